// SIMD vectors of one instruction set, through GCC/Clang vector extensions: load, store, select,
// transpose. Everything is in the namespace of the build (cmake/Isa.cmake) and always inlined.
//
//   using V = Vec<float>;            // LMKERN_VEC_BYTES wide; + - * / < ?: work lane by lane
//   V x = load(p), y = V{} + 2.0f;
//   store(q, x * y + x);             // one FMA (-ffp-contract=fast)
//
// Storage types are float, double, bfloat16 and float16; a vector holds their Accumulate type.
#pragma once
#include <cstdint>
#include <utility>

#include "core/dtype.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define LMKERN_UNROLL _Pragma("GCC unroll 32")

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

inline constexpr int kVecBytes = LMKERN_VEC_BYTES;

template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float Value __attribute__((vector_size(kVecBytes)));
  typedef std::int32_t Int __attribute__((vector_size(kVecBytes)));
  typedef std::uint32_t Word __attribute__((vector_size(kVecBytes)));
  typedef std::uint8_t Bytes __attribute__((vector_size(kVecBytes / sizeof(float))));
  using IntLane = std::int32_t;
};
template <>
struct VecTypes<double> {
  typedef double Value __attribute__((vector_size(kVecBytes)));
  typedef std::int64_t Int __attribute__((vector_size(kVecBytes)));
  typedef std::uint64_t Word __attribute__((vector_size(kVecBytes)));
  typedef std::uint8_t Bytes __attribute__((vector_size(kVecBytes / sizeof(double))));
  using IntLane = std::int64_t;
};

template <class T>
using Vec = typename VecTypes<T>::Value;
template <class T>
using IntVec = typename VecTypes<T>::Int;  // also the type of a comparison's result
template <class T>
using WordVec = typename VecTypes<T>::Word;  // bit patterns: its arithmetic may wrap around
template <class T>
inline constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

// The number of vectors an accumulator tile may hold without spilling, with room for its operands.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kAccumulators = 24;
#else
inline constexpr int kAccumulators = 12;
#endif

template <class T>
LMKERN_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // not a sum: 0 + -0.0 is +0.0
}

template <class T>
LMKERN_INLINE IntVec<T> lane_index() {
  IntVec<T> v{};
  LMKERN_UNROLL
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}

// ---- load and store ---------------------------------------------------------------------------

LMKERN_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
LMKERN_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
LMKERN_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
LMKERN_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }

typedef std::uint16_t HalfWords __attribute__((vector_size(kVecBytes / 2)));
using Words = WordVec<float>;

LMKERN_INLINE Vec<float> load(const bfloat16* p) {
  HalfWords half;
  __builtin_memcpy(&half, p, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, Words) << 16);
}
// Rounds to nearest, ties to even; a NaN stays a NaN.
LMKERN_INLINE void store(bfloat16* p, Vec<float> v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words kept = v == v ? rounded : (bits >> 16) | 0x40u;
  const HalfWords half = __builtin_convertvector(kept, HalfWords);
  __builtin_memcpy(p, &half, sizeof half);
}

// float16: by instruction where there is one, otherwise by moving bits. To float: the half's
// exponent and mantissa, read as a float, are the value times 2^-112; denormals come out right too.
// From float: adding 2^-1 pushes the bits that a denormal half cannot keep out of the
// mantissa, rounded.
LMKERN_INLINE Vec<float> widen_half(HalfWords half) {
  const Words bits = __builtin_convertvector(half, Words), magnitude = (bits & 0x7fffu) << 13;
  const Words value = (Words)((Vec<float>)magnitude * 0x1p112f);
  const Words special = magnitude >= (0x7c00u << 13) ? value | 0x7f800000u : value;
  return (Vec<float>)(special | ((bits & 0x8000u) << 16));
}
LMKERN_INLINE HalfWords narrow_half(Vec<float> v) {
  const Words bits = (Words)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Words denormal = (Words)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Words half = magnitude < (113u << 23) ? denormal : normal;
  half = magnitude >= 0x477ff000u ? (Words{} + 0x7c00u) : half;  // 65520 and above
  half = magnitude > 0x7f800000u ? (Words{} + 0x7e00u) : half;
  return __builtin_convertvector(half | sign, HalfWords);
}

LMKERN_INLINE Vec<float> load(const float16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; i += 8) {
    const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i)));
    __builtin_memcpy((float*)&v + i, &part, sizeof part);
  }
  return v;
