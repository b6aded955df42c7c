// Philox 4x32-10 for one counter, and what dropout makes of its words, for all backends. (Vectors of
// counters: cpu/philox.h.)
//
// Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once
#include "core/dtype.h"

namespace lmkern {

struct Philox {
  static constexpr int kRounds = 10;
  static constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier2 = 0xCD9E8D57u;
  static constexpr std::uint32_t kKeyLow = 0x9E3779B9u, kKeyHigh = 0xBB67AE85u;  // of each round
};

// Turns the counter into four random words.
LMKERN_HOST_DEVICE void philox(std::uint32_t (&counter)[4], std::uint64_t key) {
  std::uint32_t key_low = static_cast<std::uint32_t>(key);
  std::uint32_t key_high = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < Philox::kRounds; ++round) {
    const std::uint64_t product_0 = std::uint64_t{counter[0]} * Philox::kMultiplier0;
    const std::uint64_t product_2 = std::uint64_t{counter[2]} * Philox::kMultiplier2;
    counter[0] = static_cast<std::uint32_t>(product_2 >> 32) ^ counter[1] ^ key_low;
    counter[1] = static_cast<std::uint32_t>(product_2);
    counter[2] = static_cast<std::uint32_t>(product_0 >> 32) ^ counter[3] ^ key_high;
    counter[3] = static_cast<std::uint32_t>(product_0);
    key_low += Philox::kKeyLow;
    key_high += Philox::kKeyHigh;
  }
}

// Dropout's rule: an element is kept if its word is not below `threshold`, and is multiplied with `scale`.
template <class T>
struct KeepRule {
  std::uint32_t threshold;
  T scale;

  // p: the probability to be dropped.
  explicit LMKERN_INLINE KeepRule(double p) {
    const double words = p * 0x1p32 + 0.5;
    threshold = words >= 0x1p32 - 1 ? 0xffffffffu : static_cast<std::uint32_t>(words);
    scale = p < 1 ? static_cast<T>(1 / (1 - p)) : T(0);
  }
  LMKERN_HOST_DEVICE T keep(std::uint32_t word) const { return word >= threshold ? scale : T(0); }
};

}  // namespace lmkern
