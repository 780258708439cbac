// A linear layer of few inputs on codes: sum of parts, norm, gate, codes, products, bias, activation, residual, and codes
// for who reads the result. ssmquant/ops/deployed/cuda_thin.py compiles it for one case and launches it.
//
// A warp has 16 rows. Lane (g, t) of it, of 8 times 4, has four neighbouring inputs of every 16 of rows g and g + 8: what
// the tensor cores want of it as codes (mma.m16n8k32), so that values are encoded in registers where they have been read,
// and a norm's sums are over four lanes. Of every 16 outputs it has four neighbours too, since weights lie so that two
// products of 8 outputs give it these. SPLIT warps share the outputs of the same rows, where there are few.
//
// After cuda_math.cu and definitions of: INPUTS, OUTPUTS; CODED: the input is codes, int8 from 0 and -1 for NaN; PARTS: tensors
// whose sum it is; BLEND: it is the sum of x, 2: with a gain, and v by a factor of each sample, and is written too; NORM: 1 layer norm, 2 RMS norm, 3 factors alone; HAS_W, HAS_B: of the norm; GATE; HAS_BIAS; RESIDUAL;
// HAS_GAIN; ACT (1: SiLU, 2: GELU); CODES: so many of the first outputs are written as codes, apart from the others; FACTORS:
// of these before; CORE: 1 all outputs are, each by a quantizer of its own, and the input's codes and NaN too, 2: its codes are
// those of a single quantizer, which are multiplied; VEC: inputs that are read at once; AT_ONCE: outputs; WARPS, SPLIT;
// RESIDENT: blocks of a multiprocessor, what registers are limited for.

#ifndef EMULATED
__device__ __forceinline__ int total_of(unsigned x, int sum) {  // of four bytes, with signs
    int y;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(0x01010101), "r"(sum));
    return y;
}
// sum += a @ b, 16 x 32 by 32 x 8 of int8.
__device__ __forceinline__ void multiply(int (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

constexpr unsigned ALL = 0xffffffff;
constexpr int KT = (INPUTS + 31) / 32, GROUPS = (OUTPUTS + 15) / 16, THREADS = 32 * WARPS, REST = OUTPUTS - CODES;
constexpr int UNROLLED = CORE ? 1 : 2;  // by what registers there are
template <int N> struct alignas(4 * N) Floats { float x[N]; };
template <int N> struct alignas(N) Bytes { signed char x[N]; };
struct alignas(16) Words { unsigned x[4]; };

struct Params {
    const void *x;
    const float *v, *x_gain, *v_scale;                   // BLEND: rows; of each input; (samples, INPUTS)
    float *blended;                                      // BLEND: (samples, rows, INPUTS)
    const float *z, *norm_weight, *norm_bias, *scale, *shift;
    const Words *tiles;                                  // weights: [GROUPS][KT][32], see cuda_thin.tiles
    const float *of_outputs;                             // scales, shifts and totals, (3, 16 * GROUPS)
    const float *bias, *residual, *gain;
    float *y;                                            // (samples, rows, REST)
    signed char *codes;                                  // (samples, rows, CODES); CORE: uint8, rows of code_row
    const float *next_scale, *next_shift, *next_factors; // of codes; CORE: of u
    const float *inverse, *moved, *least, *most;         // CORE: of each output
    unsigned char *u, *bad;                              // CORE: the input's codes, rows of u_row, and rows with a NaN
    long long part, x_batch, x_row, v_batch, v_row, z_batch, z_row, r_batch, r_row;
    int rows, u_row, code_row, qmin, qmax, next_min, next_max;
    float eps;
};

__device__ __forceinline__ float of_four(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}

// Bits whose lowest byte is that of the integer that a value is rounded to; notes NaN.
__device__ __forceinline__ int bits_of(float x, float inverse, float moved, float least, float most, bool &odd) {
    const float u = fmaf(x, inverse, moved);
    odd = odd || u != u;
    return as_int(fminf(fmaxf(u, least), most) + MAGIC);
}

// One number less in each byte.
__device__ __forceinline__ unsigned less(unsigned x, unsigned y) {
    return ((x | 0x80808080u) - (y & 0x7f7f7f7fu)) ^ ((x ^ ~y) & 0x80808080u);
}

// Has memory brought to the cache.
template <int BYTES> __device__ __forceinline__ void ask(const void *p) {
#ifndef EMULATED
#pragma unroll
    for (int begin = 0; begin < BYTES; begin += THREADS * 128) {
        const int at = begin + threadIdx.x * 128;
        if (at < BYTES) asm volatile("prefetch.global.L1 [%0];" ::"l"(static_cast<const char *>(p) + at));
    }
#endif
}

// What no thread writes: may be read ahead of what is written before.
#ifdef EMULATED
template <class T> inline T fixed(const T *p) { return *p; }
#else
__device__ __forceinline__ Words fixed(const Words *p) {
    Words w;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.x[0]), "=r"(w.x[1]), "=r"(w.x[2]), "=r"(w.x[3]) : "l"(p));
    return w;
}
__device__ __forceinline__ Floats<4> fixed(const Floats<4> *p) {
    const Words w = fixed(reinterpret_cast<const Words *>(p));
    return {as_float(w.x[0]), as_float(w.x[1]), as_float(w.x[2]), as_float(w.x[3])};
}
#endif
__device__ __forceinline__ Floats<4> four(const float *p, int n) { return fixed(reinterpret_cast<const Floats<4> *>(p + n)); }

