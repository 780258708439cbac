// What kernels of scans share: their operands, and how they read them. After cuda_math.cu and a definition of SOFTPLUS.

// Where shared memory is, in the bytes that a thread counts it by, and two values from there.
#ifndef EMULATED
__device__ __forceinline__ unsigned place_of(const float *p) {
    unsigned at;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(at) : "l"(p));
    return at;
}
__device__ __forceinline__ void load_pair(unsigned at, float &x, float &y) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(at));
}
#endif

__host__ __device__ constexpr int up(int n, int m) { return (n + m - 1) / m * m; }

struct Params {
    const unsigned char *u, *bad;          // (B * L, u_row); (B * L): pixels that had a NaN
    const unsigned *codes;                 // (B * L, row): of each direction WORDS of the low rank, and B and C in turn
    unsigned char *sizes;                  // of steps: (B * L, K, size_row), codes from 0 or floats
    const int *order, *ways;               // (K, L): the pixel of each step; (K): its row of order, twice, and 1 if back
    const float *scales;                   // scale and offset of u, B, C, and of step sizes
    const float *table;                    // (K, blocks, TABLE, LEVEL): of CT, LANES, step size and decay; TABLE even
    const int *words;                      // (K, WORDS, up(D, 16)): weights of the step sizes, four a word
    const float *affine;                   // (K, 3, up(D, 16)): factors of their products and of sums of codes, and an offset
    const float *rates;                    // / ln 2; LADDER: (K, 2, D), of the first state and between states, else (K, N, D)
    const float *bias, *skip;              // (K, D)
    float *befores, *times;                // (K, B, S, N, D), (K, B, S, D): of what comes before a chunk in its group; CHUNKS > 1
    float *ends, *totals, *y;              // of groups: (K, B, G, N, D), (K, B, G, D); (B, L, D)
    int u_row, row, size_row;              // size_row: bytes of a pixel and direction
    int batch, pixels, channels, chunks, groups, chunk, blocks;  // chunk: steps, a multiple of STAGE
    const int *paths;                      // (P, 2): directions along a path, forward and back or -1
    long long part;                        // elements between results of paths
    int directions, stretch, qmin, qmax;
    int lanes, rows, tile;                 // scan_steps: columns and rows of a block, pixels that are copied at once
    int path, add;                         // scan_out: the first path; whether y holds something
};

extern __shared__ char shared[];

__device__ __forceinline__ float step_size(float x) { return SOFTPLUS ? softplus(x) : x; }

// Elements from the first one to a row: one instruction with what it is added to.
__device__ __forceinline__ unsigned long long row_of(int row, int each) { return (unsigned long long)unsigned(row) * unsigned(each); }

__device__ __forceinline__ float byte_of(unsigned word, int i) { return float(int(word >> 8 * i & 255)); }

// Pixels that a thread looks up, -1 for none, and bits: which of them had a NaN.
template <int N> struct Pixels { int of[N]; };
template <int N> __device__ __forceinline__ unsigned odd(const unsigned char *bad, const Pixels<N> &found) {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) bits |= unsigned(found.of[i] >= 0 ? bad[found.of[i]] : 0) << i;
    return bits;
}
