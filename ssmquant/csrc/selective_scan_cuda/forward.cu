// The outputs, and the states that the backward pass begins its tiles with.

#if PASS == 0
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) scan_forward(const Params p) {
    const Place at(p);
    char *own = shared + 2 * (STAGE_B + STAGE_C) + at.warp * FORWARD_WARP;
    float *decay = reinterpret_cast<float *>(own + 2 * (TILE_D + TILE_U)), *state = decay + TABLE;
    const TB *b = p.b + (CONST_B ? 0 : at.sample * p.b_b + at.group * p.b_g);
    const TC *c = p.c + (CONST_C ? 0 : at.sample * p.c_b + at.group * p.c_g);
    const int channel0 = at.group * at.size + at.inner;
    const TU *u = rows_of(p.u, p.u_b, p.u_d, at);
    const TD *delta = delta_of(p, at);
    TU *y = p.y + plane(p, at);
    const long long slab = (long long)p.batch * STATES * p.channels;
    tables(decay, state, p.carry ? p.carry + at.chunk * slab : nullptr, p, at);
    float shift[CT], through[CT];
    vectors(shift, p.bias, at);
    vectors(through, p.skip, at);
    const Mover mover(at.lane);
    auto buffer = [&](int turn) { return shared + 2 * (STAGE_B + STAGE_C) + (turn & 1) * (TILE_D + TILE_U); };
    auto tile_of = [&](int turn) { return reinterpret_cast<TD *>(buffer(turn) + at.warp * FORWARD_WARP); };
    auto tile_u_of = [&](int turn) { return reinterpret_cast<TU *>(buffer(turn) + at.warp * FORWARD_WARP + TILE_D); };
    auto stage_b_of = [&](int turn) { return reinterpret_cast<TB *>(shared + (turn & 1) * (STAGE_B + STAGE_C)); };
    auto stage_c_of = [&](int turn) { return reinterpret_cast<TC *>(shared + (turn & 1) * (STAGE_B + STAGE_C) + STAGE_B); };
    auto fetch = [&](int turn, int start) {
        fetch_tile<FORWARD_WARP>(mover, buffer(turn), delta, p.delta_d, at, start, at.end);
        fetch_tile<FORWARD_WARP>(mover, buffer(turn) + TILE_D, u, p.u_d, at, start, at.end);
    };
    auto fetch_stage = [&](int turn, int n0, int start) {
        if (!CONST_B) stage(stage_b_of(turn), b, p.b_n, n0, at, start, at.end);
        if (!CONST_C) stage(stage_c_of(turn), c, p.c_n, n0, at, start, at.end);
    };
    fetch(0, at.first);
    fetch_stage(0, 0, at.first);

    int turn = 0, stage_turn = 0;
    for (int start = at.first; start < at.end; start += TILE, ++turn) {
        float dt[CT][T], drive[CT][T], out[CT][T], sum[CT];
        const int here = start + at.seg * T;
        float *saved = p.saved + here / SAVE * slab + (long long)at.sample * STATES * p.channels + at.channel(0);
        const bool keep = p.saved && here % SAVE == 0 && here < at.end;
        for (int n0 = 0; n0 < STATES; n0 += GROUP, ++stage_turn) {
            copy_done();
            __syncthreads();
            if (n0 + GROUP < STATES) {
                fetch_stage(stage_turn + 1, n0 + GROUP, start);
            } else if (start + TILE < at.end) {
                fetch_stage(stage_turn + 1, 0, start + TILE);
                fetch(turn + 1, start + TILE);
            }
            if (n0 == 0)
#pragma unroll
                for (int ct = 0; ct < CT; ++ct) {
                    int place = at.row(ct) * PITCH;
                    sum[ct] = sizes(dt[ct], tile_of(turn) + place, shift[ct], at.seg, at.end - here);
                    read<true>(drive[ct], tile_u_of(turn) + place, at.seg);
#pragma unroll
                    for (int t = 0; t < T; ++t) {
                        out[ct][t] = through[ct] * drive[ct][t];
                        drive[ct][t] *= dt[ct][t];
                    }
                }
            const TB *stage_b = stage_b_of(stage_turn);
            const TC *stage_c = stage_c_of(stage_turn);
#pragma unroll MIX
            for (int n = n0; n < n0 + GROUP && n < STATES; ++n) {
                SEGMENT(CONST_B, bv, stage_b)
                SEGMENT(CONST_C, cv, stage_c)
                float a[CT][T];
                Scan scan;
                scan.first = at.seg == 0;
#pragma unroll
                for (int ct = 0; ct < CT; ++ct) {
                    CONSTANT_OF(CONST_B, bv, p.b)
                    float a2 = decay[n * ROWS + at.row(ct)];
                    scan.state[ct] = state[n * ROWS + at.row(ct)];
                    scan.kept[ct] = exp2_(a2 * sum[ct]);
#pragma unroll
                    for (int t = 0; t < T; ++t) {
                        a[ct][t] = exp2_(dt[ct][t] * a2);
                        scan.made[ct] = t ? fmaf(a[ct][t], scan.made[ct], drive[ct][t] * bv[t]) : drive[ct][t] * bv[t];
                    }
                }
                run(scan);
#pragma unroll
                for (int ct = 0; ct < CT; ++ct) {
                    CONSTANT_OF(CONST_B, bv, p.b)
                    CONSTANT_OF(CONST_C, cv, p.c)
                    float h = scan.made[ct];
                    if (keep && at.real(ct)) saved[ct * LC] = h;
                    if (at.seg == LS - 1) state[n * ROWS + at.row(ct)] = scan.after[ct];
#pragma unroll
                    for (int t = 0; t < T; ++t) {
                        h = fmaf(a[ct][t], h, drive[ct][t] * bv[t]);
                        out[ct][t] = fmaf(cv[t], h, out[ct][t]);
                    }
                }
                saved += p.channels;
            }
        }
        __syncwarp();
#pragma unroll
        for (int ct = 0; ct < CT; ++ct) write(tile_u_of(turn) + at.row(ct) * PITCH, out[ct], at.seg);
        if (MAP) __syncthreads(); else __syncwarp();
        flush_tile<FORWARD_WARP>(mover, buffer(turn) + TILE_D, y, MAP ? at.size : p.length, at, start);
    }
    __syncwarp();
    if (at.chunk == p.chunks - 1)
        for (int i = at.lane; i < STATES * ROWS; i += 32)
            if (at.inner + i / STATES < at.size)
                p.last[((long long)at.sample * p.channels + channel0 + i / STATES) * STATES + i % STATES] = state[i % STATES * ROWS + i / STATES];
}
#endif
