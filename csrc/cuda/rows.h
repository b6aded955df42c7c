// Rows of tensors, and the threads that share them: each owns kVec neighbouring elements of a row, 16
// bytes, or one where rows do not begin at multiples of 16 bytes.
#pragma once
#include <initializer_list>

#include "core/tensor_view.h"
#include "cuda/device/convert.h"
#include "cuda/device/vector.h"

namespace lmkern::cuda {

template <class S>
inline constexpr int kWide = 16 / static_cast<int>(sizeof(S));

// Whether rows of `width` elements of S may be read 16 bytes at a time. An absent view does not matter.
template <class S>
bool is_wide(std::int64_t width, std::initializer_list<const TensorView*> views) {
  bool wide = width % kWide<S> == 0;
  for (const TensorView* view : views) {
    wide = wide && reinterpret_cast<std::uintptr_t>(view->data) % 16 == 0;
    if (view->ndim == 2 && view->shape[0] > 1) wide = wide && view->strides[0] % kWide<S> == 0;
  }
  return wide;
}

// kVec elements, whatever they are, loaded and stored 16 bytes at a time.
template <class E, int kVec>
struct Piece {
  static constexpr int kPart = kVec * sizeof(E) > 16 ? 16 / static_cast<int>(sizeof(E)) : kVec;
  E at[kVec];

  LMKERN_DEVICE void load(const E* from LMKERN_AND_SITE) {
    LMKERN_UNROLL
    for (int part = 0; part < kVec; part += kPart) {
      const auto vector = load_vector<Vector<E, kPart>>(from + part LMKERN_AND_HERE);
      LMKERN_UNROLL
      for (int i = 0; i < kPart; ++i) at[part + i] = vector.at[i];
    }
  }
  LMKERN_DEVICE void store(E* to LMKERN_AND_SITE) const {
    LMKERN_UNROLL
    for (int part = 0; part < kVec; part += kPart) {
      Vector<E, kPart> vector;
      LMKERN_UNROLL
      for (int i = 0; i < kPart; ++i) vector.at[i] = at[part + i];
      store_vector(to + part, vector LMKERN_AND_HERE);
    }
  }
};

// Elements of a tensor of int32 or int64. Which one is the same for all threads.
struct Integers {
  const void* data = nullptr;
  bool wide = false;

  Integers() = default;
  explicit Integers(const TensorView& view) : data(view.data), wide(view.dtype == DType::kInt64) {}
  LMKERN_DEVICE std::int64_t at(std::int64_t i) const {
    return wide ? static_cast<const std::int64_t*>(data)[i]
                : static_cast<std::int64_t>(static_cast<const std::int32_t*>(data)[i]);
  }
};

// Threads are numbered through the grid; `columns` of them, one for each piece, share a row.
struct RowThread {
  std::int64_t row;
  std::int64_t column;  // the number of the piece
};
LMKERN_DEVICE RowThread split_index(std::int64_t index, std::int64_t columns) {
  if ((index | columns) >> 32 == 0) {  // seldom not: 64-bit division costs a hundred instructions
    const auto i = static_cast<std::uint32_t>(index), c = static_cast<std::uint32_t>(columns);
    return {i / c, i % c};
  }
  return {index / columns, index % columns};
}

inline unsigned blocks_for(std::int64_t threads, int of_a_block) {
  return static_cast<unsigned>((threads + of_a_block - 1) / of_a_block);
}

}  // namespace lmkern::cuda
