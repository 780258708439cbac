// What kernels of linear layers on codes are made of: norm, gate, codes, products, bias, activation, residual, and codes for
// who reads the result, of a warp's 16 rows in registers. Behind the definitions that thin.cu names, and FRONTED: rows are
// pixels of a tile (fronted.cu).
//
// Lane (g, t) of a warp, of 8 times 4, has four neighbouring inputs of every 16 of rows g and g + 8: what the tensor cores
// want of it as codes (mma.m16n8k32), so that values are encoded in registers where they have been read, and a norm's sums
// are over four lanes. Of every 16 outputs it has four neighbours too, since weights lie so that two products of 8 outputs
// give it these: they are what it needs of another layer's inputs.

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
template <int N> struct alignas(N) Bytes { signed char x[N]; };
struct alignas(16) Words { unsigned x[4]; };

// What layers are compiled for.
struct First {
    static constexpr bool has_w = HAS_W, has_b = HAS_B, gate = GATE, has_bias = HAS_BIAS, residual = RESIDUAL, factors = FACTORS;
    static constexpr int inputs = INPUTS, outputs = OUTPUTS, norm = NORM, act = ACT, codes = CODES, core = CORE, vec = VEC;
    static constexpr int at_once = AT_ONCE, kt = (inputs + 31) / 32, groups = (outputs + 15) / 16;
};
struct Second {
    static constexpr bool has_w = THEN_HAS_W, has_b = THEN_HAS_B, gate = false, has_bias = THEN_HAS_BIAS, residual = false;
    static constexpr bool factors = THEN_FACTORS;
    static constexpr int inputs = OUTPUTS, outputs = THEN, norm = THEN_NORM, act = THEN_ACT, codes = THEN_CODES, core = 0;
    static constexpr int vec = AT_ONCE, at_once = THEN_AT_ONCE, kt = (inputs + 31) / 32, groups = (outputs + 15) / 16;
};

