// Layer and RMS norm (csrc/ops/norm.h).
//
// Parallel  forward over rows; backward over blocks of rows, then, when all are done, over columns of
//           the sums of the blocks.
// Traffic   each operand once: a row stays in L1 from its statistics to its output. Forward 2 N D,
//           with a residual 4; backward 3 N D, with a residual 4 or 5, and dropout 1 more.
// Limits    Philox takes about one cycle an element, as much as the memory.
#include "ops/norm.h"
#include "core/memory.h"
#include "cpu/dropout.h"
#include "cpu/norm_row.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class S>
struct Forward {
  using T = Accumulate<S>;
  using V = Vec<T>;

  const NormForwardArgs& a;
  const std::int64_t rows = a.out.shape[0], width = a.out.shape[1];

  const S* input_row(std::int64_t i) const {
    return a.input.ptr<const S>() + i * a.input.strides[0];
  }
  const S* residual_row(std::int64_t i) const {
    return a.residual.ptr<const S>() + i * a.residual.strides[0];
  }

  // The sum, as stored.
  const S* add(std::int64_t i, const T* input_bias, const Dropout<T>& dropout, T* buffer) const {
    const S *const input = input_row(i), *const residual = residual_row(i);
    S* const sum = a.sum.ptr<S>() + i * width;
    if (a.dropout_p > 0) {
      const T* const keep = dropout.row(i * width, width, buffer);
      for_vectors<T>(width,
                     [&](std::int64_t d, std::int64_t n, int) __attribute__((always_inline)) {
                       const V x = load_n(input + d, n) + load_n(input_bias + d, n);
                       store_n(sum + d, load_n(residual + d, n) + x * load_n(keep + d, n), n);
                     });
    } else {
      for_vectors<T>(width,
                     [&](std::int64_t d, std::int64_t n, int) __attribute__((always_inline)) {
                       const V x = load_n(input + d, n) + load_n(input_bias + d, n);
                       store_n(sum + d, load_n(residual + d, n) + x, n);
                     });
    }
    return sum;
  }

  void row(std::int64_t i, const S* x, const T* weight, const T* bias) const {
    const bool centred = a.statistics.shape[0] == 2, adds = a.residual.defined(),
               drops = a.dropout_p > 0;
    S* const out = a.out.ptr<S>() + i * width;
    const S* const next = i + 1 < rows ? input_row(i + 1) : x;
    const S* const next_residual = adds && i + 1 < rows ? residual_row(i + 1) : x;
    const Moments<T> m =
        moments(x, width, a.eps, centred, [&](std::int64_t d) __attribute__((always_inline)) {
          __builtin_prefetch(next + d);
          if (adds) __builtin_prefetch(next_residual + d);
          if (drops) return;  // the stores of one row drain while Philox makes the next
          __builtin_prefetch(out + width + d);
          if (adds) __builtin_prefetch(x + width + d);
        });
    normalise(x, m, weight, bias, width,
              [&](std::int64_t d, std::int64_t n, V y)
                  __attribute__((always_inline)) { store_n(out + d, y, n); });
    T* const statistics = a.statistics.ptr<T>();
    if (centred) statistics[i] = m.mean + m.rest;
    statistics[(centred ? rows : 0) + i] = m.rstd;
  }

  void run() const {
    const int most = threads_for(rows * width, rows);
    const bool adds = a.residual.defined();
    const std::int64_t buffer_size = a.dropout_p > 0 ? Dropout<T>::row_size(width) : 0;
    T *weight_buffer = nullptr, *bias_buffer = nullptr, *input_bias_buffer = nullptr,
      *keep = nullptr;
    Scratch::place([&](Scratch& scratch) {
      weight_buffer = scratch.take<T>(width);
      bias_buffer = scratch.take<T>(width);
      input_bias_buffer = scratch.take<T>(adds ? width : 0);
      keep = scratch.take<T>(most * buffer_size);
    });
    const T* const weight = widened<T>(a.weight, width, T(1), weight_buffer);
    const T* const bias = widened<T>(a.bias, width, T(0), bias_buffer);
    const T* const input_bias =
        adds ? widened<T>(a.input_bias, width, T(0), input_bias_buffer) : nullptr;
    parallel(most, [&](int thread, int threads) {
      const Dropout<T> dropout(a.dropout_p, a.seed);
      const Range own = thread_range(rows, 1, thread, threads);
      for (std::int64_t i = own.begin; i < own.end; ++i) {
        const S* const x =
            adds ? add(i, input_bias, dropout, keep + thread * buffer_size) : input_row(i);
        row(i, x, weight, bias);
      }
    });
  }
};

