// Chunks of CPU fake quantization, for one instruction set. SSMQUANT_PATH is its name; see quantize_cpu.h.

#include "quantize_cpu_path_bank.h"
#include "quantize_cpu_pieces.h"

namespace {

template <typename M>
SSMQUANT_INLINE V one_where(M mask) {
  return mask ? 1.0f - V{} : V{};
}

template <typename T, bool clipped>
void forward(const QuantizeCall& call, const Span& span, const Scale& scale) {
  const Coder c(call, scale);
  const float low = scale.low, high = scale.high;
  Buffers b;
  for_long_pieces<T>(span, [&](const Piece& p) {
    const float* x = p.values<T>(call.x, b.x);
    float* y = p.target<T>(call.y, b.y);
    const int64_t n = p.padded();
    for (int64_t i = 0; i < n; i += kW) {
      fetch_ahead<T>(x + i);
      const V value = c.decode(c.round(c.clamp(c.scaled(load(x + i)))));
      store(y + i, clipped ? at_most(high, at_least(low, value)) : value);
    }
    p.write<T>(call.y, y);
  });
}

// Products with 0 rather than choices of 0, so that what is not finite in the gradient shows as in the quantizers.

template <typename T>
void lsq_back(const QuantizeCall& call, const Span& span, const Scale& scale, double* sums) {
  const Coder c(call, scale);
  Buffers b;
  Totals<2> totals;
  for_pieces(span, [&](const Piece& p) {
    const float *x = p.values<T>(call.x, b.x), *g = p.gradients<T>(call.g, b.g);
    float* dx = p.target<T>(call.y, b.y);
    const int64_t n = p.padded();
    totals.clear();
    for (int64_t i = 0; i < n; i += kRow) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        fetch_ahead<T>(x + i + j * kW);
        fetch_ahead<T>(g + i + j * kW);
        const V grad = load(g + i + j * kW), u = c.scaled(load(x + i + j * kW)), clamped = c.clamp(u);
        const auto inside = clamped == u;
        const V own = grad * one_where(inside);
        totals.piece[kAlpha][j] += grad * (c.round(clamped) - (inside ? u : V{}));
        totals.piece[kBeta][j] += own - grad;
        store(dx + i + j * kW, own);
      }
    }
    totals.flush();
    p.write<T>(call.y, dx);
  });
  totals.add_to(sums);
}

// About the mean of a span: of its first rows, or its first element if it has no whole row. Exact where all are equal.
SSMQUANT_INLINE float pivot_of(const Piece& p, const float* x) {
  double lanes[kRow] = {};
  const int64_t whole = p.count / kRow * kRow;
  if (whole == 0) return x[0];
  for (int64_t i = 0; i < whole; i += kRow) {
    for (int j = 0; j < kRow; ++j) lanes[j] += double(x[i + j]);
  }
  for (int j = 1; j < kRow; ++j) lanes[0] += lanes[j];
  return float(lanes[0] / double(whole));
}

// Deviations from about the mean are small, so that squares of them lose nothing in float32.
template <typename T>
void moments(const QuantizeCall& call, const Span& span, Moments* to) {
  enum { kSum, kSquares };
  Buffers b;
  Totals<2> totals;
  float pivot = 0;
  V low[kVecs], high[kVecs];
  double extra[2] = {};
  for_pieces(span, [&](const Piece& p) {
    const float* x = p.values<T>(call.x, b.x);
    const int64_t n = p.padded();
    if (p.first == span.first) {
      pivot = pivot_of(p, x);
      for (int j = 0; j < kVecs; ++j) low[j] = high[j] = load(x + j * kW);
    }
    totals.clear();
    for (int64_t i = 0; i < n; i += kRow) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        fetch_ahead<T>(x + i + j * kW);
        const V value = load(x + i + j * kW), d = value - pivot;
        totals.piece[kSum][j] += d;
        totals.piece[kSquares][j] += d * d;
        low[j] = at_most(value, low[j]);
        high[j] = at_least(value, high[j]);
      }
    }
    totals.flush();
    const float d = x[p.count - 1] - pivot;  // of those that fill up the row
    extra[kSum] += double(n - p.count) * double(d);
    extra[kSquares] += double(n - p.count) * double(d * d);
  });
  double sums[2] = {-extra[kSum], -extra[kSquares]};
  totals.add_to(sums);
  float ends[2][kRow];
  for (int j = 0; j < kVecs; ++j) {
    store(ends[0] + j * kW, low[j]);
    store(ends[1] + j * kW, high[j]);
  }
  for (int i = 1; i < kRow; ++i) {
    ends[0][0] = ends[0][i] < ends[0][0] ? ends[0][i] : ends[0][0];
    ends[1][0] = ends[1][i] > ends[1][0] ? ends[1][i] : ends[1][0];
  }
  const double n = double(span.count);
  const auto squares = [&] {
    const double all = sums[kSquares] - sums[kSum] * sums[kSum] / n;
    return all < 0 ? 0.0 : all;
  };
  *to = {double(pivot) + sums[kSum] / n, squares(), ends[0][0], ends[1][0]};
  if (to->squares - to->squares == 0) return;
  // Something is too large to be squared in float32, or not finite. Comparisons pass NaN by.
  double total = 0;
  float nan = 0;
  for_pieces(span, [&](const Piece& p) {
    const float* x = p.read<T>(call.x, b.x);
    for (int64_t i = 0; i < p.count; ++i) {
      total += double(x[i]);
      if (x[i] != x[i]) nan = x[i];
    }
  });
  to->mean = total / n;
  sums[kSum] = sums[kSquares] = 0;
  for_pieces(span, [&](const Piece& p) {
    const float* x = p.read<T>(call.x, b.x);
    for (int64_t i = 0; i < p.count; ++i) {
      const double d = double(x[i]) - to->mean;
      sums[kSum] += d;
      sums[kSquares] += d * d;
    }
  });
  to->squares = squares();
  if (nan != nan) to->low = to->high = nan;
}

