// Selective scans of one state, of many samples or channels: one kernel from codes to results.
// ssmquant/ops/deployed/cuda_scan_tiles.py compiles it for one case and launches it.
//
// A block has WIDTH channels of a sample and walks along a whole path of pixels, tile after tile. A warp has 8 of these
// channels. Lane (g, t) of it, of 8 times 4, has RUN steps of two channels, in both directions one after the other: tensor
// cores make step sizes of their low rank, and of each step registers keep what it does to the state, a decay and what it adds.
// Of all RUN these compose to one such pair, and shuffles compose those of the 8 lanes, from which each finds the state before
// its own steps. Results of both directions are added up in registers and written once. What a step back finds behind its
// tile is found by walking from the last tile to the second one first, without results.
//
// Codes of a tile are copied to shared memory while the one before it is worked on.
//
// After cuda_math.cu, steps.cu and scan_params.cu with what they want, and definitions of: WARPS; RUN; RESIDENT: blocks of a
// multiprocessor; DIRECTIONS: of a path, 1 or 2; ROW: words of a pixel's codes, a multiple of 4; TABLE: the number of the
// levels of step sizes, or 0; RATES: rows of rates; FULL: there are many blocks.

constexpr int WIDTH = 8 * WARPS, TILE = 8 * RUN, THREADS = 32 * WARPS;
constexpr int FINDS = (TILE + THREADS - 1) / THREADS;
constexpr int LEVEL = up(2 * WIDTH, 32) + 8;    // values of a level of the table: levels next to each other are in other banks
constexpr int EACH = WORDS + 1;                 // words of a direction's codes
constexpr int DEPTHS = (WORDS + 7) / 8;         // products with 32 codes of the low rank
constexpr unsigned ALL = 0xffffffff;
struct alignas(8) Place {
    int pixel;     // or -1 beyond the last step
    float factor;  // of B: 1, or NaN where there was one
};
struct alignas(16) Record { float total, b, c, none; };  // of a step: the sum of its low rank's codes, B and C

// What lanes read together is of steps that are RUN apart: so many bytes, or a little more, put these into different banks.
__host__ __device__ constexpr int apart(int bytes, int unit) { return bytes / unit % 2 ? bytes : bytes + unit; }
constexpr int U_ROW = up(WIDTH, 16), RAW = apart(RUN * ROW * 4, 16), IMAGE = apart(RUN * U_ROW, 16);
constexpr int RECORDS = apart(RUN * int(sizeof(Record)), 16), PLACES = apart(RUN * int(sizeof(Place)), 8);
constexpr int OF_U = U_ROW / 16, PIECES = OF_U + ROW / 4;  // of 16 bytes, that are copied of a pixel

// Where things are in shared memory. The last one: the state that enters a tile from behind, of each tile if there are several.
constexpr int OF_RECORDS = DIRECTIONS * TABLE * LEVEL * 4, OF_RAW = OF_RECORDS + DIRECTIONS * 8 * RECORDS;
constexpr int OF_IMAGE = OF_RAW + 2 * 8 * RAW, OF_PLACES = OF_IMAGE + 2 * 8 * IMAGE, OF_BEHIND = OF_PLACES + 2 * 8 * PLACES;
__host__ __device__ constexpr int bytes_of_tiles(int tiles) { return OF_BEHIND + (DIRECTIONS == 2 && tiles > 1 ? tiles * WIDTH * 4 : 0); }

__host__ __device__ constexpr int power(int n, int least = 1) { return least >= n ? least : power(n, 2 * least); }

#ifndef EMULATED
// a @ b + sum, 16 x 32 uint8 by 32 x 8 int8.
__device__ __forceinline__ void multiply_codes(int (&y)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const int (&sum)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(sum[0]), "r"(sum[1]), "r"(sum[2]), "r"(sum[3]));
}
#endif

// What RUN steps of two channels do: state = decay * state + drive.
struct Steps {
    float decay[RUN][2], drive[RUN][2];
};

