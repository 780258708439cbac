// Products of codes, or of their values, with a weight. See deployed_cpu.h.
#pragma once

#include "deployed_cpu_pieces.h"

namespace {

#if defined(__AVX512F__)
constexpr int kMostRows = 6;
#else
constexpr int kMostRows = 2;
#endif
constexpr int kTiles = 4;

// Calls f with constants: how many tiles of outputs at once, and the first one.
template <typename F>
SSMQUANT_INLINE void for_tiles(int64_t outputs, const F& f) {
  const int64_t tiles = (outputs + W - 1) / W;
  int64_t tile = 0;
  for (; tile + kTiles <= tiles; tile += kTiles) f(std::integral_constant<int, kTiles>(), tile);
  for (; tile + 2 <= tiles; tile += 2) f(std::integral_constant<int, 2>(), tile);
  for (; tile < tiles; ++tile) f(std::integral_constant<int, 1>(), tile);
}

// Calls f with constants: how many of `count` rows at once, and the first one.
template <typename F>
SSMQUANT_INLINE void for_rows(int64_t count, const F& f) {
  int64_t row = 0;
  for (; row + kMostRows <= count; row += kMostRows) f(std::integral_constant<int, kMostRows>(), row);
  for (; row < count; ++row) f(std::integral_constant<int, 1>(), row);
}

constexpr int64_t kUnitBytes = W * 4;  // of a weight, for all lanes, in either form

// How many pairs of products of codes up to `most` fit into an int16; 0 for weights in the path's own form.
inline int64_t pairs_at_once(const Weights& weights, int64_t most) {
  if (kNarrow == 0 || weights.narrow == 0) return 0;
  const int64_t one = 2 * weights.narrow * most;
  return one < 1 ? 32767 : 32767 / one;
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
template <int rows, int tiles>
SSMQUANT_INLINE void multiply_narrow(const uint8_t* x, int64_t apart, const char* w, int64_t units, int64_t at_once,
                                     I (&total)[rows][tiles]) {
  for (int64_t first = 0; first < units; first += at_once) {
    const int64_t end = units - first < at_once ? units : first + at_once;
    I sums[rows][tiles] = {};
    for (int64_t k = first; k < end; ++k) {
      I codes[rows];
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * apart + k * 4, 4);
        codes[r] = in_all_lanes(four);
      }
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) sums[r][t] = pairs(sums[r][t], codes[r], w + (t * units + k) * kUnitBytes);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tiles; ++t) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) total[r][t] = add_pairs(total[r][t], sums[r][t]);
    }
  }
}
#endif

// Adds to `total` the products of rows of codes, `apart` bytes from each other, with tiles of a weight. `at_once`: of
// pairs_at_once.
template <int rows, int tiles>
SSMQUANT_INLINE void multiply(const uint8_t* x, int64_t apart, const void* weights, int64_t units, int64_t at_once,
                              I (&total)[rows][tiles]) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  if (at_once > 0) return multiply_narrow(x, apart, static_cast<const char*>(weights), units, at_once, total);
#else
  (void)at_once;
#endif
  const Weight* const w = static_cast<const Weight*>(weights);
  for (int64_t k = 0; k < units; ++k) {
    I codes[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) codes[r] = unit(x + r * apart + k * kUnit);
#pragma GCC unroll 8
    for (int t = 0; t < tiles; ++t) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) total[r][t] = dot(total[r][t], codes[r], w + (t * units + k) * kWeights);
    }
  }
}

SSMQUANT_INLINE float sum_of(int32_t sum) { return sum == kNotANumber ? NAN : float(sum); }

// The activation of some rows of results, in place.
inline void activate(int64_t act, float* y, int64_t rows, int64_t apart, int64_t columns) {
  if (act == kNoActivation) return;
  constexpr int n = 4;
  for (int64_t r = 0; r < rows; ++r, y += apart) {
    int64_t c = 0;
    for (; c + n * W <= columns; c += n * W) {
      V some[n];
      for (int j = 0; j < n; ++j) some[j] = load(y + c + j * W);
      activated<n>(act, some);
      for (int j = 0; j < n; ++j) store(y + c + j * W, some[j]);
    }
    for (; c < columns; c += W) {
      V rest = load_some(y + c, columns - c);
      activated<1>(act, &rest);
      store_some(y + c, rest, columns - c);
    }
  }
}

struct Linear {
  const LinearCall& call;
  const Grid q;
  const int64_t row, count;  // of the rows of all samples
  const float *scales, *shifts;  // of each row, where they are its own; then qmin is 0
  const int64_t at_once = pairs_at_once(call.weights, call.quantizer.qmax - call.quantizer.qmin);

