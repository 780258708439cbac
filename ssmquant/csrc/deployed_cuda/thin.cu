// A linear layer of few inputs, and maybe the one that reads it: see thin_layer.cu. ssmquant/ops/deployed/cuda_thin.py compiles
// it for one case and launches it. A warp has 16 rows; SPLIT warps share the outputs of the same rows, where there are few.
//
// After cuda_math.cu, thin_layer.cu and definitions of: INPUTS, OUTPUTS; CODED: the input is codes, int8 from 0 and -1 for
// NaN; PARTS: tensors whose sum it is; BLEND: it is the sum of x, 2: with a gain, and v by a factor of each sample, and is
// written too; EXCITE: these are channel attention's, of sums of tiles, with so many hidden values; NORM: 1 layer norm, 2 RMS
// norm, 3 factors alone; HAS_W, HAS_B: of the norm; GATE; HAS_BIAS; RESIDUAL; HAS_GAIN; ACT (1: SiLU, 2: GELU); CODES: so
// many of the first outputs are written as codes, apart from the others; FACTORS: of these before; CORE: 1 all outputs are,
// each by a quantizer of its own, and the input's codes and NaN too, 2: its codes are those of a single quantizer, which are
// multiplied; VEC: inputs that are read at once; AT_ONCE: outputs. THEN: outputs of a layer that reads these, 0 for none,
// with THEN_NORM, THEN_HAS_W, THEN_HAS_B, THEN_HAS_BIAS, THEN_ACT, THEN_CODES, THEN_FACTORS, THEN_AT_ONCE; KEPT: this one's
// are written too. LARGE: there is much to do. WARPS, SPLIT (1 of two layers); RESIDENT: blocks of a multiprocessor, what
// registers are limited for.

extern __shared__ char shared[];
constexpr int SHARED = EXCITE ? 4 * ((WARPS + 1) * INPUTS + EXCITE) : 0;

// Channel attention of a sample, by all threads of a block: sigmoid(second @ relu(first @ mean + ..) + ..).
__device__ __forceinline__ const float *attend(const Params &p, const Place &at) {
    float *parts = reinterpret_cast<float *>(shared), *factors = parts + WARPS * INPUTS, *hidden = factors + INPUTS;
    const float *tiles = p.tiles + at.sample * p.count * INPUTS;
    const int warp = threadIdx.x / 32;
    ask<4 * INPUTS * EXCITE>(p.first);
    ask<4 * INPUTS * EXCITE>(p.second);
    for (int k = at.lane; k < INPUTS; k += 32) {
        float sum = 0.0f;
#pragma unroll 16
        for (int i = warp; i < p.count; i += WARPS) sum += tiles[i * INPUTS + k];
        parts[warp * INPUTS + k] = sum;
    }
    __syncthreads();
    for (int i = warp; i < EXCITE; i += WARPS) {
        float sum = 0.0f;
        for (int k = at.lane; k < INPUTS; k += 32) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) total += parts[w * INPUTS + k];
            sum = fmaf(p.first[i * INPUTS + k], total / float(p.rows), sum);
        }
#pragma unroll
        for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(ALL, sum, by);
        sum += p.first_bias[i];
        if (at.lane == 0) hidden[i] = sum < 0.0f ? 0.0f : sum;  // NaN stays one
    }
    __syncthreads();
    for (int k = threadIdx.x; k < INPUTS; k += 32 * WARPS) {
        float sum = p.second_bias[k];
        for (int i = 0; i < EXCITE; ++i) sum = fmaf(p.second[k * EXCITE + i], hidden[i], sum);
        factors[k] = recip(1.0f + exp2_(-sum * LOG2E));
    }
    __syncthreads();
    return factors;
}

// The input's values: x, or the sum of its parts, or of x and v.
__device__ __forceinline__ void gather(const Params &p, const Place &at, const float *v_scale, float (&v)[2][8 * First::kt]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float *x = static_cast<const float *>(p.x) + at.sample * p.x_batch + at.row(r) * p.x_row;
        read<First>(x, at, at.has(r), v[r]);
        for (int part = 1; part < PARTS; ++part) {
            float more[8 * First::kt];
            read<First>(x + part * p.part, at, at.has(r), more);
#pragma unroll
            for (int i = 0; i < 8 * First::kt; ++i) v[r][i] += more[i];
        }
    }
    if (!BLEND) return;
