// The selective scan of deployed models on a GPU: codes in, float32 state and result. ssmquant/ops/deployed/cuda_scan.py
// compiles it for one case and launches it.
//
// A lane owns CT neighbouring channels of one chunk of time and walks along it, step after step: no scan over lanes, and
// everything that depends on a channel alone stays in registers. Lanes of a block share LANES * CT channels and CHUNKS
// chunks that follow each other. Codes of u and of step sizes are copied to shared memory, STAGE steps at a time, while
// those before them are worked on; B and C, which all channels share, are decoded on their way there. Four kernels:
//
//   scan_steps  codes of step sizes from their low rank, once for all passes; values where they are not quantized. Not
//               where the kernel in front has made them: see fronted.cu
//   scan_ends   what each chunk adds to the state, from zero, and how much time it takes. Evenly spaced rates: from the
//               last step back, with the decay of all steps behind, which takes two products a state instead of three.
//               Chunks of a block, a group, are put together there
//   scan_carry  the states that enter groups of chunks
//   scan_out    from there on once more, with results. Directions along the same path of pixels (one forward, one back)
//               are walked by the same lane, one after the other, so that sums at a pixel have one order; or (BOTH) at
//               once by two halves of a block, of chunks that are one stage, whose results meet in shared memory. Paths
//               are walked at once, each with results of its own, or one after the other, which add up.
//
// Step sizes of few levels, and the decays of the first state that go with them, are looked up (TABLE); further states have
// the power of one ratio after the other (LADDER), whatever the levels are.
//
// After cuda_math.cu, steps.cu and scan_params.cu with what these want, and definitions of: STATES; CT (1 or 2), LANES,
// CHUNKS, STAGE; TABLE: the number of the levels of step sizes, or 0; LADDER (2: the ratio is the first decay); SOFTPLUS;
// GROUP: steps whose results are asked for together; RESIDENT: blocks of a multiprocessor; BOTH; SEGMENTS: of the groups,
// in scan_carry, a power of two; HELD: as many as a segment has, which fit into registers, or 0; TAKEN: channels of a
// thread of scan_steps, 4 or 8; STEPS_RESIDENT: blocks of a multiprocessor there; FULL: scan_out's blocks fill all
// multiprocessors, however they are spread; CARRIED: there is scan_carry.

#ifndef EMULATED
// The thread's number, from which nothing is computed ahead and kept in registers.
__device__ __forceinline__ int this_thread(int first) {
    int x = threadIdx.x - first;
    asm volatile("" : "+r"(x));
    return x;
}
#endif

constexpr int PAIRS = (STATES + 1) / 2, EACH = WORDS + PAIRS;  // words of a direction's codes
constexpr int THREADS = (LANES * CHUNKS + 31) / 32 * 32;
constexpr int PLACES = CHUNKS * STAGE;                             // steps that are in shared memory at once, twice
constexpr int RATES = LADDER ? 2 : STATES;
constexpr int COLUMNS = SEGMENTS < 16 ? 256 / SEGMENTS : 16;       // states of channels of a block, in scan_carry
constexpr int LEVEL = (CT * LANES * 2 + 31) / 32 * 32;  // values of a level: so that banks do not depend on the level
constexpr int OF_STEP = QUANT ? 1 : 4;                             // bytes of a step size
// Bytes of what a step has of its own in shared memory: u, step sizes, and codes of B and C.
constexpr int U_ROW = up(LANES * CT, 16), STEP_ROW = up(LANES * CT * OF_STEP, 16), RECORD = U_ROW + STEP_ROW + up(4 * PAIRS, 16);
constexpr int OF_U = U_ROW / 16, COPIED = OF_U + STEP_ROW / 16;    // copies of 16 bytes
// Threads that work for one step: a power of two, at least n if there are so many.
__host__ __device__ constexpr int spanned(int n, int span = 1) { return span >= n || 2 * span > THREADS ? span : spanned(n, 2 * span); }
struct alignas(16) Place {
    float scale, offset;  // of codes of B
    int source, pixel;    // where it is copied from, and its result goes to, or -1
};

