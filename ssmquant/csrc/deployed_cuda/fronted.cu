// A depthwise convolution and the projection of its pixels in one kernel: see depthwise.cu and thin_layer.cu.
// ssmquant/ops/deployed/cuda_fronted.py compiles it for one case and launches it.
//
// A block has a tile of pixels of all channels. It convolves them, has their codes in shared memory, and then a warp takes 16
// pixels of these as rows; SPLIT warps share the outputs of the same rows, where there are few.
//
// After both and what they want, with FRONTED.

struct Both {
    Image image;
    Params layer;
};

static_assert(TILE_HIGH * TILE_WIDE % 16 == 0 && THREADS >= 32 && ROW >= First::inputs, "");

// blockIdx.x: tile; blockIdx.y: sample.
extern "C" __global__ void __launch_bounds__(THREADS) fronted(const Both both) {
    const Params &p = both.layer;
    ask<16 * 32 * First::groups * First::kt>(p.layer.tiles);
    ask<12 * 16 * First::groups>(p.layer.of_outputs);
    convolve(both.image);
    __syncthreads();
    constexpr int WORKERS = THREADS / 32;  // whole warps
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp >= WORKERS) return;
    const int tile_y = quotient(blockIdx.x, both.image.across);
    const int top = tile_y * TILE_HIGH, left = (int(blockIdx.x) - tile_y * both.image.across.count) * TILE_WIDE;
    const signed char *codes = reinterpret_cast<const signed char *>(reinterpret_cast<float *>(shared) + VALUES);
#pragma unroll 1
    for (int task = warp; task < TILE_HIGH * TILE_WIDE / 16 * SPLIT; task += WORKERS) {
        const Place at{lane, lane / 4, lane % 4, task % SPLIT, task / SPLIT * 16, top, left, both.image.height, both.image.width, blockIdx.y};
        Encoded<First> x;
        take(p.layer, at, x, [&](int r) { return codes + at.row(r) * ROW; });
        Rows<First>(p, p.layer, at, x).all();
        if (CORE && at.split == 0 && at.t < 2 && at.has(at.t)) p.bad[at.at(at.t)] = x.odd >> at.t & 1;
    }
}
