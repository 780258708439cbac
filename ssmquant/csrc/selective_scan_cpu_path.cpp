// Tasks of the CPU selective scan, for one instruction set. SSMQUANT_PATH is its name; see selective_scan_cpu.h.

#include "selective_scan_cpu.h"
#include "selective_scan_cpu_steps.h"
#include "selective_scan_cpu_tiles.h"

namespace {

template <typename S>
void forward(const Call& call, const Plan& plan, Pass pass, int64_t index, int64_t thread) {
  constexpr int W = kLanes<S>;
  const FlushDenormals flush;
  const Task task = task_of(call, plan, index);
  const int64_t N = call.states;
  S* work = static_cast<S*>(call.workspace);
  Scratch<S> scratch{work + plan.scratch + thread * plan.scratch_size};
  S* const h = scratch.take(task.count * N * W);
  S* const totals = scratch.take(task.count * W);
  S* const dt = scratch.take(kSteps * W);
  S* const x = scratch.take(kSteps * W);
  S* const y = scratch.take(kSteps * W);
  S* const rows = scratch.take(kSteps * W);

  for (int64_t sample = task.first_sample; sample < task.last_sample; ++sample) {
    const int64_t slot = (task.chunk * call.batch + sample) * plan.tiles + task.first_tile;
    if (pass == Pass::kMain) {
      copy(work + plan.states + slot * N * W, h, task.count * N * W);
    } else {
      zero(h, task.count * N * W);
    }
    zero(totals, task.count * W);
    for (int64_t piece = task.first_piece; piece < task.last_piece; ++piece) {
      const int64_t first = piece * kPiece;
      const int steps = int(call.length - first < kPiece ? call.length - first : kPiece);
      for (int64_t r = 0; r < task.count; ++r) {
        const Shared<S> shared(call, plan, task.first_tile + r, sample, piece);
        const Where<S> w = where<S>(plan, task.first_tile + r);
        S* const own = h + r * N * W;
        if (call.save && pass != Pass::kEnds) {
          S* to = static_cast<S*>(call.saved) + (piece * call.batch + sample) * N * call.channels + w.channel;
          for (int64_t n = 0; n < N; ++n) {
            if (w.lanes == W) {
              store(to + n * call.channels, load(own + n * W));
            } else {
              copy(own + n * W, to + n * call.channels, w.lanes);
            }
          }
        }
        read_tile<S>(call.delta, sample, w, first, steps, rows, dt);
        read_tile<S>(call.u, sample, w, first, steps, rows, y);
        if (piece + 1 < task.last_piece) {
          prefetch_tile<S>(call.delta, sample, w, first + kPiece);
          prefetch_tile<S>(call.u, sample, w, first + kPiece);
        }
        discretize<S, false>(call, shared.bias, steps, dt, nullptr);
        const Vec<S> skip = load(shared.skip);
        Vec<S> total = load(totals + r * W);
        for (int i = 0; i < steps * W; i += W) {
          const Vec<S> u = load(y + i), step = load(dt + i);
          store(x + i, step * u);
          store(y + i, call.skip ? skip * u : Vec<S>{});
          total = total + step;
        }
        store(totals + r * W, total);
        for_forms(call, [&](auto form_b, auto form_c) {
          for_blocks(N, [&](auto block, int64_t n) {
            constexpr bool constant_b = decltype(form_b)::value, constant_c = decltype(form_c)::value;
            advance<S, decltype(block)::value, constant_b, constant_c>(
                dt, x, y, shared.b + n * kStateStride<S, constant_b>, shared.c + n * kStateStride<S, constant_c>,
                shared.a + n * W, own + n * W, steps);
          });
        });
        if (pass != Pass::kEnds) write_tile<S>(call.y, call, sample, w, first, steps, rows, y);
      }
    }
    if (pass == Pass::kEnds) {
      copy(h, work + plan.states + slot * N * W, task.count * N * W);
      copy(totals, work + plan.totals + slot * W, task.count * W);
    } else if (task.chunk == plan.chunks - 1) {
      for (int64_t r = 0; r < task.count; ++r) {
        const Where<S> w = where<S>(plan, task.first_tile + r);
        S* to = static_cast<S*>(call.last) + (sample * call.channels + w.channel) * N;
        scatter_states(h + r * N * W, N, w.lanes, to);
      }
    }
  }
}

template <typename S>
struct BackwardTask {
  const Call& call;
  const Plan& plan;
  const Task task;
  const int64_t N;
  // Scratch. k: the gradient of the states behind what has been walked, (tiles, N, lanes).
  S *k, *recent, *h, *rows, *kept;
  Tile<S> tile;
  int steps = 0;  // in the current piece
  S* sums;        // of this task, (tiles, sums_size); `recent` has what is to be added to them