#else
  HalfWords half;
  __builtin_memcpy(&half, p, sizeof half);
  return widen_half(half);
#endif
}
LMKERN_INLINE void store(float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (int i = 0; i < kLanes<float>; i += 8) {
    __m256 part;
    __builtin_memcpy(&part, (const float*)&v + i, sizeof part);
    _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  const HalfWords half = narrow_half(v);
  __builtin_memcpy(p, &half, sizeof half);
#endif
}

// The first n lanes only (0 <= n <= lanes); lanes beyond are zero.
template <class S>
LMKERN_INLINE Vec<Accumulate<S>> load_n(const S* p, std::int64_t n) {
  if (n == kLanes<Accumulate<S>>) return load(p);
  S lanes[kLanes<Accumulate<S>>] = {};
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class S>
LMKERN_INLINE void store_n(S* p, Vec<Accumulate<S>> v, std::int64_t n) {
  if (n == kLanes<Accumulate<S>>) return store(p, v);
  S lanes[kLanes<Accumulate<S>>];
  store(lanes, v);
  for (std::int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

LMKERN_INLINE float to_accumulate(float x) { return x; }
LMKERN_INLINE double to_accumulate(double x) { return x; }
LMKERN_INLINE float to_accumulate(bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
LMKERN_INLINE float to_accumulate(float16 x) {
  float16 lanes[kLanes<float>] = {x};
  return load(lanes)[0];
}

// n bools as 1 and 0.
template <class T>
LMKERN_INLINE Vec<T> load_bools(const bool* p, std::int64_t n) {
  typename VecTypes<T>::Bytes bytes{};
  if (n == kLanes<T>)
    __builtin_memcpy(&bytes, p, sizeof bytes);
  else
    for (std::int64_t i = 0; i < n; ++i) bytes[i] = p[i];
  return __builtin_convertvector(bytes, Vec<T>);
}

// The sum of the lanes, pairwise: the same order on every run.
template <class V>
LMKERN_INLINE auto sum_lanes(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  decltype(+v[0]) lanes[n];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int width = n / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// ---- lane arithmetic --------------------------------------------------------------------------

// b where either is NaN. By instruction where there is one: compilers do not dare.
#if defined(__AVX512F__)
LMKERN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
}
LMKERN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
}
#endif
template <class V>
LMKERN_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
LMKERN_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

// Correctly rounded. There is no such operator on vectors; the loop becomes one instruction.
LMKERN_INLINE Vec<float> sqrt(Vec<float> v) {
  float lanes[kLanes<float>];
  store(lanes, v);
  for (int i = 0; i < kLanes<float>; ++i) lanes[i] = __builtin_sqrtf(lanes[i]);
  return load(lanes);
}
LMKERN_INLINE Vec<double> sqrt(Vec<double> v) {
  double lanes[kLanes<double>];
  store(lanes, v);
  for (int i = 0; i < kLanes<double>; ++i) lanes[i] = __builtin_sqrt(lanes[i]);
  return load(lanes);
}

// numerator / denominator for finite denominators of at least 1. A 512-bit division takes the
// FMA port for 16 cycles; the 14-bit estimate and one Newton step take 4, at an error of at most
// 1 ULP more.
LMKERN_INLINE Vec<float> divide(Vec<float> numerator, Vec<float> denominator) {
#if defined(__AVX512F__)
  typedef float Whole __attribute__((vector_size(64)));
  const Vec<float> estimate =
      (Vec<float>)__builtin_ia32_rcp14ps512_mask((Whole)denominator, Whole{}, 0xffff);
  const Vec<float> quotient = numerator * estimate;
  return quotient + estimate * (numerator - quotient * denominator);
#else
  return numerator / denominator;
#endif
}
LMKERN_INLINE Vec<double> divide(Vec<double> numerator, Vec<double> denominator) {
  return numerator / denominator;
}

// ---- transpose --------------------------------------------------------------------------------

// a[0], b[0], a[1], b[1], ... of the lower (High = 0) or upper (High = 1) half of the lanes.
template <int High, class V, int... Lane>
LMKERN_INLINE V interleave(V a, V b, std::integer_sequence<int, Lane...>) {
  constexpr int n = sizeof...(Lane);
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (Lane / 2 + High * n / 2 + Lane % 2 * n)...);
#else
  using Mask = decltype(a < b);
  return __builtin_shuffle(a, b, Mask{(Lane / 2 + High * n / 2 + Lane % 2 * n)...});
#endif
}

// The lower (High = 0) or upper halves of a and b, one after the other.
template <int High, class V, int... Lane>
LMKERN_INLINE V concatenate(V a, V b, std::integer_sequence<int, Lane...>) {
  constexpr int n = sizeof...(Lane);
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (Lane + (Lane < n / 2 ? High : 1 + High) * n / 2)...);
#else
  using Mask = decltype(a < b);
  return __builtin_shuffle(a, b, Mask{(Lane + (Lane < n / 2 ? High : 1 + High) * n / 2)...});
#endif
}

// Transposes a square of lanes x lanes in registers: log2(lanes) perfect shuffles of its rows.
template <class T>
LMKERN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  using Lanes = std::make_integer_sequence<int, n>;
  LMKERN_UNROLL
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
    LMKERN_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + n / 2], Lanes{});
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + n / 2], Lanes{});
    }
    LMKERN_UNROLL
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// Sums across lanes, K vectors at a time: log2(K) rounds, each adding the halves of two vectors.
// The result has lanes / K blocks of K lanes, whose sum has the sum of rows[i] in lane i.
template <class T, int K>
LMKERN_INLINE Vec<T> fold(Vec<T> (&rows)[K]) {
  using Lanes = std::make_integer_sequence<int, kLanes<T>>;
  LMKERN_UNROLL
  for (int half = K / 2; half > 0; half /= 2) {
    LMKERN_UNROLL
    for (int i = 0; i < half; ++i)
      rows[i] = interleave<0>(rows[i], rows[i + half], Lanes{}) +
                interleave<1>(rows[i], rows[i + half], Lanes{});
  }
  return rows[0];
}

