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

std::int64_t embedding_buckets(const EmbeddingBucketsArgs& a) {
  const Check check("embedding");
  const std::int64_t n = a.indices.numel();
  const std::int64_t most = n < a.num_embeddings ? n : a.num_embeddings;
  check.tensor("ids", a.ids, DType::kInt64, {most}, "[min(N, V)]");
  check.tensor("starts", a.starts, DType::kInt64, {most + 1}, "[min(N, V) + 1]");
  check.tensor("order", a.order, DType::kInt64, {n}, "[N]");
  check_indices(check, a.indices, a.num_embeddings);
  if (n > 0 && static_cast<std::uint64_t>(n) > ~std::uint64_t{0} / 4 / a.num_embeddings)
    check.fail("N V must be below 2^62");
  return backend::kernels().embedding_buckets(a);
}

void embedding_backward(const EmbeddingBackwardArgs& a) {
  const Check check("embedding_backward");
  check.dims("d_out", a.d_out, 2, "[N, D]");
  check_bucketed_gradient(check, {a.ids, a.starts, a.order, a.stale, a.d_weight, a.sparse},
                          a.d_out.shape[0]);
  check.tensor("d_out", a.d_out, a.d_weight.dtype, {a.d_out.shape[0], a.d_weight.shape[1]},
               "[N, D]");
  backend::kernels().embedding_backward(a);
}

void embedding_clear(const EmbeddingClearArgs& a) {
  const Check check("embedding_backward");
  check.floating("d_weight", a.d_weight);
  check.dims("d_weight", a.d_weight, 2, "[V, D]");
  check.contiguous("d_weight", a.d_weight);
  backend::kernels().embedding_clear(a);
}

bool embedding_is_clear(const EmbeddingIsClearArgs& a) {
  const Check check("embedding_backward");
  check.floating("d_weight", a.d_weight);
  check.dims("d_weight", a.d_weight, 2, "[V, D]");
  check.contiguous("d_weight", a.d_weight);
  if (a.written.defined())
    check.tensor("written", a.written, DType::kInt64, {a.written.shape[0]}, "[K]");
  if (a.samples < 1) check.fail("samples must be positive, got " + std::to_string(a.samples));
  return backend::kernels().embedding_is_clear(a);
}

}  // namespace lmkern
