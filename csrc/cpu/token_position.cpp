// Token + position + segment, norm and dropout in one pass (csrc/ops/token_position.h).
//
// Parallel  positions outside, the rows that share one inside: so a position's row and the sum of its
//           gradient stay in L1. Forward over rows in that order; backward over blocks of positions,
//           then over columns of the sums of the blocks.
// Traffic   forward N D of tokens read, L D of positions, N D written; backward the same and N D of
//           d_out read, or N D read and written without a norm.
// Limits    backward with few positions (L below the number of threads) leaves threads idle. Philox
//           takes about one cycle an element, as much as the memory.
#include "ops/token_position.h"

#include "core/memory.h"
#include "cpu/dropout.h"
#include "cpu/norm_row.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

LMKERN_INLINE std::int64_t index_at(const TensorView& indices, std::int64_t n) {
  return indices.dtype == DType::kInt32 ? indices.ptr<const std::int32_t>()[n]
                                        : indices.ptr<const std::int64_t>()[n];
}

// The rows to be summed for one n; a table that is absent has null.
template <class S>
struct Addends {
  using T = Accumulate<S>;

  const S *token, *position, *segment;
  T scale;

  LMKERN_INLINE Addends(const TokenPosition& r, std::int64_t n, std::int64_t l)
      : token(row(r.token, index_at(r.input, n))),
        position(row(r.position, r.positions.defined() ? index_at(r.positions, l) : r.offset + l)),
        segment(r.segment.defined() ? row(r.segment, index_at(r.segments, n)) : nullptr),
        scale(static_cast<T>(r.scale)) {}

  // f(d, lanes, x) for the vectors of the sum.
  template <class F>
  LMKERN_INLINE void sum(std::int64_t width, const F& f) const {
    for_vectors<T>(width, [&](std::int64_t d, std::int64_t n, int) __attribute__((always_inline)) {
      Vec<T> x = load_n(token + d, n) * scale;
      if (position != nullptr) x += load_n(position + d, n);
      if (segment != nullptr) x += load_n(segment + d, n);
      f(d, n, x);
    });
  }

 private:
  static LMKERN_INLINE const S* row(const TensorView& table, std::int64_t i) {
    return table.defined() ? table.ptr<const S>() + i * table.strides[0] : nullptr;
  }
};

