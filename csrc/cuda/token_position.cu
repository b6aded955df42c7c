// Token + position + segment, norm and dropout in one pass (csrc/ops/token_position.h).
//
// Parallel  a warp for a row of up to 1 K elements, a block for a wider one; each thread keeps up to 32
//           elements of the sum in registers between statistics and output, 16 bytes of a row beside
//           each other. Rows that share a position are neighbours, so that its row comes from L1.
// Traffic   N D of tokens read, L D of positions, N D written: bound by memory, as Philox, at 20
//           instructions an element, takes about 2/3 of that time in 16-bit storage.
// Limits    rows beyond 256 threads x 32 elements (8 without 16-byte alignment, where Philox also makes
//           four words for each that is used) are added up again for each pass over them.
#include "core/dispatch.h"
#include "cuda/dropout.h"
#include "cuda/kernels.h"
#include "cuda/norm_row.h"
#include "cuda/stream.h"
#include "cuda/token_position.h"

namespace lmkern::cuda {
namespace {

constexpr int kThreads = 256;

template <class S>
struct ForwardRows {
  using T = Accumulate<S>;
  AddedRows<S> tables;
  RowOrder order;
  std::int64_t rows, width;
  NormParameter<S> weight, bias;
  T eps;
  DropoutRule<T> dropout;
  S* out;
  T* statistics;  // [2 or 1, N]; null: no norm
  bool centred;
};

// kHeld: pieces of a row that a thread keeps; 0: any number, added up each time.
// registers: 96, spills: 0
template <class S, int kVec, bool kBlock, int kHeld>
LMKERN_KERNEL(kThreads, 2)
add_rows(ForwardRows<S> r) {
  using T = Accumulate<S>;
  constexpr std::int64_t kRowThreads = kBlock ? kThreads : 32;
  const std::int64_t k =
      kBlock ? std::int64_t{block_x()} : std::int64_t{block_x()} * (kThreads / 32) + warp_index();
  if (k >= r.rows) return;
  const std::int64_t thread = kBlock ? thread_index() : lane_index();
  const RowOrder::Place place = r.order.at(k);
  const std::int64_t n = place.n;
  const Dropout<T> dropout(r.dropout);
  const Addends<S> addends = r.tables.at(n, place.l, thread == 0);

  T held[kHeld > 0 ? kHeld : 1][kVec];
  Piece<S, kVec> tokens[kHeld > 0 ? kHeld : 1];  // all under way before the first is awaited
  LMKERN_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    const std::int64_t column = (i * kRowThreads + thread) * kVec;
    if (column < r.width) tokens[i].load(addends.token + column);
  }
  LMKERN_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    const std::int64_t column = (i * kRowThreads + thread) * kVec;
    if (column < r.width) addends.add(column, tokens[i], held[i]);
  }
  const auto each = [&](const auto& f) {
    if constexpr (kHeld > 0) {
      LMKERN_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        const std::int64_t column = (i * kRowThreads + thread) * kVec;
        if (column < r.width) f(column, held[i]);
      }
    } else {
      for (std::int64_t c = thread * kVec; c < r.width; c += kRowThreads * kVec) {
        addends.load(c, held[0]);
        f(c, held[0]);
      }
    }
  };
  const auto write = [&](std::int64_t column, T(&y)[kVec]) {
    dropout.apply(n * r.width + column, y);
    Piece<S, kVec> piece;
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) piece.at[i] = from_accumulate<S>(y[i]);
    piece.store(r.out + n * r.width + column);
  };
  if (r.statistics == nullptr) {
    each(write);
    return;
  }
  const auto m = NormMoments<T>::template of<kBlock, kVec>(each, r.width, r.eps, r.centred,
                                                           shared_memory<T>());
  if (thread == 0) {
    if (r.centred) r.statistics[n] = m.mean + m.rest;
    r.statistics[(r.centred ? r.rows : 0) + n] = m.rstd;
  }
  each([&](std::int64_t column, T(&x)[kVec]) {
    T weight[kVec], bias[kVec];
    r.weight.load(column, T(1), weight);
    r.bias.load(column, T(0), bias);
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) x[i] = m.normalise(x[i]) * weight[i] + bias[i];
    write(column, x);
  });
}

template <class S, int kVec>
void launch_add_rows(const ForwardRows<S>& r) {
  using T = Accumulate<S>;
  constexpr int kHeld = kVec == 8 ? 4 : 8;
  const Stream stream = current_stream();
  const Grid by_warp{.x = blocks_for(r.rows, kThreads / 32), .threads = kThreads};
  const Grid by_block{.x = static_cast<unsigned>(r.rows),
                      .threads = kThreads,
                      .shared_bytes = 3 * sizeof(T) * kThreads / 32};
  if (r.width <= 32 * kHeld * kVec)
    launch<add_rows<S, kVec, false, kHeld>>(by_warp, stream, r);
  else if (r.width <= kThreads * kHeld * kVec)
    launch<add_rows<S, kVec, true, kHeld>>(by_block, stream, r);
  else
    launch<add_rows<S, kVec, true, 0>>(by_block, stream, r);
}

}  // namespace

void Kernels::token_position_forward(const TokenPositionForwardArgs& a) {
  const std::int64_t rows = a.out.shape[0], width = a.out.shape[1];
  if (rows == 0 || width == 0) return;
  dispatch_float_types(a.out.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    using T = Accumulate<S>;
    const ForwardRows<S> r{AddedRows<S>("token_position_embedding", a.rows),
                           RowOrder(rows, a.rows.length),
                           rows,
                           width,
                           NormParameter<S>(a.weight),
                           NormParameter<S>(a.bias),
                           static_cast<T>(a.eps),
                           DropoutRule<T>(a.dropout_p, a.seed),
                           a.out.ptr<S>(),
                           a.statistics.ptr<T>(),
                           a.statistics.defined() && a.statistics.shape[0] == 2};
    if (is_wide<S>(width,
                   {&a.rows.token, &a.rows.position, &a.rows.segment, &a.weight, &a.bias, &a.out}))
      launch_add_rows<S, kWide<S>>(r);
    else
      launch_add_rows<S, 1>(r);
  });
}

}  // namespace lmkern::cuda
