// Vectors of one instruction set, and the functions that CPU kernels compute on them.
//
// A file that includes this is compiled once for each instruction set, with the flags of that set, into one library.
// Hence everything here is internal to its translation unit (static or in an unnamed namespace), and no template of
// the standard library that makes code may be used: the linker would keep one copy of it, of any instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SSMQUANT_INLINE inline __attribute__((always_inline))

// For what a file calls after its instruction set, SSMQUANT_PATH: NAME##path, and "path".
#define SSMQUANT_JOIN_(a, b) a##b
#define SSMQUANT_JOIN(a, b) SSMQUANT_JOIN_(a, b)
#define SSMQUANT_TEXT_(a) #a
#define SSMQUANT_TEXT(a) SSMQUANT_TEXT_(a)

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename S>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(kBytes)));
  typedef int32_t Lane;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef double Unaligned __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(kBytes)));
  typedef int64_t Lane;
};

template <typename S>
using Vec = typename Simd<S>::V;

template <typename S>
constexpr int kLanes = kBytes / int(sizeof(S));

template <typename S>
SSMQUANT_INLINE Vec<S> load(const S* p) {
  return *reinterpret_cast<const typename Simd<S>::Unaligned*>(p);
}

template <typename S>
SSMQUANT_INLINE void store(S* p, Vec<S> x) {
  *reinterpret_cast<typename Simd<S>::Unaligned*>(p) = x;
}

// A bound is returned only where x is beyond it, so a NaN stays one. Compilers do not make one instruction of the
// comparison, those of x86 return their second operand where there is a NaN.
template <typename B, typename V>
SSMQUANT_INLINE V at_least(B bound, V x) {
  const V b = bound - V{};
  return b > x ? b : x;
}

template <typename B, typename V>
SSMQUANT_INLINE V at_most(B bound, V x) {
  const V b = bound - V{};
  return b < x ? b : x;
}

#if defined(__x86_64__)
#if defined(__AVX512F__)
SSMQUANT_INLINE Vec<float> at_least(Vec<float> b, Vec<float> x) { return _mm512_max_ps(b, x); }
SSMQUANT_INLINE Vec<float> at_most(Vec<float> b, Vec<float> x) { return _mm512_min_ps(b, x); }
#elif defined(__AVX2__)
SSMQUANT_INLINE Vec<float> at_least(Vec<float> b, Vec<float> x) { return _mm256_max_ps(b, x); }
SSMQUANT_INLINE Vec<float> at_most(Vec<float> b, Vec<float> x) { return _mm256_min_ps(b, x); }
#else
SSMQUANT_INLINE Vec<float> at_least(Vec<float> b, Vec<float> x) { return _mm_max_ps(b, x); }
SSMQUANT_INLINE Vec<float> at_most(Vec<float> b, Vec<float> x) { return _mm_min_ps(b, x); }
#endif
SSMQUANT_INLINE Vec<float> at_least(float b, Vec<float> x) { return at_least(b - Vec<float>{}, x); }
SSMQUANT_INLINE Vec<float> at_most(float b, Vec<float> x) { return at_most(b - Vec<float>{}, x); }
#endif

template <typename S>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float lowest = -127.0f, highest = 128.0f, magic = 12582912.0f + 127.0f;  // 1.5 * 2 ** 23 + bias
  static constexpr int shift = 23;
  // Minimax of relative error, with a value of exactly 1 at 0.
  static constexpr float terms[] = {1.0f, 0.693147f, 0.24022242f, 0.055507336f, 0.009671507f, 0.0013264712f};
};

template <>
struct Exp2<double> {
  static constexpr double lowest = -1023.0, highest = 1024.0, magic = 6755399441055744.0 + 1023.0;
  static constexpr int shift = 52;
  // ln(2) ** k / k!
  static constexpr double terms[] = {
      1.0,
      6.931471805599453e-01,
      2.402265069591007e-01,
      5.5504108664821576e-02,
      9.618129107628477e-03,
      1.3333558146428441e-03,
      1.5403530393381606e-04,
      1.5252733804059838e-05,
      1.3215486790144305e-06,
      1.0178086009239696e-07,
      7.054911620801121e-09,
      4.44553827187081e-10,
      2.5678435993488196e-11,
  };
};

