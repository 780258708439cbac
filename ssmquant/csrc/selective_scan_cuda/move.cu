// Between memory, shared memory and registers.

// V neighbours in memory.
template <class X> struct alignas(V * sizeof(X)) Pack { X x[V]; };
template <class X> struct alignas(4 * sizeof(X)) Four { X x[4]; };

template <class X>
__device__ __forceinline__ void move(X *to, const X *from, bool there) {
    if constexpr (V * sizeof(X) >= 4) {
        copy<V * sizeof(X)>(to, from, there);
    } else if (there) {                              // single halves cannot be copied asynchronously
        *to = *from;
    } else {
        *to = X{};
    }
}

// The place of a step in a row of a tile. Fours of floats change places within a segment, so that lanes that read the same
// four of their segments find them in different banks. (For halves it costs more than it saves.)
template <class X>
__device__ __forceinline__ constexpr int placed(int step) {
    return sizeof(X) == 4 ? (step / 4 ^ (step / 32 & (T / 4 - 1))) * 4 + step % 4 : step;
}

// Between rows of (.., L) in memory and a tile in shared memory. Steps beyond the end and rows beyond `rows` are zeros.
// A lane's places differ by constants, given its first: rows and columns of a span are counted out at compile time.
struct Mover {
    static constexpr int PER_ROW = TILE >= SPAN ? TILE / SPAN : 1, AT_ONCE = TILE >= SPAN ? 1 : SPAN / TILE;
    static constexpr int COUNT = ROWS / AT_ONCE * PER_ROW;
    int row, col;

    __device__ explicit Mover(int lane) {
        row = TILE >= SPAN ? 0 : lane / (TILE / V);
        col = TILE >= SPAN ? lane * V : lane % (TILE / V) * V;
    }
    static __device__ constexpr int r(int i) { return i / PER_ROW * AT_ONCE; }
    static __device__ constexpr int c(int i) { return i % PER_ROW * SPAN; }

    template <class X>
    __device__ __forceinline__ void fetch(X *tile, const X *from, long long stride, int rows, int start, int end) const {
        from += row * stride + start + col;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            move(tile + (row + r(i)) * PITCH + placed<X>(col + c(i)), from + r(i) * stride + c(i), row + r(i) < rows && start + col + c(i) < end);
    }

    template <class X>
    __device__ __forceinline__ void flush(const X *tile, X *to, long long stride, int rows, int start, int end) const {
        to += row * stride + start + col;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (row + r(i) < rows && start + col + c(i) < end)
                *reinterpret_cast<Pack<X> *>(to + r(i) * stride + c(i)) = 
                    *reinterpret_cast<const Pack<X> *>(tile + (row + r(i)) * PITCH + placed<X>(col + c(i)));
    }
};

// Tiles of all warps of the block; `tiles` is that of the first, others follow at WARP_BYTES. `from` and `to`: the block's
// first channel. In a map channels are neighbours, so threads take them together; then the tiles are whole after a barrier.
template <int WARP_BYTES, class X>
__device__ __forceinline__ void fetch_tile(const Mover &mover, char *tiles, const X *from, long long stride, const Place &at, int start, int end) {
    if constexpr (MAP) {
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * WARPS * TILE; i += WARPS * 32) {
            int channel = i % (ROWS * WARPS), step = i / (ROWS * WARPS);
            int pixel = at.block0() + channel < at.size && start + step < end ? at.pixel(start + step) : -1;
            X *to = reinterpret_cast<X *>(tiles + channel / ROWS * WARP_BYTES) + channel % ROWS * PITCH + placed<X>(step);
            move(to, pixel < 0 ? from : from + pixel * stride + channel, pixel >= 0);
        }
    } else {
        mover.fetch(reinterpret_cast<X *>(tiles + at.warp * WARP_BYTES), from + at.warp * ROWS * stride, stride, at.size - at.inner, start, end);
    }
}
template <int WARP_BYTES, class X>
__device__ __forceinline__ void flush_tile(const Mover &mover, const char *tiles, X *to, long long stride, const Place &at, int start) {
    if constexpr (MAP) {
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * WARPS * TILE; i += WARPS * 32) {
            int channel = i % (ROWS * WARPS), step = i / (ROWS * WARPS);
            int pixel = at.block0() + channel < at.size && start + step < at.end ? at.pixel(start + step) : -1;
            if (pixel >= 0)
                to[pixel * stride + channel] = reinterpret_cast<const X *>(tiles + channel / ROWS * WARP_BYTES)[channel % ROWS * PITCH + placed<X>(step)];
        }
    } else {
        mover.flush(reinterpret_cast<const X *>(tiles + at.warp * WARP_BYTES), to + at.warp * ROWS * stride, stride, at.size - at.inner, start, at.end);
    }
}