struct Layer {
    const float *norm_weight, *norm_bias, *scale, *shift;
    const Words *tiles;                                  // weights: [groups][kt][32], see cuda_thin.tiles
    const float *of_outputs;                             // scales, shifts and totals, (3, 16 * groups)
    const float *bias;
    float *y;                                            // (samples, rows, outputs that are no codes)
    signed char *codes;                                  // (samples, rows, codes); CORE: uint8, rows of code_row
    const float *next_scale, *next_shift, *next_factors; // of codes; CORE: of u
    int qmin, qmax, next_min, next_max;
    float eps;
};
struct Params {
    Layer layer, then;
    const void *x;
    const float *v, *x_gain, *v_scale;                   // BLEND: rows; of each input; (samples, INPUTS)
    const float *tiles;                                  // EXCITE: (samples, count, INPUTS)
    const float *first, *first_bias, *second, *second_bias;
    float *blended;                                      // BLEND: (samples, rows, INPUTS)
    const float *z, *residual, *gain;
    const float *inverse, *moved, *least, *most;         // CORE: of each output
    unsigned char *u, *bad;                              // CORE: the input's codes, rows of u_row, and rows with a NaN
    long long part, x_batch, x_row, v_batch, v_row, z_batch, z_row, r_batch, r_row;
    int rows, u_row, code_row, count;
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
    for (int begin = 0; begin < BYTES; begin += 32 * WARPS * 128) {
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

#if FRONTED
// Two pixels of a tile, `first + g` and that + 8, of which a lane has columns 4 t and following, of every 16.
struct Place {
    int lane, g, t, split, first, top, left, height, width;
    long long sample;
    unsigned *low;  // shared: words of the low rank of each pixel and direction

    __device__ __forceinline__ int row(int r) const { return first + g + 8 * r; }  // of the tile
    __device__ __forceinline__ int y(int r) const { return top + row(r) / TILE_WIDE; }
    __device__ __forceinline__ int x(int r) const { return left + row(r) % TILE_WIDE; }
    __device__ __forceinline__ bool has(int r) const { return y(r) < height && x(r) < width; }
    __device__ __forceinline__ long long at(int r) const { return sample * (height * width) + y(r) * width + x(r); }
    __device__ __forceinline__ int column(int i) const { return i / 4 * 16 + 4 * t + i % 4; }
};
#else
// The rows of a lane, `first + g` and that + 8, of which it has columns 4 t and following, of every 16.
struct Place {
    int lane, g, t, split, first, rows;
    long long sample;

    __device__ __forceinline__ int row(int r) const { return first + g + 8 * r; }
    __device__ __forceinline__ bool has(int r) const { return row(r) < rows; }
    __device__ __forceinline__ long long at(int r) const { return sample * rows + row(r); }  // of all samples' rows
    __device__ __forceinline__ int column(int i) const { return i / 4 * 16 + 4 * t + i % 4; }
};
#endif

// A layer's input as it is multiplied.
template <class L> struct Encoded {
    unsigned code[L::kt][4];
    float sum[2], a, origin;  // a: scale; origin: the value of what is held as 0
    int odd;                  // bits: rows that have a NaN

    __device__ __forceinline__ void finish(const int (&sums)[2], const bool (&nan)[2], float scale, float zero) {
#pragma unroll
        for (int r = 0; r < 2; ++r) sum[r] = of_four(float(sums[r]));
        odd = nan[0] + 2 * nan[1];
        odd |= int(__shfl_xor_sync(ALL, odd, 1));
        odd |= int(__shfl_xor_sync(ALL, odd, 2));
        a = scale, origin = zero;
    }
};

// Outputs n to n + 3 of what every output has, zeros where there are none; n is a multiple of 4.
template <class L> __device__ __forceinline__ Floats<4> of_outputs(const float *p, int n) {
    if (L::at_once == 4) return n < L::outputs ? *reinterpret_cast<const Floats<4> *>(p + n) : Floats<4>{};
    Floats<4> x{};
#pragma unroll
    for (int i = 0; i < 4; i += L::at_once) {
        if (n + i >= L::outputs) break;
        const Floats<L::at_once> some = *reinterpret_cast<const Floats<L::at_once> *>(p + n + i);
#pragma unroll
        for (int j = 0; j < L::at_once; ++j) x.x[i + j] = some.x[j];
    }
    return x;
}

// A lane's columns of a row, zeros where there are none.
template <class L> __device__ __forceinline__ void read(const float *x, const Place &p, bool here, float (&v)[8 * L::kt]) {
#pragma unroll
    for (int i = 0; i < 8 * L::kt; i += L::vec) {
        Floats<L::vec> some{};
        if (here && p.column(i) < L::inputs) some = *reinterpret_cast<const Floats<L::vec> *>(x + p.column(i));
#pragma unroll
        for (int j = 0; j < L::vec; ++j) v[i + j] = some.x[j];
    }
}

template <class L> __device__ __forceinline__ void normalize(const Layer &layer, const Place &at, float (&v)[2][8 * L::kt]) {
    float factor[2] = {1.0f, 1.0f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float mean = 0.0f;
        if (L::norm == 1) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 8 * L::kt; ++i) sum += v[r][i];
            mean = of_four(sum) * (1.0f / L::inputs);
        }
        if (L::norm == 1 || L::norm == 2) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 8 * L::kt; ++i) {
                const float off = v[r][i] - mean;
                v[r][i] = off;
                if (at.column(i) < L::inputs) sum = fmaf(off, off, sum);
            }
            factor[r] = 1.0f / sqrtf(of_four(sum) * (1.0f / L::inputs) + layer.eps);
        }
    }
    float of_k[8 * L::kt];
    if (L::has_w) {
        read<L>(layer.norm_weight, at, true, of_k);
#pragma unroll
        for (int i = 0; i < 8 * L::kt; ++i) v[0][i] *= factor[0] * of_k[i], v[1][i] *= factor[1] * of_k[i];
    } else if (L::norm) {
#pragma unroll
        for (int i = 0; i < 8 * L::kt; ++i) v[0][i] *= factor[0], v[1][i] *= factor[1];
    }
    if (L::has_b) {
        read<L>(layer.norm_bias, at, true, of_k);
#pragma unroll
        for (int i = 0; i < 8 * L::kt; ++i) v[0][i] += of_k[i], v[1][i] += of_k[i];
    }
}

