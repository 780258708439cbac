// A depthwise convolution of quantized values, and an activation. ssmquant/ops/deployed/cuda_depthwise.py compiles it for
// one case and launches it.
//
// A block has a tile of TILE_HIGH * TILE_WIDE pixels of LANES channels: each value of it, and of its rim, is quantized once
// on its way to shared memory. A thread has PER neighbouring channels of a column: it goes down RUN lines that are DOWN
// apart, so that each finds what its taps need in registers but for one line, and threads next to each other read places
// next to each other. What is read and written may be codes, int8 from 0 and -1 for NaN. A projection in the same kernel
// (fronted.cu) finds them in shared memory.
//
// After cuda_math.cu and definitions of: KH, KW, DOWN, RIGHT (of the taps); LANES (a multiple of PER and X_VEC), PER;
// TILE_HIGH, TILE_WIDE, RUN (TILE_HIGH is a multiple of RUN * DOWN, or RUN is 1); Y_ACT (1: SiLU, 2: GELU); X_CODED: x is
// codes; Y_CODES: y is, by a quantizer of its own, Y_FACTORS before; ALSO: and by another one; SUMS: each tile's sums of what
// is written are too; ROW: bytes of a pixel's codes in shared memory, 0: none; LOW: words that a pixel has behind all of these;
// WRITTEN: y is; X_VEC: channels that are read at once. TEAM threads read a line of the tile, and then one further down; before
// a thread looks at any of it, it has asked for X_VEC channels at ROUNDS places of each of LINES lines.

constexpr int COLUMN = LANES / PER;   // threads of one
constexpr int THREADS = COLUMN * TILE_WIDE * (TILE_HIGH / RUN), UNROLLED = RUN < 4 ? RUN : 4;
template <int N> struct Word { typedef unsigned type; };  // of N codes
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<1> { typedef unsigned char type; };
#if X_CODED
typedef Word<X_VEC>::type Input;
typedef signed char Value;
#else
typedef Floats<X_VEC> Input;
typedef float Value;
#endif
#if Y_CODES
typedef Word<PER>::type Output;
typedef signed char Result;
#else
typedef Floats<PER> Output;
typedef float Result;
#endif
constexpr int REACH_DOWN = (KH - 1) * DOWN, REACH_RIGHT = (KW - 1) * RIGHT;
constexpr int TALL = TILE_HIGH + REACH_DOWN, BROAD = TILE_WIDE + REACH_RIGHT;  // with the rim
static_assert((RUN == 1 || TILE_HIGH % (RUN * DOWN) == 0) && TILE_HIGH % RUN == 0 && LANES % PER == 0 && LANES % X_VEC == 0, "");

// What is read: ITEMS a line. Threads that have nothing left read the last item once more, or lines below the tile.
constexpr int GROUPS = LANES / X_VEC, ITEMS = BROAD * GROUPS, TEAMS = THREADS / TEAM;
constexpr int ROUNDS_IN_ALL = (ITEMS + TEAM - 1) / TEAM;
constexpr int LINES_IN_ALL = (TALL + TEAMS * LINES - 1) / (TEAMS * LINES) * LINES;
constexpr int VALUES = TEAMS * LINES_IN_ALL * BROAD * LANES, BYTES = 4 * VALUES + TILE_HIGH * TILE_WIDE * (ROW + 4 * LOW);

struct Divisor { unsigned factor; int shift, count; };  // exact below 2^31

struct Image {
    const void *x;
    const float *scale, *shift, *weights, *bias;                            // weights: (taps, channels)
    const float *next_scale, *next_shift, *next_factors;                    // of y
    const float *also_scale, *also_shift;                                   // of z
    void *y;                                                                // (B, H, W, channels), rows of y_row
    signed char *z;                                                         // the same by another quantizer, rows of z_row
    float *sums;                                                            // (B, tiles, channels)
    long long x_batch;
    int x_down, x_right, x_channel, y_row, z_row, height, width, channels, qmin, qmax, next_min, next_max, also_min, also_max;
    Divisor across, blocks;                                                 // tiles of a line, blocks of channels
};

extern __shared__ char shared[];

__device__ __forceinline__ int quotient(unsigned x, Divisor by) { return int((unsigned long long)x * by.factor >> by.shift); }

__device__ __forceinline__ float activated(float x) { return Y_ACT == 1 ? silu(x) : Y_ACT == 2 ? gelu(x) : x; }

// The lowest bytes of codes, next to each other.
__device__ __forceinline__ int joined(const int (&code)[PER]) {
    if (PER == 1) return code[0];
    const int two = bytes_of(code[0], code[PER > 1], 0x0040);
    return PER == 2 ? two : bytes_of(two, bytes_of(code[PER / 2], code[PER - 1], 0x0040), 0x5410);
}

