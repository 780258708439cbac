// The selective scan of deployed models on a GPU: codes in, float32 state and result. ssmquant/ops/deployed/cuda_scan.py
// compiles it for one case and launches it.
//
// A lane owns CT neighbouring channels of one chunk of time and walks along it, step after step: no scan over lanes, and
// everything that depends on a channel alone stays in registers. Lanes of a block share LANES * CT channels and CHUNKS
// chunks that follow each other. What a step's pixel has in common for all channels (B, C, the low rank of the step
// sizes) is decoded to shared memory, STAGE steps at a time, while those after them are on their way. Three kernels:
//
//   scan_ends   what each chunk adds to the state, from zero, and how much time it takes
//   scan_carry  the states that enter chunks
//   scan_out    from there on once more, with results. Directions along the same path of pixels (one forward, one back)
//               are walked by the same lane, one after the other, so that sums at a pixel have one order. Paths are
//               walked at once, each with results of its own, or one after the other, which add up.
//
// Step sizes of few levels, and the decays of the first state that go with them, are looked up (TABLE); further states have
// the power of one ratio after the other (LADDER), whatever the levels are.
//
// After cuda_math.cu and definitions of: STATES; RANK (of step sizes), CT (1 or 2), LANES, CHUNKS, STAGE; QUANT: step sizes are
// quantized; TABLE: the number of their levels, or 0; LADDER (2: the ratio is the first decay); SOFTPLUS; GROUP: steps whose
// memory is asked for together; RESIDENT: blocks of a multiprocessor; SEGMENTS: of the chunks, in scan_carry, a
// power of two; HELD: as many as a segment has, which fit into registers, or 0.

#ifndef EMULATED
__device__ __forceinline__ int dot4(unsigned x, int w, int sum) {  // bytes of x have no sign
    int y;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(w), "r"(sum));
    return y;
}
#endif

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
// A store without a branch.
__device__ __forceinline__ void store_if(bool there, float *to, float x) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.f32 [%1], %2; }" ::"r"(int(there)), "l"(to), "f"(x) : "memory");
}
__device__ __forceinline__ void store_if(bool there, float *to, float x, float y) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v2.f32 [%1], {%2, %3}; }" ::"r"(int(there)), "l"(to), "f"(x), "f"(y) : "memory");
}
#endif

constexpr int WORDS = (RANK + 3) / 4, PAIRS = (STATES + 1) / 2, EACH = WORDS + PAIRS;  // words of a direction's codes
constexpr int THREADS = (LANES * CHUNKS + 31) / 32 * 32;
constexpr int PLACES = CHUNKS * STAGE;                             // steps that are decoded at once
constexpr int ITEMS = (PLACES * EACH + THREADS - 1) / THREADS;     // words of them, for each thread
constexpr int META = (WORDS + 1 + 3) / 4 * 4;                      // words of the low rank, the pixel
constexpr int RATES = LADDER ? 2 : STATES;
constexpr int COLUMNS = SEGMENTS < 16 ? 256 / SEGMENTS : 16;       // states of channels of a block, in scan_carry
constexpr int LEVEL = (CT * LANES * 2 + 31) / 32 * 32;  // values of a level: so that banks do not depend on the level
constexpr int up4(int n) { return (n + 3) / 4 * 4; }
template <int N> struct alignas(4 * N) Floats { float x[N]; };

struct Params {
    const unsigned char *u, *bad;          // (B * L, u_row); (B * L): pixels that had a NaN
    const unsigned *codes;                 // (B * L, row): of each direction WORDS of the low rank, and B and C in turn
    const int *order, *ways;               // (K, L): the pixel of each step; (K): its row of order, twice, and 1 if back
    const float *scales;                   // scale and offset of u, B, C, and of step sizes
    const float *table;                    // (K, blocks, TABLE, LEVEL): of CT, LANES, step size and decay; TABLE even
    const int *words;                      // (K, WORDS, D): weights of the step sizes, four a word
    const float *affine;                   // (K, 3, D): factors of their products and of sums of codes, and an offset
    const float *rates;                    // / ln 2; LADDER: (K, 2, D), of the first state and between states, else (K, N, D)
    const float *bias, *skip;              // (K, D)
    float *ends, *totals, *y;              // (K, B, S, N, D), (K, B, S, D), (B, L, D)
    int u_row, row;
    int batch, pixels, channels, chunks, chunk, blocks;  // chunk: steps, a multiple of STAGE
    const int *paths;                      // (P, 2): directions along a path, forward and back or -1
    long long part;                        // elements between results of paths
    int qmin, qmax, path, add;             // scan_out: the first path; whether y holds something
};