// Outputs n to n + 3 of what every output has, zeros where there are none; n is a multiple of 4.
__device__ __forceinline__ Floats<4> of_outputs(const float *p, int n) {
    if (AT_ONCE == 4) return n < OUTPUTS ? *reinterpret_cast<const Floats<4> *>(p + n) : Floats<4>{};
    Floats<4> x{};
#pragma unroll
    for (int i = 0; i < 4; i += AT_ONCE) {
        if (n + i >= OUTPUTS) break;
        const Floats<AT_ONCE> some = *reinterpret_cast<const Floats<AT_ONCE> *>(p + n + i);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) x.x[i + j] = some.x[j];
    }
    return x;
}

// Four neighbouring inputs of each of the 2 * KT times that a lane has some, zeros where there are none.
template <int STEP> __device__ __forceinline__ void read(const float *x, int t, bool here, float (&v)[8 * KT]) {
#pragma unroll
    for (int i = 0; i < 8 * KT; i += STEP) {
        const int k = i / 4 * 16 + 4 * t + i % 4;
        Floats<STEP> four{};
        if (here && k < INPUTS) four = *reinterpret_cast<const Floats<STEP> *>(x + k);
#pragma unroll
        for (int j = 0; j < STEP; ++j) v[i + j] = four.x[j];
    }
}

// The reverse of ``read``.
template <int STEP> __device__ __forceinline__ void write(float *x, int t, const float (&v)[8 * KT]) {
#pragma unroll
    for (int i = 0; i < 8 * KT; i += STEP) {
        const int k = i / 4 * 16 + 4 * t + i % 4;
        Floats<STEP> some;
#pragma unroll
        for (int j = 0; j < STEP; ++j) some.x[j] = v[i + j];
        if (k < INPUTS) *reinterpret_cast<Floats<STEP> *>(x + k) = some;
    }
}

// Sixteen outputs of 16 rows; of these some are written as codes, some as values.
struct Rows {
    const Params &p;
    const unsigned (&code)[KT][4];
    float sum[2], a, origin, next_inverse, next_moved;
    int lane, first, odd;
    long long sample;