// Elements of a row in whole vectors.
template <class T>
LMKERN_INLINE std::int64_t padded(std::int64_t width) {
  return (width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class S>
struct Forward {
  using T = Accumulate<S>;
  using V = Vec<T>;

  const TokenPositionForwardArgs& a;
  const std::int64_t rows = a.out.shape[0], width = a.out.shape[1], length = a.rows.length;
  const std::int64_t repeats = length > 0 ? rows / length : 0;

  // The k-th row, position by position.
  std::int64_t place(std::int64_t k) const { return k % repeats * length + k / repeats; }

  void row(std::int64_t n, std::int64_t next, const T* weight, const T* bias, const T* keep,
           T* x) const {
    const Addends<S> addends(a.rows, n, n % length);
    S* const out = a.out.ptr<S>() + n * width;
    const S* const next_token =
        a.rows.token.ptr<const S>() + index_at(a.rows.input, next) * a.rows.token.strides[0];
    const S* const next_out = a.out.ptr<S>() + next * width;
    const auto ahead = [&](std::int64_t d) __attribute__((always_inline)) {
      __builtin_prefetch(next_token + d);
      if (keep == nullptr) __builtin_prefetch(next_out + d);
    };
    const auto emit = [&](std::int64_t d, std::int64_t lanes, V y) __attribute__((always_inline)) {
      if (keep != nullptr) y *= load_n(keep + d, lanes);
      store_n(out + d, y, lanes);
    };
    if (!a.statistics.defined()) {
      addends.sum(width, [&](std::int64_t d, std::int64_t lanes, V y)
                             __attribute__((always_inline)) { ahead(d), emit(d, lanes, y); });
      return;
    }
    addends.sum(width, [&](std::int64_t d, std::int64_t, V y)
                           __attribute__((always_inline)) { store(x + d, y); });
    const bool centred = a.statistics.shape[0] == 2;
    const Moments<T> m = moments(x, width, a.eps, centred, ahead);
    normalise(x, m, weight, bias, width, emit);
    T* const statistics = a.statistics.ptr<T>();
    if (centred) statistics[n] = m.mean + m.rest;
    statistics[(centred ? rows : 0) + n] = m.rstd;
  }

  void run() const {
    if (rows == 0) return;
    const int most = threads_for(rows * width, rows);
    const std::int64_t keep_size = a.dropout_p > 0 ? Dropout<T>::row_size(width) : 0;
    const std::int64_t x_size = padded<T>(width);
    T *weight_buffer = nullptr, *bias_buffer = nullptr, *keeps = nullptr, *xs = nullptr;
    Scratch::place([&](Scratch& scratch) {
      weight_buffer = scratch.take<T>(width);
      bias_buffer = scratch.take<T>(width);
      keeps = scratch.take<T>(most * keep_size);
      xs = scratch.take<T>(most * x_size);
    });
    const T* const weight = widened<T>(a.weight, width, T(1), weight_buffer);
    const T* const bias = widened<T>(a.bias, width, T(0), bias_buffer);
    parallel(most, [&](int thread, int threads) {
      const Dropout<T> dropout(a.dropout_p, a.seed);
      const Range own = thread_range(rows, 1, thread, threads);
      for (std::int64_t k = own.begin; k < own.end; ++k) {
        const std::int64_t n = place(k), next = k + 1 < own.end ? place(k + 1) : n;
        const T* const keep =
            keep_size > 0 ? dropout.row(n * width, width, keeps + thread * keep_size) : nullptr;
        row(n, next, weight, bias, keep, xs + thread * x_size);
      }
    });
  }
};

template <class S>
struct Backward {
  using T = Accumulate<S>;
  using V = Vec<T>;
  enum Kind { kWeight, kBias, kKinds };

  const TokenPositionBackwardArgs& a;
  const std::int64_t rows = a.d_out.shape[0], width = a.d_out.shape[1], length = a.rows.length;
  const std::int64_t repeats = length > 0 ? rows / length : 0;

  // The rows of one position are summed in pieces, or float would lose digits in a long sum.
  static constexpr std::int64_t kPieceRows = 64;

  // What a thread works with: whole vectors each. d_position: of a piece; total: of those before.
  struct Buffers {
    T *x, *g, *keep, *d_position, *total;
  };

  // d_sum of a row of which g is d_out keep; added to the position's sum.
  template <class G>
  void row(std::int64_t n, std::int64_t l, const G* g, const T* weight, const Buffers& buffers,
           T* d_weight, T* d_bias) const {
    S* const d_sum = a.d_sum.defined() ? a.d_sum.ptr<S>() + n * width : nullptr;
    T* const d_position = a.d_position.defined() ? buffers.d_position : nullptr;
    const auto emit = [&](std::int64_t d, std::int64_t lanes, V grad)
                          __attribute__((always_inline)) {
                            if (d_sum != nullptr) store_n(d_sum + d, grad, lanes);
                            if (d_position != nullptr)
                              store(d_position + d, load(d_position + d) + grad);
                          };
    const std::int64_t next = n + length < rows ? n + length : l + 1 < length ? l + 1 : n;
    const S* const next_d_out = a.d_out.ptr<const S>() + next * width;
    if (!a.statistics.defined()) {
      for_vectors<T>(width,
                     [&](std::int64_t d, std::int64_t lanes, int) __attribute__((always_inline)) {
                       __builtin_prefetch(next_d_out + d);
                       emit(d, lanes, load_n(g + d, lanes));
                     });
      return;
    }
    const S* const next_token =
        a.rows.token.ptr<const S>() + index_at(a.rows.input, next) * a.rows.token.strides[0];
    Addends<S>(a.rows, n, l)
        .sum(width, [&](std::int64_t d, std::int64_t, V x) __attribute__((always_inline)) {
          __builtin_prefetch(next_token + d);
          store(buffers.x + d, x);
        });
    const bool centred = a.statistics.shape[0] == 2;
    const T* const statistics = a.statistics.ptr<const T>();
    const T mean = centred ? statistics[n] : T(0), rstd = statistics[(centred ? rows : 0) + n];
    normalise_backward(
        buffers.x, g, mean, rstd, centred, weight, width, d_weight, d_bias,
        [&](std::int64_t d) __attribute__((always_inline)) { __builtin_prefetch(next_d_out + d); },
        emit);
  }

  void position(std::int64_t l, const T* weight, const Dropout<T>& dropout, const Buffers& buffers,
                T* d_weight, T* d_bias) const {
    const std::size_t bytes = padded<T>(width) * sizeof(T);
    __builtin_memset(buffers.d_position, 0, bytes);
    __builtin_memset(buffers.total, 0, bytes);
    const auto add_piece = [&] {
      for_vectors<T>(width, [&](std::int64_t d, std::int64_t, int) __attribute__((always_inline)) {
        store(buffers.total + d, load(buffers.total + d) + load(buffers.d_position + d));
      });
    };
    for (std::int64_t n = l, piece = 0; n < rows; n += length, ++piece) {
      if (piece == kPieceRows) {
        add_piece();
        __builtin_memset(buffers.d_position, 0, bytes);
        piece = 0;
      }
      const S* const d_out = a.d_out.ptr<const S>() + n * width;
      if (a.dropout_p > 0) {
        const T* const keep = dropout.row(n * width, width, buffers.keep);
        for_vectors<T>(width,
                       [&](std::int64_t d, std::int64_t lanes, int) __attribute__((always_inline)) {
                         store(buffers.g + d, load_n(d_out + d, lanes) * load_n(keep + d, lanes));
                       });
        row(n, l, buffers.g, weight, buffers, d_weight, d_bias);
      } else {
        row(n, l, d_out, weight, buffers, d_weight, d_bias);
      }
    }
    if (a.d_position.defined()) {
      add_piece();
      S* const d_position = a.d_position.ptr<S>() + l * width;
      for_vectors<T>(width,
                     [&](std::int64_t d, std::int64_t lanes, int) __attribute__((always_inline)) {
                       store_n(d_position + d, load(buffers.total + d), lanes);
                     });
    }
  }

  void run() const {
    // A block has at least as many rows as its sums are worth, however many share a position.
    const std::int64_t shared = repeats > 0 ? repeats : 1;
    ColumnSums<T> sums{length, width, kKinds, (ColumnSums<T>::kLeastRows + shared - 1) / shared};
    const int most = threads_for(rows * width, sums.blocks);
    const std::int64_t keep_size = a.dropout_p > 0 ? Dropout<T>::row_size(width) : 0;
    const std::int64_t size = padded<T>(width);
    T *weight_buffer = nullptr, *xs = nullptr, *gs = nullptr, *keeps = nullptr,
      *sums_of_position = nullptr;
    Scratch::place([&](Scratch& scratch) {
      sums.sums = scratch.take<T>(sums.size());
      weight_buffer = scratch.take<T>(width);
      xs = scratch.take<T>(most * size);
      gs = scratch.take<T>(most * size);
      keeps = scratch.take<T>(most * keep_size);
      sums_of_position = scratch.take<T>(most * 2 * size);
    });
    const T* const weight = widened<T>(a.weight, width, T(1), weight_buffer);
    Barrier barrier;
    parallel(most, [&](int thread, int threads) {
      const Dropout<T> dropout(a.dropout_p, a.seed);
      const Buffers buffers{xs + thread * size, gs + thread * size, keeps + thread * keep_size,
                            sums_of_position + thread * 2 * size,
                            sums_of_position + thread * 2 * size + size};
      const Range own = thread_range(sums.blocks, 1, thread, threads);
      for (std::int64_t block = own.begin; block < own.end; ++block) {
        sums.clear(block);
        T* const d_weight = a.d_weight.defined() ? sums.of(block, kWeight) : nullptr;
        T* const d_bias = a.d_bias.defined() ? sums.of(block, kBias) : nullptr;
        const std::int64_t first = block * sums.block_rows, past = first + sums.block_rows;
        for (std::int64_t l = first; l < (past < length ? past : length); ++l)
          position(l, weight, dropout, buffers, d_weight, d_bias);
      }
      barrier.wait(threads);
      sums.total(kWeight, a.d_weight, thread, threads);
      sums.total(kBias, a.d_bias, thread, threads);
    });
  }
};

}  // namespace

void token_position_forward(const TokenPositionForwardArgs& a) {
  dispatch_float_types(a.out.dtype,
                       [&](auto tag) { Forward<typename decltype(tag)::type>{a}.run(); });
}

void token_position_backward(const TokenPositionBackwardArgs& a) {
  dispatch_float_types(a.d_out.dtype,
                       [&](auto tag) { Backward<typename decltype(tag)::type>{a}.run(); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
