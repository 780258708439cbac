// The selective scan on a GPU, float32 state. ssmquant/ops/selective_scan/cuda.py compiles it for one case and launches it.
//
// A warp owns LC * CT channels and walks along time in tiles of LS * T steps, LC * LS = 32: a lane has T steps (its
// segment) of CT channels. State by state it computes the decays of its segment, each once, and keeps them in registers
// while the warp finds the states that enter its segments by a scan over lanes; then it runs the recurrence again from
// the right state. Per step, channel and state that is one exponential and about ten other instructions. Warps of a block
// share the steps and the group, hence B and C, and differ in channels. While a tile is worked on, the next one is on its
// way to shared memory: a handful of warps a multiprocessor cannot hide the latency of memory otherwise.
//
// Where channels and samples alone would leave the GPU idle, time is also cut into chunks, one a block. What a chunk adds
// to the state is found first (scan_ends), from its far end on and only as long as the decay leaves more than 2^-32 of
// what came in: next to states of the same size float32 cannot hold that. (All of it where steps can be negative.)
// scan_carry hands states from chunk to chunk.
//
// Sums are of one order; nothing depends on the order of blocks. No header is included, so that NVRTC needs none.
//
// Files are put together by cuda_shapes.py, after definitions of:
//   PASS                 what to compile: "forward" (0), "backward" (1), and the passes that chunks need before: (2), (3)
//   STATES, SOFTPLUS, CONST_B, CONST_C      the case; TU, TD, TB, TC: types of u (and y), delta, B and C
//   MAP                  the channels-last form: see Params
//   T, CT, LC, WARPS, MIN_BLOCKS (per multiprocessor), GROUP (states of B and C staged at once),
//   UNROLL (states whose instructions may be mixed), V (elements that memory is moved by: 4 where all rows begin at
//   multiples of that, else 1)

