// Chunks of CPU fake quantization, for one instruction set. SSMQUANT_PATH is its name; see quantize_cpu.h.

#include "quantize_cpu.h"

#include <type_traits>

#include "cpu_dtypes.h"
#include "cpu_simd.h"

namespace {

using V = Vec<float>;
using D = Vec<double>;

constexpr int kW = kLanes<float>;
constexpr int64_t kPiece = 512;  // elements that are converted at a time, and added up in float32
constexpr int kRow = 16;         // sums of every path: element i of a piece goes to sum i % kRow
constexpr int kVecs = kRow / kW;

// Some elements of a span, as floats.
struct Piece {
  const Span& span;
  int64_t first, count;

  // Elements with those that fill up the last row.
  int64_t padded() const { return (count + kRow - 1) / kRow * kRow; }
  bool in_one_run() const { return first + count <= span.run; }

  // Calls run(place, i, n) for n elements that lie in memory at `place`, the first of which is number i of the piece.
  template <typename F>
  SSMQUANT_INLINE void for_runs(F run) const {
    int64_t place = span.offset, within = first;
    if (first >= span.run) {
      place += first / span.run * span.stride;
      within = first % span.run;
    }
    for (int64_t i = 0, n; i < count; i += n) {
      n = span.run - within < count - i ? span.run - within : count - i;
      run(place + within, i, n);
      within = 0;
      place += span.stride;
    }
  }

  // Where they lie if they can be used there, else copied to `buffer`.
  template <typename T>
  SSMQUANT_INLINE const float* read(const void* base, float* buffer) const {
    const T* from = static_cast<const T*>(base);
    if constexpr (std::is_same_v<T, float>) {
      if (in_one_run() && count % kRow == 0) return from + span.offset + first;
    }
    for_runs([&](int64_t place, int64_t i, int64_t n) {
      read_as<float, T>(from + place, 1, buffer + i, n);
    });
    return buffer;
  }

  void pad(float* buffer, float value) const {
    for (int64_t i = count; i < padded(); ++i) buffer[i] = value;
  }

  // The last one again and again: it makes no NaN that there would not be.
  template <typename T>
  SSMQUANT_INLINE const float* values(const void* base, float* buffer) const {
    const float* x = read<T>(base, buffer);
    pad(buffer, x[count - 1]);
    return x;
  }

  template <typename T>
  SSMQUANT_INLINE const float* gradients(const void* base, float* buffer) const {
    const float* g = read<T>(base, buffer);
    pad(buffer, 0.0f);
    return g;
  }

  // Where to put results for `write`.
  template <typename T>
  SSMQUANT_INLINE float* target(void* base, float* buffer) const {
    if constexpr (std::is_same_v<T, float>) {
      if (in_one_run() && count % kRow == 0) return static_cast<float*>(base) + span.offset + first;
    }
    return buffer;
  }

  template <typename T>
  SSMQUANT_INLINE void write(void* base, const float* results) const {
    T* to = static_cast<T*>(base);
    if constexpr (std::is_same_v<T, float>) {
      if (results == to + span.offset + first) return;
    }
    for_runs([&](int64_t place, int64_t i, int64_t n) {
      write_as<T>(results + i, to + place, n);
    });
  }
};

struct Buffers {
  alignas(64) float x[kPiece], g[kPiece], y[kPiece];
};

// Into the next page, where processors by themselves do not look. Of use unless what is read is a copy.
template <typename T>
SSMQUANT_INLINE void fetch_ahead(const float* x) {
  if constexpr (std::is_same_v<T, float>) __builtin_prefetch(x + 1024);
}

template <typename F>
SSMQUANT_INLINE void for_pieces(const Span& span, F run) {
  const int64_t end = span.first + span.count;
  for (int64_t k = span.first; k < end; k += kPiece) run(Piece{span, k, end - k < kPiece ? end - k : kPiece});
}

// Without sums, what needs no buffers is one long piece, and its last row another.
template <typename T, typename F>
SSMQUANT_INLINE void for_long_pieces(const Span& span, F run) {
  Span rest = span;
  if constexpr (std::is_same_v<T, float>) {
    const Piece whole{span, span.first, span.count / kRow * kRow};
    if (whole.count > 0 && whole.in_one_run()) {
      run(whole);
      rest.first += whole.count;
      rest.count -= whole.count;
    }
  }
  for_pieces(rest, run);
}

// Sums of float32 over a piece at a time, those of pieces in float64.
template <int count>
struct Totals {
  V piece[count][kVecs];
  double whole[count][kRow] = {};

  SSMQUANT_INLINE void clear() {
    for (auto& sums : piece) {
      for (V& sum : sums) sum = V{};
    }
  }

  SSMQUANT_INLINE void flush() {
    for (int k = 0; k < count; ++k) {
      float row[kRow];
      for (int j = 0; j < kVecs; ++j) store(row + j * kW, piece[k][j]);
      for (int i = 0; i < kRow; ++i) whole[k][i] += double(row[i]);
    }
  }

  void add_to(double* sums) {
    for (int k = 0; k < count; ++k) {
      for (int step = kRow / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) whole[k][i] += whole[k][i + step];
      }
      sums[k] += whole[k][0];
    }
  }
};

// Codes of values, and what the gradients need of them.
struct Coder {
  float alpha, beta, qmin, qmax;

  Coder(const QuantizeCall& call, const Scale& s)
      : alpha(s.alpha), beta(s.beta), qmin(float(call.qmin)), qmax(float(call.qmax)) {}

  SSMQUANT_INLINE V scaled(V x) const { return (x + beta) / alpha; }
  SSMQUANT_INLINE V clamp(V u) const { return at_most(qmax, at_least(qmin, u)); }  // the same where it is in range
  // Adding that leaves no bits for a fraction: rounds ties to even, and -0.0 to 0.0 as affine_decode does.
  SSMQUANT_INLINE V round(V u) const { return (u + 12582912.0f) - 12582912.0f; }
  SSMQUANT_INLINE V decode(V code) const { return code * alpha - beta; }
};

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