struct Block {
    const Params &p;
    const int sample, block, tiles;
    const int *order;
    const unsigned char *u, *bad;
    const unsigned *codes;
    char *y;
    int there, back, warp, g, t, channel;  // directions; the lane's first channel
    bool real;
    int turn = 0;

    __device__ __forceinline__ Block(const Params &params, int sample, int path, int block)
        : p(params), sample(sample), block(block), tiles((params.pixels + TILE - 1) / TILE) {
        there = p.paths[2 * path], back = p.paths[2 * path + 1];
        order = p.order + (long long)(p.ways[there] / 2) * p.pixels;
        warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        channel = block * WIDTH + 8 * warp + 2 * t, real = channel < p.channels;
        const long long first = (long long)sample * p.pixels;
        u = p.u + first * p.u_row + block * WIDTH, bad = p.bad + first, codes = p.codes + first * ROW;
        y = reinterpret_cast<char *>(p.y + path * p.part + first * p.channels + channel);
    }

    __device__ __forceinline__ int of(int d) const { return d ? back : there; }
    template <class T> __device__ __forceinline__ static T *at(int bytes) { return reinterpret_cast<T *>(shared + bytes); }
    // Bytes from the first step of a tile to another one, of which each has so many, and RUN of them a little more.
    __device__ __forceinline__ static int of_step(int step, int of_run, int each) {
        return step * each + int(unsigned(step) / RUN) * (of_run - RUN * each);
    }
    __device__ __forceinline__ static Place *place(int turn, int step) {
        return at<Place>(OF_PLACES + turn * 8 * PLACES + of_step(step, PLACES, sizeof(Place)));
    }
    __device__ __forceinline__ static Record *record(int d, int step) {
        return at<Record>(OF_RECORDS + d * 8 * RECORDS + of_step(step, RECORDS, sizeof(Record)));
    }
    __device__ __forceinline__ static int raw(int turn) { return OF_RAW + turn * 8 * RAW; }
    __device__ __forceinline__ static int image(int turn) { return OF_IMAGE + turn * 8 * IMAGE; }

    __device__ __forceinline__ void read_tables() const {
        constexpr int FOURS = TABLE * LEVEL / 4;
        for (int i = threadIdx.x; i < DIRECTIONS * FOURS; i += THREADS) {
            const int d = i >= FOURS;
            const Floats<4> *from = reinterpret_cast<const Floats<4> *>(p.table) + ((long long)of(d) * p.blocks + block) * FOURS;
            copy<16>(at<Floats<4>>(0) + i, from + (i - d * FOURS), true);
        }
    }

    // The pixels of a tile's steps.
    __device__ __forceinline__ Pixels<FINDS> find(int tile) const {
        Pixels<FINDS> found;
#pragma unroll
        for (int i = 0; i < FINDS; ++i) {
            const int at = threadIdx.x + i * THREADS, step = tile * TILE + at;
            found.of[i] = at < TILE && step >= 0 && step < p.pixels ? order[step] : -1;
        }
        return found;
    }
    __device__ __forceinline__ static void keep(const Pixels<FINDS> &found, unsigned odd, int turn) {
#pragma unroll
        for (int i = 0; i < FINDS; ++i) {
            const int at = threadIdx.x + i * THREADS;
            if (at < TILE) *place(turn, at) = {found.of[i], odd >> i & 1 ? as_float(0x7fffffff) : 1.0f};
        }
    }