// What is left to do where K is half of the lanes: both halves of `a`, then of `b`, added.
template <class T>
LMKERN_INLINE Vec<T> fold_halves(Vec<T> a, Vec<T> b) {
  using Lanes = std::make_integer_sequence<int, kLanes<T>>;
  return concatenate<0>(a, b, Lanes{}) + concatenate<1>(a, b, Lanes{});
}

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < cols, and zero for
// rows <= r < padded_rows, a multiple of the lanes. `to` may be S or what S accumulates in.
template <class S, class To>
LMKERN_INLINE void transpose_into(const S* from, std::int64_t from_stride, std::int64_t rows,
                                  std::int64_t padded_rows, std::int64_t cols, To* to,
                                  std::int64_t to_stride) {
  using T = Accumulate<S>;
  constexpr std::int64_t n = kLanes<T>;
  for (std::int64_t r = 0; r < padded_rows; r += n) {
    for (std::int64_t c = 0; c < cols; c += n) {
      const std::int64_t width = cols - c < n ? cols - c : n;
      Vec<T> square[n];
      LMKERN_UNROLL
      for (int i = 0; i < n; ++i)
        square[i] = r + i < rows ? load_n(from + (r + i) * from_stride + c, width) : Vec<T>{};
      transpose<T>(square);
      LMKERN_UNROLL
      for (int i = 0; i < n; ++i)
        if (i < width) store(to + (c + i) * to_stride + r, square[i]);
    }
  }
}

// The way back: to[r * to_stride + c] = from[c * from_stride + r] for r < rows, c < cols. `from`
// has whole vectors of rows.
template <class S>
LMKERN_INLINE void transpose_from(const Accumulate<S>* from, std::int64_t from_stride,
                                  std::int64_t rows, std::int64_t cols, S* to,
                                  std::int64_t to_stride) {
  using T = Accumulate<S>;
  constexpr std::int64_t n = kLanes<T>;
  for (std::int64_t r = 0; r < rows; r += n) {
    for (std::int64_t c = 0; c < cols; c += n) {
      const std::int64_t width = cols - c < n ? cols - c : n;
      Vec<T> square[n];
      LMKERN_UNROLL
      for (int i = 0; i < n; ++i)
        square[i] = i < width ? load(from + (c + i) * from_stride + r) : Vec<T>{};
      transpose<T>(square);
      LMKERN_UNROLL
      for (int i = 0; i < n; ++i)
        if (r + i < rows) store_n(to + (r + i) * to_stride + c, square[i], width);
    }
  }
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
