// The recurrence of the CPU selective scan and its gradients: one piece of one tile at a time.
#pragma once

#include <type_traits>

#include "cpu_simd.h"
#include "selective_scan_cpu.h"
#include "selective_scan_cpu_tiles.h"

namespace {

// Elements of B or C between one state and the next.
template <typename S, bool constant>
constexpr int kStateStride = constant ? kLanes<S> : kSteps;

// Value of B or C for a state j of the block and step t: a scalar, or a vector where constant.
template <typename S, bool constant>
struct Matrix;

template <typename S>
struct Matrix<S, false> {
  const S* p;
  SSMQUANT_INLINE S get(int j, int t) const { return p[j * kStateStride<S, false> + t]; }
};

template <typename S>
struct Matrix<S, true> {
  const S* p;
  SSMQUANT_INLINE Vec<S> get(int j, int) const { return load(p + j * kStateStride<S, true>); }
};

// One piece of a tile, for a block of states that fits the registers.
template <typename S, int block, bool constant_b, bool constant_c>
void advance(const S* dt, const S* x, S* y, const S* b, const S* c, const S* a, S* h, int steps) {
  constexpr int W = kLanes<S>;
  const Matrix<S, constant_b> mb{b};
  const Matrix<S, constant_c> mc{c};
  Vec<S> state[block], rate[block];
  for (int j = 0; j < block; ++j) {
    state[j] = load(h + j * W);
    rate[j] = load(a + j * W);
  }
  for (int t = 0; t < steps; ++t) {
    const Vec<S> step = load(dt + t * W), drive = load(x + t * W);
    Vec<S> out = load(y + t * W), decay[block];
#pragma GCC unroll 4
    for (int j = 0; j < block; ++j) decay[j] = step * rate[j];
    exp2<block>(decay, S(0));
#pragma GCC unroll 4
    for (int j = 0; j < block; ++j) state[j] = decay[j] * state[j] + drive * mb.get(j, t);
#pragma GCC unroll 4
    for (int j = 0; j < block; ++j) out = out + state[j] * mc.get(j, t);
    store(y + t * W, out);
  }
  for (int j = 0; j < block; ++j) store(h + j * W, state[j]);
}

// The gradient of the state before a piece, from that after it.
template <typename S, int block, bool constant_c>
void retreat(const S* dt, const S* g, const S* c, const S* a, S* k, int steps) {
  constexpr int W = kLanes<S>;
  const Matrix<S, constant_c> mc{c};
  for (int t = steps - 1; t >= 0; --t) {
    const Vec<S> step = load(dt + t * W), gy = load(g + t * W);
    Vec<S> decay[block];
#pragma GCC unroll 4
    for (int j = 0; j < block; ++j) decay[j] = step * load(a + j * W);
    exp2<block>(decay, S(0));
#pragma GCC unroll 4
    for (int j = 0; j < block; ++j) store(k + j * W, decay[j] * (gy * mc.get(j, t) + load(k + j * W)));
  }
}

// Sums over lanes of kSteps vectors, those of step t `stride` behind those of step t - 1; lanes that are no channels
// do not count. Added to `to`, or put there.
template <typename S>
void lane_sums(const S* from, int64_t stride, int lanes, int steps, bool add, S* to) {
  constexpr int W = kLanes<S>;
  for (int t = 0; t < steps; t += W) {
    Vec<S> rows[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = load(from + (t + i) * stride);
    if (lanes < W) {  // a product with zero would not do: there may be NaN
      typename Simd<S>::I index{};
      for (int i = 0; i < W; ++i) index[i] = i;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) rows[i] = index < typename Simd<S>::Lane(lanes) ? rows[i] : Vec<S>{};
    }
    const Vec<S> sums = row_sums<S>(rows);
    store(to + t, add ? load(to + t) + sums : sums);
  }
}

// Vectors of one piece of a tile, (kSteps, lanes) each, one after another so that one register addresses all.
template <typename S>
struct Tile {
  static constexpr int size = kSteps * kLanes<S>, count = 7;
  S* base;
  SSMQUANT_INLINE S* u() const { return base; }
  SSMQUANT_INLINE S* dt() const { return base + size; }
  SSMQUANT_INLINE S* slope() const { return base + 2 * size; }
  SSMQUANT_INLINE S* x() const { return base + 3 * size; }
  SSMQUANT_INLINE S* g() const { return base + 4 * size; }
  SSMQUANT_INLINE S* fed() const { return base + 5 * size; }     // gradient of x
  SSMQUANT_INLINE S* slowed() const { return base + 6 * size; }  // gradient of dt through the decays, over ln 2
};

// What the way forwards keeps for the way back, and products to be summed over lanes: (kSteps, block, kKept, lanes).
constexpr int kKept = 4, kDecay = 0, kBefore = 1, kProductB = 2, kProductC = 3;

// Where sums over time go, (block, lanes) each.
template <typename S>
struct Sums {
  S *a, *b, *c;
};

// Gradients of one piece of a tile, for a block of states: forwards from h, the states before the piece, keeping decays
// and decayed states, and back with k, the gradient of the states after it, which becomes that of the states before.
template <typename S, int block, bool constant_b, bool constant_c>
void sweep(Tile<S> tile, int steps, int lanes, const S* b, const S* c, const S* a, const S* h, int64_t stride, S* k,
           Sums<S> sums, S* kept, bool add, S* gb, S* gc) {
  constexpr int W = kLanes<S>, row = block * kKept * W;
  const Matrix<S, constant_b> mb{b};
  const Matrix<S, constant_c> mc{c};
  const Vec<S> zero{};
  Vec<S> rate[block];
  for (int j = 0; j < block; ++j) rate[j] = load(a + j * W);
  {
    Vec<S> state[block], sum_c[block];
    for (int j = 0; j < block; ++j) {
      state[j] = load(h + j * stride);
      sum_c[j] = zero;
    }
    for (int t = 0; t < steps; ++t) {
      const Vec<S> step = load(tile.dt() + t * W), drive = load(tile.x() + t * W), gy = load(tile.g() + t * W);
      Vec<S> decay[block];
#pragma GCC unroll 4
      for (int j = 0; j < block; ++j) decay[j] = step * rate[j];
      exp2<block>(decay, S(0));
#pragma GCC unroll 4
      for (int j = 0; j < block; ++j) {
        S* const to = kept + t * row + j * kKept * W;
        const Vec<S> left = decay[j] * state[j];
        state[j] = left + drive * mb.get(j, t);
        store(to + kDecay * W, decay[j]);
        store(to + kBefore * W, left);
        if constexpr (constant_c) {
          sum_c[j] = sum_c[j] + gy * state[j];
        } else {
          store(to + kProductC * W, gy * state[j]);
        }
      }
    }
    if constexpr (constant_c) {
      for (int j = 0; j < block; ++j) store(sums.c + j * W, load(sums.c + j * W) + sum_c[j]);
    }
  }
  Vec<S> after[block], sum_a[block], sum_b[block];
  for (int j = 0; j < block; ++j) {
    after[j] = load(k + j * W);
    sum_a[j] = sum_b[j] = zero;
  }
  for (int t = steps - 1; t >= 0; --t) {
    const Vec<S> step = load(tile.dt() + t * W), drive = load(tile.x() + t * W), gy = load(tile.g() + t * W);
    Vec<S> fed = load(tile.fed() + t * W), slowed = load(tile.slowed() + t * W);
#pragma GCC unroll 4
    for (int j = 0; j < block; ++j) {
      S* const from = kept + t * row + j * kKept * W;
      const Vec<S> gh = gy * mc.get(j, t) + after[j];
      const Vec<S> q = gh * load(from + kBefore * W);  // gradient of dt * A
      after[j] = gh * load(from + kDecay * W);
      fed = fed + gh * mb.get(j, t);
      slowed = slowed + q * rate[j];
      sum_a[j] = sum_a[j] + q * step;
      if constexpr (constant_b) {
        sum_b[j] = sum_b[j] + gh * drive;
      } else {
        store(from + kProductB * W, gh * drive);
      }
    }
    store(tile.fed() + t * W, fed);
    store(tile.slowed() + t * W, slowed);
  }
  for (int j = 0; j < block; ++j) {
    store(k + j * W, after[j]);
    store(sums.a + j * W, load(sums.a + j * W) + sum_a[j]);
    const S* const products = kept + j * kKept * W;
    if constexpr (constant_b) {
      store(sums.b + j * W, load(sums.b + j * W) + sum_b[j]);
    } else {
      lane_sums<S>(products + kProductB * W, row, lanes, steps, add, gb + j * kSteps);
    }
    if constexpr (!constant_c) {
      lane_sums<S>(products + kProductC * W, row, lanes, steps, add, gc + j * kSteps);
    }
  }
}

// Calls f.template operator()<block>(n) for blocks of states that make up all of them.
template <typename F>
SSMQUANT_INLINE void for_blocks(int64_t states, const F& f) {
  int64_t n = 0;
  for (; n + 4 <= states; n += 4) f(std::integral_constant<int, 4>(), n);
  if (n + 2 <= states) {
    f(std::integral_constant<int, 2>(), n);
    n += 2;
  }
  if (n < states) f(std::integral_constant<int, 1>(), n);
}

// Calls f with two constants for whether B and C are constant.
template <typename F>
SSMQUANT_INLINE void for_forms(const Call& call, const F& f) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (call.constant_b) {
    call.constant_c ? f(Yes(), Yes()) : f(Yes(), No());
  } else {
    call.constant_c ? f(No(), Yes()) : f(No(), No());
  }
}

}  // namespace
