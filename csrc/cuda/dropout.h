// What dropout multiplies elements with (cpu/dropout.h says how it follows from seed and flat index): the
// same bits as on the CPU.
#pragma once
#include "core/philox.h"
#include "core/tensor_view.h"
#include "cuda/device/base.h"

namespace lmkern::cuda {

// What a launch passes on: the seed lies in the GPU's memory, so that a CUDA graph draws another one in
// each replay.
template <class T>
struct DropoutRule {
  KeepRule<T> keep;
  const std::int64_t* seed;  // null: no dropout

  DropoutRule(double p, const TensorView& seed)
      : keep(p), seed(p > 0 ? seed.ptr<const std::int64_t>() : nullptr) {}
};

template <class T>
struct Dropout {
  KeepRule<T> rule;
  bool on;
  std::uint64_t seed;

  explicit LMKERN_DEVICE Dropout(const DropoutRule<T>& rule)
      : rule(rule.keep),
        on(rule.seed != nullptr),
        seed(on ? static_cast<std::uint64_t>(*rule.seed) : 0) {}

  // x *= keep, of the elements from flat index `first` on, a multiple of kVec; nothing without dropout.
  template <int kVec>
  LMKERN_DEVICE void apply(std::int64_t first, T (&x)[kVec]) const {
    if (!on) return;
    constexpr int kWords = kVec < 4 ? kVec : 4;  // of a call of Philox
    LMKERN_UNROLL
    for (int part = 0; part < kVec; part += kWords) {
      const auto quad = static_cast<std::uint64_t>(first + part) / 4;
      std::uint32_t words[4] = {static_cast<std::uint32_t>(quad),
                                static_cast<std::uint32_t>(quad >> 32), 0, 0};
      philox(words, seed);
      // Moved rather than indexed, so that they stay in registers.
      if (kWords <= 2 && (first & 2) != 0) words[0] = words[2], words[1] = words[3];
      if (kWords == 1 && (first & 1) != 0) words[0] = words[1];
      LMKERN_UNROLL
      for (int i = 0; i < kWords; ++i) x[part + i] *= rule.keep(words[i]);
    }
  }
};

}  // namespace lmkern::cuda