  template <bool by_row, int rows, int tiles>
  void codes(int64_t first, int64_t tile) const {
    const int64_t units = call.weights.units;
    I total[rows][tiles] = {};
    multiply<rows, tiles>(call.x.data + first * call.x.padded, call.x.padded,
                          static_cast<const char*>(call.weights.codes) + tile * units * kUnitBytes, units, at_once, total);
    const float offset = q.qmin * q.scale - q.shift;  // the value of code 0
#pragma GCC unroll 8
    for (int t = 0; t < tiles; ++t) {
      const int64_t at = (tile + t) * W;
      const V scale = load(call.weights.scale + at) * q.scale, shift = load(call.weights.shift + at) * q.scale;
      const V all = load(call.weights.total + at);
      V constant = by_row ? V{} : all * offset;
      if (call.bias != nullptr) constant = constant + load(call.bias + at);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        V y = floats(total[r][t]) * scale - shift * sum_of(call.x.sums[first + r]);
        if constexpr (by_row) {
          y = y * scales[first + r] - all * shifts[first + r] + constant;
        } else {
          y = y + constant;
        }
        store_some(call.y + (first + r) * call.outputs + at, y, call.outputs - at);
      }
    }
  }

  // x: (rows, inputs), decoded, whose sums are `sums`.
  template <int rows, int tiles>
  void values(const float* x, const float* sums, int64_t first, int64_t tile) const {
    const int8_t* w = static_cast<const int8_t*>(call.weights.codes) + tile * call.inputs * W;
    V total[rows][tiles] = {};
    for (int64_t k = 0; k < call.inputs; ++k) {
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) {
        const V weight = load_signed(w + (t * call.inputs + k) * W);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) total[r][t] = total[r][t] + weight * x[r * call.inputs + k];
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tiles; ++t) {
      const int64_t at = (tile + t) * W;
      const V scale = load(call.weights.scale + at), shift = load(call.weights.shift + at);
      const V bias = call.bias != nullptr ? load(call.bias + at) : V{};
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const V y = total[r][t] * scale - shift * sums[r] + bias;
        store_some(call.y + (first + r) * call.outputs + at, y, call.outputs - at);
      }
    }
  }

  // Of results that have just been written, so that they are in the nearest cache: not where they are made, whose
  // registers are full, and of which there are many forms.
  void activated_outputs(int64_t first, int64_t rows, int64_t at, int64_t columns) const {
    const int64_t left = call.outputs - at;
    activate(call.act, call.y + first * call.outputs + at, rows, call.outputs, columns < left ? columns : left);
  }

  template <bool by_row>
  void products() const {
    for_tiles(call.outputs, [&](auto tiles, int64_t tile) {
      constexpr int n = decltype(tiles)::value;
      for_rows(count, [&](auto rows, int64_t r) { codes<by_row, decltype(rows)::value, n>(row + r, tile); });
      activated_outputs(row, count, tile * W, n * W);
    });
  }

  void on_codes() const { scales == nullptr ? products<false>() : products<true>(); }

  // `x`: scratch for kMostRows rows and W values behind them.
  void on_values(float* x) const {
    for_rows(count, [&](auto rows, int64_t r) {
      constexpr int n = decltype(rows)::value;
      float sums[n];
      for (int i = 0; i < n; ++i) {
        const int64_t at = row + r + i;
        V sum{};
        for (int64_t k = 0; k < call.inputs; k += W) {
          const V value = q.value(load_codes(call.x.data + at * call.x.padded + k));
          store(x + i * call.inputs + k, value);
          sum = sum + first_of(value, call.inputs - k);
        }
        sums[i] = call.x.sums[at] == kNotANumber ? NAN : lane_sum(sum);
      }
      for_tiles(call.outputs, [&](auto tiles, int64_t tile) {
        values<n, decltype(tiles)::value>(x, sums, row + r, tile);
      });
      activated_outputs(row + r, n, 0, call.outputs);
    });
  }
};

// Inputs of a linear layer on values, at most: mirrored by ssmquant/ops/deployed/cpu.py.
constexpr int64_t kMostInputs = 4096;

void linear(const LinearCall& call, const Part& part) {
  const int64_t first = part.sample * call.rows + part.first;
  const Linear l{call, Grid(call.quantizer, part.sample), first, part.count, nullptr, nullptr};
  if (call.quantizer.low == nullptr) return l.on_codes();
  alignas(64) float x[kMostRows * kMostInputs + W];
  l.on_values(x);
}

}  // namespace
