// A depthwise convolution and the projection of its pixels in one kernel: see depthwise.cu and thin_layer.cu.
// ssmquant/ops/deployed/cuda_fronted.py compiles it for one case and launches it.
//
// A block has a tile of pixels of all channels. It convolves them, has their codes in shared memory, and then a warp takes 16
// pixels of these as rows; SPLIT warps share the outputs of the same rows, where there are few. Of a scan's projection the
// low ranks are kept there too, from which a thread makes codes of step sizes of 8 channels, pixel after pixel.
//
// After all these, steps.cu and what they want, with FRONTED, and STEPS: step sizes are made; then DIRECTIONS; EACH: words of
// codes of a direction; LOW: words of the low rank of all; SIZE_ROW: bytes of a pixel's step sizes in a direction.

struct Steps {
    const int *words;      // as scan_steps wants them
    const float *affine;
    unsigned char *sizes;  // (B * H * W, DIRECTIONS, SIZE_ROW)
    int qmin, qmax;
};
struct Both {
    Image image;
    Params layer;
    Steps steps;
};

constexpr int PIXELS = TILE_HIGH * TILE_WIDE;
static_assert(PIXELS % 16 == 0 && THREADS >= 32 && ROW >= First::inputs, "");

#if STEPS
__device__ __forceinline__ void step_sizes(const Both &both, const unsigned *low, int top, int left) {
    constexpr int COLUMNS = DIRECTIONS * SIZE_ROW / 8, TOGETHER = THREADS / COLUMNS, QUADS = SIZE_ROW / 4;
    static_assert(TOGETHER > 0, "");
    const Steps &p = both.steps;
    const int first = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS, k = column / (SIZE_ROW / 8), quad = column % (SIZE_ROW / 8) * 2;
    if (first >= TOGETHER) return;
    Floats<4> weight[WORDS][2], affine[3][2];  // weights: words
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) weight[w][q] = reinterpret_cast<const Floats<4> *>(p.words)[(k * WORDS + w) * QUADS + quad + q];
#pragma unroll
        for (int i = 0; i < 3; ++i) affine[i][q] = reinterpret_cast<const Floats<4> *>(p.affine)[(k * 3 + i) * QUADS + quad + q];
    }
    const int height = both.image.height, width = both.image.width;
#pragma unroll 2
    for (int pixel = first; pixel < PIXELS; pixel += TOGETHER) {
        const int y = top + pixel / TILE_WIDE, x = left + pixel % TILE_WIDE;
        const long long at = (long long)blockIdx.y * (height * width) + y * width + x;
        unsigned word[WORDS];
#pragma unroll
        for (int w = 0; w < WORDS; ++w) word[w] = low[pixel * LOW + k * WORDS + w];
        step_codes<2>(p.qmin, p.qmax, word, weight, affine, y < height && x < width, p.sizes + at * (DIRECTIONS * SIZE_ROW) + column * 8);
    }
}
#endif

// blockIdx.x: tile; blockIdx.y: sample.
extern "C" __global__ void __launch_bounds__(THREADS) fronted(const Both both) {
    const Params &p = both.layer;
    ask<16 * 32 * First::groups * First::kt>(p.layer.tiles);
    ask<12 * 16 * First::groups>(p.layer.of_outputs);
#if STEPS
    ask<4 * DIRECTIONS * WORDS * SIZE_ROW>(both.steps.words);
    ask<12 * DIRECTIONS * SIZE_ROW>(both.steps.affine);
#endif
    convolve(both.image);
    __syncthreads();
    constexpr int WORKERS = THREADS / 32;  // whole warps
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile_y = quotient(blockIdx.x, both.image.across);
    const int top = tile_y * TILE_HIGH, left = (int(blockIdx.x) - tile_y * both.image.across.count) * TILE_WIDE;
    signed char *codes = reinterpret_cast<signed char *>(reinterpret_cast<float *>(shared) + VALUES);
    unsigned *low = reinterpret_cast<unsigned *>(codes + PIXELS * ROW);
    if (warp < WORKERS) {
#pragma unroll 1
        for (int task = warp; task < PIXELS / 16 * SPLIT; task += WORKERS) {
            const Place at{lane, lane / 4, lane % 4, task % SPLIT, task / SPLIT * 16, top, left, both.image.height, both.image.width, blockIdx.y, low};
            Encoded<First> x;
            take(p.layer, at, x, [&](int r) { return codes + at.row(r) * ROW; });
            Rows<First>(p, p.layer, at, x).all();
            if (CORE && at.split == 0 && at.t < 2 && at.has(at.t)) p.bad[at.at(at.t)] = x.odd >> at.t & 1;
        }
    }
#if STEPS
    __syncthreads();
    step_sizes(both, low, top, left);
#endif
}
