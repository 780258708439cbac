// Codes, their products and sums over values, for one instruction set. As cpu_simd.h, internal to the translation unit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_simd.h"
#include "deployed_cpu.h"

namespace {

using V = Vec<float>;
using I = Simd<float>::I;
constexpr int W = kLanes<float>;

typedef uint8_t Bytes __attribute__((vector_size(W)));

SSMQUANT_INLINE V floats(I x) { return __builtin_convertvector(x, V); }

// W codes as floats.
SSMQUANT_INLINE V load_codes(const uint8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Bytes bytes;
  std::memcpy(&bytes, p, W);
  return __builtin_convertvector(bytes, V);
#endif
}

// Floats that are codes. A NaN becomes any code.
SSMQUANT_INLINE void store_codes(uint8_t* p, V x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x)));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvttps_epi32(x);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(half, half));
#else
  int32_t codes[W];
#if defined(__x86_64__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm_cvttps_epi32(x));
#else
  for (int i = 0; i < W; ++i) codes[i] = x[i] == x[i] ? int32_t(x[i]) : 0;
#endif
  for (int i = 0; i < W; ++i) p[i] = uint8_t(codes[i]);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// All bits of the first `count` lanes.
SSMQUANT_INLINE __m256i lanes_below(int64_t count) {
  alignas(64) static constexpr int32_t ones[2 * W] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones + W - count));
}
#endif

// The first `count` of W values, zeros behind them. Reads no others.
SSMQUANT_INLINE V load_some(const float* p, int64_t count) {
  if (count >= W) return load(p);
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(p, lanes_below(count));
#else
  float some[W] = {};
  std::memcpy(some, p, size_t(count) * sizeof(float));
  return load(some);
#endif
}

SSMQUANT_INLINE void store_some(float* p, V x, int64_t count) {
  if (count >= W) return store(p, x);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), x);
#elif defined(__AVX2__)  // a masked store takes as long as ten others on some processors
  __m128 rest = _mm256_castps256_ps128(x);
  if (count & 4) {
    _mm_storeu_ps(p, rest);
    rest = _mm256_extractf128_ps(x, 1), p += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
    rest = _mm_movehl_ps(rest, rest), p += 2;
  }
  if (count & 1) _mm_store_ss(p, rest);
#else
  std::memcpy(p, &x, size_t(count) * sizeof(float));
#endif
}

// The first `count` lanes, zeros behind them.
SSMQUANT_INLINE V first_of(V x, int64_t count) {
  if (count >= W) return x;
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(__mmask16((1u << count) - 1), x);
#elif defined(__AVX2__)
  return _mm256_and_ps(x, _mm256_castsi256_ps(lanes_below(count)));
#else
  for (int64_t i = count; i < W; ++i) x[i] = 0;
  return x;
#endif
}

SSMQUANT_INLINE float lane_sum(V x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#elif defined(__AVX2__)
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
  float total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
#endif
}

// W signed codes as floats.
SSMQUANT_INLINE V load_signed(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef int8_t Signed __attribute__((vector_size(W)));
  Signed bytes;
  std::memcpy(&bytes, p, W);
  return __builtin_convertvector(bytes, V);
#endif
}

// A quantizer's numbers for one sample.
struct Grid {
  float scale, over, shift, low, high, qmin, qmax;

  Grid() : scale(1), over(1), shift(0), low(-INFINITY), high(INFINITY), qmin(0), qmax(0) {}

  Grid(const Quantizer& q, int64_t sample) {
    const int64_t i = q.by_sample ? sample : 0;
    scale = q.scale[i], over = 1.0f / scale, shift = q.shift[i];
    low = q.low ? q.low[i] : -INFINITY, high = q.high ? q.high[i] : INFINITY;
    qmin = float(q.qmin), qmax = float(q.qmax);
  }

  // The map of a row from its range and the shares of it that are kept, as quantizers/token.py.
  Grid(float least, float most, const float* clip, float eps, const Quantizer& q)
      : low(-INFINITY), high(INFINITY), qmin(0), qmax(float(q.qmax)) {
    const float half = (most - least) * 0.5f, middle = (least + most) * 0.5f;
    scale = half * ((clip[0] + clip[1]) / qmax);
    scale = scale < eps ? eps : scale;  // a NaN stays one
    over = 1.0f / scale, shift = half * clip[0] - middle;
  }

  // As quantizers/affine.py but for the division, which may decide a tie otherwise. Adding 1.5 * 2 ** 23 rounds, ties to
  // even.
  SSMQUANT_INLINE V level(V x) const {
    const V u = at_most(qmax, at_least(qmin, (x + shift) * over));
    return (u + 12582912.0f) - 12582912.0f;
  }
  SSMQUANT_INLINE V index(V x) const { return level(x) - qmin; }
  SSMQUANT_INLINE V value_of_level(V u) const { return at_most(high, at_least(low, u * scale - shift)); }
  SSMQUANT_INLINE V value(V index) const { return value_of_level(index + qmin); }
};