// Beyond the last pixel of a path steps have no B and leave a state of zero as it is: they come last on the way there,
// where nobody asks for what follows, and first on the way back, where the state is still zero.
template <bool OUT>
struct Walk {
    static constexpr bool BEHIND = !OUT && LADDER;                        // from the last step back
    static constexpr int VALUES = up(OUT ? 2 * STATES : STATES, 4);       // of a step: of B, or of B and C in turn
    static constexpr int FINDS = (PLACES + THREADS - 1) / THREADS;        // steps whose pixels a thread looks up
    float *values;                                                        // [PLACES][VALUES]
    float *table;                                                         // [TABLE][LEVEL], of channel lane * CT + ct at (ct, lane)
    unsigned char *records;                                               // [2][PLACES][RECORD]
    Place *places;                                                        // [2][PLACES]
    const Params &p;
    const unsigned char *u, *bad;                                         // the sample's
    const unsigned *codes;
    float *y;
    int sample, block, chunk, in_chunk, lane, channel, half;              // half: of the block
    bool real;

    static constexpr int OF_GROUP = OUT ? 0 : CHUNKS * (STATES + 1) * LANES * CT;  // values, when the walk is over
    static constexpr int WALKING = PLACES * VALUES + TABLE * LEVEL + PLACES * (RECORD + int(sizeof(Place))) / 2;
    static constexpr int WIDTH = LANES * CT, MEETING = OUT && BOTH ? PLACES * WIDTH : 0;  // results of a half
    static constexpr int OF_HALF = up(4 * (WALKING > OF_GROUP ? WALKING : OF_GROUP), 16);
    static constexpr int bytes() { return (OUT && BOTH ? 2 : 1) * (OF_HALF + 4 * MEETING); }

    __device__ __forceinline__ Walk(const Params &params, int sample, int block) : p(params), sample(sample), block(block) {
        half = OUT && BOTH && threadIdx.x >= THREADS;
        const int thread = threadIdx.x - half * THREADS;
        values = reinterpret_cast<float *>(shared + half * OF_HALF);
        table = values + PLACES * VALUES;
        records = reinterpret_cast<unsigned char *>(table + TABLE * LEVEL);
        places = reinterpret_cast<Place *>(records + 2 * PLACES * RECORD);
        in_chunk = thread / LANES;
        lane = thread % LANES;
        chunk = blockIdx.x * CHUNKS + in_chunk;
        channel = (block * LANES + lane) * CT;
        real = in_chunk < CHUNKS && chunk < p.chunks && channel < p.channels;
        const long long first = (long long)sample * p.pixels;
        u = p.u + first * p.u_row, bad = p.bad + first;
        codes = p.codes + first * p.row, y = p.y + first * p.channels + channel;
    }

    __device__ __forceinline__ void read_table(int k) const {
        constexpr int FOURS = TABLE * LEVEL / 4, EVERY = (FOURS + THREADS - 1) / THREADS;
        const Floats<4> *from = reinterpret_cast<const Floats<4> *>(p.table) + ((long long)k * p.blocks + block) * FOURS;
#pragma unroll
        for (int i = 0; i < EVERY; ++i) {
            const int at = int(threadIdx.x) - half * THREADS + i * THREADS;
            if (at < FOURS) copy<16>(reinterpret_cast<Floats<4> *>(table) + at, from + at, true);
        }
    }

    // The pixels of the steps that are `at` behind the beginning of the walk, one stage for each place.
    __device__ __forceinline__ Pixels<FINDS> find(const int *order, bool back, int at) const {
        const int thread = this_thread(half * THREADS);
        Pixels<FINDS> found;
#pragma unroll
        for (int i = 0; i < FINDS; ++i) {
            const int place = thread + i * THREADS, chunk = blockIdx.x * CHUNKS + place / STAGE;
            const int past = at + place % STAGE, step = chunk * p.chunk + (back ? p.chunk - 1 - past : past);
            found.of[i] = place < PLACES && past < p.chunk && chunk < p.chunks && step < p.pixels ? order[step] : -1;
        }
        return found;
    }
    __device__ __forceinline__ void keep(const Pixels<FINDS> &found, unsigned odd, int turn) const {
        const int thread = this_thread(half * THREADS);
#pragma unroll
        for (int i = 0; i < FINDS; ++i) {
            const int place = thread + i * THREADS;
            if (place >= PLACES) break;
            const float none = as_float(0x7fffffff);
            const int pixel = found.of[i];
            const bool nan = odd >> i & 1;
            places[turn * PLACES + place] = {pixel < 0 ? 0.0f : nan ? none : p.scales[2], pixel < 0 ? 0.0f : nan ? none : p.scales[3],
                                             pixel < 0 ? 0 : pixel, pixel};
        }
    }