    // Begins to copy the codes of a tile: a thread always the same piece of a step.
    __device__ __forceinline__ void start(int turn) const {
        constexpr int SPAN = power(PIECES), ROUND = THREADS / SPAN;
        static_assert(ROUND > 0, "");
        const int piece = threadIdx.x % SPAN, of_codes = piece - OF_U, begin = threadIdx.x / SPAN;
        if (piece >= PIECES) return;
        const bool there = of_codes >= 0 || block * WIDTH + 16 * piece < p.u_row;
        const char *from = of_codes >= 0 ? reinterpret_cast<const char *>(codes) + 16 * of_codes : reinterpret_cast<const char *>(u) + 16 * piece;
        const int each = of_codes >= 0 ? 4 * ROW : p.u_row, each_there = of_codes >= 0 ? 4 * ROW : U_ROW;
        const int of_run = of_codes >= 0 ? RAW : IMAGE;
        char *to = shared + (of_codes >= 0 ? raw(turn) + 16 * of_codes : image(turn) + 16 * piece);
#pragma unroll 4
        for (int step = begin; step < TILE; step += ROUND)
            copy<16>(to + of_step(step, of_run, each_there), from + row_of(max(place(turn, step)->pixel, 0), each), there);
    }

    // Takes apart what all channels share. BEHIND: of the way back alone.
    template <bool BEHIND> __device__ __forceinline__ void put(int turn) const {
        for (int i = threadIdx.x + (BEHIND ? TILE : 0); i < DIRECTIONS * TILE; i += THREADS) {
            const int d = i >= TILE, step = i - d * TILE;
            const unsigned *from = at<const unsigned>(raw(turn) + of_step(step, RAW, 4 * ROW)) + of(d) * EACH;
            unsigned word[WORDS];
#pragma unroll
            for (int w = 0; w < WORDS; ++w) word[w] = from[w];
            const unsigned both = from[WORDS];
            const float b = fmaf(byte_of(both, 0), p.scales[2], p.scales[3]) * place(turn, step)->factor;
            *record(d, step) = {total_of_codes(word), b, fmaf(byte_of(both, 1), p.scales[4], p.scales[5]), 0.0f};
        }
    }

    __device__ __forceinline__ void read_image(int turn, float (&v)[RUN][2]) const {
        const float scale = p.scales[0], offset = p.scales[1];
        const char *from = at<const char>(image(turn) + g * IMAGE + 8 * warp + 2 * t);
#pragma unroll
        for (int r = 0; r < RUN; ++r) {
            const unsigned word = *reinterpret_cast<const unsigned short *>(from + r * U_ROW);
#pragma unroll
            for (int c = 0; c < 2; ++c) v[r][c] = fmaf(byte_of(word, c), scale, offset);
        }
    }