  BackwardTask(const Call& call, const Plan& plan, int64_t index, int64_t thread)
      : call(call), plan(plan), task(task_of(call, plan, index)), N(call.states) {
    constexpr int W = kLanes<S>;
    S* work = static_cast<S*>(call.workspace);
    Scratch<S> scratch{work + plan.scratch + thread * plan.scratch_size};
    k = scratch.take(task.count * N * W);
    recent = scratch.take(task.count * plan.sums_size);
    h = scratch.take(N * W);
    rows = scratch.take(kSteps * W);
    tile.base = scratch.take(Tile<S>::count * Tile<S>::size);
    kept = scratch.take(4 * kKept * kSteps * W);
    sums = work + plan.sums + ((task.range * plan.chunks + task.chunk) * plan.tiles + task.first_tile) * plan.sums_size;
  }

  // Sums over time take two steps, lest small terms be lost in long ones.
  void flush_sums() {
    for (int64_t i = 0; i < task.count * plan.sums_size; i += kLanes<S>) {
      store(sums + i, load(sums + i) + load(recent + i));
    }
    zero(recent, task.count * plan.sums_size);
  }

  struct States {
    const S* first;
    int64_t stride;  // from one state to the next
  };

  // States of a tile before a piece.
  States saved(int64_t piece, int64_t sample, const Where<S>& w) {
    const S* from = static_cast<const S*>(call.saved) + (piece * call.batch + sample) * N * call.channels + w.channel;
    if (w.lanes == kLanes<S>) return {from, call.channels};
    zero(h, N * kLanes<S>);
    for (int64_t n = 0; n < N; ++n) copy(from + n * call.channels, h + n * kLanes<S>, w.lanes);
    return {h, kLanes<S>};
  }

  void run_tile(int64_t r, int64_t sample, int64_t piece, const Shared<S>& shared, const Where<S>& w) {
    constexpr int W = kLanes<S>;
    const Tile<S> tile = this->tile;
    const int steps = this->steps;
    const int64_t first = piece * kPiece;
    const States before = saved(piece, sample, w);
    const int64_t packed = task.block * plan.packed_size + packed_at(call, plan, sample, task.group, piece);
    S* const gb = static_cast<S*>(call.workspace) + plan.parts_b + packed;
    S* const gc = static_cast<S*>(call.workspace) + plan.parts_c + packed;
    S* const sum = recent + r * plan.sums_size;
    S* const sum_b = sum + N * W;
    S* const sum_c = sum_b + (call.constant_b ? N * W : 0);
    S* const sum_skip = sum_c + (call.constant_c ? N * W : 0);
    for (int i = 0; i < steps * W; i += W) store(tile.x() + i, load(tile.dt() + i) * load(tile.u() + i));
    zero(tile.fed(), steps * W);
    zero(tile.slowed(), steps * W);
    for_forms(call, [&](auto form_b, auto form_c) {
      for_blocks(N, [&](auto block, int64_t n) {
        constexpr bool constant_b = decltype(form_b)::value, constant_c = decltype(form_c)::value;
        sweep<S, decltype(block)::value, constant_b, constant_c>(
            tile, steps, w.lanes, shared.b + n * kStateStride<S, constant_b>,
            shared.c + n * kStateStride<S, constant_c>, shared.a + n * W, before.first + n * before.stride,
            before.stride, k + (r * N + n) * W, {sum + n * W, sum_b + n * W, sum_c + n * W}, kept, r > 0,
            gb + n * kSteps, gc + n * kSteps);
      });
    });
    const Vec<S> skip = load(shared.skip);
    Vec<S> total_skip{}, total_bias{};
    for (int i = 0; i < steps * W; i += W) {
      const Vec<S> u = load(tile.u() + i), g = load(tile.g() + i), fed = load(tile.fed() + i);
      const Vec<S> gu = load(tile.dt() + i) * fed;
      const Vec<S> gdelta = (u * fed + load(tile.slowed() + i) * S(kLn2)) * load(tile.slope() + i);
      store(tile.fed() + i, call.skip ? gu + skip * g : gu);
      store(tile.slowed() + i, gdelta);
      total_skip = total_skip + g * u;
      total_bias = total_bias + gdelta;
    }
    store(sum_skip, load(sum_skip) + total_skip);
    store(sum_skip + W, load(sum_skip + W) + total_bias);
    write_tile<S>(call.gu, call, sample, w, first, steps, rows, tile.fed());
    write_tile<S>(call.gdelta, call, sample, w, first, steps, rows, tile.slowed());
  }