    // Begins COUNT copies of BYTES for each step of a stage, of what `source` says of each: a thread has always the same ones.
    template <int BYTES, int COUNT, class Source> __device__ __forceinline__ void bring(int turn, int to, Source source) const {
        constexpr int SPAN = spanned(COUNT), STEPS = THREADS / SPAN;
        const int thread = this_thread(half * THREADS), begin = thread / SPAN;
        if (THREADS % SPAN && begin >= STEPS) return;
        const Place *from = places + turn * PLACES + begin;
#pragma unroll
        for (int round = 0; round < COUNT; round += SPAN) {
            const int v = round + thread % SPAN;
            int each;
            const unsigned char *const of_pixel = source(v, each);
            if (v >= COUNT || !of_pixel) break;
            unsigned char *at = records + (turn * PLACES + begin) * RECORD + to + BYTES * v;
#pragma unroll
            for (int i = 0; i < PLACES; i += STEPS) {
                if (i + STEPS > PLACES && begin + i >= PLACES) break;
                copy<BYTES>(at + i * RECORD, of_pixel + row_of(from[i].source, each), true);
            }
        }
    }
    // Begins to copy what the steps of a stage have of their own.
    __device__ __forceinline__ void start(int turn, int k) const {
        const int first = block * LANES * CT;
        bring<16, COPIED>(turn, 0, [&](int v, int &each) -> const unsigned char * {
            const int of_u = first + 16 * v, of_steps = first * OF_STEP + 16 * (v - OF_U);
            if (v < OF_U) return each = p.u_row, of_u < each ? u + of_u : nullptr;
            const unsigned char *sizes = p.sizes + ((long long)sample * p.pixels * p.directions + k) * p.size_row;
            return each = p.directions * p.size_row, of_steps < p.size_row ? sizes + of_steps : nullptr;
        });
        bring<4, PAIRS>(turn, U_ROW + STEP_ROW, [&](int v, int &each) {
            return each = 4 * p.row, reinterpret_cast<const unsigned char *>(codes + k * EACH + WORDS + v);
        });
    }

    // Decodes B and C of a stage.
    __device__ __forceinline__ void put(int turn) const {
        constexpr int SPAN = spanned(PAIRS), STEPS = THREADS / SPAN;
        const int thread = this_thread(half * THREADS), begin = thread / SPAN;
        const float c_scale = p.scales[4], c_offset = p.scales[5];
#pragma unroll
        for (int round = 0; round < PAIRS; round += SPAN) {
            const int pair = round + thread % SPAN;
            if (pair >= PAIRS) break;
            const unsigned char *from = records + (turn * PLACES + begin) * RECORD + U_ROW + STEP_ROW + 4 * pair;
            const Place *of_step = places + turn * PLACES + begin;
            float *to = values + begin * VALUES + pair * (OUT ? 4 : 2);
#pragma unroll
            for (int i = 0; i < PLACES; i += STEPS) {
                if (i + STEPS > PLACES && begin + i >= PLACES) break;
                const unsigned word = *reinterpret_cast<const unsigned *>(from + i * RECORD);
                const Floats<2> s = *reinterpret_cast<const Floats<2> *>(of_step + i);
                const float b0 = fmaf(byte_of(word, 0), s.x[0], s.x[1]), b1 = fmaf(byte_of(word, 2), s.x[0], s.x[1]);
                if (OUT) {
                    const float c0 = fmaf(byte_of(word, 1), c_scale, c_offset), c1 = fmaf(byte_of(word, 3), c_scale, c_offset);
                    *reinterpret_cast<Floats<4> *>(to + i * VALUES) = {b0, c0, b1, c1};
                } else {
                    *reinterpret_cast<Floats<2> *>(to + i * VALUES) = {b0, b1};
                }
            }
        }
    }

