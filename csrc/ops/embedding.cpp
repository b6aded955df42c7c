#include "ops/embedding.h"

#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/isa.h"

namespace lmkern {
namespace {

std::string position_string(const TensorView& indices, std::int64_t flat) {
  TensorView at = indices;
  for (int i = indices.ndim - 1; i >= 0; --i) {
    at.shape[i] = flat % indices.shape[i];
    flat /= indices.shape[i];
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

// rows: [..., D], one for each index.
void check_rows(const Check& check, const char* name, const TensorView& rows,
                const TensorView& indices, std::int64_t width) {
  bool same = rows.ndim == indices.ndim + 1 && rows.shape[rows.ndim - 1] == width;
  for (int i = 0; same && i < indices.ndim; ++i) same = rows.shape[i] == indices.shape[i];
  if (!same)
    check.fail(std::string(name) + " must be [*input, D] with input " + shape_string(indices) +
               " and D = " + std::to_string(width) + ", got " + shape_string(rows));
  check.contiguous(name, rows);
}

}  // namespace

void embedding_forward(const EmbeddingForwardArgs& a) {
  const Check check("embedding");
  check.floating("weight", a.weight);
  check.dims("weight", a.weight, 2, "[V, D]");
  check.last_contiguous("weight", a.weight);
  check.dtype("out", a.out, a.weight.dtype);
  check_rows(check, "out", a.out, a.indices, a.weight.shape[1]);
  check_indices(check, a.indices, a.weight.shape[0]);
  cpu::kernels().embedding_forward(a);
}

void embedding_backward(const EmbeddingBackwardArgs& a) {
  const Check check("embedding_backward");
  check.floating("d_weight", a.d_weight);
  check.dims("d_weight", a.d_weight, 2, "[V, D]");
  check.contiguous("d_weight", a.d_weight);
  check.dtype("d_out", a.d_out, a.d_weight.dtype);
  check_rows(check, "d_out", a.d_out, a.indices, a.d_weight.shape[1]);
  check_indices(check, a.indices, a.d_weight.shape[0]);
  cpu::kernels().embedding_backward(a);
}

}  // namespace lmkern
