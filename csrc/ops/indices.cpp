#include "ops/indices.h"

#include "core/dispatch.h"

namespace lmkern {

std::string position_string(const TensorView& view, std::int64_t flat) {
  TensorView at = view;
  for (int i = view.ndim - 1; i >= 0; --i) {
    at.shape[i] = flat % view.shape[i];
    flat /= view.shape[i];
  }
  return shape_string(at);
}

void check_indices(const Check& check, const TensorView& indices, std::int64_t rows) {
  if (indices.dtype != DType::kInt32 && indices.dtype != DType::kInt64)
    check.fail_type(std::string("input must be int32 or int64, got ") + dtype_name(indices.dtype));
  check.dtype("input", indices, indices.dtype);
  check.contiguous("input", indices);
  dispatch_index_types(indices.dtype, [&](auto tag) {
    using I = typename decltype(tag)::type;
    const I* index = indices.ptr<const I>();
    const std::int64_t n = indices.numel();
    bool valid = true;
    for (std::int64_t i = 0; i < n; ++i) valid &= index[i] >= 0 && index[i] < rows;
    for (std::int64_t i = 0; !valid && i < n; ++i)
      if (index[i] < 0 || index[i] >= rows)
        check.fail_index("index " + std::to_string(index[i]) + " at position " +
                         position_string(indices, i) +
                         " is out of range for V = " + std::to_string(rows));
  });
}

}  // namespace lmkern
