// Between tensors and what the steps of the CPU selective scan work on: tiles, packed B and C, step sizes.
#pragma once

#include "cpu_dtypes.h"
#include "cpu_simd.h"
#include "selective_scan_cpu.h"

namespace {

constexpr int kSteps = int(kPiece);

template <typename S>
void copy(const S* from, S* to, int64_t count) {
  if (count > 0) std::memcpy(to, from, size_t(count) * sizeof(S));
}

template <typename S>
void zero(S* to, int64_t count) {
  std::memset(to, 0, size_t(count) * sizeof(S));
}

// Parts of a thread's scratch, one after another.
template <typename S>
struct Scratch {
  S* next;

  S* take(int64_t count) {
    S* p = next;
    next += count;
    return p;
  }
};

template <typename S>
struct Where {
  int64_t channel;  // the tile's first one
  int lanes;        // how many of its lanes are channels
};

template <typename S>
Where<S> where(const Plan& plan, int64_t tile) {
  const int64_t group = tile / plan.tiles_in_group, offset = tile % plan.tiles_in_group * kLanes<S>;
  const int64_t left = plan.inner - offset;
  return {group * plan.inner + offset, int(left < kLanes<S> ? left : kLanes<S>)};
}

template <typename S>
constexpr Dtype kOwn = sizeof(S) == 8 ? kFloat64 : kFloat32;

// Steps of a tile, one vector each, from (B, D, L); lanes that are no channels are zero. `rows` is scratch.
template <typename S>
void read_tile(const Operand& x, int64_t sample, Where<S> w, int64_t first, int steps, S* rows, S* tile) {
  constexpr int W = kLanes<S>;
  const void* base = at(x.data, x.dtype, sample * x.batch + w.channel * x.row + first * x.time);
  if (x.row == 1 && x.time != 1) {
    for (int t = 0; t < steps; ++t) {
      read_row(x.dtype, at(base, x.dtype, t * x.time), 1, tile + t * W, w.lanes);
      for (int i = w.lanes; i < W; ++i) tile[t * W + i] = 0;
    }
    return;
  }
  const S* from = rows;
  int64_t stride = kSteps;
  if (x.dtype == kOwn<S> && x.time == 1 && w.lanes == W && steps == kSteps) {
    from = static_cast<const S*>(base);
    stride = x.row;
  } else {
    for (int i = 0; i < W; ++i) {
      if (i < w.lanes) {
        read_row(x.dtype, at(base, x.dtype, i * x.row), x.time, rows + i * kSteps, steps);
      } else {
        for (int t = 0; t < steps; ++t) rows[i * kSteps + t] = 0;
      }
    }
  }
  for (int t = 0; t < steps; t += W) transpose<S>(from + t, stride, tile + t * W, W);
}

template <typename S>
void write_tile(const Result& x, const Call& call, int64_t sample, Where<S> w, int64_t first, int steps, S* rows,
                const S* tile) {
  constexpr int W = kLanes<S>;
  void* base = at(x.data, x.dtype, (sample * call.channels + w.channel) * call.length + first);
  const bool direct = x.dtype == kOwn<S> && w.lanes == W && steps == kSteps;
  S* to = direct ? static_cast<S*>(base) : rows;
  const int64_t stride = direct ? call.length : kSteps;
  for (int t = 0; t < steps; t += W) transpose<S>(tile + t * W, W, to + t, stride);
  if (direct) return;
  for (int i = 0; i < w.lanes; ++i) write_row<S>(x.dtype, rows + i * kSteps, at(base, x.dtype, i * call.length), steps);
}

// Where the piece of a sample and group is in what is packed, (B, G, pieces, N, kPiece).
inline int64_t packed_at(const Call& call, const Plan& plan, int64_t sample, int64_t group, int64_t piece) {
  return ((sample * call.groups + group) * plan.pieces + piece) * call.states * kPiece;
}

template <typename S>
void pack_matrix(const Operand& x, const Call& call, const Plan& plan, int64_t sample, int64_t group, S* packed) {
  S* to = packed + packed_at(call, plan, sample, group, 0);
  const void* base = at(x.data, x.dtype, sample * x.batch + group * x.group);
  for (int64_t n = 0; n < call.states; ++n) {
    const void* row = at(base, x.dtype, n * x.row);
    for (int64_t first = 0; first < call.length; first += kPiece) {
      const int64_t steps = call.length - first < kPiece ? call.length - first : kPiece;
      read_row(x.dtype, at(row, x.dtype, first * x.time), x.time, to + (first * call.states + n * kPiece), steps);
    }
  }
}

// Task `index` of (B, G): its B and C in the order in which tasks read them.
template <typename S>
void pack(const Call& call, const Plan& plan, Pass, int64_t index, int64_t) {
  S* work = static_cast<S*>(call.workspace);
  const int64_t sample = index / call.groups, group = index % call.groups;
  if (!call.constant_b) pack_matrix(call.b, call, plan, sample, group, work + plan.b);
  if (!call.constant_c) pack_matrix(call.c, call, plan, sample, group, work + plan.c);
}

// Asks for a tile of the next piece. The rows of a tile are far apart, so the hardware does not foresee them.
template <typename S>
void prefetch_tile(const Operand& x, int64_t sample, Where<S> w, int64_t first) {
  if (x.time != 1) return;
  const char* base = static_cast<const char*>(at(x.data, x.dtype, sample * x.batch + w.channel * x.row + first));
  for (int i = 0; i < w.lanes; ++i) {
    const char* row = base + i * x.row * size_of(x.dtype);
    for (int64_t b = 0; b < kPiece * size_of(x.dtype); b += 64) __builtin_prefetch(row + b, 0, 2);
  }
}

// From raw step sizes to dt, and to what d(raw) is of d(dt). Also of what lies behind the last step, if anything.
template <typename S, bool slopes>
void discretize(const Call& call, const S* bias, int steps, S* dt, S* slope) {
  constexpr int W = kLanes<S>, count = 2;
  static_assert(kSteps % count == 0);
  const Vec<S> shift = load(bias), one = S(1) - Vec<S>{};
  for (int t = 0; t < steps; t += count) {
    Vec<S> x[count], s[count];
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) {
      x[j] = load(dt + (t + j) * W) + shift;
      s[j] = one;
    }
    if (call.softplus) softplus<slopes, count>(x, s);
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) {
      store(dt + (t + j) * W, x[j]);
      if constexpr (slopes) store(slope + (t + j) * W, s[j]);
    }
  }
}