// ---- products ------------------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)
constexpr int kUnit = 4;
typedef int8_t Weight;
SSMQUANT_INLINE I dot(I total, I codes, const Weight* w) {
  return (I)_mm512_dpbusd_epi32((__m512i)total, (__m512i)codes, _mm512_loadu_si512(w));
}
#else
constexpr int kUnit = 2;
typedef int16_t Weight;
SSMQUANT_INLINE I dot(I total, I codes, const Weight* w) {
#if defined(__AVX512F__)
  return (I)_mm512_add_epi32((__m512i)total, _mm512_madd_epi16((__m512i)codes, _mm512_loadu_si512(w)));
#elif defined(__AVX2__)
  const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  return (I)_mm256_add_epi32((__m256i)total, _mm256_madd_epi16((__m256i)codes, weights));
#elif defined(__x86_64__)
  const __m128i weights = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  return (I)_mm_add_epi32((__m128i)total, _mm_madd_epi16((__m128i)codes, weights));
#else
  for (int i = 0; i < W; ++i) total[i] += (codes[i] & 0xffff) * w[2 * i] + (codes[i] >> 16) * w[2 * i + 1];
  return total;
#endif
}
#endif
constexpr int kWeights = W * kUnit;  // of one unit of all lanes

// Codes of a weight that are small enough are multiplied as int8 even without an instruction that sums in int32: pairs
// of products, and some pairs, have room in an int16.
#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
constexpr int kNarrow = 64;  // 255 * 64 * 2 < 2 ** 15
SSMQUANT_INLINE I pairs(I total, I codes, const void* w) {
  return (I)_mm512_add_epi16((__m512i)total, _mm512_maddubs_epi16((__m512i)codes, _mm512_loadu_si512(w)));
}
SSMQUANT_INLINE I add_pairs(I total, I sums) {
  return (I)_mm512_add_epi32((__m512i)total, _mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kNarrow = 64;
SSMQUANT_INLINE I pairs(I total, I codes, const void* w) {
  const __m256i weights = _mm256_loadu_si256(static_cast<const __m256i*>(w));
  return (I)_mm256_add_epi16((__m256i)total, _mm256_maddubs_epi16((__m256i)codes, weights));
}
SSMQUANT_INLINE I add_pairs(I total, I sums) {
  return (I)_mm256_add_epi32((__m256i)total, _mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)));
}
#else
constexpr int kNarrow = 0;
#endif

// A unit of codes.
SSMQUANT_INLINE int32_t word(const uint8_t* codes) {
  if constexpr (kUnit == 2) return int32_t(codes[0]) | int32_t(codes[1]) << 16;
  int32_t all;
  std::memcpy(&all, codes, 4);
  return all;
}

SSMQUANT_INLINE I in_all_lanes(int32_t x) {
#if defined(__AVX512F__)
  return (I)_mm512_set1_epi32(x);
#elif defined(__AVX2__)
  return (I)_mm256_set1_epi32(x);
#else
  return x - I{};
#endif
}

SSMQUANT_INLINE I unit(const uint8_t* codes) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  int16_t both;
  std::memcpy(&both, codes, 2);
  return (I)_mm256_cvtepu8_epi16(_mm_set1_epi16(both));
#else
  return in_all_lanes(word(codes));
#endif
}

#if defined(__AVX2__)
// Units of codes in the lanes by one of weights.
SSMQUANT_INLINE I dot_words(I total, I codes, int32_t weights) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)total, (__m512i)codes, (__m512i)in_all_lanes(weights));
#elif defined(__AVX512F__)
  return (I)_mm512_add_epi32((__m512i)total, _mm512_madd_epi16((__m512i)codes, (__m512i)in_all_lanes(weights)));
#else
  return (I)_mm256_add_epi32((__m256i)total, _mm256_madd_epi16((__m256i)codes, (__m256i)in_all_lanes(weights)));
#endif
}

constexpr int kLevels = 16;  // of a table

// Entries of a table of kLevels by numbers, floats that are integers; `few`: there are 8 at most.
struct Levels {
#if defined(__AVX512F__)
  const __m512i at;
  explicit Levels(V number) : at(_mm512_cvtps_epi32(number)) {}
  SSMQUANT_INLINE V of(const float* table, bool) const { return _mm512_permutexvar_ps(at, load(table)); }
#else
  const __m256i at;
  explicit Levels(V number) : at(_mm256_cvtps_epi32(number)) {}
  SSMQUANT_INLINE V of(const float* table, bool few) const {
    const V low = _mm256_permutevar8x32_ps(load(table), at);
    if (few) return low;
    const V high = _mm256_permutevar8x32_ps(load(table + W), at);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
  }
#endif
};
#endif

