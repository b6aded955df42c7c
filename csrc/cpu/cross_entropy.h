// What both passes of the cross entropy share (csrc/ops/cross_entropy.h).
//
// Parallel  threads own positions. P = 1: lanes are classes of one; P > 1: lanes are positions, in
//           blocks of kWide vectors and tiles of kTile classes.
// Traffic   forward reads the logits, backward reads and writes them: the bound where they come from
//           memory. A row of classes, or a tile, is read twice, for the maximum and for the sum, the
//           second time from L1 or L2; beside an exponential of about 4 ns a vector.
// Limits    few positions with many classes run on few threads.
#pragma once
#include "core/dispatch.h"
#include "core/parallel.h"
#include "cpu/vec_math.h"
#include "ops/cross_entropy.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE::cross_entropy {

inline constexpr std::int64_t kForkElements = 16 << 10;
inline constexpr int kWide = 4, kTile = 32;  // 8 KB of float: a tile stays in L1

template <class Args>
LMKERN_INLINE int threads_for(const Args& a) {
  return a.logits.numel() < kForkElements ? 1 : max_threads();
}

LMKERN_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// What both passes know of the problem. `kPlain`: class indices, no softcap, no weights or smoothing
// inside of the loop over classes, which a branch there would double.
template <class S, bool kPlain>
struct Problem {
  using T = Accumulate<S>;
  using V = Vec<T>;
  using M = VecMath<T>;
  static constexpr std::int64_t kLane = kLanes<T>;

  const TensorView& logits;
  const CrossEntropyTarget& target;
  const std::int64_t classes = logits.shape[1], positions = logits.shape[2];
  const std::int64_t* const index = target.index.ptr<const std::int64_t>();
  const T* const weight = target.weight.ptr<const T>();
  const T* const bias = target.bias.ptr<const T>();
  const T cap = static_cast<T>(target.softcap);
  const T inverse_cap = cap > 0 ? 1 / cap : T(0);

  LMKERN_INLINE V capped(V z) const {
    if constexpr (kPlain) return z;
    return cap > 0 ? M::tanh(z * inverse_cap) * cap : z;
  }
  // The class that `position` picks, counted from the first of these logits; -1 if not among them.
  LMKERN_INLINE std::int64_t picked(std::int64_t position) const {
    if (index == nullptr || index[position] == target.ignore_index) return -1;
    const std::int64_t c = index[position] - target.first;
    return c >= 0 && c < classes ? c : -1;
  }
  // Logits of neighbouring classes, and of one, with their biases.
  LMKERN_INLINE V biased(V z, std::int64_t at, std::int64_t count) const {
    if constexpr (kPlain) return z;
    return bias != nullptr ? z + load_n(bias + at, count) : z;
  }
  LMKERN_INLINE T single(const S* z, std::int64_t at) const {
    return to_accumulate(z[at]) + (bias != nullptr ? bias[at] : T(0));
  }
  static LMKERN_INLINE V lowest() { return splat<T>(-T(__builtin_inf())); }
};

template <class Pass, class Args>
void run(const Args& a) {
  const Pass pass(a);
  const std::int64_t batch = a.logits.shape[0], positions = a.logits.shape[2];
  constexpr std::int64_t kBlock = kWide * Pass::kLane;
  const std::int64_t blocks = positions == 1 ? 1 : (positions + kBlock - 1) / kBlock;
  parallel(threads_for(a), [&](int thread, int of) {
    const Range own = thread_range(batch * blocks, 1, thread, of);
    for (std::int64_t i = own.begin; i < own.end; ++i) {
      if (positions == 1) {
        pass.row(i);
        continue;
      }
      std::int64_t p = i % blocks * kBlock;
      const std::int64_t end = least(p + kBlock, positions);
      if (end - p == kBlock) {
        pass.template lanes<kWide>(i / blocks, p, Pass::kLane);
        continue;
      }
      for (; p < end; p += Pass::kLane)
        pass.template lanes<1>(i / blocks, p, least(end - p, Pass::kLane));
    }
  });
}

template <template <class, bool> class Pass, class Args>
void dispatch(const Args& a, bool plain) {
  dispatch_float_types(a.logits.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (plain)
      run<Pass<S, true>>(a);
    else
      run<Pass<S, false>>(a);
  });
}

LMKERN_INLINE bool is_plain(const TensorView& logits, const CrossEntropyTarget& t,
                            const TensorView& total) {
  const bool biased_rows = t.bias.defined() && logits.shape[2] == 1;
  return t.softcap == 0 && t.index.defined() && !total.defined() && !biased_rows;
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE::cross_entropy
