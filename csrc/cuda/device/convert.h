// Between storage types and the type that is computed in (PTX 9.7.9.23, cvt).
#pragma once
#include <cstring>

#include "cuda/device/base.h"

namespace lmkern::cuda {

template <class S>
inline constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<bfloat16> = true;

namespace detail {
template <class To, class From>
LMKERN_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace detail

LMKERN_DEVICE float to_accumulate(float value) { return value; }
LMKERN_DEVICE double to_accumulate(double value) { return value; }
LMKERN_DEVICE float to_accumulate(bfloat16 value) {
  return detail::bits_as<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
LMKERN_DEVICE float to_accumulate(float16 value) {
#if defined(LMKERN_SIMT)
  return static_cast<float>(detail::bits_as<_Float16>(value.bits));
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#endif
}

// Rounds to nearest, ties to even.
template <class S>
LMKERN_DEVICE S from_accumulate(Accumulate<S> value) {
  if constexpr (sizeof(S) == sizeof(Accumulate<S>)) {
    return value;
  } else if constexpr (kIsBFloat16<S>) {
#if defined(LMKERN_SIMT)
    const auto bits = detail::bits_as<std::uint32_t>(value);
    if (value != value) return S{static_cast<std::uint16_t>(bits >> 16 | 0x40)};
    return S{static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#else
    S narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
#endif
  } else {
#if defined(LMKERN_SIMT)
    return S{detail::bits_as<std::uint16_t>(static_cast<_Float16>(value))};
#else
    S narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
#endif
  }
}

// A float rounded to 10 bits of mantissa, as tensor cores take it.
LMKERN_DEVICE std::uint32_t to_tf32(float value) {
#if defined(LMKERN_SIMT)
  const auto bits = detail::bits_as<std::uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;  // ties away from zero
#else
  std::uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
#endif
}

}  // namespace lmkern::cuda
