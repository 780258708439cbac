// Chunks of the weights of an RFA bank. For quantize_cpu_path.cpp, which quantizes those of LSQ as any chunk.
#pragma once

#include "quantize_cpu_pieces.h"

namespace {

// How many bounds are below each of n values; NaN lies above all. n is a multiple of kRow.
SSMQUANT_INLINE void count_below(const Bounds& bounds, const float* u, int64_t n, int32_t* below) {
  const float* values = bounds.values;
  const int count = bounds.count;
  if (count <= kFewBounds) {
    for (int64_t i = 0; i < n; i += kW) {
      const V value = load(u + i);
      Simd<float>::I sum{};
      for (int k = 0; k < count; ++k) sum = sum - (values[k] < value);
      sum = value == value ? sum : sum * 0 + count;
      std::memcpy(below + i, &sum, sizeof(sum));
    }
    return;
  }
  int32_t found[kPiece];
  if (bounds.in_cell > 0) {
    int32_t before[kPiece];
    for (int64_t i = 0; i < n; ++i) before[i] = bounds.before[bounds.cell(u[i] == u[i] ? u[i] : bounds.low)];
    for (int64_t i = 0; i < n; ++i) found[i] = before[i] + (values[before[i]] < u[i]);
    for (int k = 1; k < bounds.in_cell; ++k) {
      for (int64_t i = 0; i < n; ++i) found[i] += values[before[i] + k] < u[i];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) found[i] = 0;
    for (int32_t half = kLevels; half > 0; half /= 2) {
      for (int64_t i = 0; i < n; ++i) found[i] += values[found[i] + half - 1] < u[i] ? half : 0;
    }
  }
  for (int64_t i = 0; i < n; ++i) below[i] = u[i] == u[i] ? found[i] : count;
}

void rfa(const QuantizeCall& call, const Span& span, const Scale& scale, const Bounds& thresholds) {
  const Coder c(call, scale);
  const float least = float(-call.levels / 2);
  Buffers b;
  for_pieces(span, [&](const Piece& p) {
    const float* x = p.values<float>(call.x, b.x);
    float* y = p.target<float>(call.y, b.y);
    const int64_t n = p.padded();
    int32_t below[kPiece];
    for (int64_t i = 0; i < n; i += kW) store(b.g + i, c.clamp(c.scaled(load(x + i))));
    count_below(thresholds, b.g, n, below);
    // The product with 0 keeps a NaN a NaN.
    for (int64_t i = 0; i < n; ++i) y[i] = ((float(below[i]) + b.g[i] * 0.0f) + least) * c.alpha - c.beta;
    p.write<float>(call.y, y);
  });
}

void rfa_back(const QuantizeCall& call, const Span& span, const Scale& scale, const Segments& segments, double* sums,
              double* bins) {
  typedef float Pair __attribute__((vector_size(8)));
  typedef double WidePair __attribute__((vector_size(16), may_alias));
  const Coder c(call, scale);
  const float least = float(-call.levels / 2);
  const int64_t bins_of_copy = 2 * (call.levels + 1);
  Buffers b;
  Totals<2> totals;
  for_pieces(span, [&](const Piece& p) {
    const float *x = p.values<float>(call.x, b.x), *g = p.gradients<float>(call.g, b.g);
    float* dx = p.target<float>(call.y, b.y);
    const int64_t n = p.padded();
    alignas(64) float u[kPiece], clamped[kPiece], start[kPiece], slope[kPiece], middle[kPiece], pairs[2 * kPiece];
    alignas(64) int32_t segment[kPiece];
    for (int64_t i = 0; i < n; i += kW) {
      const V all = c.scaled(load(x + i));
      store(u + i, all);
      store(clamped + i, c.clamp(all));
    }
    count_below(segments.entries, clamped, n, segment);
    for (int64_t i = 0; i < n; ++i) {
      start[i] = segments.start[segment[i]];
      slope[i] = segments.slope[segment[i]];
      middle[i] = segments.middle[segment[i]];
    }
    totals.clear();
    for (int64_t i = 0; i < n; i += kRow) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const int64_t at = i + j * kW;
        const V grad = load(g + at), value = load(clamped + at), rise = load(slope + at);
        const auto inside = value == load(u + at);
        Simd<float>::I before;
        std::memcpy(&before, segment + at, sizeof(before));
        before = before - 1 - (load(middle + at) < value);
        const V code = __builtin_convertvector(before, V) + least;
        const V own = grad * (inside ? rise : V{});
        totals.piece[kAlpha][j] += grad * (code - (inside ? rise * value : V{}));
        totals.piece[kBeta][j] += own - grad;
        store(dx + at, own);
      }
    }
    totals.flush();
    for (int64_t i = 0; i < n; ++i) {
      const float step = g[i] * c.alpha;
      pairs[2 * i] = step;
      pairs[2 * i + 1] = step * (clamped[i] - start[i]);
    }
    for (int64_t i = 0; i < n; i += kCopies) {
#pragma GCC unroll 4
      for (int k = 0; k < kCopies; ++k) {
        Pair pair;
        std::memcpy(&pair, pairs + 2 * (i + k), sizeof(pair));
        auto* bin = reinterpret_cast<WidePair*>(bins + k * bins_of_copy + 2 * segment[i + k]);
        *bin += __builtin_convertvector(pair, WidePair);
      }
    }
    p.write<float>(call.y, dx);
  });
  totals.add_to(sums);
}

}  // namespace