template <class L>
__device__ __forceinline__ void encode(
    const Params &p, const Layer &layer, const Place &at, float (&v)[2][8 * L::kt], Encoded<L> &x
) {
    const float a = layer.scale[0], b = layer.shift[0], inverse = 1.0f / a, moved = b * inverse;
    const float least = float(layer.qmin), most = float(layer.qmax);
    const float u_inverse = L::core == 1 ? 1.0f / layer.next_scale[0] : 1.0f;
    const float u_moved = L::core == 1 ? layer.next_shift[0] * u_inverse : 0.0f;
    // What codes are less by when they are multiplied: nothing where they fit as they are.
    const int base = layer.qmin < -128 || layer.qmax > 127 ? layer.qmin + (layer.qmax - layer.qmin > 127 ? 128 : 0) : 0;
    int sums[2] = {0, 0};
    bool nan[2] = {false, false};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (L::gate) {
            float gate[8 * L::kt];
            read<L>(p.z + at.sample * p.z_batch + at.row(r) * p.z_row, at, at.has(r), gate);
#pragma unroll
            for (int i = 0; i < 8 * L::kt; ++i) v[r][i] *= silu(gate[i]);
        }
#pragma unroll
        for (int i = 0; i < 8 * L::kt; i += 4) {
            const int k = at.column(i);
            int bits[4], others[4];
            bool other = false;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                bits[j] = bits_of(v[r][i + j], inverse, moved, least, most, nan[r]);
                others[j] = bits[j];
                if (L::core == 1)
                    others[j] = bits_of(v[r][i + j], u_inverse, u_moved, float(layer.next_min), float(layer.next_max), other);
            }
            const unsigned whole = joined(bits[0], bits[1], bits[2], bits[3]);
            unsigned word = base ? less(whole, unsigned(base & 255) * 0x01010101u) : whole;
            if (k + 3 >= L::inputs) word = k >= L::inputs ? 0 : word & 0xffffffffu >> 8 * (k + 4 - L::inputs);
            sums[r] = total_of(word, sums[r]);
            x.code[i / 8][i / 4 % 2 * 2 + r] = word;
            if (L::core && at.split == 0 && at.has(r) && k < L::inputs) {  // rows of u are multiples of 16 long
                const unsigned from = unsigned((L::core == 1 ? layer.next_min : layer.qmin) & 255) * 0x01010101u;
                *reinterpret_cast<unsigned *>(p.u + at.at(r) * p.u_row + k) = less(joined(others[0], others[1], others[2], others[3]), from);
            }
        }
    }
    x.finish(sums, nan, a, float(base) * a - b);
}

// The input's codes, as another kernel has written them, or another part of this one: `row` is where those of a row are.
template <class Row> __device__ __forceinline__ void take(const Layer &layer, const Place &at, Encoded<First> &x, Row row) {
    int sums[2] = {0, 0};
    bool nan[2] = {false, false};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const signed char *from = row(r);
#pragma unroll
        for (int i = 0; i < 8 * First::kt; i += 4) {
            unsigned word = 0;
#pragma unroll
            for (int j = 0; j < 4; j += VEC) {
                const int k = at.column(i + j);
                Bytes<VEC> some{};
                if (at.has(r) && k < INPUTS) some = *reinterpret_cast<const Bytes<VEC> *>(from + k);
#pragma unroll
                for (int l = 0; l < VEC; ++l) word |= unsigned(some.x[l] & 255) << 8 * (j + l);
            }
            const unsigned none = word & 0x80808080u;
            nan[r] = nan[r] || none;
            word &= ~((none >> 7) * 255u);
            x.code[i / 8][i / 4 % 2 * 2 + r] = word;
            sums[r] = total_of(word, sums[r]);
        }
    }
    const float a = layer.scale[0];
    x.finish(sums, nan, a, float(layer.qmin) * a - layer.shift[0]);  // codes are less by the lowest one
}

// Sixteen outputs of 16 rows: products, and what a lane's four outputs have for all rows.
struct Sixteen {
    int n, acc[2][4];
    Floats<4> ws, wt, total, bias, gain, factors, inverse, moved, least, most;
};

