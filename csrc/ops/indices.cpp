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

void check_indices(const Check& check, const TensorView& indices, std::int64_t rows,
                   const char* name, const char* extent) {
  const char* const argument = name == nullptr ? "input" : name;
  if (indices.dtype != DType::kInt32 && indices.dtype != DType::kInt64)
    check.fail_type(std::string(argument) + " must be int32 or int64, got " +
                    dtype_name(indices.dtype));
  check.dtype(argument, indices, indices.dtype);
  check.contiguous(argument, indices);
  dispatch_index_types(indices.dtype, [&](auto tag) {
    using I = typename decltype(tag)::type;
    const I* index = indices.ptr<const I>();
    const std::int64_t n = indices.numel();
    bool valid = true;
    for (std::int64_t i = 0; i < n; ++i) valid &= index[i] >= 0 && index[i] < rows;
    for (std::int64_t i = 0; !valid && i < n; ++i)
      if (index[i] < 0 || index[i] >= rows)
        check.fail_index((name == nullptr ? "index " : std::string(name) + ": index ") +
                         std::to_string(index[i]) + " at position " + position_string(indices, i) +
                         " is out of range for " + extent + " = " + std::to_string(rows));
  });
}

void check_bucketed_gradient(const Check& check, const BucketedGradient& g,
                             std::int64_t positions) {
  check.floating("d_weight", g.d_weight);
  check.dims("d_weight", g.d_weight, 2, g.sparse ? "[U, D]" : "[V, D]");
  check.contiguous("d_weight", g.d_weight);
  check.dims("ids", g.ids, 1, "[U]");
  check.dtype("ids", g.ids, DType::kInt64);
  const std::int64_t distinct = g.ids.shape[0];
  check.tensor("starts", g.starts, DType::kInt64, {distinct + 1}, "[U + 1]");
  const std::int64_t terms = g.starts.ptr<const std::int64_t>()[distinct];
  TensorView order = g.order;
  check.dims("order", order, 1, "[N]");
  if (order.shape[0] > terms) order.shape[0] = terms;
  check.tensor("order", order, DType::kInt64, {terms}, "[starts[U]]");
  check_indices(check, order, positions);
  if (g.sparse)
    check.shape("d_weight", g.d_weight, {distinct, g.d_weight.shape[1]}, "[U, D]");
  else
    check_indices(check, g.ids, g.d_weight.shape[0]);
  if (g.stale.defined()) {
    check.dims("stale", g.stale, 1, "[K]");
    check.dtype("stale", g.stale, DType::kInt64);
    check_indices(check, g.stale, g.d_weight.shape[0]);
  }
}

}  // namespace lmkern
