// Philox 4x32-10, one stream per lane: random bits as a function of a counter and a key alone, so
// that a backward pass, or another thread, has them again.
//
// Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once
#include "core/philox.h"
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

// Four random words for each lane of counter[0..3] and the key, in the lower halves of 64-bit lanes;
// what the upper halves hold does not matter, and is arbitrary afterwards: a product then has its two
// words where they are wanted next, at a third fewer instructions than with all halves in use.
LMKERN_INLINE void philox(WideWords (&counter)[4], std::uint64_t key) {
  std::uint32_t key_low = static_cast<std::uint32_t>(key);
  std::uint32_t key_high = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < Philox::kRounds; ++round) {
    const WideWords product_0 = multiply_halves(counter[0], WideWords{} + Philox::kMultiplier0);
    const WideWords product_2 = multiply_halves(counter[2], WideWords{} + Philox::kMultiplier2);
    counter[0] = (product_2 >> 32) ^ counter[1] ^ key_low;
    counter[1] = product_2;
    counter[2] = (product_0 >> 32) ^ counter[3] ^ key_high;
    counter[3] = product_0;
    key_low += Philox::kKeyLow;
    key_high += Philox::kKeyHigh;
  }
}

// The lower halves of `low`, and those of `high` above them.
LMKERN_INLINE WideWords join_halves(WideWords low, WideWords high) {
  return (low & 0xffffffffu) | (high << 32);
}

// The same for 32-bit lanes.
LMKERN_INLINE void philox(Words (&counter)[4], std::uint64_t key) {
  WideWords even[4], odd[4];
  LMKERN_UNROLL
  for (int i = 0; i < 4; ++i) {
    even[i] = (WideWords)counter[i];
    odd[i] = (WideWords)counter[i] >> 32;
  }
  philox(even, key);
  philox(odd, key);
  LMKERN_UNROLL
  for (int i = 0; i < 4; ++i) counter[i] = (Words)join_halves(even[i], odd[i]);
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