    // What each step of a tile does, in direction d.
    __device__ __forceinline__ void make(int d, int tile, const float (&u)[RUN][2], Steps &steps) const {
        const int k = of(d), columns = up(p.channels, 16), here = real ? channel : 0;
        unsigned weight[DEPTHS][2];  // of channel g of the warp's
        int from[DEPTHS][2];         // where codes are that go with them
#pragma unroll
        for (int i = 0; i < DEPTHS; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int w = 8 * i + 4 * half + t, n = block * WIDTH + 8 * warp + g;
                weight[i][half] = w < WORDS && n < columns ? p.words[(k * WORDS + w) * columns + n] : 0;
                from[i][half] = k * EACH + min(w, WORDS - 1);
            }
        Floats<2> affine[3], rate = {}, offset = {p.scales[7], p.scales[7]};
#pragma unroll
        for (int i = 0; i < 3; ++i) affine[i] = *reinterpret_cast<const Floats<2> *>(p.affine + (k * 3 + i) * columns + here);
        if (!TABLE) {
            rate = *reinterpret_cast<const Floats<2> *>(p.rates + (long long)k * RATES * p.channels + here);
            if (p.bias) {
                const Floats<2> bias = *reinterpret_cast<const Floats<2> *>(p.bias + k * p.channels + here);
                offset = {offset.x[0] + bias.x[0], offset.x[1] + bias.x[1]};
            }
        }
        const unsigned of_table = TABLE ? place_of(at<float>(d * TABLE * LEVEL * 4)) + (4 * warp + t) * 8 : 0;
        const unsigned *of_codes = at<const unsigned>(raw(turn) + g * RAW);
        const Record *own = at<const Record>(OF_RECORDS + (d * 8 + g) * RECORDS);
#pragma unroll
        for (int two = 0; two < RUN; two += 2) {  // rows g and g + 8 of the product
            int dot[4] = {as_int(MAGIC), as_int(MAGIC), as_int(MAGIC), as_int(MAGIC)};
#pragma unroll
            for (int i = 0; i < DEPTHS; ++i) {
                unsigned a[4] = {};
#pragma unroll
                for (int q = 0; q < 4; ++q)
                    if (8 * i + q / 2 * 4 < WORDS && two + q % 2 < RUN) a[q] = of_codes[(two + q % 2) * ROW + from[i][q / 2]];
                const int sum[4] = {dot[0], dot[1], dot[2], dot[3]};
                multiply_codes(dot, a, weight[i][0], weight[i][1], sum);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = two + i / 2, c = i % 2;
                if (r >= RUN) continue;
                const Floats<2> total_b = *reinterpret_cast<const Floats<2> *>(own + r);
                const float level = step_level(dot[i], total_b.x[0], affine[0].x[c], affine[1].x[c], affine[2].x[c]);
                float dt;
                if (TABLE) {
                    const unsigned code = code_of_step(level, p.qmin, p.qmax - p.qmin);
                    load_pair(code * (LEVEL * 4u) + of_table + c * (WIDTH * 4), dt, steps.decay[r][c]);
                } else {
                    const int code = QUANT ? code_of_step(level, p.qmin, p.qmax - p.qmin) : 0;
                    dt = step_size(QUANT ? fmaf(float(code), p.scales[6], offset.x[c]) : level);
                    steps.decay[r][c] = exp2_(dt * rate.x[c]);
                }
                steps.drive[r][c] = dt * u[r][c] * total_b.x[1];
            }
        }
        const int left = p.pixels - tile * TILE - g * RUN;
        if (left >= RUN) return;
#pragma unroll
        for (int r = 0; r < RUN; ++r)  // beyond the last step the state stays as it is
#pragma unroll
            for (int c = 0; c < 2; ++c)
                if (r >= left) steps.decay[r][c] = 1.0f, steps.drive[r][c] = 0.0f;
    }

