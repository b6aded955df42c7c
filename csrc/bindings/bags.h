// EmbeddingBags as Python hands it over.
#pragma once
#include <pybind11/stl.h>

#include <tuple>

#include "bindings/tensor_caster.h"
#include "ops/embedding_bag.h"

namespace lmkern {

// EmbeddingBags, member by member.
using Bags = std::tuple<TensorView, TensorView, TensorView, bool, int, std::int64_t>;

inline EmbeddingBags embedding_bags(const Bags& bags) {
  const auto& [indices, offsets, weights, include_last_offset, mode, padding_idx] = bags;
  return {indices, offsets, weights, include_last_offset, static_cast<BagMode>(mode), padding_idx};
}

}  // namespace lmkern