extern __shared__ char shared[];

__device__ __forceinline__ float step_size(float x) { return SOFTPLUS ? softplus(x) : x; }

// Elements from the first one to a row: one instruction with what it is added to.
__device__ __forceinline__ unsigned long long row_of(int row, int each) { return (unsigned long long)unsigned(row) * unsigned(each); }

__device__ __forceinline__ float byte_of(unsigned word, int i) { return float(int(word >> 8 * i & 255)); }

// Beyond the last pixel of a path steps have no B and leave a state of zero as it is: they come last on the way there,
// where nobody asks for what follows, and first on the way back, where the state is still zero.
template <bool OUT>
struct Walk {
    static constexpr int VALUES = up4(OUT ? 2 * STATES : STATES);  // of a step: of B, or of B and C in turn
    float *values;                                                 // [PLACES][VALUES]
    int *meta;                                                     // [PLACES][META]
    float *table;                                                  // [TABLE][LEVEL], of channel lane * CT + ct at (ct, lane)
    const Params &p;
    const unsigned char *u, *bad;                                  // the sample's
    const unsigned *codes;
    float *y;
    int sample, block, chunk, in_chunk, lane, channel;
    bool real;

    static constexpr int bytes() { return 4 * (PLACES * (VALUES + META) + TABLE * LEVEL); }

    __device__ __forceinline__ Walk(const Params &params, int sample, int block) : p(params), sample(sample), block(block) {
        values = reinterpret_cast<float *>(shared);
        meta = reinterpret_cast<int *>(values + PLACES * VALUES);
        table = reinterpret_cast<float *>(meta + PLACES * META);
        in_chunk = threadIdx.x / LANES;
        lane = threadIdx.x % LANES;
        chunk = blockIdx.x * CHUNKS + in_chunk;
        channel = (block * LANES + lane) * CT;
        real = in_chunk < CHUNKS && chunk < p.chunks && channel < p.channels;
        const long long first = (long long)sample * p.pixels;
        u = p.u + first * p.u_row + channel, bad = p.bad + first;
        codes = p.codes + first * p.row, y = p.y + first * p.channels + channel;
    }

    __device__ __forceinline__ void read_table(int k) {
        constexpr int FOURS = TABLE * LEVEL / 4, EVERY = (FOURS + THREADS - 1) / THREADS;
        const Floats<4> *from = reinterpret_cast<const Floats<4> *>(p.table) + ((long long)k * p.blocks + block) * FOURS;
        Floats<4> held[EVERY > 0 ? EVERY : 1];
#pragma unroll
        for (int i = 0; i < EVERY; ++i)
            if (threadIdx.x + i * THREADS < FOURS) held[i] = from[threadIdx.x + i * THREADS];
#pragma unroll
        for (int i = 0; i < EVERY; ++i)
            if (threadIdx.x + i * THREADS < FOURS) reinterpret_cast<Floats<4> *>(table)[threadIdx.x + i * THREADS] = held[i];
    }

