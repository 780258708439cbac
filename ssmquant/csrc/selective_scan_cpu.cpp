// The CPU selective scan: plan, threads, and the sums over what tasks leave behind. C ABI, see selective_scan_cpu.h.

#include "selective_scan_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu_dtypes.h"
#include "cpu_threads.h"

extern const Path ssmquant_scan_portable;
#if defined(__x86_64__)
extern const Path ssmquant_scan_avx2, ssmquant_scan_avx512;
#endif

namespace {

// Tasks to aim at. Tiles of one group that are shared out leave B's and C's gradients to be added up afterwards, so the
// backward pass does that for less.
constexpr int64_t kTasks = 64, kBackwardTasks = 16;
// With fewer tiles of eight channels than this, time is cut as well, which costs a second pass over most of the work.
constexpr int64_t kFewTiles = 3, kFewTasks = 8, kLeastPieces = 16;
// States of one step that are worth the start of a thread.
constexpr int64_t kThreadWork = 1 << 18;

const Paths<Path> kPaths(SSMQUANT_PATHS(ssmquant_scan_));

int64_t useful_threads(const Call& call) {
  const int64_t work = call.batch * call.channels * call.length * (call.states + 2);
  return parts(std::min(call.threads, kMostThreads), work / kThreadWork);
}

Plan make_plan(const Call& call, bool backward) {
  Plan p{};
  const int64_t size = call.wide ? 8 : 4, N = call.states;
  const int64_t line = 64 / size;
  p.lanes = kPaths.found[call.path]->bytes / size;
  p.inner = call.channels / call.groups;
  p.tiles_in_group = divide_up(p.inner, p.lanes);
  p.tiles = p.tiles_in_group * call.groups;
  p.pieces = divide_up(call.length, kPiece);
  p.ranges = parts(kTasks, call.batch);
  p.blocks = parts(divide_up(backward ? kBackwardTasks : kTasks, p.ranges * call.groups), p.tiles_in_group);
  const int64_t eights = call.batch * call.groups * divide_up(p.inner, 8);
  p.chunks = eights < kFewTiles ? parts(kFewTasks / eights, p.pieces / kLeastPieces) : 1;
  p.tasks = p.ranges * p.chunks * call.groups * p.blocks;
  p.tiles_in_task = divide_up(p.tiles_in_group, p.blocks);

  int64_t used = 0;
  const auto take = [&](int64_t count) {
    const int64_t offset = used;
    used += divide_up(count, line) * line;
    return offset;
  };
  const int64_t wide = p.tiles * N * p.lanes, narrow = p.tiles * p.lanes;
  p.packed_size = call.batch * call.groups * p.pieces * N * kPiece;
  p.a = take(wide);
  p.b = take(call.constant_b ? wide : p.packed_size);
  p.c = take(call.constant_c ? wide : p.packed_size);
  p.skip = take(narrow);
  p.bias = take(narrow);
  p.states = take(p.chunks > 1 ? p.chunks * call.batch * wide : 0);
  p.totals = take(p.chunks > 1 ? p.chunks * call.batch * narrow : 0);
  const int64_t tile = kPiece * p.lanes;
  p.scratch_size = p.tiles_in_task * (N + 1) * p.lanes + 4 * tile;
  if (backward) {
    p.sums_size = ((1 + call.constant_b + call.constant_c) * N + 2) * p.lanes;
    p.sums = take(p.ranges * p.chunks * p.tiles * p.sums_size);
    p.parts_b = take(call.constant_b ? 0 : p.blocks * p.packed_size);
    p.parts_c = take(call.constant_c ? 0 : p.blocks * p.packed_size);
    p.scratch_size = p.tiles_in_task * (N * p.lanes + p.sums_size) + N * p.lanes + 24 * tile;
  }
  p.scratch_size = divide_up(p.scratch_size, line) * line;
  p.scratch = take(useful_threads(call) * p.scratch_size);
  p.size = used;
  return p;
}

// (D, N) -> (N, lanes) per tile, zeros in lanes that are no channels.
template <typename S>
void spread(const Plan& p, const void* from, int64_t states, S factor, S* to) {
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    const int64_t group = tile / p.tiles_in_group, offset = tile % p.tiles_in_group * p.lanes;
    for (int64_t n = 0; n < states; ++n) {
      for (int64_t i = 0; i < p.lanes; ++i) {
        const bool real = from != nullptr && offset + i < p.inner;
        const int64_t channel = group * p.inner + offset + i;
        *to++ = real ? static_cast<const S*>(from)[channel * states + n] * factor : S(0);
      }
    }
  }
}

template <typename S>
void prepare(const Call& call, const Plan& p) {
  S* work = static_cast<S*>(call.workspace);
  spread<S>(p, call.matrix_a, call.states, S(1.4426950408889634), work + p.a);
  if (call.constant_b) spread<S>(p, call.matrix_b, call.states, S(1), work + p.b);
  if (call.constant_c) spread<S>(p, call.matrix_c, call.states, S(1), work + p.c);
  spread<S>(p, call.skip, 1, S(1), work + p.skip);
  spread<S>(p, call.bias, 1, S(1), work + p.bias);
}