// Gradients that are not finite show in the sum for alpha, and by that in all gradients.
template <typename T>
void dls_sums(const QuantizeCall& call, const Span& span, const Scale& scale, double* sums) {
  using I = Simd<float>::I;
  const Coder c(call, scale);
  const float low = scale.low, high = scale.high;
  Buffers b;
  Totals<kAtLow> totals;
  int64_t at_low = 0, at_high = 0;
  for_pieces(span, [&](const Piece& p) {
    const float *x = p.values<T>(call.x, b.x), *g = p.gradients<T>(call.g, b.g);
    const int64_t n = p.padded();
    I lows{}, highs{};
    totals.clear();
    for (int64_t i = 0; i < n; i += kRow) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        fetch_ahead<T>(x + i + j * kW);
        fetch_ahead<T>(g + i + j * kW);
        const V value = load(x + i + j * kW), grad = load(g + i + j * kW);
        const V u = c.scaled(value), clamped = c.clamp(u), code = c.round(clamped), y = c.decode(code);
        const auto inside = clamped == u;
        const auto below = y < low, above = y > high;
        const V kept = (below | above) ? V{} : grad;
        totals.piece[kAlpha][j] += kept * (code - (inside ? u : V{}));
        totals.piece[kBeta][j] -= inside ? V{} : kept;
        totals.piece[kLow][j] += below ? grad : V{};
        totals.piece[kHigh][j] += above ? grad : V{};
        lows -= value == low;
        highs -= value == high;
      }
    }
    totals.flush();
    for (int i = 0; i < kW; ++i) {
      at_low += lows[i];
      at_high += highs[i];
    }
    // Those that fill up the row are none.
    at_low -= (n - p.count) * (x[p.count - 1] == low);
    at_high -= (n - p.count) * (x[p.count - 1] == high);
  });
  totals.add_to(sums);
  sums[kAtLow] += double(at_low);
  sums[kAtHigh] += double(at_high);
}

template <typename T, bool with_ends>
void dls_back(const QuantizeCall& call, const Span& span, const Scale& scale, const Ends& ends) {
  const Coder c(call, scale);
  const float low = scale.low, high = scale.high;
  const float mean = ends.mean, mean_part = ends.mean_part, slope = ends.slope;
  const V none{}, low_part = ends.low_part - none, high_part = ends.high_part - none;
  // Of an element that is not at an end. NaN if the end's gradient is not finite.
  const V no_low = low_part * none, no_high = high_part * none;
  Buffers b;
  for_long_pieces<T>(span, [&](const Piece& p) {
    const float *x = p.values<T>(call.x, b.x), *g = p.gradients<T>(call.g, b.g);
    float* dx = p.target<T>(call.y, b.y);
    const int64_t n = p.padded();
    for (int64_t i = 0; i < n; i += kW) {
      const V value = load(x + i), u = c.scaled(value), clamped = c.clamp(u), y = c.decode(c.round(clamped));
      const V kept = ((y < low) | (y > high)) ? none : load(g + i);
      V d = kept * one_where(clamped == u) + mean_part + (value - mean) * slope;
      if constexpr (with_ends) {
        d = d + (value == low ? low_part : no_low);
        d = d + (value == high ? high_part : no_high);
      }
      store(dx + i, d);
    }
    p.write<T>(call.y, dx);
  });
}

template <typename T>
void dls_back(const QuantizeCall& call, const Span& span, const Scale& scale, const Ends& ends, bool with_ends) {
  (with_ends ? dls_back<T, true> : dls_back<T, false>)(call, span, scale, ends);
}

}  // namespace

extern const QuantizePath SSMQUANT_JOIN(ssmquant_quantize_, SSMQUANT_PATH);
const QuantizePath SSMQUANT_JOIN(ssmquant_quantize_, SSMQUANT_PATH) = {
    SSMQUANT_TEXT(SSMQUANT_PATH),
    {forward<float, false>, nullptr, forward<Half, false>, forward<BFloat, false>},
    {lsq_back<float>, nullptr, lsq_back<Half>, lsq_back<BFloat>},
    {moments<float>, nullptr, moments<Half>, moments<BFloat>},
    {forward<float, true>, nullptr, forward<Half, true>, forward<BFloat, true>},
    {dls_sums<float>, nullptr, dls_sums<Half>, dls_sums<BFloat>},
    {dls_back<float>, nullptr, dls_back<Half>, dls_back<BFloat>},
    rfa,
    rfa_back,
};
