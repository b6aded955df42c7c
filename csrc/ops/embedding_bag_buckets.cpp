// The gradient of bags by buckets: the CPU's.
#include "core/backend.h"
#include "core/check.h"
#include "core/dispatch.h"
#include "ops/embedding.h"
#include "ops/embedding_bag.h"

namespace lmkern {
namespace {

// How many positions lie in a bag.
std::int64_t covered(const EmbeddingBags& bags) {
  std::int64_t end = bags.indices.numel();
  if (bags.offsets.defined() && bags.include_last_offset)
    dispatch_index_types(bags.offsets.dtype, [&](auto tag) {
      end = bags.offsets.ptr<const typename decltype(tag)::type>()[bags.offsets.shape[0] - 1];
    });
  return bags.offsets.defined() && bags.offsets.shape[0] == 0 ? 0 : end;
}

}  // namespace

void embedding_bag_backward(const EmbeddingBagBackwardArgs& a) {
  const Check check("embedding_bag_backward");
  // The buckets were made of these indices, which were checked then.
  const std::int64_t count = check_bags(check, a.bags, a.d_weight, INT64_MAX);
  check_bucketed_gradient(check, {a.ids, a.starts, a.order, a.stale, a.d_weight, a.sparse},
                          covered(a.bags));
  const std::int64_t width = a.d_weight.shape[1];
  check.tensor("d_out", a.d_out, a.d_weight.dtype, {count, width}, "[B, D]");
  check_bag_terms(check, a.bags, a.winners, {}, count, width);
  backend::kernels().embedding_bag_backward(a);
}

}  // namespace lmkern