    template <bool AS_CODES, bool AS_VALUES> __device__ __forceinline__ void finish(int group) const {
        const int g = lane / 4, n = group * 16 + lane % 4 * 4;
        int acc[2][4] = {};
#pragma unroll
        for (int kt = 0; kt < KT; ++kt) {
            const Words w = fixed(p.tiles + (group * KT + kt) * 32 + lane);
            multiply(acc[0], code[kt], w.x[0], w.x[1]);
            multiply(acc[1], code[kt], w.x[2], w.x[3]);
        }
        const Floats<4> ws = four(p.of_outputs, n), wt = four(p.of_outputs + 16 * GROUPS, n), total = four(p.of_outputs + 32 * GROUPS, n);
        const Floats<4> bias = HAS_BIAS ? of_outputs(p.bias, n) : Floats<4>{}, gain = HAS_GAIN ? of_outputs(p.gain, n) : Floats<4>{};
        Floats<4> inverse{}, moved{}, least{}, most{};
        Floats<4> factors{};
        if (FACTORS && AS_CODES) {
#pragma unroll
            for (int c = 0; c < 4; ++c) factors.x[c] = n + c < CODES ? p.next_factors[n + c] : 0.0f;
        }
        if (CORE) inverse = of_outputs(p.inverse, n), moved = of_outputs(p.moved, n), least = of_outputs(p.least, n), most = of_outputs(p.most, n);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first + g + 8 * r;
            if (row >= p.rows) continue;
            const long long at = sample * p.rows + row;
            float value[4];
            int made[4];  // in the lowest byte
            Floats<4> held{};
            if (RESIDUAL) held = of_outputs(p.residual + sample * p.r_batch + row * p.r_row, n);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const float product = ws.x[c] * float(acc[c / 2][2 * r + c % 2]) - wt.x[c] * sum[r];
                float x = fmaf(a, product, fmaf(origin, total.x[c], bias.x[c]));
                x = ACT == 1 ? silu(x) : ACT == 2 ? gelu(x) : x;
                if (RESIDUAL) x += HAS_GAIN ? held.x[c] * gain.x[c] : held.x[c];
                value[c] = odd >> r & 1 ? as_float(0x7fffffff) : x;
                if (CORE) {
                    const float u = fminf(fmaxf(fmaf(value[c], inverse.x[c], moved.x[c]), least.x[c]), most.x[c]);
                    made[c] = as_int((u + MAGIC) - least.x[c]);
                } else if (AS_CODES) {  // -1 for NaN
                    const float v = FACTORS ? value[c] * factors.x[c] : value[c];
                    const float u = min_nan(max_nan(fmaf(v, next_inverse, next_moved), float(p.next_min)), float(p.next_max));
                    made[c] = as_int((u + MAGIC) - float(p.next_min));
                }
            }
            if (AS_CODES && n < CODES) {
                constexpr int WIDE = CORE || CODES % 4 == 0 ? 4 : CODES % 2 == 0 ? 2 : 1;  // rows of a core's are wide enough
                signed char *to = p.codes + at * (CORE ? p.code_row : CODES) + n;
                const int word = int(joined(made[0], made[1], made[2], made[3]));
#pragma unroll
                for (int c = 0; c < 4; c += WIDE) {
                    if (!CORE && n + c >= CODES) break;
                    if (WIDE == 4) *reinterpret_cast<int *>(to) = word;
                    else if (WIDE == 2) *reinterpret_cast<short *>(to + c) = short(word >> 8 * c);
                    else to[c] = (signed char)(word >> 8 * c);
                }
            }
            if (AS_VALUES) {
                constexpr int WIDE = CODES % 4 == 0 && OUTPUTS % 4 == 0 ? 4 : CODES % 2 == 0 && OUTPUTS % 2 == 0 ? 2 : 1;
                float *to = p.y + at * REST + (n - CODES);
#pragma unroll
                for (int c = 0; c < 4; c += WIDE) {
                    if (n + c < CODES || n + c >= OUTPUTS) continue;
                    Floats<WIDE> some;
#pragma unroll
                    for (int i = 0; i < WIDE; ++i) some.x[i] = value[c + i];
                    *reinterpret_cast<Floats<WIDE> *>(to + c) = some;
                }
            }
        }
    }

    template <bool AS_CODES, bool AS_VALUES> __device__ __forceinline__ void range(int begin, int end) const {
#pragma unroll UNROLLED
        for (int group = begin; group < end; ++group) finish<AS_CODES, AS_VALUES>(group);
    }
};

