// Dropout without a mask in memory: what it multiplies an element with is a function of the seed and
// of the element's flat index n alone, so that a backward pass has it again, on any thread and with
// any instruction set.
//
//   word n % 4 of philox(counter = {n / 4, its upper half, 0, 0}, key = seed)
//   keep(n) = word >= round(p 2^32) ? 1 / (1 - p) : 0            p = 1 keeps nothing
#pragma once
#include "core/tensor_view.h"
#include "cpu/philox.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

template <class T>
class Dropout {
 public:
  static constexpr int kBlock = 4 * kLanes<float>;  // elements of one call of Philox

  LMKERN_INLINE Dropout(double p, std::int64_t seed)
      : seed_(static_cast<std::uint64_t>(seed)), rule_(p) {}
  LMKERN_INLINE Dropout(double p, const TensorView& seed)  // absent without dropout
      : Dropout(p, p > 0 ? *seed.ptr<const std::int64_t>() : 0) {}

  // keep of the elements 4 quad .. 4 quad + kBlock, in order; for float, in registers.
  LMKERN_INLINE void block(std::int64_t quad, Vec<float> (&keep)[4]) const {
    static_assert(sizeof(T) == sizeof(float));
    Words words[4];
    random(quad, words);
    LMKERN_UNROLL
    for (int v = 0; v < 4; ++v)
      keep[v] = words[v] >= rule_.threshold ? splat(rule_.scale) : Vec<float>{};
  }

  // What `row` wants of a buffer for n elements.
  static constexpr LMKERN_INLINE std::int64_t row_size(std::int64_t n) {
    return (n + 3 + kBlock - 1) / kBlock * kBlock;
  }

  // keep of the elements first .. first + n: written into the buffer, at the address returned.
  LMKERN_INLINE const T* row(std::int64_t first, std::int64_t n, T* buffer) const {
    const std::int64_t skip = first % 4;
    for (std::int64_t i = 0; i < n + skip; i += kBlock) {
      if constexpr (sizeof(T) == sizeof(float)) {
        Vec<float> keep[4];
        block((first + i) / 4, keep);
        LMKERN_UNROLL
        for (int v = 0; v < 4; ++v) store(buffer + i + v * kLanes<float>, keep[v]);
      } else {
        Words words[4];
        random((first + i) / 4, words);
        for (int e = 0; e < kBlock; ++e)
          buffer[i + e] = rule_.keep(words[e / kLanes<float>][e % kLanes<float>]);
      }
    }
    return buffer + skip;
  }

 private:
  // The words of kBlock elements, in the elements' order.
  LMKERN_INLINE void random(std::int64_t quad, Words (&words)[4]) const {
    constexpr int quads = kLanes<double>;
    using Lanes = std::make_integer_sequence<int, quads>;
    LMKERN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const WideWords counter =
          (WideWords)lane_index<double>() + static_cast<std::uint64_t>(quad + half * quads);
      WideWords of[4] = {counter, counter >> 32, WideWords{}, WideWords{}};
      philox(of, seed_);
      const WideWords first = join_halves(of[0], of[1]), second = join_halves(of[2], of[3]);
      words[2 * half] = (Words)interleave<0>(first, second, Lanes{});
      words[2 * half + 1] = (Words)interleave<1>(first, second, Lanes{});
    }
  }

  std::uint64_t seed_;
  KeepRule<T> rule_;
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
