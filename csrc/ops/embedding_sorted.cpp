// The gradients of the lookup and of bags by sorted positions: a GPU's.
#include "core/backend.h"
#include "core/check.h"
#include "ops/embedding.h"
#include "ops/embedding_bag.h"
#include "ops/indices.h"

namespace lmkern {
namespace {

constexpr std::int64_t kMost = 0x7fffffff;  // of positions and rows: keys are int32

}  // namespace

void check_sorted_gradient(const Check& check, const SortedGradient& g, std::int64_t positions,
                           std::int64_t workspace_bytes) {
  check.floating("d_weight", g.d_weight);
  check.dims("d_weight", g.d_weight, 2, "[R, D]");
  check.contiguous("d_weight", g.d_weight);
  if (positions >= kMost || g.d_weight.shape[0] >= kMost)
    check.fail("input and weight must have fewer than 2^31 elements and rows");
  check.tensor("rows", g.rows, DType::kInt32, {positions}, "[N]");
  check.tensor("order", g.order, DType::kInt64, {positions}, "[N]");
  check.dims("workspace", g.workspace, 1, "[bytes]");
  check.dtype("workspace", g.workspace, DType::kUInt8);
  check.contiguous("workspace", g.workspace);
  if (g.workspace.shape[0] < workspace_bytes)
    check.fail("workspace must have " + std::to_string(workspace_bytes) + " bytes, got " +
               std::to_string(g.workspace.shape[0]));
}

void embedding_keys(const EmbeddingKeysArgs& a) {
  const Check check("embedding");
  check_indices(check, a.indices, a.num_embeddings);
  const std::int64_t n = a.indices.numel();
  if (n >= kMost || a.num_embeddings >= kMost)
    check.fail("input and weight must have fewer than 2^31 elements and rows");
  check.tensor("keys", a.keys, DType::kInt32, {n}, "[N]");
  if (a.covered.defined()) {
    check.dims("covered", a.covered, 1, "[1]");
    check_integers(check, a.covered, "covered");
    check.shape("covered", a.covered, {1}, "[1]");
  }
  backend::kernels().embedding_keys(a);
}

void embedding_sorted_backward(const EmbeddingSortedBackwardArgs& a) {
  const Check check("embedding_backward");
  check.dims("d_out", a.d_out, 2, "[N, D]");
  check_sorted_gradient(check, {a.rows, a.order, a.d_weight, a.workspace}, a.d_out.shape[0],
                        cuda::embedding_sorted_workspace(a.d_out.shape[0], a.d_out.shape[1],
                                                         a.d_out.dtype == DType::kFloat64));
  check.tensor("d_out", a.d_out, a.d_weight.dtype, {a.d_out.shape[0], a.d_weight.shape[1]},
               "[N, D]");
  backend::kernels().embedding_sorted_backward(a);
}

void embedding_bag_sorted_backward(const EmbeddingBagSortedBackwardArgs& a) {
  const Check check("embedding_bag_backward");
  // The keys were made of these indices, which were looked at then.
  const std::int64_t count = check_bags(check, a.bags, a.d_weight, kMost);
  const std::int64_t positions = a.bags.indices.numel();
  check.dims("d_out", a.d_out, 2, "[B, D]");
  check_sorted_gradient(check, {a.rows, a.order, a.d_weight, a.workspace}, positions,
                        cuda::embedding_bag_sorted_workspace(positions, a.d_out.shape[1],
                                                             a.d_out.dtype == DType::kFloat64));
  const std::int64_t width = a.d_weight.shape[1];
  check.tensor("d_out", a.d_out, a.d_weight.dtype, {count, width}, "[B, D]");
  check_bag_terms(check, a.bags, a.winners, a.kept, count, width);
  backend::kernels().embedding_bag_sorted_backward(a);
}

}  // namespace lmkern