// 2 ** x of some vectors, in place: zero below the normal numbers (x < -126.5 in float32), infinite from 2 ** 127.5 on.
// Adding `magic` rounds x to an integer n and leaves n + bias in the low bits, from where it is shifted into the
// exponent: 0 for the lower bound, that of infinity for the upper one. Relative error 1.9e-7 in float32 for an exact x.
// All vectors go through one stage before the next, so that the processor finds independent work in its window.
template <int count, typename S>
SSMQUANT_INLINE void exp2(Vec<S>* x, S) {
  using C = Exp2<S>;
  constexpr int degree = int(sizeof(C::terms) / sizeof(S)) - 1;
  Vec<S> t[count], p[count];
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) x[j] = at_most(C::highest, at_least(C::lowest, x[j]));
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) t[j] = x[j] + C::magic;
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) x[j] = x[j] - (t[j] - C::magic);
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) p[j] = x[j] * C::terms[degree] + C::terms[degree - 1];
#pragma GCC unroll 16
  for (int k = degree - 2; k >= 0; --k) {
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) p[j] = p[j] * x[j] + C::terms[k];
  }
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) {
    const auto power = reinterpret_cast<typename Simd<S>::I>(t[j]) << C::shift;
    x[j] = p[j] * reinterpret_cast<Vec<S>>(power);
  }
}

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// softplus of some vectors, in place, with torch's threshold; and its slope if asked for. Relative errors of some ulp
// wherever the result is a normal number.
template <bool with_slope, int count>
SSMQUANT_INLINE void softplus(Vec<float>* x, Vec<float>* slope) {
  using V = Vec<float>;
  const V zero{}, one = 1.0f - zero;
  V n[count], r[count], z[count], w[count], p[count];
  // z = exp(-|x|); n = round(-|x| / ln 2) is taken off in two parts, so that x * log2(e) costs no digits.
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) {
    const V a = at_least(-104.0f, x[j] < 0.0f ? x[j] : -x[j]);
    n[j] = (a * float(kLog2e) + 12582912.0f) - 12582912.0f;
    r[j] = (a - n[j] * 0.693359375f) - n[j] * -2.12194440e-4f;
  }
  constexpr float exp_terms[] = {1.0f, 1.0f, 0.5f, 0.16666667f, 0.041666667f, 0.0083333333f};
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) z[j] = r[j] * 0.0013888889f + exp_terms[5];
#pragma GCC unroll 8
  for (int k = 4; k >= 0; --k) {
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) z[j] = z[j] * r[j] + exp_terms[k];
  }
  exp2<count>(n, 0.0f);
  // log(1 + z) = 2 atanh(z / (2 + z))
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) {
    z[j] = z[j] * n[j];
    r[j] = z[j] / (z[j] + 2.0f);
    w[j] = r[j] * r[j];
    p[j] = w[j] * 0.14005994f + 0.14000903f;
  }
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) p[j] = p[j] * w[j] + 0.20010764f;
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) p[j] = p[j] * w[j] + 0.33333208f;
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) {
    const V twice = r[j] + r[j];
    const V log1p = twice + twice * w[j] * p[j];
    if constexpr (with_slope) slope[j] = x[j] > 20.0f ? one : (x[j] < 0.0f ? z[j] : one) / (z[j] + 1.0f);
    x[j] = x[j] > 20.0f ? x[j] : (x[j] > 0.0f ? x[j] : zero) + log1p;
  }
}

template <bool with_slope, int count>
SSMQUANT_INLINE void softplus(Vec<double>* x, Vec<double>* slope) {
  for (int j = 0; j < count; ++j) {
    for (int i = 0; i < kLanes<double>; ++i) {
      const double v = x[j][i];
      if constexpr (with_slope) slope[j][i] = v > 20.0 ? 1.0 : 1.0 / (1.0 + std::exp(-v));
      x[j][i] = v > 20.0 ? v : std::log1p(std::exp(v));
    }
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SSMQUANT_SHUFFLE(S, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(SSMQUANT_SHUFFLE)  // GCC before 12
#define SSMQUANT_SHUFFLE(S, a, b, ...) __builtin_shuffle(a, b, (typename Simd<S>::I){__VA_ARGS__})
#endif

// Swaps, for rows a and b of a matrix that are `step` apart, the off-diagonal blocks of `step` columns.
template <typename S, int step, int... j>
SSMQUANT_INLINE void swap_blocks(Vec<S>& a, Vec<S>& b, std::integer_sequence<int, j...>) {
  constexpr int w = kLanes<S>;
  const Vec<S> lower = SSMQUANT_SHUFFLE(S, a, b, ((j & step) ? w + j - step : j)...);
  const Vec<S> upper = SSMQUANT_SHUFFLE(S, a, b, ((j & step) ? w + j : j + step)...);
  a = lower;
  b = upper;
}

template <typename S, int step = kLanes<S> / 2>
SSMQUANT_INLINE void transpose_rows(Vec<S>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<S>; ++i) {
    if (!(i & step)) {
      swap_blocks<S, step>(rows[i], rows[i + step], std::make_integer_sequence<int, kLanes<S>>());
    }
  }
  if constexpr (step > 1) transpose_rows<S, step / 2>(rows);
}

// A square of as many rows as a vector has lanes.
template <typename S>
SSMQUANT_INLINE void transpose(const S* from, int64_t from_stride, S* to, int64_t to_stride) {
  constexpr int w = kLanes<S>;
  Vec<S> rows[w];
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i) rows[i] = load(from + i * from_stride);
  transpose_rows<S>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i) store(to + i * to_stride, rows[i]);
}

// Lane i of the result is the sum of the lanes of row i, added up in an order that is the same for all.
template <typename S, int step = kLanes<S> / 2>
SSMQUANT_INLINE Vec<S> row_sums(Vec<S>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < step; ++i) {
    swap_blocks<S, step>(rows[i], rows[i + step], std::make_integer_sequence<int, kLanes<S>>());
    rows[i] = rows[i] + rows[i + step];
  }
  if constexpr (step > 1) return row_sums<S, step / 2>(rows);
  return rows[0];
}

// Denormal numbers count as zero while one of these lives: states that fade away would take a hundred times as long.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

}  // namespace