template <typename S>
struct Shared {  // what tasks only read: (N, lanes) or (lanes) of a tile, (N, kPiece) of a piece
  const S *a, *b, *c, *skip, *bias;

  Shared(const Call& call, const Plan& plan, int64_t tile, int64_t sample, int64_t piece) {
    const S* base = static_cast<const S*>(call.workspace);
    const int64_t wide = tile * call.states * kLanes<S>, narrow = tile * kLanes<S>;
    const int64_t packed = packed_at(call, plan, sample, tile / plan.tiles_in_group, piece);
    a = base + plan.a + wide;
    b = base + plan.b + (call.constant_b ? wide : packed);
    c = base + plan.c + (call.constant_c ? wide : packed);
    skip = base + plan.skip + narrow;
    bias = base + plan.bias + narrow;
  }
};



// (N, lanes) <-> row `d` of (D, N)
template <typename S>
void gather_states(const S* from, int64_t states, int lanes, S* to) {
  for (int64_t n = 0; n < states; ++n) {
    for (int i = 0; i < kLanes<S>; ++i) to[n * kLanes<S> + i] = i < lanes ? from[i * states + n] : S(0);
  }
}

template <typename S>
void scatter_states(const S* from, int64_t states, int lanes, S* to) {
  for (int i = 0; i < lanes; ++i) {
    for (int64_t n = 0; n < states; ++n) to[i * states + n] = from[n * kLanes<S> + i];
  }
}

}  // namespace
