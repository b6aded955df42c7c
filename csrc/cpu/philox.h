// Philox 4x32-10, one stream per lane: random bits as a function of a counter and a key alone, so
// that a backward pass, or another thread, has them again.
//
// Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once
#include "cpu/vec.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

using WideWords = WordVec<double>;  // 64-bit lanes

// Products of the lower halves of 64-bit lanes.
LMKERN_INLINE WideWords multiply_halves(WideWords a, WideWords b) {
#if defined(__AVX512F__)
  return (WideWords)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  WideWords product;
  for (int i = 0; i < kVecBytes; i += 32) {
    __m256i x, y;
    __builtin_memcpy(&x, (const char*)&a + i, 32);
    __builtin_memcpy(&y, (const char*)&b + i, 32);
    x = _mm256_mul_epu32(x, y);
    __builtin_memcpy((char*)&product + i, &x, 32);
  }
  return product;
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Four random words for each lane of counter[0..3] and the key.
LMKERN_INLINE void philox(Words (&counter)[4], std::uint64_t key) {
  const auto multiply = [](Words x, std::uint32_t by, Words& high) __attribute__((always_inline)) {
    const WideWords factor = WideWords{} + by;
    const WideWords even = multiply_halves((WideWords)x, factor);
    const WideWords odd = multiply_halves((WideWords)x >> 32, factor);
    constexpr std::uint64_t kHigh = 0xffffffff00000000u;
    high = (Words)((even >> 32) | (odd & kHigh));
    return (Words)((even & ~kHigh) | (odd << 32));
  };
  std::uint32_t key_low = static_cast<std::uint32_t>(key);
  std::uint32_t key_high = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    Words high_0, high_2;
    const Words low_0 = multiply(counter[0], 0xD2511F53u, high_0);
    const Words low_2 = multiply(counter[2], 0xCD9E8D57u, high_2);
    counter[0] = high_2 ^ counter[1] ^ key_low;
    counter[1] = low_2;
    counter[2] = high_0 ^ counter[3] ^ key_high;
    counter[3] = low_0;
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