    // What y holds at the next steps.
    struct Ahead {
        float y[GROUP][CT];
    };
    __device__ __forceinline__ void ask(Ahead &next, const Place *steps) const {
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            const Floats<CT> held = *reinterpret_cast<const Floats<CT> *>(y + row_of(steps[g].source, p.channels));
#pragma unroll
            for (int c = 0; c < CT; ++c) next.y[g][c] = held.x[c];
        }
    }

    // One direction. ADD: to what y holds.
    template <bool ADD>
    __device__ __forceinline__ void run(int k) {
        const int way = p.ways[k];
        const int *order = p.order + (long long)(way / 2) * p.pixels;
        const bool back = (way & 1) != int(BEHIND);
        float rate[CT][RATES], offset[CT], skip[CT], total[CT], h[CT][STATES];
        float reach[CT], ratios[CT];  // BEHIND: products of the decays of the first state, and of their ratios, of all steps behind
#pragma unroll
        for (int c = 0; c < CT; ++c) {
            const int d = channel + c;
#pragma unroll
            for (int n = 0; n < RATES; ++n) rate[c][n] = real ? p.rates[((long long)k * RATES + n) * p.channels + d] : 0.0f;
            offset[c] = p.scales[7] + (real && p.bias ? p.bias[(long long)k * p.channels + d] : 0.0f);
            skip[c] = OUT && real && p.skip ? p.skip[(long long)k * p.channels + d] : 0.0f;
            total[c] = 0.0f, reach[c] = ratios[c] = 1.0f;
#pragma unroll
            for (int n = 0; n < STATES; ++n) h[c][n] = 0.0f;
        }
        if (OUT && real && p.chunks > 1) enter(k, rate, h);
        const float su = p.scales[0], ou = p.scales[1], sd = p.scales[6];
        const unsigned of_table = TABLE ? place_of(table) + lane * 8 : 0;
        Pixels<FINDS> found = find(order, back, 0);
        __syncthreads();
        if (TABLE) read_table(k);
        keep(found, odd(bad, found), 0);
        found = find(order, back, STAGE);
        unsigned of_found = odd(bad, found);
        Pixels<FINDS> further = find(order, back, 2 * STAGE);
        __syncthreads();
        start(0, k);
        int turn = 0;
        for (int at = 0; at < p.chunk; at += STAGE, turn ^= 1) {
            copy_done();
            __syncthreads();
            put(turn);
            keep(found, of_found, turn ^ 1);
            __syncthreads();
            if (at + STAGE < p.chunk) {
                found = further, of_found = odd(bad, found);
                further = find(order, back, at + 3 * STAGE);
                start(turn ^ 1, k);
            }
            if (!real) continue;
            const int first = turn * PLACES + in_chunk * STAGE;
            const float *v = values + in_chunk * STAGE * VALUES;
            const unsigned char *us = records + first * RECORD + lane * CT, *steps = records + first * RECORD + U_ROW + lane * CT * OF_STEP;
            const Place *at_place = places + first;
            Ahead now, next;
            if (OUT && ADD) ask(next, at_place);
#pragma unroll 1
            for (int s = 0; s < STAGE; s += GROUP) {
                if (OUT && ADD) {
                    now = next;
                    if (s + GROUP < STAGE) ask(next, at_place + s + GROUP);
                }
#pragma unroll
                for (int g = 0; g < GROUP; ++g) {
                    const float *of_step = v + (s + g) * VALUES;
                    const unsigned char *u_at = us + (s + g) * RECORD, *step_at = steps + (s + g) * RECORD;
                    const unsigned u_word = CT == 2 ? *reinterpret_cast<const unsigned short *>(u_at) : *u_at;
                    unsigned step_word = 0;
                    if (QUANT) step_word = CT == 2 ? *reinterpret_cast<const unsigned short *>(step_at) : *step_at;
                    float result[CT], odd[CT], drive[CT], decay[2][CT], ratio[CT], dt[CT];  // states in turn, two chains
#pragma unroll
                    for (int c = 0; c < CT; ++c) {
                        if (TABLE) {
                            load_pair((step_word >> 8 * c & 255) * (LEVEL * 4u) + of_table + c * LANES * 8, dt[c], decay[0][c]);
                        } else {
                            dt[c] = step_size(QUANT ? fmaf(byte_of(step_word, c), sd, offset[c]) : reinterpret_cast<const float *>(step_at)[c]);
                            decay[0][c] = exp2_(dt[c] * rate[c][0]);
                        }
                        const float u = fmaf(byte_of(u_word, c), su, ou);
                        drive[c] = dt[c] * u;
                        result[c] = skip[c] * u, odd[c] = 0.0f;
                        if (!OUT) total[c] += dt[c];
                        if (LADDER && STATES > 1) ratio[c] = LADDER == 2 ? decay[0][c] : exp2_(dt[c] * rate[c][1]);
                        if (BEHIND) {  // from here on "decay" is what the step adds to a state for a B of 1
                            const float all = LADDER == 2 ? reach[c] : ratios[c], first = decay[0][c];
                            decay[0][c] = drive[c] * reach[c];
                            decay[1][c] = decay[0][c] * all;
                            reach[c] *= first;
                            if (LADDER == 1 && STATES > 1) ratios[c] *= ratio[c];
                            ratio[c] = all * all;
                        } else if (LADDER && STATES > 1) {
                            decay[1][c] = decay[0][c] * ratio[c];
                            ratio[c] *= ratio[c];
                        }
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
                                if (BEHIND) h[c][n] = fmaf(four.x[i], a, h[c][n]);
                                else h[c][n] = fmaf(a, h[c][n], drive[c] * four.x[OUT ? 2 * i : i]);
                                if (OUT) sum = fmaf(four.x[(2 * i + 1) % 4], h[c][n], sum);
                                if (LADDER && n + 2 < STATES) a *= ratio[c];
                            }
                    }
                    if (OUT && BOTH) {
                        float *const to = meeting(half) + (in_chunk * STAGE + (back ? STAGE - 1 - s - g : s + g)) * WIDTH + lane * CT;
#pragma unroll
                        for (int c = 0; c < CT; ++c) to[c] = result[c] + odd[c];
                    } else if (OUT) {
                        const int here = at_place[s + g].pixel;
                        float *const to = y + row_of(here < 0 ? 0 : here, p.channels);
                        float out[CT];
#pragma unroll
                        for (int c = 0; c < CT; ++c) out[c] = ADD ? (result[c] + odd[c]) + now.y[g][c] : result[c] + odd[c];
                        if (CT == 1) store_if(here >= 0, to, out[0]);
                        else store_if(here >= 0, to, out[0], out[CT - 1]);
                    }
                }
            }
        }
        if (!OUT) leave(k, way & 1, total, h);
    }

    __device__ __forceinline__ static float *meeting(int half) {
        return reinterpret_cast<float *>(shared + 2 * OF_HALF) + half * MEETING;
    }

    // Writes what both halves have come to.
    __device__ __forceinline__ void meet() const {
        __syncthreads();
        const Place *const steps = reinterpret_cast<const Place *>(reinterpret_cast<char *>(places) - half * OF_HALF);  // of the way there
        const int first = block * WIDTH;
        float *const result = y - channel + first;
        for (int i = threadIdx.x; i < PLACES * WIDTH; i += 2 * THREADS) {
            const int place = i / WIDTH, c = i % WIDTH, pixel = steps[place].pixel;
            if (pixel >= 0 && first + c < p.channels) result[row_of(pixel, p.channels) + c] = meeting(0)[i] + meeting(1)[i];
        }
    }

    // The decays of all states of a channel over some time.
    __device__ __forceinline__ static void decays(const float (&rate)[RATES], float time, float (&a)[STATES]) {
        const float ratio = LADDER ? exp2_(rate[RATES - 1] * time) : 0.0f;
#pragma unroll
        for (int n = 0; n < STATES; ++n) a[n] = LADDER && n > 0 ? a[n > 0 ? n - 1 : 0] * ratio : exp2_(rate[LADDER ? 0 : n] * time);
    }

    // The state before a chunk: of its group, as far as it is left, and of what comes before it in the group.
    __device__ __forceinline__ void enter(int k, const float (&rate)[CT][RATES], float (&h)[CT][STATES]) const {
        const long long path = (long long)k * p.batch + sample, of_group = path * p.groups + blockIdx.x, of_chunk = path * p.chunks + chunk;
#pragma unroll
        for (int c = 0; c < CT; ++c) {
            const int d = channel + c;
            float a[STATES];
            if (CHUNKS > 1) decays(rate[c], p.times[of_chunk * p.channels + d], a);
#pragma unroll
            for (int n = 0; n < STATES; ++n) {
                h[c][n] = p.groups > 1 ? p.ends[(of_group * STATES + n) * p.channels + d] : 0.0f;
                if (CHUNKS > 1) h[c][n] = fmaf(a[n], h[c][n], p.befores[(of_chunk * STATES + n) * p.channels + d]);
            }
        }
    }

    // Writes what comes before each chunk in its group, and what the group adds to the state.
    __device__ __forceinline__ void leave(int k, bool back, const float (&total)[CT], const float (&h)[CT][STATES]) const {
        float *sums = reinterpret_cast<float *>(shared);  // [CHUNKS][STATES + 1][CT][LANES]
        __syncthreads();
#pragma unroll
        for (int c = 0; c < CT; ++c) {
            if (in_chunk >= CHUNKS) break;
            float *to = sums + in_chunk * (STATES + 1) * WIDTH + c * LANES + lane;
            to[STATES * WIDTH] = total[c];
#pragma unroll
            for (int n = 0; n < STATES; ++n) to[n * WIDTH] = h[c][n];
        }
        __syncthreads();
        if (in_chunk >= CHUNKS || channel >= p.channels) return;
        const long long path = (long long)k * p.batch + sample, of_group = path * p.groups + blockIdx.x, of_chunk = path * p.chunks + chunk;
#pragma unroll 1
        for (int c = 0; c < CT; ++c) {
            const int d = channel + c;
            float rate[RATES], before[STATES] = {}, time = 0.0f;
#pragma unroll
            for (int n = 0; n < RATES; ++n) rate[n] = p.rates[((long long)k * RATES + n) * p.channels + d];
            const auto add = [&](int other) {
                const float *from = sums + other * (STATES + 1) * WIDTH + c * LANES + lane;
                float a[STATES];
                decays(rate, from[STATES * WIDTH], a);
                time += from[STATES * WIDTH];
#pragma unroll
                for (int n = 0; n < STATES; ++n) before[n] = fmaf(a[n], before[n], from[n * WIDTH]);
            };
            const int begin = back ? CHUNKS - 1 : 0, step = back ? -1 : 1;
#pragma unroll 1
            for (int other = begin; other != in_chunk; other += step) add(other);
            if (CHUNKS > 1 && real) {
                p.times[of_chunk * p.channels + d] = time;
#pragma unroll
                for (int n = 0; n < STATES; ++n) p.befores[(of_chunk * STATES + n) * p.channels + d] = before[n];
            }
            if (in_chunk != (back ? 0 : CHUNKS - 1)) continue;
            add(in_chunk);
            p.totals[of_group * p.channels + d] = time;
#pragma unroll
            for (int n = 0; n < STATES; ++n) p.ends[(of_group * STATES + n) * p.channels + d] = before[n];
        }
    }
};