#pragma unroll
    for (int i = 0; i < 8 * First::kt; i += VEC) {
        const int k = at.column(i);
        if (k >= INPUTS) continue;
        Floats<VEC> gain{};
        if (BLEND == 2) gain = *reinterpret_cast<const Floats<VEC> *>(p.x_gain + k);
        const Floats<VEC> scale = *reinterpret_cast<const Floats<VEC> *>(v_scale + k);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (!at.has(r)) continue;
            const Floats<VEC> more = *reinterpret_cast<const Floats<VEC> *>(p.v + at.sample * p.v_batch + at.row(r) * p.v_row + k);
#pragma unroll
            for (int j = 0; j < VEC; ++j)
                v[r][i + j] = fmaf(more.x[j], scale.x[j], BLEND == 2 ? v[r][i + j] * gain.x[j] : v[r][i + j]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // when all has been read: no read waits for a write
        if (at.split > 0 || !at.has(r)) continue;
#pragma unroll
        for (int i = 0; i < 8 * First::kt; i += VEC) {
            Floats<VEC> some;
#pragma unroll
            for (int j = 0; j < VEC; ++j) some.x[j] = v[r][i + j];
            if (at.column(i) < INPUTS) *reinterpret_cast<Floats<VEC> *>(p.blended + at.at(r) * INPUTS + at.column(i)) = some;
        }
    }
}

// The outputs of a layer, which stay in registers, and those of the layer that reads them.
template <class L> __device__ __forceinline__ void both(const Params &p, const Place &at, const Rows<First> &rows) {
    float v[2][8 * L::kt] = {};
#pragma unroll
    for (int group = 0; group < First::groups; ++group) {
        const Sixteen y = rows.template products<false>(group);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float value[4];
            rows.values(y, r, value);
#pragma unroll
            for (int c = 0; c < 4; ++c) v[r][4 * group + c] = value[c];
        }
    }
#pragma unroll
    for (int group = 0; KEPT && group < First::groups; ++group) {  // when all has been read: no read waits for a write
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float value[4] = {v[r][4 * group], v[r][4 * group + 1], v[r][4 * group + 2], v[r][4 * group + 3]};
            if (at.has(r)) rows.write(r, group * 16 + 4 * at.t, value);
        }
    }
    Encoded<L> x;
    normalize<L>(p.then, at, v);
    encode<L>(p, p.then, at, v, x);
    Rows<L>(p, p.then, at, x).all();
}

// blockIdx.x: rows; blockIdx.y: sample.
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) thin(const Params p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = (blockIdx.x * (WARPS / SPLIT) + warp / SPLIT) * 16;
    const Place at{lane, lane / 4, lane % 4, warp % SPLIT, first, p.rows, blockIdx.y};
    ask<16 * 32 * First::groups * First::kt>(p.layer.tiles);  // all at once: one wait for all, and not one for every group
    ask<12 * 16 * First::groups>(p.layer.of_outputs);
    if (THEN) {
        ask<16 * 32 * Second::groups * Second::kt>(p.then.tiles);
        ask<12 * 16 * Second::groups>(p.then.of_outputs);
    }
    kernel_before<LARGE>();
    const float *v_scale = p.v_scale + at.sample * INPUTS;
    if constexpr (EXCITE > 0) v_scale = attend(p, at);
    if (first >= p.rows) return;
    Encoded<First> x;
    if (CODED) {
        const signed char *codes = static_cast<const signed char *>(p.x) + at.sample * p.x_batch;
        take(p.layer, at, x, [&](int r) { return codes + at.row(r) * p.x_row; });
    } else {
        float v[2][8 * First::kt];
        gather(p, at, v_scale, v);
        normalize<First>(p.layer, at, v);
        encode<First>(p, p.layer, at, v, x);
    }
    const Rows<First> rows(p, p.layer, at, x);
    if constexpr (THEN > 0) both<Second>(p, at, rows);
    else rows.all();
    if (CORE && at.split == 0 && at.t < 2 && at.has(at.t)) p.bad[at.at(at.t)] = x.odd >> at.t & 1;
}