    // From the state before a tile, of two channels, to that before the lane's own steps, and to the one behind the tile.
    template <bool BACK> __device__ __forceinline__ void go(const Steps &steps, float (&carry)[2], float (&h)[2]) const {
        const bool first = BACK ? g == 7 : g == 0;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float decay = 1.0f, sum = first ? carry[c] : 0.0f;
#pragma unroll
            for (int i = 0; i < RUN; ++i) {
                const int r = BACK ? RUN - 1 - i : i;
                sum = fmaf(steps.decay[r][c], sum, steps.drive[r][c]);
                decay *= steps.decay[r][c];
            }
#pragma unroll
            for (int by = 1; by < 8; by *= 2) {
                const float before = moved<BACK>(sum, by), of_before = moved<BACK>(decay, by);
                if (BACK ? g + by < 8 : g >= by) sum = fmaf(decay, before, sum), decay *= of_before;
            }
            const float before = moved<BACK>(sum, 1);
            h[c] = first ? carry[c] : before;
            carry[c] = __shfl_sync(ALL, sum, BACK ? t : 28 + t);
        }
    }
    template <bool BACK> __device__ __forceinline__ static float moved(float x, int by) {
        return BACK ? __shfl_down_sync(ALL, x, 4 * by) : __shfl_up_sync(ALL, x, 4 * by);
    }

    __device__ __forceinline__ Floats<2> *behind(int tile) const { return at<Floats<2>>(OF_BEHIND) + tile * (WIDTH / 2) + 4 * warp + t; }

    // From the last step back: the state that enters the tile before.
    __device__ __forceinline__ void fold(int tile, float (&carry)[2]) const {
        float v[RUN][2], h[2];
        Steps steps;
        read_image(turn, v);
        make(1, tile, v, steps);
        go<true>(steps, carry, h);
        if (g == 0) *behind(tile - 1) = {carry[0], carry[1]};
    }

    template <int D> __device__ __forceinline__ void direction(int tile, float (&carry)[2], const float (&u)[RUN][2], float (&v)[RUN][2]) const {
        Steps steps;
        float h[2];
        make(D, tile, u, steps);
        go<D == 1>(steps, carry, h);
        const Record *own = at<const Record>(OF_RECORDS + (D * 8 + g) * RECORDS);
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            const int r = D ? RUN - 1 - i : i;
            const float at_step = own[r].c;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                h[c] = fmaf(steps.decay[r][c], h[c], steps.drive[r][c]);
                v[r][c] = fmaf(at_step, h[c], v[r][c]);
            }
        }
    }

    // The results of a tile.
    __device__ __forceinline__ void work(int tile, float (&carry)[2]) const {
        float u[RUN][2], v[RUN][2], skip[2] = {};
        read_image(turn, u);
#pragma unroll
        for (int d = 0; d < DIRECTIONS; ++d) {
            Floats<2> more = {};
            if (p.skip && real) more = *reinterpret_cast<const Floats<2> *>(p.skip + of(d) * p.channels + channel);
            skip[0] += more.x[0], skip[1] += more.x[1];
        }
#pragma unroll
        for (int r = 0; r < RUN; ++r)
#pragma unroll
            for (int c = 0; c < 2; ++c) v[r][c] = skip[c] * u[r][c];
        direction<0>(tile, carry, u, v);
        if constexpr (DIRECTIONS == 2) {
            Floats<2> last = {};
            if (tile < tiles - 1) last = *behind(tile);
            direction<1>(tile, last.x, u, v);
        }
        const Place *own = at<const Place>(OF_PLACES + (turn * 8 + g) * PLACES);
#pragma unroll
        for (int r = 0; r < RUN; ++r) {
            const int pixel = own[r].pixel;
            float *const to = reinterpret_cast<float *>(y + row_of(pixel, 4 * p.channels));
            store_if(real && pixel >= 0, to, v[r][0], v[r][1]);
        }
    }

    // BEHIND: from the last tile to the second one, without results.
    template <bool BEHIND> __device__ __forceinline__ void walk() {
        const int step = BEHIND ? -1 : 1, begin = BEHIND ? tiles - 1 : 0, end = BEHIND ? 0 : tiles;
        float carry[2] = {};
        Pixels<FINDS> found = find(begin);
        keep(found, odd(bad, found), turn);
        found = find(begin + step);
        unsigned of_found = odd(bad, found);
        Pixels<FINDS> further = find(begin + 2 * step);
        __syncthreads();
        start(turn);
#pragma unroll 1
        for (int tile = begin; tile != end; tile += step, turn ^= 1) {
            copy_done();
            __syncthreads();
            put<BEHIND>(turn);
            keep(found, of_found, turn ^ 1);
            __syncthreads();
            if (tile + step != end) {
                found = further, of_found = odd(bad, found);
                further = find(tile + 3 * step);
                start(turn ^ 1);
            }
            if constexpr (BEHIND) fold(tile, carry);
            else work(tile, carry);
        }
    }
};

// blockIdx.x: block of channels; blockIdx.y: path, sample.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_tiles(const Params p) {
    kernel_before<FULL>();
    Block block(p, blockIdx.y % p.batch, p.path + blockIdx.y / p.batch, blockIdx.x);
    if (TABLE) block.read_tables();
    if constexpr (DIRECTIONS == 2) {
        if (block.tiles > 1) {
            block.walk<true>();
            __syncthreads();
        }
    }
    block.walk<false>();
}

#ifdef EMULATED
static int tiles_bytes(const Params &p) { return bytes_of_tiles((p.pixels + TILE - 1) / TILE); }
#endif