  void ends_tile(int64_t r, const Shared<S>& shared) {
    constexpr int W = kLanes<S>;
    for_forms(call, [&](auto, auto form_c) {
      for_blocks(N, [&](auto block, int64_t n) {
        constexpr bool constant_c = decltype(form_c)::value;
        retreat<S, decltype(block)::value, constant_c>(tile.dt(), tile.g(),
                                                       shared.c + n * kStateStride<S, constant_c>,
                                                       shared.a + n * W, k + (r * N + n) * W, steps);
      });
    });
    S* const total = recent + r * W;
    for (int i = 0; i < steps * W; i += W) store(total, load(total) + load(tile.dt() + i));
  }

  void enter(int64_t sample, Pass pass) {
    constexpr int W = kLanes<S>;
    const int64_t slot = (task.chunk * call.batch + sample) * plan.tiles + task.first_tile;
    if (pass == Pass::kMain) {
      copy(static_cast<const S*>(call.workspace) + plan.states + slot * N * W, k, task.count * N * W);
    } else if (pass == Pass::kEnds || call.g_last == nullptr) {
      zero(k, task.count * N * W);
    } else {
      for (int64_t r = 0; r < task.count; ++r) {
        const Where<S> w = where<S>(plan, task.first_tile + r);
        const S* from = static_cast<const S*>(call.g_last) + (sample * call.channels + w.channel) * N;
        gather_states(from, N, w.lanes, k + r * N * W);
      }
    }
  }

  void run(Pass pass) {
    constexpr int W = kLanes<S>;
    S* work = static_cast<S*>(call.workspace);
    int pieces = 0;
    zero(recent, task.count * plan.sums_size);
    if (pass != Pass::kEnds) zero(sums, task.count * plan.sums_size);
    for (int64_t sample = task.first_sample; sample < task.last_sample; ++sample) {
      enter(sample, pass);
      for (int64_t piece = task.last_piece - 1; piece >= task.first_piece; --piece) {
        const int64_t first = piece * kPiece;
        steps = int(call.length - first < kPiece ? call.length - first : kPiece);
        for (int64_t r = 0; r < task.count; ++r) {
          const Shared<S> shared(call, plan, task.first_tile + r, sample, piece);
          const Where<S> w = where<S>(plan, task.first_tile + r);
          read_tile<S>(call.delta, sample, w, first, steps, rows, tile.dt());
          read_tile<S>(call.g, sample, w, first, steps, rows, tile.g());
          if (pass != Pass::kEnds) read_tile<S>(call.u, sample, w, first, steps, rows, tile.u());
          if (piece > task.first_piece) {
            for (const Operand* x : {&call.delta, &call.g, &call.u}) prefetch_tile<S>(*x, sample, w, first - kPiece);
          }
          discretize<S, true>(call, shared.bias, steps, tile.dt(), tile.slope());
          if (pass == Pass::kEnds) {
            ends_tile(r, shared);
          } else {
            run_tile(r, sample, piece, shared, w);
          }
        }
        if (++pieces % 32 == 0 && pass != Pass::kEnds) flush_sums();
      }
      if (pass == Pass::kEnds) {
        const int64_t slot = (task.chunk * call.batch + sample) * plan.tiles + task.first_tile;
        copy(k, work + plan.states + slot * N * W, task.count * N * W);
        copy(recent, work + plan.totals + slot * W, task.count * W);
        zero(recent, task.count * W);
      }
    }
    if (pass != Pass::kEnds) flush_sums();
  }
};

template <typename S>
void backward(const Call& call, const Plan& plan, Pass pass, int64_t index, int64_t thread) {
  const FlushDenormals flush;
  BackwardTask<S>(call, plan, index, thread).run(pass);
}

}  // namespace

extern const Path SSMQUANT_JOIN(ssmquant_scan_, SSMQUANT_PATH);
const Path SSMQUANT_JOIN(ssmquant_scan_, SSMQUANT_PATH) = {
    SSMQUANT_TEXT(SSMQUANT_PATH),
    kBytes,
    {pack<float>, pack<double>},
    {forward<float>, forward<double>},
    {backward<float>, backward<double>},
};