template <class S>
struct Backward {
  using T = Accumulate<S>;
  using V = Vec<T>;
  enum Kind { kWeight, kBias, kInputBias };

  const NormBackwardArgs& a;
  const std::int64_t rows = a.x.shape[0], width = a.x.shape[1];

  void row(std::int64_t i, const T* weight, const Dropout<T>& dropout, T* buffer, T* d_weight,
           T* d_bias, T* d_input_bias) const {
    const auto at = [&](const TensorView& view, std::int64_t i) {
      return view.ptr<const S>() + i * view.strides[0];
    };
    const std::int64_t next = i + 1 < rows ? i + 1 : i;
    const S* const x = at(a.x, i);
    const S* const d_sum = a.d_sum.defined() ? at(a.d_sum, i) : nullptr;
    S* const d_x = a.d_x.ptr<S>() + i * width;
    const bool centred = a.statistics.shape[0] == 2;
    const T* const statistics = a.statistics.ptr<const T>();
    const T mean = centred ? statistics[i] : T(0), rstd = statistics[(centred ? rows : 0) + i];
    const T* const keep = a.dropout_p > 0 ? dropout.row(i * width, width, buffer) : nullptr;
    S* const d_input = keep != nullptr ? a.d_input.ptr<S>() + i * width : nullptr;
    const auto ahead = [&](std::int64_t d) __attribute__((always_inline)) {
      __builtin_prefetch(at(a.x, next) + d);
      __builtin_prefetch(at(a.d_out, next) + d);
      if (d_sum != nullptr) __builtin_prefetch(at(a.d_sum, next) + d);
      if (keep == nullptr) __builtin_prefetch(d_x + width + d);
    };
    normalise_backward(x, at(a.d_out, i), mean, rstd, centred, weight, width, d_weight, d_bias,
                       ahead,
                       [&](std::int64_t d, std::int64_t n, V grad) __attribute__((always_inline)) {
                         if (d_sum != nullptr) grad += load_n(d_sum + d, n);
                         store_n(d_x + d, grad, n);
                         if (keep != nullptr) {
                           grad *= load_n(keep + d, n);
                           store_n(d_input + d, grad, n);
                         }
                         if (d_input_bias != nullptr)
                           store(d_input_bias + d, load(d_input_bias + d) + grad);
                       });
  }

  void run() const {
    ColumnSums<T> sums{rows, width, 3};
    const int most = threads_for(rows * width, sums.blocks);
    const std::int64_t buffer_size = a.dropout_p > 0 ? Dropout<T>::row_size(width) : 0;
    T *weight_buffer = nullptr, *keep = nullptr;
    Scratch::place([&](Scratch& scratch) {
      sums.sums = scratch.take<T>(sums.size());
      weight_buffer = scratch.take<T>(width);
      keep = scratch.take<T>(most * buffer_size);
    });
    const T* const weight = widened<T>(a.weight, width, T(1), weight_buffer);
    Barrier barrier;
    parallel(most, [&](int thread, int threads) {
      const Dropout<T> dropout(a.dropout_p, a.seed);
      const Range own = thread_range(sums.blocks, 1, thread, threads);
      for (std::int64_t block = own.begin; block < own.end; ++block) {
        sums.clear(block);
        const auto sum = [&](Kind kind, const TensorView& out) {
          return out.defined() ? sums.of(block, kind) : nullptr;
        };
        const std::int64_t first = block * sums.block_rows, past = first + sums.block_rows;
        for (std::int64_t i = first; i < (past < rows ? past : rows); ++i)
          row(i, weight, dropout, keep + thread * buffer_size, sum(kWeight, a.d_weight),
              sum(kBias, a.d_bias), sum(kInputBias, a.d_input_bias));
      }
      barrier.wait(threads);
      sums.total(kWeight, a.d_weight, thread, threads);
      sums.total(kBias, a.d_bias, thread, threads);
      sums.total(kInputBias, a.d_input_bias, thread, threads);
    });
  }
};

}  // namespace

void norm_forward(const NormForwardArgs& a) {
  dispatch_float_types(a.out.dtype,
                       [&](auto tag) { Forward<typename decltype(tag)::type>{a}.run(); });
}

void norm_backward(const NormBackwardArgs& a) {
  dispatch_float_types(a.x.dtype,
                       [&](auto tag) { Backward<typename decltype(tag)::type>{a}.run(); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
