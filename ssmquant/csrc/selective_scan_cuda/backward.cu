// All gradients.

#if PASS == 1
// Sums over the warp's channels of a value per step: afterwards the lane has those of LEFT steps from `first_step` on.
__device__ __forceinline__ void over_channels(float (&v)[T], const Place &at) {
    int count = T;
#pragma unroll
    for (int bit = 1; bit < LC; bit *= 2) {
        bool upper = at.lane & bit;
        if (count > 1) {
            count /= 2;
#pragma unroll
            for (int i = 0; i < T / 2; ++i)
                if (i < count) {
                    float send = upper ? v[i] : v[i + count], keep = upper ? v[i + count] : v[i];
                    v[i] = keep + __shfl_xor_sync(ALL, send, bit);
                }
        } else {
            v[0] += __shfl_xor_sync(ALL, v[0], bit);
        }
    }
}
constexpr int LEFT = T / LC > 0 ? T / LC : 1;
__device__ __forceinline__ int first_step(const Place &at) {
    int step = 0, count = T;
#pragma unroll
    for (int bit = 1; bit < LC; bit *= 2)
        if (count > 1) {
            count /= 2;
            if (at.lane & bit) step += count;
        }
    return step;
}

// dL/dB and dL/dC of GROUP states: sums over the block's warps, in order, into the block's own slice.
constexpr int LAST_GROUP = (STATES - 1) / GROUP * GROUP;
__device__ __forceinline__ void gather(int turn, const Params &p, const Place &at, int n0, int start) {
    const char *warps = shared + 2 * (STAGE_B + STAGE_C) + 2 * (TILE_D + 2 * TILE_U);
    for (int first = at.warp * 32; first < 2 * GROUP * TILE; first += WARPS * 32) {
        const int item = first + at.lane, i = item / TILE, step = item % TILE, n = n0 + i % GROUP;
        const bool of_c = i >= GROUP;
        if (item >= 2 * GROUP * TILE || n >= STATES || (of_c ? CONST_C : CONST_B)) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) total += reinterpret_cast<const float *>(warps + w * BACKWARD_WARP)[(turn & 1) * SUMS + item];
        if (start + step >= at.end) continue;
        const int pixel = MAP ? at.pixel(start + step) : 0;
        if (pixel < 0) continue;
        const long long to = MAP ? (((long long)at.sample * p.length + pixel) * p.groups + at.group) * STATES + n
                                 : (((long long)at.sample * p.groups + at.group) * STATES + n) * p.length + start + step;
        const long long part = (long long)at.block * p.batch * p.groups * STATES * p.length + to;
        float *parts = of_c ? p.gc_parts : p.gb_parts;
        if (parts) parts[part] = total;
        else if (of_c) narrow(total, p.gc[to]);
        else narrow(total, p.gb[to]);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) scan_backward(const Params p) {
    constexpr float LN2 = 0.693147180559945309f;
    const Place at(p);
    char *own = shared + 2 * (STAGE_B + STAGE_C) + at.warp * BACKWARD_WARP;
    float *sums = reinterpret_cast<float *>(own + 2 * (TILE_D + 2 * TILE_U));  // [2][SUMS]
    float *decay = sums + 2 * SUMS, *later = decay + TABLE, *entry = later + TABLE, *ga = entry + TABLE;
    float *gb = ga + SUMS_A, *gc = gb + CONST_B * TABLE;
    const TB *b = p.b + (CONST_B ? 0 : at.sample * p.b_b + at.group * p.b_g);
    const TC *c = p.c + (CONST_C ? 0 : at.sample * p.c_b + at.group * p.c_g);
    const int channel0 = at.group * at.size + at.inner;
    const TU *u = rows_of(p.u, p.u_b, p.u_d, at), *g = rows_of(p.g, p.g_b, p.g_d, at);
    const TD *delta = delta_of(p, at);
    TU *gu = p.gu + plane(p, at);
    TD *gdelta = p.gdelta + (MAP ? (long long)at.sample * p.channels * p.length + at.group * at.size + at.block0() : plane(p, at));
    const long long slab = (long long)p.batch * STATES * p.channels;
    tables(decay, later, p.carry ? p.carry + at.chunk * slab : nullptr, p, at);
    for (int i = at.lane; i < STATES * ROWS; i += 32) {
        int channel = channel0 + i % ROWS;
        if (!p.carry && p.last && at.inner + i % ROWS < at.size) later[i] = p.last[((long long)at.sample * p.channels + channel) * STATES + i / ROWS];
        if (CONST_B) gb[i] = 0.0f;
        if (CONST_C) gc[i] = 0.0f;
    }
    for (int i = at.lane; i < SUMS_A; i += 32) ga[i] = 0.0f;
    float shift[CT], through[CT], gskip[CT], gshift[CT];
    vectors(shift, p.bias, at);
    vectors(through, p.skip, at);
#pragma unroll
    for (int ct = 0; ct < CT; ++ct) gskip[ct] = gshift[ct] = 0.0f;

    const Mover mover(at.lane);
    const int count = (at.end - at.first + TILE - 1) / TILE, rows = at.size - at.inner, last = at.first + (count - 1) * TILE;
    constexpr int BUFFER = TILE_D + 2 * TILE_U;
    auto buffer = [&](int turn) { return shared + 2 * (STAGE_B + STAGE_C) + (turn & 1) * BUFFER; };
    auto tile_of = [&](int turn) { return reinterpret_cast<TD *>(buffer(turn) + at.warp * BACKWARD_WARP); };
    auto tile_u_of = [&](int turn) { return reinterpret_cast<TU *>(buffer(turn) + at.warp * BACKWARD_WARP + TILE_D); };
    auto tile_g_of = [&](int turn) { return reinterpret_cast<TU *>(buffer(turn) + at.warp * BACKWARD_WARP + TILE_D + TILE_U); };
    auto stage_b_of = [&](int turn) { return reinterpret_cast<TB *>(shared + (turn & 1) * (STAGE_B + STAGE_C)); };
    auto stage_c_of = [&](int turn) { return reinterpret_cast<TC *>(shared + (turn & 1) * (STAGE_B + STAGE_C) + STAGE_B); };
    auto fetch = [&](int turn, int start) {
        fetch_tile<BACKWARD_WARP>(mover, buffer(turn), delta, p.delta_d, at, start, at.end);
        fetch_tile<BACKWARD_WARP>(mover, buffer(turn) + TILE_D, u, p.u_d, at, start, at.end);
        fetch_tile<BACKWARD_WARP>(mover, buffer(turn) + TILE_D + TILE_U, g, p.g_d, at, start, at.end);
    };
    auto fetch_stage = [&](int turn, int n0, int start) {
        if (!CONST_B) stage(stage_b_of(turn), b, p.b_n, n0, at, start, at.end);
        if (!CONST_C) stage(stage_c_of(turn), c, p.c_n, n0, at, start, at.end);
    };
    auto fetch_entry = [&](int start) {
        const float *saved = p.saved + start / SAVE * slab + (long long)at.sample * STATES * p.channels + channel0;
        for (int i = at.lane; i < STATES * ROWS; i += 32)
            copy<4>(entry + i, saved + (long long)(i / ROWS) * p.channels + i % ROWS, i % ROWS < rows);
    };
    fetch(0, last);
    fetch_stage(0, 0, last);
    fetch_entry(last);

    int turn = 0, stage_turn = 0;
    for (int start = last; start >= at.first; start -= TILE, ++turn) {
        const TD *tile = tile_of(turn);
        const TU *tile_u = tile_u_of(turn), *tile_g = tile_g_of(turn);
        float dt[CT][T], drive[CT][T], gy[CT][T], fed[CT][T], slope[CT][T], sum[CT];
        for (int n0 = 0; n0 < STATES; n0 += GROUP, ++stage_turn) {
            copy_done();
            __syncthreads();
            // Warps have finished the group before: its sums can be added up, and its B and C make room.
            if (n0 > 0) gather(stage_turn - 1, p, at, n0 - GROUP, start);
            else if (start < last) gather(stage_turn - 1, p, at, LAST_GROUP, start + TILE);
            if (n0 + GROUP < STATES) {
                fetch_stage(stage_turn + 1, n0 + GROUP, start);
            } else if (start > at.first) {
                fetch_stage(stage_turn + 1, 0, start - TILE);
                fetch(turn + 1, start - TILE);
            }
            if (n0 == 0)
#pragma unroll
                for (int ct = 0; ct < CT; ++ct) {
                    int place = at.row(ct) * PITCH;
                    sum[ct] = sizes(dt[ct], tile + place, shift[ct], at.seg, at.end - start - at.seg * T);
                    read<true>(drive[ct], tile_u + place, at.seg);
                    read<true>(gy[ct], tile_g + place, at.seg);
#pragma unroll
                    for (int t = 0; t < T; ++t) {
                        drive[ct][t] *= dt[ct][t];
                        fed[ct][t] = slope[ct][t] = 0.0f;
                    }
                }
            const TB *stage_b = stage_b_of(stage_turn);
            const TC *stage_c = stage_c_of(stage_turn);
#pragma unroll MIX
            for (int n = n0; n < n0 + GROUP && n < STATES; ++n) {
                SEGMENT(CONST_B, bv, stage_b)
                SEGMENT(CONST_C, cv, stage_c)
                float gbv[T], gcv[T], gav[CT], gbc[CT], gcc[CT];
                float a[CT][T], a2[CT];
                Scan ahead, back;
                ahead.first = at.seg == 0;
                back.first = at.seg == LS - 1;
#pragma unroll
                for (int ct = 0; ct < CT; ++ct) {
                    CONSTANT_OF(CONST_B, bv, p.b)
                    CONSTANT_OF(CONST_C, cv, p.c)
                    a2[ct] = decay[n * ROWS + at.row(ct)];
                    ahead.state[ct] = entry[n * ROWS + at.row(ct)];
                    back.state[ct] = later[n * ROWS + at.row(ct)];
                    ahead.kept[ct] = back.kept[ct] = exp2_(a2[ct] * sum[ct]);
#pragma unroll
                    for (int t = 0; t < T; ++t) {
                        a[ct][t] = exp2_(dt[ct][t] * a2[ct]);
                        ahead.made[ct] = t ? fmaf(a[ct][t], ahead.made[ct], drive[ct][t] * bv[t]) : drive[ct][t] * bv[t];
                    }
#pragma unroll
                    for (int t = T - 1; t >= 0; --t)
                        back.made[ct] = a[ct][t] * (t < T - 1 ? fmaf(cv[t], gy[ct][t], back.made[ct]) : cv[t] * gy[ct][t]);
                }
                run(ahead, back);
#pragma unroll
                for (int ct = 0; ct < CT; ++ct) {
                    CONSTANT_OF(CONST_B, bv, p.b)
                    CONSTANT_OF(CONST_C, cv, p.c)
                    if (at.seg == 0) later[n * ROWS + at.row(ct)] = back.after[ct];
                    float h[T + 1], k = back.made[ct];
                    h[0] = ahead.made[ct];
#pragma unroll
                    for (int t = 0; t < T; ++t) h[t + 1] = fmaf(a[ct][t], h[t], drive[ct][t] * bv[t]);
                    gav[ct] = gbc[ct] = gcc[ct] = 0.0f;
#pragma unroll
                    for (int t = T - 1; t >= 0; --t) {
                        float gh = fmaf(cv[t], gy[ct][t], k);
                        if (CONST_B) gbc[ct] = fmaf(gh, drive[ct][t], gbc[ct]);
                        else gbv[t] = ct ? fmaf(gh, drive[ct][t], gbv[t]) : gh * drive[ct][t];
                        if (CONST_C) gcc[ct] = fmaf(gy[ct][t], h[t + 1], gcc[ct]);
                        else gcv[t] = ct ? fmaf(gy[ct][t], h[t + 1], gcv[t]) : gy[ct][t] * h[t + 1];
                        fed[ct][t] = fmaf(gh, bv[t], fed[ct][t]);
                        k = a[ct][t] * gh;
                        float q = k * h[t];                   // gradient of dt * A
                        slope[ct][t] = fmaf(a2[ct], q, slope[ct][t]);
                        gav[ct] = fmaf(dt[ct][t], q, gav[ct]);
                    }
                }
                if (LANES_A) {
#pragma unroll
                    for (int ct = 0; ct < CT; ++ct) ga[(n * CT + ct) * 32 + at.lane] += gav[ct];
                } else {
                    add_row(ga + n * ROWS, gav, at);
                }
                if (CONST_B) add_row(gb + n * ROWS, gbc, at);
                if (CONST_C) add_row(gc + n * ROWS, gcc, at);
                if (!CONST_B) over_channels(gbv, at);
                if (!CONST_C) over_channels(gcv, at);
                float *mine = sums + (stage_turn & 1) * SUMS + (n - n0) * TILE + at.seg * T + first_step(at);
                if (LC <= T || at.lc < T)
#pragma unroll
                    for (int i = 0; i < LEFT; ++i) {
                        if (!CONST_B) mine[i] = gbv[i];
                        if (!CONST_C) mine[GROUP * TILE + i] = gcv[i];
                    }
            }
        }
        __syncwarp();
        if (start > at.first) fetch_entry(start - TILE);
#pragma unroll
        for (int ct = 0; ct < CT; ++ct) {
            int place = at.row(ct) * PITCH;
            float raw[T], x[T];
            read<true>(raw, tile + place, at.seg);
            read<true>(x, tile_u + place, at.seg);
#pragma unroll
            for (int t = 0; t < T; ++t) {
                float gd = fmaf(slope[ct][t], LN2, fed[ct][t] * x[t]);
#if SOFTPLUS
                gd *= recip(1.0f + exp2_(-(raw[t] + shift[ct]) * LOG2E));
#endif
                if (start + at.seg * T + t < at.end) gshift[ct] += gd;
                gskip[ct] = fmaf(gy[ct][t], x[t], gskip[ct]);
                raw[t] = gd;
                x[t] = fmaf(through[ct], gy[ct][t], fed[ct][t] * dt[ct][t]);
            }
            write(tile_of(turn) + place, raw, at.seg);
            write(tile_u_of(turn) + place, x, at.seg);
        }
        if (MAP) __syncthreads(); else __syncwarp();
        flush_tile<BACKWARD_WARP>(mover, buffer(turn), gdelta, MAP ? p.channels : p.length, at, start);
        flush_tile<BACKWARD_WARP>(mover, buffer(turn) + TILE_D, gu, MAP ? at.size : p.length, at, start);
    }
    __syncthreads();
    gather(stage_turn - 1, p, at, LAST_GROUP, at.first);
    const long long part = ((long long)at.chunk * p.batch + at.sample) * p.channels;
    for (int i = at.lane; i < STATES * ROWS; i += 32) {
        if (at.inner + i / STATES >= at.size) continue;
        long long to = (part + channel0 + i / STATES) * STATES + i % STATES;
        int from = i % STATES * ROWS + i / STATES;
        if (LANES_A) {
            float total = 0.0f;
            for (int seg = 0; seg < LS; ++seg) total += ga[lane_sum(i % STATES, i / STATES) + seg * LC];
            p.ga_parts[to] = total;
        } else {
            p.ga_parts[to] = ga[from];
        }
        if (CONST_B) p.gb_parts[to] = gb[from];
        if (CONST_C) p.gc_parts[to] = gc[from];
    }
    float total = over_segments(gskip, at), total_shift = over_segments(gshift, at);
    if constexpr (CT <= LS) {
        int row = at.seg * LC + at.lc;
        if (at.seg < CT && at.inner + row < at.size) {
            if (p.gskip_parts) p.gskip_parts[part + channel0 + row] = total;
            if (p.gbias_parts) p.gbias_parts[part + channel0 + row] = total_shift;
        }
    } else {
#pragma unroll
        for (int i = 0; i < CT / LS; ++i) {
            int row = (i * LS + at.seg) * LC + at.lc;
            if (at.inner + row >= at.size) continue;
            if (p.gskip_parts) p.gskip_parts[part + channel0 + row] = gskip[i];
            if (p.gbias_parts) p.gbias_parts[part + channel0 + row] = gshift[i];
        }
    }
}