// A segment between shared memory and registers: of a line of B or C, or (SWAPPED) of a row of a tile.
template <bool SWAPPED = false, class X>
__device__ __forceinline__ void read(float (&x)[T], const X *line, int seg) {
#pragma unroll
    for (int t = 0; t < T; t += 4) {
        Four<X> v = *reinterpret_cast<const Four<X> *>(line + (SWAPPED ? placed<X>(seg * T + t) : seg * SEG + t));
#pragma unroll
        for (int i = 0; i < 4; ++i) x[t + i] = widen(v.x[i]);
    }
}
template <class X>
__device__ __forceinline__ void write(X *row, const float (&x)[T], int seg) {
#pragma unroll
    for (int t = 0; t < T; t += 4) {
        Four<X> v;
#pragma unroll
        for (int i = 0; i < 4; ++i) narrow(x[t + i], v.x[i]);
        *reinterpret_cast<Four<X> *>(row + placed<X>(seg * T + t)) = v;
    }
}

// GROUP states of B or C, shared by the block: a state a warp. Of the first 32, those that are wanted (by bits); what else
// is in their place stays.
template <class X>
__device__ __forceinline__ void stage(X *to, const X *from, long long stride, int n0, const Place &at, int start, int end, unsigned wanted = ALL) {
    auto want = [&](int n) { return n < STATES && (n >= 32 || (wanted >> n & 1)); };
    if constexpr (MAP) {
        for (int i = threadIdx.x; i < GROUP * TILE; i += WARPS * 32) {
            int n = i % GROUP, step = i / GROUP;
            if (!want(n0 + n)) continue;
            int pixel = start + step < end ? at.pixel(start + step) : -1;
            move(to + n * LINE + step / T * SEG + step % T, pixel < 0 ? from : from + pixel * stride + n0 + n, pixel >= 0);
        }
        return;
    }
    constexpr int PER_ROW = TILE >= SPAN ? TILE / SPAN : 1;
    const int col = at.lane * V;
    if (TILE < SPAN && col >= TILE) return;
    for (int i = at.warp; i < GROUP; i += WARPS) {
        if (!want(n0 + i)) continue;
#pragma unroll
        for (int c = 0; c < PER_ROW; ++c)
            move(to + i * LINE + c * (SPAN / T) * SEG + col / T * SEG + col % T, from + (n0 + i) * stride + start + col + c * SPAN,
                 start + col + c * SPAN < end);
    }
}

// The segment's B or C of a state: from shared memory, or one value of the channel.
#define SEGMENT(CONSTANT, NAME, STAGED)                                                                      \
    float NAME[T];                                                                                           \
    if (!CONSTANT) read(NAME, (STAGED) + (n - n0) * LINE, at.seg);
#define CONSTANT_OF(CONSTANT, NAME, POINTER)                                                                 \
    if (CONSTANT) {                                                                                          \
        float value = at.real(ct) ? widen((POINTER)[(long long)at.channel(ct) * STATES + n]) : 0.0f;         \
        _Pragma("unroll") for (int t = 0; t < T; ++t) NAME[t] = value;                                       \
    }
