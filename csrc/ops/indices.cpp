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

std::string index_message(const char* name, std::int64_t index, const std::string& position,
                          const char* extent, std::int64_t rows) {
  return (name == nullptr ? "index " : std::string(name) + ": index ") + std::to_string(index) +
         " at position " + position + " is out of range for " + extent + " = " +
         std::to_string(rows);
}

void check_integers(const Check& check, const TensorView& view, const char* name) {
  if (view.dtype != DType::kInt32 && view.dtype != DType::kInt64)
    check.fail_type(std::string(name) + " must be int32 or int64, got " + dtype_name(view.dtype));
  check.dtype(name, view, view.dtype);
  check.contiguous(name, view);
}

void check_indices(const Check& check, const TensorView& indices, std::int64_t rows,
                   const char* name, const char* extent) {
  const char* const argument = name == nullptr ? "input" : name;
  check_integers(check, indices, argument);
  if constexpr (!kReadable) {
    if (rows == 0 && indices.numel() > 0)
      check.fail_index(std::string(argument) + " must be empty for " + extent + " = 0, got " +
                       shape_string(indices));
    return;
  }
  dispatch_index_types(indices.dtype, [&](auto tag) {
    using I = typename decltype(tag)::type;
    const I* index = indices.ptr<const I>();
    const std::int64_t n = indices.numel();
    bool valid = true;
    for (std::int64_t i = 0; i < n; ++i) valid &= index[i] >= 0 && index[i] < rows;
    for (std::int64_t i = 0; !valid && i < n; ++i)
      if (index[i] < 0 || index[i] >= rows)
        check.fail_index(index_message(name, index[i], position_string(indices, i), extent, rows));
  });
}

}  // namespace lmkern
