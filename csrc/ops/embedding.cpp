#include "ops/embedding.h"

#include "core/backend.h"
#include "core/check.h"
#include "ops/indices.h"

namespace lmkern {
namespace {

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
  backend::kernels().embedding_forward(a);
}

void embedding_renorm(const EmbeddingRenormArgs& a) {
  const Check check("embedding");
  check.floating("weight", a.weight);
  check.dims("weight", a.weight, 2, "[V, D]");
  check.last_contiguous("weight", a.weight);
  check.dims("ids", a.ids, 1, "[U]");
  check.dtype("ids", a.ids, DType::kInt64);
  check_indices(check, a.ids, a.weight.shape[0]);
  backend::kernels().embedding_renorm(a);
}

}  // namespace lmkern
