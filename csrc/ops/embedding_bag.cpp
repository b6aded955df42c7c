#include "ops/embedding_bag.h"

#include "core/backend.h"
#include "core/dispatch.h"
#include "ops/indices.h"

namespace lmkern {
namespace {

void check_offsets(const Check& check, const TensorView& offsets, std::int64_t n) {
  check_integers(check, offsets, "offsets");
  if constexpr (!kReadable) return;
  dispatch_index_types(offsets.dtype, [&](auto tag) {
    const auto* offset = offsets.ptr<const typename decltype(tag)::type>();
    const std::int64_t count = offsets.shape[0];
    if (count > 0 && offset[0] != 0)
      check.fail("offsets[0] must be 0, got " + std::to_string(offset[0]));
    for (std::int64_t b = 1; b < count; ++b)
      if (offset[b] < offset[b - 1])
        check.fail("offsets must not decrease, got " + std::to_string(offset[b - 1]) + " before " +
                   std::to_string(offset[b]) + " at position " + std::to_string(b));
    if (count > 0 && offset[count - 1] > n)
      check.fail("offsets must not exceed N = " + std::to_string(n) + ", got " +
                 std::to_string(offset[count - 1]));
  });
}

}  // namespace

void check_bag_terms(const Check& check, const EmbeddingBags& bags, const TensorView& winners,
                     const TensorView& kept, std::int64_t count, std::int64_t width) {
  if (bags.mode == BagMode::kMax)
    check.tensor("winners", winners, DType::kInt32, {count, width}, "[B, D]");
  const std::int64_t positions = bags.indices.numel();
  if (!kReadable && bags.padding_idx >= 0)
    check.tensor("kept", kept, DType::kInt64, {positions}, "[N]");
  else if (kept.defined())
    check.fail("kept is for a GPU, and a padding_idx");
}

std::int64_t check_bags(const Check& check, const EmbeddingBags& bags, const TensorView& table,
                        std::int64_t rows) {
  const TensorView& weights = bags.per_sample_weights;
  std::int64_t count = bags.indices.shape[0];
  if (bags.offsets.defined()) {
    check.dims("input", bags.indices, 1, "[N]");
    check.dims("offsets", bags.offsets, 1, bags.include_last_offset ? "[B + 1]" : "[B]");
    count = bags.offsets.shape[0] - (bags.include_last_offset ? 1 : 0);
    if (count < 0) check.fail("offsets must be [B + 1], got [0]");
    check_offsets(check, bags.offsets, bags.indices.shape[0]);
  } else {
    check.dims("input", bags.indices, 2, "[B, L]");
  }
  if (weights.defined()) {
    if (bags.offsets.defined())
      check.tensor("per_sample_weights", weights, table.dtype, {bags.indices.shape[0]}, "[N]");
    else
      check.tensor("per_sample_weights", weights, table.dtype,
                   {bags.indices.shape[0], bags.indices.shape[1]}, "[B, L]");
  }
  check_indices(check, bags.indices, rows);
  if (bags.indices.numel() > 0x7fffffff) check.fail("input must have fewer than 2^31 elements");
  return count;
}

void embedding_bag_forward(const EmbeddingBagForwardArgs& a) {
  const Check check("embedding_bag");
  check.floating("weight", a.weight);
  check.dims("weight", a.weight, 2, "[V, D]");
  check.last_contiguous("weight", a.weight);
  const std::int64_t width = a.weight.shape[1];
  const std::int64_t count = check_bags(check, a.bags, a.weight, a.weight.shape[0]);
  check.tensor("out", a.out, a.weight.dtype, {count, width}, "[B, D]");
  check.optional("winners", a.winners, DType::kInt32, {count, width}, "[B, D]");
  backend::kernels().embedding_bag_forward(a);
}

void embedding_bag_weights_backward(const EmbeddingBagWeightsBackwardArgs& a) {
  const Check check("embedding_bag_backward");
  check.floating("weight", a.weight);
  check.dims("weight", a.weight, 2, "[V, D]");
  check.last_contiguous("weight", a.weight);
  const std::int64_t width = a.weight.shape[1];
  const std::int64_t count = check_bags(check, a.bags, a.weight, a.weight.shape[0]);
  check.tensor("d_out", a.d_out, a.weight.dtype, {count, width}, "[B, D]");
  check_bag_terms(check, a.bags, a.winners, a.kept, count, width);
  check.dtype("d_per_sample_weights", a.d_per_sample_weights, a.weight.dtype);
  check.contiguous("d_per_sample_weights", a.d_per_sample_weights);
  if (a.d_per_sample_weights.numel() != a.bags.indices.numel())
    check.fail("d_per_sample_weights must have the shape of input, got " +
               shape_string(a.d_per_sample_weights));
  backend::kernels().embedding_bag_weights_backward(a);
}

}  // namespace lmkern
