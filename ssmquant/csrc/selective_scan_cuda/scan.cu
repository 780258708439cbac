// What the passes have in common: tables of a warp, step sizes, sums and scans over the segments of a tile.

// Sums of x[i] over the warp's segments, x[i] to be found in lanes of segment i afterwards (in all, if CT is 1).
__device__ __forceinline__ float over_segments(float (&x)[CT], const Place &at) {
    int bit = LC;
#pragma unroll
    for (int count = CT; count > 1 && bit < 32; count /= 2, bit *= 2) {
        bool upper = at.lane & bit;
#pragma unroll
        for (int i = 0; i < count / 2; ++i) {
            float send = upper ? x[2 * i] : x[2 * i + 1], keep = upper ? x[2 * i + 1] : x[2 * i];
            x[i] = keep + __shfl_xor_sync(ALL, send, bit);
        }
    }
#pragma unroll
    for (int b = LC * CT; b < 32; b *= 2) x[0] += __shfl_xor_sync(ALL, x[0], b);
    return x[0];
}

extern __shared__ char shared[];

// Tables of the warp, [state][row]: A / ln 2, and a state (or its gradient) that is carried along.
__device__ __forceinline__ void tables(float *decay, float *state, const float *initial, const Params &p, const Place &at) {
    for (int i = at.lane; i < STATES * ROWS; i += 32) {
        int n = i / ROWS, row = i % ROWS, channel = at.group * at.size + at.inner + row;
        bool there = at.inner + row < at.size;
        decay[i] = there ? p.a[(long long)channel * STATES + n] * LOG2E : 0.0f;
        state[i] = there && initial ? initial[((long long)at.sample * STATES + n) * p.channels + channel] : 0.0f;
    }
}

__device__ __forceinline__ void vectors(float (&to)[CT], const float *from, const Place &at) {
#pragma unroll
    for (int ct = 0; ct < CT; ++ct) to[ct] = from && at.real(ct) ? from[at.channel(ct)] : 0.0f;
}

// Step sizes of the segment, 0 beyond the end, `left` steps from here; and their sum.
template <class X>
__device__ __forceinline__ float sizes(float (&dt)[T], const X *row, float shift, int seg, int left) {
    read<true>(dt, row, seg);
    float sum = 0.0f;
#pragma unroll
    for (int t = 0; t < T; ++t) dt[t] = step_size(dt[t], shift);
    if (left < T)
#pragma unroll
        for (int t = 0; t < T; ++t) dt[t] = t < left ? dt[t] : 0.0f;
#pragma unroll
    for (int t = 0; t < T; ++t) sum += dt[t];
    return sum;
}

// A scan over the segments of one direction. made: what segments make of zero; kept: what they leave of a state; state:
// that before the tile (or, from the end, the gradient behind it). Once the state is put into the first segment, that one
// keeps nothing, which makes lanes without a predecessor neutral: a shuffle gives them their own value, times zero.
// Leaves in `made` the states that enter the segments, in `after` the one that leaves the tile. Steps of several scans
// are taken in turn, so that none waits for a shuffle alone.
struct Scan {
    float made[CT], kept[CT], state[CT], after[CT];
    bool first;

    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int ct = 0; ct < CT; ++ct) {
            made[ct] = fmaf(kept[ct], first ? state[ct] : 0.0f, made[ct]);
            kept[ct] = first ? 0.0f : kept[ct];
        }
    }
    template <bool BACK> static __device__ __forceinline__ float from(float x, int off) {
        return BACK ? __shfl_down_sync(ALL, x, off * LC & 31) : __shfl_up_sync(ALL, x, off * LC & 31);
    }
    template <bool BACK> __device__ __forceinline__ void shuffle(int off, float (&m)[CT], float (&k)[CT]) const {
#pragma unroll
        for (int ct = 0; ct < CT; ++ct) {
            m[ct] = from<BACK>(made[ct], off);
            if (2 * off < LS) k[ct] = from<BACK>(kept[ct], off);
        }
    }
    __device__ __forceinline__ void combine(int off, const float (&m)[CT], const float (&k)[CT]) {
#pragma unroll
        for (int ct = 0; ct < CT; ++ct) {
            made[ct] = fmaf(kept[ct], m[ct], made[ct]);
            if (2 * off < LS) kept[ct] *= k[ct];
        }
    }
    __device__ __forceinline__ void end(const float (&in)[CT]) {
#pragma unroll
        for (int ct = 0; ct < CT; ++ct) {
            after[ct] = made[ct];
            made[ct] = first ? state[ct] : in[ct];
        }
    }
};

__device__ __forceinline__ void run(Scan &ahead) {
    ahead.begin();
    float m[CT], k[CT];
#pragma unroll
    for (int off = 1; off < LS; off *= 2) {
        ahead.shuffle<false>(off, m, k);
        ahead.combine(off, m, k);
    }
    ahead.shuffle<false>(1, m, k);
    ahead.end(m);
}

__device__ __forceinline__ void run(Scan &ahead, Scan &back) {
    ahead.begin();
    back.begin();
    float m[CT], k[CT], m1[CT], k1[CT];
#pragma unroll
    for (int off = 1; off < LS; off *= 2) {
        ahead.shuffle<false>(off, m, k);
        back.shuffle<true>(off, m1, k1);
        ahead.combine(off, m, k);
        back.combine(off, m1, k1);
    }
    ahead.shuffle<false>(1, m, k);
    back.shuffle<true>(1, m1, k1);
    ahead.end(m);
    back.end(m1);
}

// Where the block's channels begin in u and g, in delta, and in y and gu.
__device__ __forceinline__ const TU *rows_of(const TU *x, long long x_b, long long x_d, const Place &at) {
    return x + at.sample * x_b + (MAP ? at.block0() : (at.group * at.size + at.block0()) * x_d);
}
__device__ __forceinline__ const TD *delta_of(const Params &p, const Place &at) {
    return p.delta + at.sample * p.delta_b + (MAP ? at.group * p.delta_g + at.block0() : (at.group * at.size + at.block0()) * p.delta_d);
}
__device__ __forceinline__ long long plane(const Params &p, const Place &at) {
    return ((long long)at.sample * p.channels + at.group * at.size) * p.length + (MAP ? at.block0() : (long long)at.block0() * p.length);
}

// Adds to a row of a table the sums over segments.
__device__ __forceinline__ void add_row(float *to, float (&x)[CT], const Place &at) {
    float total = over_segments(x, at);
    if constexpr (CT <= LS) {
        if (at.seg < CT) to[at.seg * LC + at.lc] += total;
    } else {
#pragma unroll
        for (int i = 0; i < CT / LS; ++i) to[(i * LS + at.seg) * LC + at.lc] += x[i];
    }
}

// Where lanes' sums of a state and a row of the warp's tile begin, the first segment's, in [state][CT][32].
__device__ __forceinline__ constexpr int lane_sum(int n, int row) { return (n * CT + row / LC) * 32 + row % LC; }