// A layer's outputs; of these some are written as codes, some as values.
template <class L> struct Rows {
    const Params &p;
    const Layer &layer;
    const Place &at;
    const Encoded<L> &x;
    float next_inverse, next_moved;

    __device__ __forceinline__ Rows(const Params &p, const Layer &layer, const Place &at, const Encoded<L> &x)
        : p(p), layer(layer), at(at), x(x) {
        next_inverse = L::codes && !L::core ? 1.0f / layer.next_scale[0] : 1.0f;
        next_moved = L::codes && !L::core ? layer.next_shift[0] * next_inverse : 0.0f;
    }

    template <bool AS_CODES> __device__ __forceinline__ Sixteen products(int group) const {
        const int n = group * 16 + 4 * at.t;
        Sixteen y{n};
#pragma unroll
        for (int kt = 0; kt < L::kt; ++kt) {
            const Words w = fixed(layer.tiles + (group * L::kt + kt) * 32 + at.lane);
            multiply(y.acc[0], x.code[kt], w.x[0], w.x[1]);
            multiply(y.acc[1], x.code[kt], w.x[2], w.x[3]);
        }
        const float *of = layer.of_outputs;
        y.ws = four(of, n), y.wt = four(of + 16 * L::groups, n), y.total = four(of + 32 * L::groups, n);
        if (L::has_bias) y.bias = of_outputs<L>(layer.bias, n);
        if (L::residual && HAS_GAIN) y.gain = of_outputs<L>(p.gain, n);
        if (L::factors && AS_CODES) {
#pragma unroll
            for (int c = 0; c < 4; ++c) y.factors.x[c] = n + c < L::codes ? layer.next_factors[n + c] : 0.0f;
        }
        if (L::core) {
            y.inverse = of_outputs<L>(p.inverse, n), y.moved = of_outputs<L>(p.moved, n);
            y.least = of_outputs<L>(p.least, n), y.most = of_outputs<L>(p.most, n);
        }
        return y;
    }

    __device__ __forceinline__ void values(const Sixteen &y, int r, float (&value)[4]) const {
        Floats<4> held{};
        if (L::residual && at.has(r)) held = of_outputs<L>(p.residual + at.sample * p.r_batch + at.row(r) * p.r_row, y.n);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float product = y.ws.x[c] * float(y.acc[c / 2][2 * r + c % 2]) - y.wt.x[c] * x.sum[r];
            float v = fmaf(x.a, product, fmaf(x.origin, y.total.x[c], y.bias.x[c]));
            v = L::act == 1 ? silu(v) : L::act == 2 ? gelu(v) : v;
            if (L::residual) v += HAS_GAIN ? held.x[c] * y.gain.x[c] : held.x[c];
            value[c] = x.odd >> r & 1 ? as_float(0x7fffffff) : v;
        }
    }

    // In bytes; -1 for NaN.
    __device__ __forceinline__ unsigned codes(const Sixteen &y, const float (&value)[4]) const {
        int made[4];  // in the lowest byte
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (L::core) {
                const float u = fminf(fmaxf(fmaf(value[c], y.inverse.x[c], y.moved.x[c]), y.least.x[c]), y.most.x[c]);
                made[c] = as_int((u + MAGIC) - y.least.x[c]);
            } else {
                const float v = L::factors ? value[c] * y.factors.x[c] : value[c];
                const float u = min_nan(max_nan(fmaf(v, next_inverse, next_moved), float(layer.next_min)), float(layer.next_max));
                made[c] = as_int((u + MAGIC) - float(layer.next_min));
            }
        }
        return joined(made[0], made[1], made[2], made[3]);
    }

    __device__ __forceinline__ void write_codes(int r, int n, unsigned word) const {
#if STEPS
        const int direction = n / (4 * EACH), within = n / 4 - direction * EACH;
        if (within < WORDS) at.low[at.row(r) * LOW + direction * WORDS + within] = word;
#endif
        constexpr int WIDE = L::core || L::codes % 4 == 0 ? 4 : L::codes % 2 == 0 ? 2 : 1;  // rows of a core's are wide enough
        signed char *to = layer.codes + at.at(r) * (L::core ? p.code_row : L::codes) + n;
#pragma unroll
        for (int c = 0; c < 4; c += WIDE) {
            if (!L::core && n + c >= L::codes) break;
            if (WIDE == 4) *reinterpret_cast<unsigned *>(to) = word;
            else if (WIDE == 2) *reinterpret_cast<short *>(to + c) = short(word >> 8 * c);
            else to[c] = (signed char)(word >> 8 * c);
        }
    }

    __device__ __forceinline__ void write(int r, int n, const float (&value)[4]) const {
        constexpr int WIDE = L::codes % 4 == 0 && L::outputs % 4 == 0 ? 4 : L::codes % 2 == 0 && L::outputs % 2 == 0 ? 2 : 1;
        float *to = layer.y + at.at(r) * (L::outputs - L::codes) + (n - L::codes);
#pragma unroll
        for (int c = 0; c < 4; c += WIDE) {
            if (n + c < L::codes || n + c >= L::outputs) continue;
            Floats<WIDE> some;
#pragma unroll
            for (int i = 0; i < WIDE; ++i) some.x[i] = value[c + i];
            *reinterpret_cast<Floats<WIDE> *>(to + c) = some;
        }
    }

    template <bool AS_CODES, bool AS_VALUES> __device__ __forceinline__ void range(int begin, int end) const {
        constexpr int UNROLLED = L::core ? 1 : 2;  // by what registers there are
#pragma unroll UNROLLED
        for (int group = begin; group < end; ++group) {
            const Sixteen y = products<AS_CODES>(group);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (!at.has(r)) continue;
                float value[4];
                values(y, r, value);
                if (AS_CODES && y.n < L::codes) write_codes(r, y.n, codes(y, value));
                if (AS_VALUES) write(r, y.n, value);
            }
        }
    }

    __device__ __forceinline__ void all() const {
        // Up to there all are codes; from there on none.
        constexpr int LAST = L::codes == L::outputs ? L::groups : L::codes / 16;
        constexpr int NEXT = L::codes == L::outputs ? L::groups : (L::codes + 15) / 16;
        const int begin = L::groups * at.split / SPLIT, end = L::groups * (at.split + 1) / SPLIT;
        if (LAST > 0) range<true, false>(begin, end < LAST ? end : LAST);
        if (LAST < NEXT && begin <= LAST && LAST < end) range<true, true>(LAST, NEXT);
        if (NEXT < L::groups) range<false, true>(begin > NEXT ? begin : NEXT, end);
    }
};