// TAKEN channels of one direction a thread, pixel after pixel: columns of all directions are next to each other in memory,
// and so are the pixels of a tile, whose codes are copied to shared memory while those before them are worked on. Whole
// rows are written, with what is behind their last channel: a part of a sector takes as long as several whole ones.
// blockIdx.x: `stretch` pixels; blockIdx.y: `lanes` columns. Shared memory: [2][tile][row].
constexpr int STEPS_AT_ONCE = WORDS <= 4 ? 4 : 2;  // pixels whose words are read together; `tile` is a multiple of as many rows

extern "C" __global__ void __launch_bounds__(256, STEPS_RESIDENT) scan_steps(const Params p) {
    constexpr int FOURS = TAKEN / 4;
    const int thread = threadIdx.x, units = p.size_row / (TAKEN * OF_STEP), quads = up(p.channels, 16) / 4;
    const int at_row = unsigned(thread) / unsigned(p.lanes), rows = p.rows;
    int column = blockIdx.y * p.lanes + thread - at_row * p.lanes;
    const bool works = at_row < rows && column < p.directions * units;
    column = works ? column : 0;
    const int k = unsigned(column) / unsigned(units), d = (column - k * units) * TAKEN;
    Floats<4> weight[WORDS][FOURS], affine[3][FOURS];  // weights: words
    const auto four = [&](const void *of, int i, int q) { return reinterpret_cast<const Floats<4> *>(of)[(long long)i * quads + d / 4 + q]; };
#pragma unroll
    for (int q = 0; q < FOURS; ++q) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) weight[w][q] = four(p.words, k * WORDS + w, q);
