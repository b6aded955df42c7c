// Bags of embedding rows (csrc/ops/embedding_bag.h).
//
// Parallel  a thread for each piece of 16 bytes of out: its bag's terms one after the other, 4 rows
//           under way at once.
// Traffic   M D read from weight, B D written (max: and B D winners).
// Limits    a bag of many thousands is as long as it takes one thread. 80 registers, no spills.
#include "core/dispatch.h"
#include "cuda/bag_view.h"
#include "cuda/device/thread.h"
#include "cuda/kernels.h"
#include "cuda/stream.h"

namespace lmkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;

template <class S>
struct BagForward {
  BagView bags;
  const S* weight;
  std::int64_t stride, width, columns;
  const S* samples;  // per_sample_weights, or null
  S* out;
  std::int32_t* winners;  // or null
  IndexErrors errors, offset_errors;
};

// registers: 80, spills: 0
template <class S, int kVec, bool kMax>
LMKERN_KERNEL(kThreads, 3)
sum_bags(BagForward<S> f) {
  using T = Accumulate<S>;
  const RowThread me = split_index(std::int64_t{block_x()} * kThreads + thread_index(), f.columns);
  if (me.row >= f.bags.bags) return;
  const std::int64_t column = me.column * kVec;
  const bool reports = me.column == 0;
  if (reports) f.bags.check_offsets(me.row, f.offset_errors);
  const BagView::Range range = f.bags.range(me.row);

  T sum[kVec];
  std::int32_t winner[kVec];
  std::int64_t count = 0;
  LMKERN_UNROLL
  for (int i = 0; i < kVec; ++i) {
    sum[i] = T(0);
    winner[i] = 0;
  }
  for (std::int64_t n = range.begin; n < range.end; n += kInFlight) {
    bool takes[kInFlight];
    T factor[kInFlight];
    Piece<S, kVec> row[kInFlight];
    LMKERN_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      takes[k] = n + k < range.end;
      if (!takes[k]) continue;
      const std::int64_t index = f.bags.indices.at(n + k), valid = f.errors.valid_row(index);
      if (reports && index != valid) f.errors.report(index, n + k);
      takes[k] = f.bags.padding_idx < 0 || index != f.bags.padding_idx;
      if (!takes[k]) continue;
      row[k].load(f.weight + valid * f.stride + column);
      factor[k] = f.samples == nullptr ? T(1) : to_accumulate(f.samples[n + k]);
    }
    LMKERN_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      if (!takes[k]) continue;
      LMKERN_UNROLL
      for (int i = 0; i < kVec; ++i) {
        const T value = to_accumulate(row[k].at[i]) * factor[k];
        if constexpr (!kMax) {
          sum[i] += value;
        } else if (count == 0 || value > sum[i]) {
          sum[i] = value;
          winner[i] = static_cast<std::int32_t>(count);
        }
      }
      ++count;
    }
  }
  const T scale = count == 0 ? T(0) : f.bags.template factor<T>(count);
  Piece<S, kVec> result;
  LMKERN_UNROLL
  for (int i = 0; i < kVec; ++i)
    result.at[i] = from_accumulate<S>(kMax || count == 0 ? sum[i] : sum[i] * scale);
  result.store(f.out + me.row * f.width + column);
  if constexpr (kMax) {
    if (f.winners == nullptr) return;
    Piece<std::int32_t, kVec> won;
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) won.at[i] = winner[i];
    won.store(f.winners + me.row * f.width + column);
  }
}

template <class S, int kVec>
void forward(const EmbeddingBagForwardArgs& a) {
  const std::int64_t count = a.out.shape[0], width = a.out.shape[1];
  const BagForward<S> f{
      BagView(a.bags, {}),
      a.weight.ptr<const S>(),
      a.weight.strides[0],
      width,
      width / kVec,
      a.bags.per_sample_weights.ptr<const S>(),
      a.out.ptr<S>(),
      a.winners.ptr<std::int32_t>(),
      index_errors("embedding_bag", a.bags.indices, a.weight.shape[0]),
      offset_errors("embedding_bag", a.bags.offsets, a.bags.indices.numel()),
  };
  const Grid grid{.x = blocks_for(count * f.columns, kThreads), .threads = kThreads};
  if (a.bags.mode == BagMode::kMax)
    launch<sum_bags<S, kVec, true>>(grid, current_stream(), f);
  else
    launch<sum_bags<S, kVec, false>>(grid, current_stream(), f);
}

}  // namespace

void Kernels::embedding_bag_forward(const EmbeddingBagForwardArgs& a) {
  if (a.out.numel() == 0) return;
  dispatch_float_types(a.weight.dtype, [&](auto s) {
    using S = typename decltype(s)::type;
    if (is_wide<S>(a.out.shape[1], {&a.weight, &a.out, &a.winners}))
      forward<S, kWide<S>>(a);
    else
      forward<S, 1>(a);
  });
}

}  // namespace lmkern::cuda