// The sum number i of `size` of them, or W neighbours from there; else i becomes the number beyond these.
template <int W, class X>
__device__ __forceinline__ bool add_up(long long &i, const float *parts, int count, long long size, X *to) {
    if (i >= size / W) {
        i -= size / W;
        return false;
    }
    float total[W] = {};
#pragma unroll 4
    for (int part = 0; part < count; ++part) {
        Floats<W> v = *reinterpret_cast<const Floats<W> *>(parts + part * size + i * W);
#pragma unroll
        for (int w = 0; w < W; ++w) total[w] += v.x[w];
    }
#pragma unroll
    for (int w = 0; w < W; ++w) narrow(total[w], to[i * W + w]);
    return true;
}

// Sums of parts. The long ones first, V neighbours a thread: their rows are as long as those of the operands.
extern "C" __global__ void scan_sum(const Params p) {
    const int parts = p.chunks * p.batch;
    const long long matrix = (long long)p.channels * STATES, full = (long long)p.batch * p.groups * STATES * p.length;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (!CONST_B && p.gb_parts && add_up<V>(i, p.gb_parts, p.blocks, full, p.gb)) return;
    if (!CONST_C && p.gc_parts && add_up<V>(i, p.gc_parts, p.blocks, full, p.gc)) return;
    if (add_up<1>(i, p.ga_parts, parts, matrix, p.ga)) return;
    if (CONST_B && add_up<1>(i, p.gb_parts, parts, matrix, p.gb)) return;
    if (CONST_C && add_up<1>(i, p.gc_parts, parts, matrix, p.gc)) return;
    if (p.gskip && add_up<1>(i, p.gskip_parts, parts, p.channels, p.gskip)) return;
    if (p.gbias) add_up<1>(i, p.gbias_parts, parts, p.channels, p.gbias);
}
#endif