#pragma unroll
        for (int i = 0; i < 3; ++i) affine[i][q] = four(p.affine, k * 3 + i, q);
    }
    const int count = p.batch * p.pixels, begins = blockIdx.x * p.stretch, ends = count - begins < p.stretch ? count : begins + p.stretch;
    const int each = p.directions * p.size_row;
    unsigned char *result = p.sizes + row_of(begins + at_row, each) + column * (TAKEN * OF_STEP);
    const long long next = (long long)rows * each;
    kernel_before<FULL>();
    const int fours = p.row / 4, tile = p.tile;
    Floats<4> *const tiles = reinterpret_cast<Floats<4> *>(shared);
    const auto bring = [&](int begin, int turn) {
        const Floats<4> *from = reinterpret_cast<const Floats<4> *>(p.codes) + row_of(begin, fours);
        const int pieces = (ends - begin < tile ? ends - begin : tile) * fours;
        for (int i = thread; i < pieces; i += blockDim.x) copy<16>(tiles + turn * tile * fours + i, from + i, true);
    };
    bring(begins, 0);
#pragma unroll 1
    for (int begin = begins, turn = 0; begin < ends; begin += tile, turn ^= 1) {
        copy_done();
        __syncthreads();
        if (begin + tile < ends) bring(begin + tile, turn ^ 1);
        if (!works) continue;
        const unsigned *at = reinterpret_cast<const unsigned *>(tiles + turn * tile * fours) + at_row * p.row + k * EACH;
        const int left = (ends - begin < tile ? ends - begin : tile) - at_row;
#pragma unroll 1
        for (int first = 0; first < left; first += STEPS_AT_ONCE * rows) {
            unsigned word[STEPS_AT_ONCE][WORDS];
#pragma unroll
            for (int i = 0; i < STEPS_AT_ONCE; ++i, at += rows * p.row)
#pragma unroll
                for (int w = 0; w < WORDS; ++w) word[i][w] = at[w];
#pragma unroll
            for (int i = 0; i < STEPS_AT_ONCE; ++i, result += next)
                step_codes<FOURS>(p.qmin, p.qmax, word[i], weight, affine, first + i * rows < left, result);
        }
    }
}

