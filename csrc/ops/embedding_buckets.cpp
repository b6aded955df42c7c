// The gradient of the lookup by buckets, and the memory it is lent: the CPU's.
#include "core/backend.h"
#include "core/check.h"
#include "ops/embedding.h"
#include "ops/indices.h"

namespace lmkern {

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
