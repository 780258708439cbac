// Conversion of rows between the dtypes of tensors and the dtype of a computation. As cpu_simd.h, internal to the
// translation unit. Loops without branches, which compilers turn into vector code; float16 has instructions of its own
// where a file is compiled for them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

enum Dtype : int64_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

inline int64_t size_of(int64_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Half {
  uint16_t bits;

  operator float() const {
    const uint32_t m = bits & 0x7fffu;
    const uint32_t normal = (m << 13) + (112u << 23);
    // A denormal one as the mantissa of 2 ** -14, less 2 ** -14: no denormal float32 appears.
    const uint32_t tiny = bits_of(float_of((m << 13) + (113u << 23)) - float_of(113u << 23));
    const uint32_t special = (m << 13) + (224u << 23);
    const uint32_t magnitude = m >= 0x7c00u ? special : m < 0x400u ? tiny : normal;
    return float_of(magnitude | (uint32_t(bits & 0x8000u) << 16));
  }

  static Half from(float x) {  // to the nearest, ties to even
    const uint32_t all = bits_of(x), m = all & 0x7fffffffu;
    const uint32_t normal = (m - (112u << 23) + 0xfffu + ((m >> 13) & 1u)) >> 13;
    const uint32_t tiny = bits_of(float_of(m) + 0.5f) - bits_of(0.5f);
    const uint32_t special = m > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t magnitude = m >= 0x477ff000u ? special : m < 0x38800000u ? tiny : normal;
    return Half{uint16_t(magnitude | (all >> 16 & 0x8000u))};
  }
};

struct BFloat {
  uint16_t bits;

  operator float() const { return float_of(uint32_t(bits) << 16); }

  static BFloat from(float x) {
    const uint32_t all = bits_of(x);
    const uint32_t rounded = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;
    return BFloat{uint16_t((all & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
};

template <typename To>
struct Rounded {
  template <typename From>
  static To from(From x) {
    return To::from(float(x));
  }
};
template <>
struct Rounded<float> {
  template <typename From>
  static float from(From x) {
    return float(x);
  }
};
template <>
struct Rounded<double> {
  template <typename From>
  static double from(From x) {
    return double(x);
  }
};

template <typename S, typename From>
inline void read_as(const void* from, int64_t stride, S* to, int64_t count) {
  const From* p = static_cast<const From*>(from);
  if (stride == 1) {
    int64_t i = 0;
#if defined(__F16C__)
    if constexpr (std::is_same_v<From, Half> && std::is_same_v<S, float>) {
      for (; i + 8 <= count; i += 8) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(bits));
      }
    }
#endif
    for (; i < count; ++i) to[i] = S(p[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = S(p[i * stride]);
  }
}

// `count` elements of `dtype`, `stride` elements apart, as S.
template <typename S>
inline void read_row(int64_t dtype, const void* from, int64_t stride, S* to, int64_t count) {
  switch (dtype) {
    case kFloat32: return read_as<S, float>(from, stride, to, count);
    case kFloat64: return read_as<S, double>(from, stride, to, count);
    case kFloat16: return read_as<S, Half>(from, stride, to, count);
    default: return read_as<S, BFloat>(from, stride, to, count);
  }
}

template <typename To, typename S>
inline void write_as(const S* from, void* to, int64_t count) {
  To* p = static_cast<To*>(to);
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<To, Half> && std::is_same_v<S, float>) {
    for (; i + 8 <= count; i += 8) {
      const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), bits);
    }
  }
#endif
  for (; i < count; ++i) p[i] = Rounded<To>::from(from[i]);
}

template <typename S>
inline void write_row(int64_t dtype, const S* from, void* to, int64_t count) {
  switch (dtype) {
    case kFloat32: return write_as<float>(from, to, count);
    case kFloat64: return write_as<double>(from, to, count);
    case kFloat16: return write_as<Half>(from, to, count);
    default: return write_as<BFloat>(from, to, count);
  }
}

inline const void* at(const void* p, int64_t dtype, int64_t element) {
  return static_cast<const char*>(p) + element * size_of(dtype);
}

inline void* at(void* p, int64_t dtype, int64_t element) { return static_cast<char*>(p) + element * size_of(dtype); }

}  // namespace