// blockIdx.x: rows; blockIdx.y: sample.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) thin(const Params p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, split = warp % SPLIT;
    const int first = (blockIdx.x * (WARPS / SPLIT) + warp / SPLIT) * 16;
    ask<16 * 32 * GROUPS * KT>(p.tiles);  // all at once: one wait for all, and not one for every group
    ask<12 * 16 * GROUPS>(p.of_outputs);
    kernel_before<true>();
    if (first >= p.rows) return;
    const long long sample = blockIdx.y;
    const float a = p.scale[0], b = p.shift[0], inverse = 1.0f / a, moved = b * inverse;
    const float least = float(p.qmin), most = float(p.qmax);
    unsigned code[KT][4];
    int sums[2] = {0, 0};
    bool nan[2] = {false, false};
    // What codes are less by when they are multiplied: nothing where they fit as they are.
    const int base = CODED || p.qmin < -128 || p.qmax > 127 ? p.qmin + (p.qmax - p.qmin > 127 ? 128 : 0) : 0;
    float v[2][8 * KT], factor[2] = {1.0f, 1.0f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first + g + 8 * r;
        const bool here = row < p.rows;
        if (CODED) {
            const signed char *x = static_cast<const signed char *>(p.x) + sample * p.x_batch + row * p.x_row;
#pragma unroll
            for (int i = 0; i < 8 * KT; i += 4) {
                unsigned word = 0;
#pragma unroll
                for (int j = 0; j < 4; j += VEC) {
                    const int k = i / 4 * 16 + 4 * t + j;
                    Bytes<VEC> some{};
                    if (here && k < INPUTS) some = *reinterpret_cast<const Bytes<VEC> *>(x + k);
#pragma unroll
                    for (int l = 0; l < VEC; ++l) word |= unsigned(some.x[l] & 255) << 8 * (j + l);
                }
                const unsigned none = word & 0x80808080u;
                nan[r] = nan[r] || none;
                word &= ~((none >> 7) * 255u);
                code[i / 8][i / 4 % 2 * 2 + r] = word;
                sums[r] = total_of(word, sums[r]);
            }
            continue;
        }
        const float *x = static_cast<const float *>(p.x) + sample * p.x_batch + row * p.x_row;
        read<VEC>(x, t, here, v[r]);
        for (int part = 1; part < PARTS; ++part) {
            float more[8 * KT];
            read<VEC>(x + part * p.part, t, here, more);
#pragma unroll
            for (int i = 0; i < 8 * KT; ++i) v[r][i] += more[i];
        }
    }
    if (BLEND) {
#pragma unroll
        for (int i = 0; i < 8 * KT; i += VEC) {
            const int k = i / 4 * 16 + 4 * t + i % 4;
            if (k >= INPUTS) continue;
            Floats<VEC> gain{};
            if (BLEND == 2) gain = *reinterpret_cast<const Floats<VEC> *>(p.x_gain + k);
            const Floats<VEC> scale = *reinterpret_cast<const Floats<VEC> *>(p.v_scale + sample * INPUTS + k);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = first + g + 8 * r;
                if (row >= p.rows) continue;
                const Floats<VEC> more = *reinterpret_cast<const Floats<VEC> *>(p.v + sample * p.v_batch + row * p.v_row + k);
#pragma unroll
                for (int j = 0; j < VEC; ++j)
                    v[r][i + j] = fmaf(more.x[j], scale.x[j], BLEND == 2 ? v[r][i + j] * gain.x[j] : v[r][i + j]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {  // when all has been read: no read waits for a write
            const int row = first + g + 8 * r;
            if (split == 0 && row < p.rows) write<VEC>(p.blended + (sample * p.rows + row) * INPUTS, t, v[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (CODED) break;
        float mean = 0.0f;
        if (NORM == 1) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 8 * KT; ++i) sum += v[r][i];
            mean = of_four(sum) * (1.0f / INPUTS);
        }
        if (NORM == 1 || NORM == 2) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 8 * KT; ++i) {
                const float off = v[r][i] - mean;
                v[r][i] = off;
                if (i / 4 * 16 + 4 * t + i % 4 < INPUTS) sum = fmaf(off, off, sum);
            }
            factor[r] = 1.0f / sqrtf(of_four(sum) * (1.0f / INPUTS) + p.eps);
        }
    }
    if (!CODED) {
        float of_k[8 * KT];
        if (HAS_W) {
            read<VEC>(p.norm_weight, t, true, of_k);
#pragma unroll
            for (int i = 0; i < 8 * KT; ++i) v[0][i] *= factor[0] * of_k[i], v[1][i] *= factor[1] * of_k[i];
        } else if (NORM) {
#pragma unroll
            for (int i = 0; i < 8 * KT; ++i) v[0][i] *= factor[0], v[1][i] *= factor[1];
        }
        if (HAS_B) {
            read<VEC>(p.norm_bias, t, true, of_k);
#pragma unroll
            for (int i = 0; i < 8 * KT; ++i) v[0][i] += of_k[i], v[1][i] += of_k[i];
        }
        const float u_inverse = CORE == 1 ? 1.0f / p.next_scale[0] : 1.0f, u_moved = CORE == 1 ? p.next_shift[0] * u_inverse : 0.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first + g + 8 * r;
            if (GATE) {
                read<VEC>(p.z + sample * p.z_batch + row * p.z_row, t, row < p.rows, of_k);
#pragma unroll
                for (int i = 0; i < 8 * KT; ++i) v[r][i] *= silu(of_k[i]);
            }
#pragma unroll
            for (int i = 0; i < 8 * KT; i += 4) {
                const int k = i / 4 * 16 + 4 * t;
                int bits[4], others[4];
                bool other = false;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    bits[j] = bits_of(v[r][i + j], inverse, moved, least, most, nan[r]);
                    others[j] = CORE == 1 ? bits_of(v[r][i + j], u_inverse, u_moved, float(p.next_min), float(p.next_max), other) : bits[j];
                }
                const unsigned whole = joined(bits[0], bits[1], bits[2], bits[3]);
                unsigned word = base ? less(whole, unsigned(base & 255) * 0x01010101u) : whole;
                if (k + 3 >= INPUTS) word = k >= INPUTS ? 0 : word & 0xffffffffu >> 8 * (k + 4 - INPUTS);
                sums[r] = total_of(word, sums[r]);
                code[i / 8][i / 4 % 2 * 2 + r] = word;
                if (CORE && split == 0 && row < p.rows && k < INPUTS) {  // rows of u are multiples of 16 long
                    const unsigned from = unsigned((CORE == 1 ? p.next_min : p.qmin) & 255) * 0x01010101u;
                    *reinterpret_cast<unsigned *>(p.u + (sample * p.rows + row) * p.u_row + k) =
                        less(joined(others[0], others[1], others[2], others[3]), from);
                }
            }
        }
    }
    float sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = of_four(float(sums[r]));
    int odd = nan[0] + 2 * nan[1];  // bits: rows that have a NaN
    odd |= int(__shfl_xor_sync(ALL, odd, 1));
    odd |= int(__shfl_xor_sync(ALL, odd, 2));
    const float origin = float(base) * a - b;  // the value of what is held as 0
    const float next_inverse = CODES && !CORE ? 1.0f / p.next_scale[0] : 1.0f, next_moved = CODES && !CORE ? p.next_shift[0] * next_inverse : 0.0f;
    const Rows rows{p, code, {sum[0], sum[1]}, a, origin, next_inverse, next_moved, lane, first, odd, sample};
    const int begin = GROUPS * split / SPLIT, end = GROUPS * (split + 1) / SPLIT;
    // Up to there all are codes; from there on none.
    constexpr int LAST = CODES == OUTPUTS ? GROUPS : CODES / 16, NEXT = CODES == OUTPUTS ? GROUPS : (CODES + 15) / 16;
    if (LAST > 0) rows.range<true, false>(begin, end < LAST ? end : LAST);
    if (LAST < NEXT && begin <= LAST && LAST < end) rows.finish<true, true>(LAST);
    if (NEXT < GROUPS) rows.range<false, true>(begin > NEXT ? begin : NEXT, end);
    if (CORE && split == 0 && t < 2 && first + g + 8 * t < p.rows)
        p.bad[sample * p.rows + first + g + 8 * t] = odd >> t & 1;
}