    // What steps have in common for all channels, on its way to shared memory: pixels two stages ahead, codes one.
    struct Fetch {
        int step[ITEMS], pixel[ITEMS];  // the step at the beginning of the walk; the pixel, or -1
        unsigned word[ITEMS];
        bool odd[ITEMS];
    };
    __device__ __forceinline__ void begin(Fetch &f, bool back) const {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int place = (threadIdx.x + i * THREADS) / EACH, chunk = blockIdx.x * CHUNKS + place / STAGE;
            const int step = chunk * p.chunk + (back ? p.chunk - 1 - place % STAGE : place % STAGE);
            f.step[i] = place < PLACES && chunk < p.chunks ? step : 1 << 30;
        }
    }
    __device__ __forceinline__ void find(Fetch &f, const int *order, bool back, int at) const {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int step = back ? f.step[i] - at : f.step[i] + at;
            f.pixel[i] = step < p.pixels ? order[step] : -1;
        }
    }
    __device__ __forceinline__ void load(Fetch &f, const unsigned *of_direction) const {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const bool there = f.pixel[i] >= 0;
            f.word[i] = there ? of_direction[f.pixel[i] * p.row + (threadIdx.x + i * THREADS) % EACH] : 0;
            f.odd[i] = there && bad[f.pixel[i]];
        }
    }
    __device__ __forceinline__ void put(const Fetch &f, const int (&pixel)[ITEMS], const float (&s)[4]) const {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int place = (threadIdx.x + i * THREADS) / EACH, item = (threadIdx.x + i * THREADS) % EACH;
            if (place >= PLACES) continue;
            if (item < WORDS) {
                meta[place * META + item] = int(f.word[i]);
                if (item == 0) meta[place * META + WORDS] = pixel[i];
                continue;
            }
            const float none = f.odd[i] ? as_float(0x7fffffff) : 0.0f;
            const bool there = pixel[i] >= 0;
            const float b0 = there ? fmaf(byte_of(f.word[i], 0), s[0], s[1]) + none : 0.0f;
            const float b1 = there ? fmaf(byte_of(f.word[i], 2), s[0], s[1]) + none : 0.0f;
            if (OUT) {
                const float c0 = fmaf(byte_of(f.word[i], 1), s[2], s[3]), c1 = fmaf(byte_of(f.word[i], 3), s[2], s[3]);
                *reinterpret_cast<Floats<4> *>(values + place * VALUES + (item - WORDS) * 4) = {b0, c0, b1, c1};
            } else {
                *reinterpret_cast<Floats<2> *>(values + place * VALUES + (item - WORDS) * 2) = {b0, b1};
            }
        }
    }

    // Codes of u, and what y holds, at the next steps.
    struct Ahead {
        int pixel[GROUP];
        unsigned u[GROUP];
        float y[GROUP][CT];
    };
    template <bool ADD>
    __device__ __forceinline__ void ask(Ahead &next, const int *steps) const {
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            next.pixel[g] = steps[g * META + WORDS];
            const int pixel = next.pixel[g] < 0 ? 0 : next.pixel[g];
            const unsigned char *at = u + row_of(pixel, p.u_row);
            if (CT == 2) next.u[g] = *reinterpret_cast<const unsigned short *>(at);
            else next.u[g] = *at;
            if (OUT && ADD) {
                const Floats<CT> held = *reinterpret_cast<const Floats<CT> *>(y + row_of(pixel, p.channels));
#pragma unroll
                for (int c = 0; c < CT; ++c) next.y[g][c] = held.x[c];
            }
        }
    }

    // One direction. ADD: to what y holds.
    template <bool ADD>
    __device__ __forceinline__ void run(int k) {
        const int way = p.ways[k];
        const int *order = p.order + (long long)(way / 2) * p.pixels;
        const unsigned *of_direction = codes + k * EACH;
        const bool back = way & 1;
        const long long mine = ((long long)k * p.batch + sample) * p.chunks + chunk;
        int weight[CT][WORDS];
        float affine[CT][3], rate[CT][RATES], offset[CT], skip[CT], total[CT], h[CT][STATES];
#pragma unroll
        for (int c = 0; c < CT; ++c) {
            const int d = channel + c;
#pragma unroll
            for (int w = 0; w < WORDS; ++w) weight[c][w] = real ? p.words[((long long)k * WORDS + w) * p.channels + d] : 0;
#pragma unroll
            for (int i = 0; i < 3; ++i) affine[c][i] = real ? p.affine[((long long)k * 3 + i) * p.channels + d] : 0.0f;
#pragma unroll
            for (int n = 0; n < RATES; ++n) rate[c][n] = real ? p.rates[((long long)k * RATES + n) * p.channels + d] : 0.0f;
            offset[c] = p.scales[7] + (real && p.bias ? p.bias[(long long)k * p.channels + d] : 0.0f);
            skip[c] = OUT && real && p.skip ? p.skip[(long long)k * p.channels + d] : 0.0f;
            total[c] = 0.0f;
#pragma unroll
            for (int n = 0; n < STATES; ++n)
                h[c][n] = OUT && real && p.chunks > 1 ? p.ends[(mine * STATES + n) * p.channels + d] : 0.0f;
        }
        const float su = p.scales[0], ou = p.scales[1], sd = p.scales[6], least = float(p.qmin), most = float(p.qmax);
        // In bytes; it wraps round, and back again.
        const unsigned of_table = TABLE ? place_of(table) + lane * 8 - unsigned(as_int(MAGIC) + p.qmin) * (LEVEL * 4u) : 0;
        const float of_codes[4] = {p.scales[2], p.scales[3], p.scales[4], p.scales[5]};
        Fetch f;
        begin(f, back);
        find(f, order, back, 0);
        __syncthreads();
        if (TABLE) read_table(k);
        load(f, of_direction);
        for (int at = 0; at < p.chunk; at += STAGE) {
            int pixel[ITEMS];
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) pixel[i] = f.pixel[i];
            const bool more = at + STAGE < p.chunk;
            if (more) find(f, order, back, at + STAGE);
            __syncthreads();
            put(f, pixel, of_codes);
            __syncthreads();
            if (more) load(f, of_direction);
            if (!real) continue;
            const float *v = values + in_chunk * STAGE * VALUES;
            const int *m = meta + in_chunk * STAGE * META;
            Ahead now, next;
            ask<ADD>(next, m);
#pragma unroll 1
            for (int s = 0; s < STAGE; s += GROUP) {
                now = next;
                if (s + GROUP < STAGE) ask<ADD>(next, m + (s + GROUP) * META);
#pragma unroll
                for (int g = 0; g < GROUP; ++g) {
                    const float *of_step = v + (s + g) * VALUES;
                    const int *of_meta = m + (s + g) * META;
                    int sum = 0;
#pragma unroll
                    for (int w = 0; w < WORDS; ++w) sum = dot4(unsigned(of_meta[w]), 0x01010101, sum);
                    float result[CT], odd[CT], drive[CT], decay[2][CT], ratio[CT], dt[CT];  // states in turn, two chains
#pragma unroll
                    for (int c = 0; c < CT; ++c) {
                        int dot = 0;
#pragma unroll
                        for (int w = 0; w < WORDS; ++w) dot = dot4(unsigned(of_meta[w]), weight[c][w], dot);
                        float x = fmaf(affine[c][0], float(dot), fmaf(affine[c][1], float(sum), affine[c][2]));
                        if (QUANT) x = fminf(fmaxf(x, least), most);
                        if (TABLE) {
                            load_pair(unsigned(as_int(x + MAGIC)) * (LEVEL * 4u) + of_table + c * LANES * 8, dt[c], decay[0][c]);
                        } else {
                            if (QUANT) x = fmaf((x + MAGIC) - MAGIC, sd, offset[c]);
                            dt[c] = step_size(x);
                            decay[0][c] = exp2_(dt[c] * rate[c][0]);
                        }
                        if (LADDER && STATES > 1) {
                            ratio[c] = LADDER == 2 ? decay[0][c] : exp2_(dt[c] * rate[c][1]);
                            decay[1][c] = decay[0][c] * ratio[c];
                            ratio[c] *= ratio[c];
                        }
                        const float u = fmaf(byte_of(now.u[g], c), su, ou);
                        drive[c] = dt[c] * u;
                        result[c] = skip[c] * u, odd[c] = 0.0f;
                        if (!OUT) total[c] += dt[c];
                    }
                    constexpr int AT_ONCE = OUT ? 2 : 4;  // states whose values are read together
#pragma unroll
                    for (int n0 = 0; n0 < STATES; n0 += AT_ONCE) {
                        const Floats<4> four = *reinterpret_cast<const Floats<4> *>(of_step + n0 * (OUT ? 2 : 1));
#pragma unroll
                        for (int i = 0; i < AT_ONCE && n0 + i < STATES; ++i)
#pragma unroll
                            for (int c = 0; c < CT; ++c) {
                                const int n = n0 + i;
                                float &a = decay[n % 2][c], &sum = n % 2 ? odd[c] : result[c];
                                if (!LADDER && n > 0) a = exp2_(dt[c] * rate[c][n % RATES]);
                                h[c][n] = fmaf(a, h[c][n], drive[c] * four.x[OUT ? 2 * i : i]);
                                if (OUT) sum = fmaf(four.x[(2 * i + 1) % 4], h[c][n], sum);
                                if (LADDER && n + 2 < STATES) a *= ratio[c];
                            }
                    }
                    if (OUT) {
                        float *const to = y + row_of(now.pixel[g] < 0 ? 0 : now.pixel[g], p.channels);
                        float out[CT];
#pragma unroll
                        for (int c = 0; c < CT; ++c) out[c] = ADD ? (result[c] + odd[c]) + now.y[g][c] : result[c] + odd[c];
                        if (CT == 1) store_if(now.pixel[g] >= 0, to, out[0]);
                        else store_if(now.pixel[g] >= 0, to, out[0], out[CT - 1]);
                    }
                }
            }
        }
        if (OUT || !real) return;
