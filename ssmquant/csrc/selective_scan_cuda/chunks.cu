// What chunks of time hand on.

#if PASS >= 2
// What a chunk adds: to the state after it (forward), or to the gradient of the state before it (BACK).
template <bool BACK>
__device__ __forceinline__ void ends(const Params &p) {
    const Place at(p);
    const int chunk = BACK ? at.chunk + 1 : at.chunk;         // the first chunk has no one before it, the last none behind
    const int first = chunk * p.chunk, end = first + p.chunk < p.length ? first + p.chunk : p.length;
    constexpr bool CONSTANT = BACK ? CONST_C : CONST_B;
    constexpr int STAGE = BACK ? STAGE_C : STAGE_B;
    float *decay = reinterpret_cast<float *>(shared + 2 * STAGE + at.warp * ENDS_WARP + 2 * (TILE_D + TILE_U));
    float *state = decay + TABLE, *adds = state + TABLE;
    // By bits, the states that the warps still want, in turn for one tile and the next. (Those from 32 on they all do.)
    unsigned *wants = reinterpret_cast<unsigned *>(shared + 2 * STAGE + WARPS * ENDS_WARP), mine = ALL;
    if (at.lane == 0) wants[at.warp] = ALL;
    auto buffer = [&](int turn) { return shared + 2 * STAGE + (turn & 1) * (TILE_D + TILE_U); };
    auto stage_b_of = [&](int turn) { return reinterpret_cast<TB *>(shared + (turn & 1) * STAGE); };
    auto stage_c_of = [&](int turn) { return reinterpret_cast<TC *>(shared + (turn & 1) * STAGE); };
    const int channel0 = at.group * at.size + at.inner;
    const TD *delta = delta_of(p, at);
    const TU *x = BACK ? rows_of(p.g, p.g_b, p.g_d, at) : rows_of(p.u, p.u_b, p.u_d, at);
    const long long x_d = BACK ? p.g_d : p.u_d, slab = (long long)p.batch * STATES * p.channels;
    tables(decay, state, nullptr, p, at);
    if (LANES_END)
        for (int i = at.lane; i < STATES * CT * 32; i += 32) adds[i] = 0.0f;
    __syncwarp();
    float shift[CT], slowest[CT], sum[CT];
    vectors(shift, p.bias, at);
#pragma unroll
    for (int ct = 0; ct < CT; ++ct) {
        slowest[ct] = decay[at.row(ct)], sum[ct] = 0.0f;
        for (int n = 1; n < STATES; ++n) slowest[ct] = fmaxf(slowest[ct], decay[n * ROWS + at.row(ct)]);
    }
    const Mover mover(at.lane);
    const int count = (end - first + TILE - 1) / TILE;
    auto start_of = [&](int i) { return first + (BACK ? i : count - 1 - i) * TILE; };
    auto fetch = [&](int i) {
        fetch_tile<ENDS_WARP>(mover, buffer(i), delta, p.delta_d, at, start_of(i), end);
        fetch_tile<ENDS_WARP>(mover, buffer(i) + TILE_D, x, x_d, at, start_of(i), end);
    };
    auto fetch_stage = [&](int turn, int n0, int i, unsigned wanted) {
        if (CONSTANT) return;
        if (BACK) stage(stage_c_of(turn), p.c + at.sample * p.c_b + at.group * p.c_g, p.c_n, n0, at, start_of(i), end, wanted);
        else stage(stage_b_of(turn), p.b + at.sample * p.b_b + at.group * p.b_g, p.b_n, n0, at, start_of(i), end, wanted);
    };
    fetch(0);
    fetch_stage(0, 0, 0, ALL);
    int stage_turn = 0;
    bool over = false;                                        // nothing of the warp's channels gets to the end from here
    for (int i = 0; i < count; ++i) {
        const int start = start_of(i);
        const TD *tile = reinterpret_cast<TD *>(buffer(i) + at.warp * ENDS_WARP);
        const TU *tile_x = reinterpret_cast<TU *>(buffer(i) + at.warp * ENDS_WARP + TILE_D);
        copy_done();
        if (__syncthreads_and(over)) break;
        if (i + 1 < count && (MAP || !over)) fetch(i + 1);
        unsigned wanted = 0;
        for (int warp = 0; warp < WARPS; ++warp) wanted |= wants[i % 2 * WARPS + warp];
        float dt[CT][T], drive[CT][T], beyond[CT];  // beyond: dt between the segment and the end it is walked from
        if (!over)
#pragma unroll
        for (int ct = 0; ct < CT; ++ct) {
            int place = at.row(ct) * PITCH;
            float mine = sizes(dt[ct], tile + place, shift[ct], at.seg, end - start - at.seg * T), total = mine;
            read<true>(drive[ct], tile_x + place, at.seg);
#pragma unroll
            for (int off = 1; off < LS; off *= 2) {
                float more = BACK ? __shfl_up_sync(ALL, total, off * LC) : __shfl_down_sync(ALL, total, off * LC);
                if (BACK ? at.seg >= off : at.seg + off < LS) total += more;
            }
            beyond[ct] = sum[ct] + (total - mine);
            sum[ct] += __shfl_sync(ALL, total, (BACK ? LS - 1 : 0) * LC + at.lc);
            if (!BACK)
#pragma unroll
                for (int t = 0; t < T; ++t) drive[ct][t] *= dt[ct][t];
        }
        for (int n0 = 0; n0 < STATES; n0 += GROUP, ++stage_turn) {
            if (n0 > 0) {
                copy_done();
                __syncthreads();
            }
            if (n0 + GROUP < STATES) fetch_stage(stage_turn + 1, n0 + GROUP, i, wanted);
            else if (i + 1 < count) fetch_stage(stage_turn + 1, 0, i + 1, wanted);
            if (over) continue;
#pragma unroll MIX
            for (int n = n0; n < n0 + GROUP && n < STATES; ++n) {
                if (n < 32 && !(mine >> n & 1)) continue;
                float v[T];
                if (!CONSTANT && BACK) read(v, stage_c_of(stage_turn) + (n - n0) * LINE, at.seg);
                if (!CONSTANT && !BACK) read(v, stage_b_of(stage_turn) + (n - n0) * LINE, at.seg);
                float add[CT];
#pragma unroll
                for (int ct = 0; ct < CT; ++ct) {
                    if (BACK) { CONSTANT_OF(CONST_C, v, p.c) } else { CONSTANT_OF(CONST_B, v, p.b) }
                    float a2 = decay[n * ROWS + at.row(ct)], h = 0.0f;
#pragma unroll
                    for (int i = 0; i < T; ++i) {
                        int t = BACK ? T - 1 - i : i;
                        float a = exp2_(dt[ct][t] * a2);
                        h = BACK ? a * fmaf(drive[ct][t], v[t], h) : fmaf(a, h, drive[ct][t] * v[t]);
                    }
                    add[ct] = h * exp2_(a2 * beyond[ct]);
                }
                if (LANES_END) {
#pragma unroll
                    for (int ct = 0; ct < CT; ++ct) adds[(n * CT + ct) * 32 + at.lane] += add[ct];
                } else {
                    add_row(state + n * ROWS, add, at);
                }
            }
        }
        // What of a state comes from before this tile does not get to the end.
        auto gone = [&](const float *rates, int pitch) {
            bool all = true;
#pragma unroll
            for (int ct = 0; ct < CT; ++ct) all = all && (!at.real(ct) || rates[ct * pitch] * sum[ct] < NONE);
            return __all_sync(ALL, all);
        };
        if (!over) {
            for (int n = 0; n < STATES && n < 32; ++n)
                if (gone(decay + n * ROWS + at.lc, LC)) mine &= ~(1u << n);
            over = gone(slowest, 1);
        }
        if (at.lane == 0) wants[(i + 1) % 2 * WARPS + at.warp] = over ? 0 : mine;
    }
    copy_done();
    __syncwarp();
    for (int i = at.lane; i < STATES * ROWS; i += 32) {
        if (at.inner + i % ROWS >= at.size) continue;
        float total = LANES_END ? 0.0f : state[i];
        if (LANES_END)
            for (int seg = 0; seg < LS; ++seg) total += adds[lane_sum(i / ROWS, i % ROWS) + seg * LC];
        p.carry[chunk * slab + ((long long)at.sample * STATES + i / ROWS) * p.channels + channel0 + i % ROWS] = total;
    }
#pragma unroll
    for (int ct = 0; ct < CT; ++ct)
        if (at.seg == 0 && at.real(ct)) p.totals[((long long)chunk * p.batch + at.sample) * p.channels + at.channel(ct)] = sum[ct];
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) scan_ends(const Params p) { ends<PASS == 3>(p); }

// From what chunks add to what enters them, in place. One thread a (sample, state, channel).
extern "C" __global__ void scan_carry(const Params p) {
    constexpr bool BACK = PASS == 3;
    const long long slab = (long long)p.batch * STATES * p.channels, i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= slab) return;
    const int channel = i % p.channels, n = i / p.channels % STATES, sample = i / p.channels / STATES;
    const float a2 = p.a[(long long)channel * STATES + n] * LOG2E;
    float h = BACK && p.last ? p.last[((long long)sample * p.channels + channel) * STATES + n] : 0.0f;
    for (int j = 0; j < p.chunks; ++j) {
        const int chunk = BACK ? p.chunks - 1 - j : j;
        float add = 0.0f, total = 0.0f;
        if (j < p.chunks - 1) {
            add = p.carry[chunk * slab + i];
            total = p.totals[((long long)chunk * p.batch + sample) * p.channels + channel];
        }
        p.carry[chunk * slab + i] = h;
        h = fmaf(exp2_(a2 * total), h, add);
    }
}
#endif
