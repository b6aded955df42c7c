// The terms of each bag (csrc/ops/embedding_bag.h): positions without padding, bag by bag.
#pragma once
#include "core/dispatch.h"
#include "core/memory.h"
#include "cpu/vec.h"
#include "ops/embedding_bag.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

struct BagTerms {
  std::int64_t bags;
  std::int64_t* starts = nullptr;     // [B + 1], of positions and rows
  std::int64_t* positions = nullptr;  // [M]
  std::int64_t* rows = nullptr;       // [M], what the positions look up

  // Takes the arrays; fill writes them.
  LMKERN_INLINE void layout(Scratch& scratch, const EmbeddingBags& b) {
    starts = scratch.take<std::int64_t>(bags + 1);
    positions = scratch.take<std::int64_t>(b.indices.numel());
    rows = scratch.take<std::int64_t>(b.indices.numel());
  }

  LMKERN_INLINE void fill(const EmbeddingBags& b) const {
    dispatch_index_types(b.indices.dtype, [&](auto i) {
      using I = typename decltype(i)::type;
      if (!b.offsets.defined()) {
        const std::int64_t length = b.indices.shape[1];
        collect(b, b.indices.ptr<const I>(), [=](std::int64_t bag) { return bag * length; });
        return;
      }
      dispatch_index_types(b.offsets.dtype, [&](auto o) {
        const auto* offset = b.offsets.ptr<const typename decltype(o)::type>();
        const std::int64_t given = b.offsets.shape[0], n = b.indices.shape[0];
        collect(b, b.indices.ptr<const I>(), [=](std::int64_t bag) {
          return bag < given ? static_cast<std::int64_t>(offset[bag]) : n;
        });
      });
    });
  }

 private:
  template <class I, class Begin>
  LMKERN_INLINE void collect(const EmbeddingBags& b, const I* index, const Begin& begin) const {
    std::int64_t kept = 0;
    for (std::int64_t bag = 0; bag < bags; ++bag) {
      starts[bag] = kept;
      const std::int64_t end = begin(bag + 1);
      for (std::int64_t n = begin(bag); n < end; ++n) {
        positions[kept] = n;
        rows[kept] = index[n];
        kept += index[n] != b.padding_idx;
      }
    }
    starts[bags] = kept;
  }
};

typedef std::int32_t HalfInts __attribute__((vector_size(kVecBytes / 2)));

LMKERN_INLINE IntVec<float> widen_ints(const std::int32_t* p, TypeTag<float>) {
  IntVec<float> lanes;
  __builtin_memcpy(&lanes, p, sizeof lanes);
  return lanes;
}
LMKERN_INLINE IntVec<double> widen_ints(const std::int32_t* p, TypeTag<double>) {
  HalfInts lanes;
  __builtin_memcpy(&lanes, p, sizeof lanes);
  return __builtin_convertvector(lanes, IntVec<double>);
}

// n int32, as lanes of the width of T.
template <class T>
LMKERN_INLINE IntVec<T> load_ints(const std::int32_t* p, std::int64_t n) {
  if (n == kLanes<T>) return widen_ints(p, TypeTag<T>{});
  std::int32_t lanes[kLanes<T>] = {};
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return widen_ints(lanes, TypeTag<T>{});
}

// weight * row where this term is the winner, else 0.
template <class S>
struct WinnerRow {
  using T = Accumulate<S>;
  const S* data;
  const std::int32_t* winners;
  typename VecTypes<T>::IntLane term;
  T weight;
  LMKERN_INLINE Vec<T> at(std::int64_t d) const { return at_n(d, kLanes<T>); }
  LMKERN_INLINE Vec<T> at_n(std::int64_t d, std::int64_t n) const {
    const Vec<T> value = load_n(data + d, n) * weight;
    return load_ints<T>(winners + d, n) == IntVec<T>{} + term ? value : Vec<T>{};
  }
};

template <class S>
LMKERN_INLINE Accumulate<S> sample_weight(const EmbeddingBags& b, std::int64_t position) {
  return b.per_sample_weights.defined()
             ? to_accumulate(b.per_sample_weights.ptr<const S>()[position])
             : Accumulate<S>(1);
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
