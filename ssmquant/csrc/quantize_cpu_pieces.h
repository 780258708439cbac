// Pieces of a span read as floats and written back, sums over them, and codes. For quantize_cpu_path.cpp.
#pragma once

#include <type_traits>

#include "cpu_dtypes.h"
#include "cpu_simd.h"
#include "quantize_cpu.h"

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

}  // namespace