// From what chunks make of a zero state to the states that enter them, in place.
template <typename S>
void carry(const Call& call, const Plan& p, bool reverse) {
  S* work = static_cast<S*>(call.workspace);
  const int64_t N = call.states, W = p.lanes;
  for (int64_t sample = 0; sample < call.batch; ++sample) {
    for (int64_t tile = 0; tile < p.tiles; ++tile) {
      const int64_t group = tile / p.tiles_in_group, offset = tile % p.tiles_in_group * W;
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t i = 0; i < W && offset + i < p.inner; ++i) {
          const int64_t channel = group * p.inner + offset + i;
          const S* g_last = reverse ? static_cast<const S*>(call.g_last) : nullptr;
          S h = g_last != nullptr ? g_last[(sample * call.channels + channel) * N + n] : S(0);
          for (int64_t k = 0; k < p.chunks; ++k) {
            const int64_t slot = ((reverse ? p.chunks - 1 - k : k) * call.batch + sample) * p.tiles + tile;
            S& state = work[p.states + (slot * N + n) * W + i];
            const S decay = std::exp2(work[p.totals + slot * W + i] * work[p.a + (tile * N + n) * W + i]);
            const S end = state;
            state = h;
            h = decay * h + end;
          }
        }
      }
    }
  }
}

template <typename S>
void run(const Call& call, bool backward) {
  const Plan p = make_plan(call, backward);
  const Path& path = *kPaths.found[call.path];
  const Run task = (backward ? path.backward : path.forward)[call.wide ? 1 : 0];
  const int64_t threads = useful_threads(call);
  prepare<S>(call, p);
  const auto pass = [&](Pass which) {
    share(threads, p.tasks, [&](int64_t i, int64_t thread) { task(call, p, which, i, thread); });
  };
  if (!call.constant_b || !call.constant_c) {
    const Run pack = path.pack[call.wide ? 1 : 0];
    share(threads, call.batch * call.groups, [&](int64_t i, int64_t t) { pack(call, p, Pass::kWhole, i, t); });
  }
  if (p.chunks == 1) {
    pass(Pass::kWhole);
  } else {
    pass(Pass::kEnds);
    carry<S>(call, p, backward);
    pass(Pass::kMain);
  }
}

// Sums over ranges and chunks of what does not depend on time; `skip` values of a tile go before those wanted.
template <typename S>
void gather(const Call& call, const Plan& p, int64_t skip, int64_t states, void* to) {
  if (to == nullptr) return;
  const S* sums = static_cast<const S*>(call.workspace) + p.sums;
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    const int64_t group = tile / p.tiles_in_group, offset = tile % p.tiles_in_group * p.lanes;
    for (int64_t i = 0; i < p.lanes && offset + i < p.inner; ++i) {
      const int64_t channel = group * p.inner + offset + i;
      for (int64_t n = 0; n < states; ++n) {
        S total = 0;
        for (int64_t slot = 0; slot < p.ranges * p.chunks; ++slot) {
          total += sums[(slot * p.tiles + tile) * p.sums_size + skip + n * p.lanes + i];
        }
        static_cast<S*>(to)[channel * states + n] = total;
      }
    }
  }
}

// Sums over blocks of tiles, unpacked into B's or C's gradient.
template <typename S>
void join(const Call& call, const Plan& p, int64_t from, const Result& to, int64_t threads) {
  share(threads, call.batch * call.groups, [&](int64_t task, int64_t) {
    const S* parts = static_cast<const S*>(call.workspace) + from + task * p.pieces * call.states * kPiece;
    for (int64_t n = 0; n < call.states; ++n) {
      for (int64_t first = 0; first < call.length; first += kPiece) {
        const S* part = parts + first * call.states + n * kPiece;
        S sums[kPiece];
        std::memcpy(sums, part, sizeof(sums));
        for (int64_t block = 1; block < p.blocks; ++block) {
          for (int64_t i = 0; i < kPiece; ++i) sums[i] += part[block * p.packed_size + i];
        }
        const int64_t row = (task * call.states + n) * call.length + first;
        write_row<S>(to.dtype, sums, at(to.data, to.dtype, row), std::min(kPiece, call.length - first));
      }
    }
  });
}

template <typename S>
void run_backward(const Call& call) {
  run<S>(call, true);
  const Plan p = make_plan(call, true);
  const int64_t all = call.states * p.lanes;
  gather<S>(call, p, 0, call.states, call.ga);
  int64_t skip = all;
  if (call.constant_b) {
    gather<S>(call, p, skip, call.states, call.gb.data);
    skip += all;
  }
  if (call.constant_c) {
    gather<S>(call, p, skip, call.states, call.gc.data);
    skip += all;
  }
  gather<S>(call, p, skip, 1, call.gskip);
  gather<S>(call, p, skip + p.lanes, 1, call.gbias);
  if (!call.constant_b) join<S>(call, p, p.parts_b, call.gb, useful_threads(call));
  if (!call.constant_c) join<S>(call, p, p.parts_c, call.gc, useful_threads(call));
}

}  // namespace

// How many instruction sets this machine can run, best first, and their names.
SSMQUANT_EXPORT int64_t ssmquant_scan_paths() { return kPaths.count; }

SSMQUANT_EXPORT const char* ssmquant_scan_path(int64_t index) { return kPaths.found[index]->name; }

// Elements of the state dtype that a call needs as its workspace.
SSMQUANT_EXPORT int64_t ssmquant_scan_workspace(const Call* call, int64_t backward) {
  return make_plan(*call, backward != 0).size;
}

SSMQUANT_EXPORT void ssmquant_scan_forward(const Call* call) {
  call->wide ? run<double>(*call, false) : run<float>(*call, false);
}

SSMQUANT_EXPORT void ssmquant_scan_backward(const Call* call) {
  call->wide ? run_backward<double>(*call) : run_backward<float>(*call);
}