#ifndef EMULATED
struct F16 { unsigned short bits; };
struct BF16 { unsigned short bits; };

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(F16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ __forceinline__ float widen(BF16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ __forceinline__ void narrow(float x, float &y) { y = x; }
__device__ __forceinline__ void narrow(float x, F16 &y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ __forceinline__ void narrow(float x, BF16 &y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
#endif

constexpr int LS = 32 / LC;                          // segments of a tile
constexpr int TILE = LS * T;                         // steps of a tile
constexpr int ROWS = LC * CT;                        // channels of a warp
constexpr int SAVE = 64;                             // steps between saved states
constexpr int PITCH = TILE + 4;                      // elements of a row of a tile in shared memory
constexpr int SEG = T + (T / 4 % 2 ? 0 : 4);         // those of a segment of B or C: an odd number of fours,
constexpr int LINE = LS * SEG;                       // so that lanes read from different banks
constexpr int TABLE = (STATES * ROWS + 3) / 4 * 4;   // floats of a table [state][row]
constexpr int SPAN = 32 * V;                         // elements that a warp moves at once
// A decay of 2^NONE leaves nothing. Without softplus steps can go back, and what seems gone can return.
constexpr float NONE = SOFTPLUS ? -32.0f : -3.0e38f;
constexpr int MIX = UNROLL;
constexpr unsigned ALL = 0xffffffffu;

// Shared memory, in bytes: tiles of a warp, B and C of a block; of each a second one that is being filled.
constexpr int up16(int bytes) { return (bytes + 15) / 16 * 16; }
constexpr int TILE_D = up16(ROWS * PITCH * sizeof(TD)), TILE_U = up16(ROWS * PITCH * sizeof(TU));
constexpr int STAGE_B = CONST_B ? 0 : up16(GROUP * LINE * sizeof(TB)), STAGE_C = CONST_C ? 0 : up16(GROUP * LINE * sizeof(TC));
constexpr int SUMS = 2 * GROUP * TILE;               // floats: a warp's share of the gradients of B and C
constexpr int TABLES = 3 + CONST_B + CONST_C;
constexpr bool LANES_A = STATES * CT <= 32;          // lanes sum up dL/dA each for itself, where that fits
constexpr int SUMS_A = LANES_A ? STATES * CT * 32 : TABLE;
constexpr int FORWARD_WARP = 2 * (TILE_D + TILE_U) + 2 * 4 * TABLE, BACKWARD_WARP = 2 * (TILE_D + 2 * TILE_U + 4 * SUMS) + 4 * (SUMS_A + TABLES * TABLE);
constexpr bool LANES_END = STATES * CT <= 32;        // lanes sum up what a chunk adds each for itself, where that fits
constexpr int ENDS_WARP = FORWARD_WARP + (LANES_END ? 4 * STATES * CT * 32 : 0);
constexpr int FORWARD_BYTES = 2 * (STAGE_B + STAGE_C) + WARPS * FORWARD_WARP;
constexpr int BACKWARD_BYTES = 2 * (STAGE_B + STAGE_C) + WARPS * BACKWARD_WARP;
constexpr int ENDS_BYTES = 2 * (PASS == 3 ? STAGE_C : STAGE_B) + WARPS * (ENDS_WARP + 2 * 4);
constexpr int BYTES = PASS == 0 ? FORWARD_BYTES : PASS == 1 ? BACKWARD_BYTES : ENDS_BYTES;

// With MAP, operands are maps of pixels, channels innermost: u (B, P, D / G), delta (B, P, G, D / G), B and C
// (B, P, G, N), g as u. Each group scans the pixels in its own order, `path`; y and gu are (B, G, P, D / G).
// Strides named _d, of a channel, and b_n and c_n, of a state, are those of a pixel then.
struct Params {
    const TU *u;           // (B, D, L), as delta and g with strides for B and D
    const TD *delta;
    const TB *b;           // (B, G, N, L) with strides, or (D, N)
    const TC *c;
    const float *a;        // (D, N)
    const float *bias;     // (D,) or null
    const float *skip;     // (D,) or null
    TU *y;                 // (B, D, L)
    float *saved;          // (ceil(L / SAVE), B, N, D), states every SAVE steps; null: not wanted
    float *carry;          // (chunks, B, N, D): states before (backward: gradients after) each chunk; null if one chunk
    float *totals;         // (chunks, B, D): sums of dt
    float *last;           // (B, D, N): the last state, or the gradient of it (null: zeros)
    const TU *g;           // gradient of y
    TU *gu;                // (B, D, L)
    TD *gdelta;            // (B, D, L)
    float *ga_parts;       // (chunks, B, D, N); what is in parts is summed by scan_sum
    float *gb_parts;       // (blocks, B, G, N, L), null if there is one block; (chunks, B, D, N) where B is constant
    float *gc_parts;
    float *gskip_parts;    // (chunks, B, D), or null, as gskip
    float *gbias_parts;
    float *ga;             // (D, N)
    TB *gb;                // (B, G, N, L) or (D, N)
    TC *gc;
    float *gskip;          // (D,)
    float *gbias;
    const int *path;       // (G, L): pixels in the order of the scan; with MAP only
    long long u_b, u_d, delta_b, delta_d, delta_g, g_b, g_d, b_b, b_g, b_n, c_b, c_g, c_n;
    int batch, channels, length, groups, blocks, chunks, chunk;  // blocks: of a group; chunk: its steps, a multiple of TILE and SAVE
};

// Where a thread is, and the channels and steps it works on.
struct Place {
    int warp, lane, lc, seg, sample, group, block, chunk, inner, first, end;  // inner: first channel of the warp, in its group
    int size;                                                                 // channels of a group
    const int *path;
    int length;

    __device__ explicit Place(const Params &p) {
        warp = threadIdx.x / 32;
        lane = threadIdx.x % 32;
        lc = lane % LC;
        seg = lane / LC;
        block = blockIdx.x % p.blocks;
        group = blockIdx.x / p.blocks % p.groups;
        sample = blockIdx.x / p.blocks / p.groups;
        chunk = blockIdx.y;
        size = p.channels / p.groups;
        inner = (block * WARPS + warp) * ROWS;
        first = chunk * p.chunk;
        end = first + p.chunk < p.length ? first + p.chunk : p.length;
        length = p.length;
        path = MAP ? p.path + (long long)group * p.length : nullptr;
    }
    __device__ int pixel(int step) const {                              // of a map; -1 where the path leads out of it
        int pixel = path[step];
        return unsigned(pixel) < unsigned(length) ? pixel : -1;
    }
    __device__ int block0() const { return block * WARPS * ROWS; }      // first channel of the block, in its group
    __device__ int row(int ct) const { return ct * LC + lc; }           // of the warp's tile
    __device__ bool real(int ct) const { return inner + row(ct) < size; }
    __device__ int channel(int ct) const { return group * size + inner + row(ct); }
};

__device__ __forceinline__ float step_size(float raw, float shift) {
#if SOFTPLUS
    return softplus(raw + shift);
#else
    return raw + shift;
#endif
}
