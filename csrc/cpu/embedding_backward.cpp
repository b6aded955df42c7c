// Gradient of the embedding lookup (embedding_backward in csrc/ops/embedding.h).
//
// Parallel  over buckets, the long ones in pieces of columns, and over rows to clear; handed out
//           dynamically, since ids are usually Zipf-distributed.
// Traffic   N D read + U D written + K D cleared: nothing is proportional to V.
// Limits    what is to be cleared is found serially: one pass over K + U ids.
#include "core/dispatch.h"
#include "cpu/row_sums.h"
#include "ops/embedding.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

// term(i) = d_out[order[i], :]
template <class S>
struct OrderedRows {
  using Row = PlainRow<S>;
  const S* d_out;
  std::int64_t width;
  const std::int64_t* order;
  LMKERN_INLINE Row row(std::int64_t i) const { return {d_out + order[i] * width}; }
};

template <class S>
void backward(const EmbeddingBackwardArgs& a) {
  RowSums sums{a.sparse ? nullptr : a.ids.ptr<const std::int64_t>(),
               a.starts.ptr<const std::int64_t>(),
               a.stale.ptr<const std::int64_t>(),
               a.ids.shape[0],
               a.stale.defined() ? a.stale.shape[0] : 0,
               a.d_weight.shape[1],
               a.scale_grad_by_freq};
  sums.scale = a.scale;
  Scratch::place([&](Scratch& scratch) { sums.layout(scratch); });
  const OrderedRows<S> terms{a.d_out.ptr<const S>(), sums.width, a.order.ptr<const std::int64_t>()};
  write_row_sums(sums, terms, a.d_weight.ptr<S>());
}

}  // namespace

void embedding_backward(const EmbeddingBackwardArgs& a) {
  dispatch_float_types(a.d_weight.dtype, [&](auto s) { backward<typename decltype(s)::type>(a); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