// ---- sums ----------------------------------------------------------------------------------------------------------

// Of `count` values next to each other: count, mean, sum of squared deviations, minimum, maximum; added to `to`.
inline void add_moments(const float* x, int64_t count, double* to) {
  if (count == 0) return;
  V sum{}, low = load_some(x, count), high = low;
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const V v = load(x + i);
    sum = sum + v;
    low = at_most(low, v);
    high = at_least(high, v);
  }
  double total = 0, least = x[0], most = x[0];
  for (int64_t j = i; j < count; ++j) {
    total += x[j];
    least = x[j] < least ? x[j] : least;
    most = x[j] > most ? x[j] : most;
  }
  if (i > 0) {
    for (int j = 0; j < W; ++j) {
      total += sum[j];
      least = low[j] < least ? low[j] : least;
      most = high[j] > most ? high[j] : most;
    }
  }
  const double mean = total / double(count);
  const float centre = float(mean);
  V squares{};
  for (i = 0; i + W <= count; i += W) {
    const V d = load(x + i) - centre;
    squares = squares + d * d;
  }
  double all_squares = 0;
  for (int j = 0; j < W; ++j) all_squares += squares[j];
  for (; i < count; ++i) all_squares += double(x[i] - centre) * double(x[i] - centre);
  all_squares -= double(count) * (mean - centre) * (mean - centre);
  const double apart = mean - to[1], both = to[0] + double(count);
  to[1] += apart * (double(count) / both);
  to[2] += all_squares + apart * apart * (to[0] * double(count) / both);
  to[0] = both;
  to[3] = least < to[3] ? least : to[3];
  to[4] = most > to[4] ? most : to[4];
}

inline void no_moments(double* to) {
  to[0] = to[1] = to[2] = 0;
  to[3] = INFINITY, to[4] = -INFINITY;
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// A norm of one row.
struct Normal {
  const Norm& norm;
  float mean, over;

  Normal(const Norm& norm, const float* x, int64_t count) : norm(norm), mean(0), over(1) {
    if (norm.kind == kNoNorm || norm.kind == kFactors) return;
    if (norm.kind == kLayerNorm) {
      V sum{};
      for (int64_t i = 0; i < count; i += W) sum = sum + load_some(x + i, count - i);
      mean = lane_sum(sum) / float(count);
    }
    V squares{};
    for (int64_t i = 0; i < count; i += W) {
      const V d = first_of(load_some(x + i, count - i) - mean, count - i);
      squares = squares + d * d;
    }
    over = 1.0f / std::sqrt(lane_sum(squares) / float(count) + float(norm.eps));
  }

  // Columns from i on, of which `left` are there.
  SSMQUANT_INLINE V at(V x, int64_t i, int64_t left) const {
    if (norm.kind == kNoNorm) return x;
    if (norm.kind == kFactors) return x * load_some(norm.weight + i, left);
    V y = (x - mean) * over;
    if (norm.weight != nullptr) y = y * load_some(norm.weight + i, left);
    return norm.bias != nullptr ? y + load_some(norm.bias + i, left) : y;
  }
};

// x * (1 + erf(x / sqrt(2))) / 2, with erf by Abramowitz and Stegun, 7.1.26: to 1.5e-7. Some vectors, in place, one
// stage after the other as in exp2.
template <int count>
SSMQUANT_INLINE void gelu(V* x) {
  V near[count], size[count], e[count], t[count], p[count];
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) {
    near[j] = at_most(16.0f, at_least(-16.0f, x[j]));  // beyond, nothing lies outside; a NaN stays one
    size[j] = at_least(near[j], -near[j]) * 0.70710678f;
    e[j] = size[j] * size[j] * float(-kLog2e);
  }
  exp2<count>(e, 0.0f);
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) t[j] = 1.0f / (1.0f + 0.3275911f * size[j]);
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) {
    p[j] = (1.061405429f * t[j] - 1.453152027f) * t[j] + 1.421413741f;
    p[j] = ((p[j] * t[j] - 0.284496736f) * t[j] + 0.254829592f) * t[j];
    const V outside = near[j] * (0.5f * p[j] * e[j]);
    x[j] = at_least(0.0f, x[j]) - at_least(outside, -outside);
  }
}

template <int count>
SSMQUANT_INLINE void silu(V* x) {
  V e[count];
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) e[j] = x[j] * float(-kLog2e);
  exp2<count>(e, 0.0f);
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) x[j] = x[j] / (e[j] + 1.0f);
}

SSMQUANT_INLINE V silu(V x) {
  silu<1>(&x);
  return x;
}

template <int count>
SSMQUANT_INLINE void activated(int64_t act, V* x) {
  if (act == kGelu) return gelu<count>(x);
  if (act == kSilu) return silu<count>(x);
}

}  // namespace