// INNER: all that is read is there.
template <bool INNER>
__device__ __forceinline__ void read_tile(const Image &p, float *values, int sample, int first_channel, int top, int left) {
    const int team = threadIdx.x / TEAM, member = threadIdx.x % TEAM;
    if (team >= TEAMS) return;
    const float scale = p.scale[0], shift = p.shift[0], inverse = 1.0f / scale, moved = shift * inverse;
    const float least = float(p.qmin), most = float(p.qmax);
    const int first_y = top + team - REACH_DOWN / 2, first_x = left - REACH_RIGHT / 2;
    const auto *x = static_cast<const Value *>(p.x) + sample * p.x_batch + (long long)first_y * p.x_down +
                    (long long)first_x * p.x_right + (long long)first_channel * p.x_channel;
#pragma unroll 1
    for (int round = 0; round < ROUNDS_IN_ALL; round += ROUNDS) {
        int item[ROUNDS];
        bool in_image[ROUNDS];
        const Value *from[ROUNDS];
#pragma unroll
        for (int r = 0; r < ROUNDS; ++r) {
            const int wanted = member + (round + r) * TEAM, i = wanted < ITEMS ? wanted : ITEMS - 1;
            const int group = i % GROUPS * X_VEC, at_x = i / GROUPS;
            item[r] = i;
            in_image[r] = first_channel + group < p.channels && unsigned(first_x + at_x) < unsigned(p.width);
            from[r] = x + (long long)at_x * p.x_right + (long long)group * p.x_channel;
        }
#pragma unroll 1
        for (int line = 0; line < LINES_IN_ALL; line += LINES) {
            Input held[ROUNDS][LINES];
#pragma unroll
            for (int l = 0; l < LINES; ++l)
#pragma unroll
                for (int r = 0; r < ROUNDS; ++r) {
                    const bool inside = in_image[r] && unsigned(first_y + (line + l) * TEAMS) < unsigned(p.height);
                    held[r][l] = INNER || inside ? *reinterpret_cast<const Input *>(from[r]) : Input{};
                    from[r] += (long long)TEAMS * p.x_down;
                }
#pragma unroll
            for (int l = 0; l < LINES; ++l)
#pragma unroll
                for (int r = 0; r < ROUNDS; ++r) {
                    const bool inside = INNER || in_image[r] && unsigned(first_y + (line + l) * TEAMS) < unsigned(p.height);
                    Floats<X_VEC> value;
#pragma unroll
                    for (int c = 0; c < X_VEC; ++c) {
#if X_CODED  // -1 has the bits of a NaN, a code those of code * 2^-149: to 2^-23, and to values
                        const float code = as_float(bytes_of(held[r][l], 0, (8 + c) * 0x1110 + c));
                        const float v = fmaf(fmaf(code, 8.5070592e37f, least * 1.1920929e-7f), scale * 8388608.0f, -shift);
#else
                        const float u = fmaf(held[r][l].x[c], inverse, moved);
                        const float v = fmaf((min_nan(max_nan(u, least), most) + MAGIC) - MAGIC, scale, -shift);
#endif
                        value.x[c] = inside ? v : 0.0f;
                    }
                    *reinterpret_cast<Floats<X_VEC> *>(values + ((team + (line + l) * TEAMS) * ITEMS + item[r]) * X_VEC) = value;
                }
        }
    }
}