#pragma unroll
        for (int c = 0; c < CT; ++c) {
            p.totals[mine * p.channels + channel + c] = total[c];
#pragma unroll
            for (int n = 0; n < STATES; ++n) p.ends[(mine * STATES + n) * p.channels + channel + c] = h[c][n];
        }
    }
};

// blockIdx.y: direction, sample, block of channels.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_ends(const Params p) {
    const int block = blockIdx.y % p.blocks, sample = blockIdx.y / p.blocks % p.batch;
    Walk<false> walk(p, sample, block);
    walk.run<false>(blockIdx.y / p.blocks / p.batch);
}

// blockIdx.y: path, sample, block of channels.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_out(const Params p) {
    const int block = blockIdx.y % p.blocks, sample = blockIdx.y / p.blocks % p.batch;
    const int path = p.path + blockIdx.y / p.blocks / p.batch, back = p.paths[2 * path + 1];
    Walk<true> walk(p, sample, block);
    walk.y += path * p.part;
    if (p.add) walk.run<true>(p.paths[2 * path]);
    else walk.run<false>(p.paths[2 * path]);
    if (back >= 0) walk.run<true>(back);
}

// From what chunks add to what enters them, in place. A thread has a segment of the chunks of one state of one channel.
// blockIdx.y: direction, sample.
extern "C" __global__ void __launch_bounds__(COLUMNS * SEGMENTS) scan_carry(const Params p) {
    float *sums = reinterpret_cast<float *>(shared), *times = sums + COLUMNS * SEGMENTS;
    const int place = threadIdx.x, segment = place / COLUMNS, width = STATES * p.channels;
    const int column = blockIdx.x * COLUMNS + place % COLUMNS;
    const int k = blockIdx.y / p.batch, channel = column % p.channels, n = column / p.channels;
    const bool real = column < width, back = p.ways[k] & 1;
    float rate = 0.0f;
    if (real && LADDER) {
        const float *of = p.rates + (long long)k * 2 * p.channels + channel;
        rate = fmaf(float(n), of[p.channels], of[0]);
    } else if (real) {
        rate = p.rates[((long long)k * STATES + n) * p.channels + channel];
    }
    const int per = (p.chunks + SEGMENTS - 1) / SEGMENTS, first = segment * per;
    const int end = !real ? first : first + per < p.chunks ? first + per : p.chunks;
    float *ends = p.ends + (long long)blockIdx.y * p.chunks * width + column;
    const float *totals = p.totals + (long long)blockIdx.y * p.chunks * p.channels + channel;
    constexpr int AHEAD = HELD ? HELD : 8;  // chunks that are read at once: all of a segment, or some of them, and twice
    float add[AHEAD], t[AHEAD], h = 0.0f, time = 0.0f;
    const auto at = [&](int j) { return (long long)(back ? p.chunks - 1 - j : j); };
    const auto read = [&](int j) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const bool there = j + i < end;
            add[i] = there ? ends[at(j + i) * width] : 0.0f;
            t[i] = there ? totals[at(j + i) * p.channels] : 0.0f;
        }
    };
    for (int j = first; j < end; j += AHEAD) {
        read(j);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            h = fmaf(exp2_(rate * t[i]), h, add[i]);
            time += t[i];
        }
    }
    // Sums of all segments up to each: of two, four, .. segments at a time.
    for (int reach = 1; reach < SEGMENTS; reach *= 2) {
        sums[place] = h;
        times[place] = time;
        __syncthreads();
        if (segment >= reach) {
            h = fmaf(exp2_(rate * time), sums[place - reach * COLUMNS], h);
            time += times[place - reach * COLUMNS];
        }
        __syncthreads();
    }
    sums[place] = h;
    __syncthreads();
    h = segment > 0 ? sums[place - COLUMNS] : 0.0f;
    for (int j = first; j < end; j += AHEAD) {
        if (!HELD) read(j);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (j + i < end) ends[at(j + i) * width] = h;
            h = fmaf(exp2_(rate * t[i]), h, add[i]);
        }
    }
}

constexpr int ENDS_BYTES = Walk<false>::bytes(), OUT_BYTES = Walk<true>::bytes(), CARRY_BYTES = 2 * 4 * COLUMNS * SEGMENTS;