// blockIdx.y: direction, sample, block of channels.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_ends(const Params p) {
    kernel_before<FULL || CARRIED>();
    const int block = blockIdx.y % p.blocks, sample = blockIdx.y / p.blocks % p.batch;
    Walk<false> walk(p, sample, block);
    walk.run<false>(blockIdx.y / p.blocks / p.batch);
}

// blockIdx.y: path, sample, block of channels.
constexpr int OUT_THREADS = BOTH ? 2 * THREADS : THREADS, OUT_RESIDENT = BOTH && RESIDENT > 1 ? RESIDENT / 2 : RESIDENT;
extern "C" __global__ void __launch_bounds__(OUT_THREADS, OUT_RESIDENT) scan_out(const Params p) {
    kernel_before<FULL>();
    const int block = blockIdx.y % p.blocks, sample = blockIdx.y / p.blocks % p.batch;
    const int path = p.path + blockIdx.y / p.blocks / p.batch, back = p.paths[2 * path + 1];
    Walk<true> walk(p, sample, block);
    walk.y += path * p.part;
    if (BOTH) {
        walk.run<false>(p.paths[2 * path + walk.half]);
        walk.meet();
        return;
    }
    if (p.add) walk.run<true>(p.paths[2 * path]);
    else walk.run<false>(p.paths[2 * path]);
    if (back >= 0) walk.run<true>(back);
}

// From what groups add to what enters them, in place. A thread has a segment of the groups of one state of one channel.
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
    const int per = (p.groups + SEGMENTS - 1) / SEGMENTS, first = segment * per;
    const int end = !real ? first : first + per < p.groups ? first + per : p.groups;
    kernel_before<FULL>();
    float *ends = p.ends + (long long)blockIdx.y * p.groups * width + column;
    const float *totals = p.totals + (long long)blockIdx.y * p.groups * p.channels + channel;
    constexpr int AHEAD = HELD ? HELD : 8;  // groups that are read at once: all of a segment, or some of them, and twice
    float add[AHEAD], t[AHEAD], h = 0.0f, time = 0.0f;
    const auto at = [&](int j) { return (long long)(back ? p.groups - 1 - j : j); };
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

#ifdef EMULATED
static int steps_bytes(const Params &p) { return 2 * p.tile * p.row * 4; }
constexpr int ENDS_BYTES = Walk<false>::bytes(), OUT_BYTES = Walk<true>::bytes(), CARRY_BYTES = 2 * 4 * COLUMNS * SEGMENTS;
#endif