// blockIdx.x: tile, block of channels: those of a tile are written at about the same time, and in memory as whole sectors;
// blockIdx.y: sample.
__device__ __forceinline__ void convolve(const Image &p) {
    float *values = reinterpret_cast<float *>(shared);  // [TALL][BROAD][LANES]
    const int sample = blockIdx.y, tile = quotient(blockIdx.x, p.blocks), tile_y = quotient(tile, p.across);
    const int first_channel = (blockIdx.x - tile * p.blocks.count) * LANES;
    const int top = tile_y * TILE_HIGH, left = (tile - tile_y * p.across.count) * TILE_WIDE;
    const int lane = threadIdx.x % COLUMN * PER, column = threadIdx.x / COLUMN % TILE_WIDE, part = threadIdx.x / (COLUMN * TILE_WIDE);
    const int line = part / DOWN * (RUN * DOWN) + part % DOWN;
    const bool real = first_channel + lane < p.channels && left + column < p.width && top + line < p.height;
    const int channel = real ? first_channel + lane : 0;
    Floats<PER> weight[KH * KW];  // asked for first: they are here when values are
    const float *of_weight = p.weights + channel;
#pragma unroll
    for (int i = 0; i < KH * KW; ++i, of_weight += p.channels)
        weight[i] = *reinterpret_cast<const Floats<PER> *>(of_weight);
    kernel_before<true>();  // a bias may be made by a kernel of the same graph
    const Floats<PER> bias = *reinterpret_cast<const Floats<PER> *>(p.bias + channel);
    const Floats<PER> factors = Y_FACTORS ? *reinterpret_cast<const Floats<PER> *>(p.next_factors + channel) : Floats<PER>{};
    const float next_scale = Y_CODES ? p.next_scale[0] : 1.0f, next_shift = Y_CODES ? p.next_shift[0] : 0.0f;
    const int up = top - REACH_DOWN / 2, before = left - REACH_RIGHT / 2;
    if (up >= 0 && up + TEAMS * LINES_IN_ALL <= p.height && before >= 0 && before + BROAD <= p.width &&
        first_channel + LANES <= p.channels)
        read_tile<true>(p, values, sample, first_channel, top, left);
    else
        read_tile<false>(p, values, sample, first_channel, top, left);
    __syncthreads();
    if (!SUMS && !real) return;  // a projection's threads meet again behind this
    const float next_inverse = 1.0f / next_scale, next_moved = next_shift * next_inverse;
    const float least = float(p.next_min), most = float(p.next_max);
    const float *from = values + (line * BROAD + column) * LANES + lane;
    const int pixels = p.height * p.width, pixel = (top + line) * p.width + left + column;
    Result *y = static_cast<Result *>(p.y) + (long long)sample * (pixels * p.y_row) + (pixel * p.y_row + channel);
    signed char *kept = reinterpret_cast<signed char *>(values + VALUES) + (line * TILE_WIDE + column) * ROW + lane;
    signed char *z = ALSO ? p.z + (long long)sample * (pixels * p.z_row) + (pixel * p.z_row + channel) : nullptr;
    const float also_inverse = ALSO ? 1.0f / p.also_scale[0] : 1.0f, also_moved = ALSO ? p.also_shift[0] * also_inverse : 0.0f;
    const int below = (p.height - top - line + DOWN - 1) / DOWN, lines = !real ? 0 : below < RUN ? below : RUN;
    Floats<PER> total = {};
    Floats<PER> window[KH][KW];
#pragma unroll
    for (int i = 0; i < KH - 1; ++i)
#pragma unroll
        for (int j = 0; j < KW; ++j)
            window[i + 1][j] = *reinterpret_cast<const Floats<PER> *>(from + (i * DOWN * BROAD + j * RIGHT) * LANES);
    from += (KH - 1) * DOWN * BROAD * LANES;
#pragma unroll UNROLLED
    for (int at = 0; at < lines; ++at) {
        Floats<PER> sum = bias;
#pragma unroll
        for (int i = 0; i < KH; ++i)
#pragma unroll
            for (int j = 0; j < KW; ++j) {
                const auto *next = reinterpret_cast<const Floats<PER> *>(from + j * RIGHT * LANES);
                window[i][j] = i < KH - 1 ? window[i + 1][j] : *next;
#pragma unroll
                for (int c = 0; c < PER; ++c) sum.x[c] = fmaf(window[i][j].x[c], weight[i * KW + j].x[c], sum.x[c]);
            }
#if Y_CODES
        int code[PER], other[PER];  // in the lowest byte
#pragma unroll
        for (int c = 0; c < PER; ++c) {
            const float result = activated(sum.x[c]), u = fmaf(Y_FACTORS ? result * factors.x[c] : result, next_inverse, next_moved);
            code[c] = as_int((min_nan(max_nan(u, least), most) + MAGIC) - least);
            if (!ALSO) continue;
            const float v = fmaf(result, also_inverse, also_moved), bottom = float(p.also_min);
            other[c] = as_int((min_nan(max_nan(v, bottom), float(p.also_max)) + MAGIC) - bottom);
        }
        if (WRITTEN) *reinterpret_cast<Output *>(y) = Output(joined(code));
        if (ROW) *reinterpret_cast<Output *>(kept) = Output(joined(code));
        kept += DOWN * TILE_WIDE * ROW;
        if (ALSO) {
            *reinterpret_cast<Output *>(z) = Output(joined(other));
            z += DOWN * p.width * p.z_row;
        }
#else
        Output result;
#pragma unroll
        for (int c = 0; c < PER; ++c) {
            result.x[c] = activated(sum.x[c]);
            if (SUMS) total.x[c] += result.x[c];
        }
        *reinterpret_cast<Output *>(y) = result;
#endif
        from += DOWN * BROAD * LANES;
        y += DOWN * p.width * p.y_row;
    }
    if (!SUMS) return;
    __syncthreads();  // what has been read there is no longer wanted
    *reinterpret_cast<Floats<PER> *>(values + threadIdx.x / COLUMN * LANES + lane) = total;
    __syncthreads();
    const int own = threadIdx.x;
    if (own >= LANES || first_channel + own >= p.channels) return;
    float all = 0.0f;
#pragma unroll 8
    for (int i = 0; i < THREADS / COLUMN; ++i) all += values[i * LANES + own];
    const int tiles = (p.height + TILE_HIGH - 1) / TILE_HIGH * p.across.count;
    p.sums[((long long)sample * tiles + tile) * p.channels + first_channel + own] = all;
}

#if !ROW
extern "C" __global__ void __launch_bounds__(THREADS) depthwise(const Image p) { convolve(p); }
#endif
