// Checks of row numbers, shared by the ops that look rows up.
#pragma once
#include "core/check.h"

namespace lmkern {

// [..., i, ...]: where element `flat` of the view is.
std::string position_string(const TensorView& view, std::int64_t flat);

// int32 or int64, contiguous, every element in [0, rows); IndexError names the first that is not, and
// the argument if it is another than input.
void check_indices(const Check& check, const TensorView& indices, std::int64_t rows,
                   const char* name = nullptr, const char* extent = "V");

// What writes rows of a gradient by buckets (ops/embedding.h): `positions` bounds order's elements.
struct BucketedGradient {
  const TensorView &ids, &starts, &order, &stale, &d_weight;
  bool sparse;
};
void check_bucketed_gradient(const Check& check, const BucketedGradient& gradient,
                             std::int64_t positions);

}  // namespace lmkern
