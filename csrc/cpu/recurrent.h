// What the forward and the backward pass of the recurrent layers share: which rows take part in
// which step, how the work is divided among threads, and the product of a step.
#pragma once
#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "cpu/step_product.h"
#include "cpu/vec_math.h"
#include "ops/recurrent.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

// Calls f(TypeTag<Cell>{}) with the cell's policy.
template <class T, class F>
LMKERN_INLINE void dispatch_cell(RecurrentCell cell, const F& f) {
  using Math = VecMath<T>;
  switch (cell) {
    case RecurrentCell::kLstm: f(TypeTag<cells::Lstm<Math>>{}); break;
    case RecurrentCell::kGru: f(TypeTag<cells::Gru<Math>>{}); break;
    case RecurrentCell::kRnnTanh: f(TypeTag<cells::Elman<cells::Tanh<Math>>>{}); break;
    case RecurrentCell::kRnnRelu: f(TypeTag<cells::Elman<cells::Relu<Math>>>{}); break;
    case RecurrentCell::kRnnSigmoid: f(TypeTag<cells::Elman<cells::Sigmoid<Math>>>{}); break;
  }
}

// The rows of each time step: a rectangle, or as in a PackedSequence.
struct Steps {
  std::int64_t count, batch;
  const std::int64_t* sizes;  // null: a rectangle
  std::int64_t* offsets;      // [count], of each step's first row
  bool reverse;

  LMKERN_INLINE Steps(const RecurrentOptions& options, std::int64_t all_rows)
      : count(options.batch_sizes.defined() ? options.batch_sizes.shape[0]
              : options.batch == 0          ? 0
                                            : all_rows / options.batch),
        batch(options.batch),
        sizes(options.batch_sizes.ptr<const std::int64_t>()),
        reverse(options.reverse) {}

  LMKERN_INLINE void place(Scratch& scratch) { offsets = scratch.take<std::int64_t>(count); }
  LMKERN_INLINE void prepare() {
    for (std::int64_t t = 0, at = 0; t < count; at += rows(t++)) offsets[t] = at;
  }

  // The time of the s-th step that is taken.
  LMKERN_INLINE std::int64_t time(std::int64_t s) const { return reverse ? count - 1 - s : s; }
  LMKERN_INLINE std::int64_t rows(std::int64_t t) const {
    return sizes != nullptr ? sizes[t] : batch;
  }
  LMKERN_INLINE std::int64_t offset(std::int64_t t) const { return offsets[t]; }
  // The time before (-1) or after (1) t in the order of the recurrence; -1 or count at the ends.
  LMKERN_INLINE std::int64_t neighbour(std::int64_t t, int step) const {
    return reverse ? t - step : t + step;
  }
  LMKERN_INLINE bool takes_part(std::int64_t t, std::int64_t row) const {
    return t >= 0 && t < count && row < rows(t);
  }
  LMKERN_INLINE std::int64_t length(std::int64_t row) const {
    if (sizes == nullptr) return count;
    std::int64_t low = 0, high = count;  // sizes do not increase
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (sizes[middle] > row)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// Two ways to divide a time step. By rows of the batch: threads never wait for each other, but each
// streams the whole of W_hh. By hidden units: each streams only its share, so that it stays in the
// core's own cache, at the price of a barrier per phase, because h_t is needed whole by everyone.
struct RecurrentPlan {
  int threads;
  bool by_rows;
  std::int64_t row_align;

  // weight_bytes: the packed W_hh; step_flops: of one time step; items: panels that can be divided.
  LMKERN_INLINE RecurrentPlan(const Steps& steps, std::int64_t items, std::int64_t weight_bytes,
                              std::int64_t step_flops, bool tiles)
      : row_align(tiles ? 16 : 1) {
    constexpr std::int64_t kCacheBytes = 1 << 20;    // of a core, with room for the activations
    constexpr std::int64_t kForkFlops = 400'000;     // a parallel region costs about 4 us
    constexpr std::int64_t kBarrierFlops = 150'000;  // a barrier about 0.5 us on each core
    threads = max_threads();
    by_rows = weight_bytes <= kCacheBytes && steps.batch >= (tiles ? 16 : 3) * threads;
    if (by_rows) items = (steps.batch + row_align - 1) / row_align;
    if (threads > items) threads = static_cast<int>(items < 1 ? 1 : items);
    if (steps.count * step_flops < kForkFlops || (!by_rows && step_flops < kBarrierFlops))
      threads = 1;
  }

  // This thread's rows of the batch: all of them by units; otherwise shares of equal
  // numbers of steps.
  LMKERN_INLINE Range rows_of(const Steps& steps, int thread, int count) const {
    if (!by_rows) return {0, steps.batch};
    if (steps.sizes == nullptr || row_align > 1)
      return thread_range(steps.batch, row_align, thread, count);
    std::int64_t all = 0, before = 0;
    for (std::int64_t b = 0; b < steps.batch; ++b) all += steps.length(b);
    Range range{steps.batch, steps.batch};
    for (std::int64_t b = 0; b < steps.batch; ++b) {
      // Rows without a step come last, and fall to the last thread.
      const int owner = before < all ? static_cast<int>(before * count / all) : count - 1;
      if (owner >= thread && b < range.begin) range.begin = b;
      if (owner > thread) {
        range.end = b;
        break;
      }
      before += steps.length(b);
    }
    return range.begin < range.end ? range : Range{0, 0};
  }
  // What falls to this thread of n items (panels, or rows between two barriers) when by units.
  LMKERN_INLINE Range share_of(std::int64_t n, int thread, int count) const {
    return by_rows ? Range{0, n} : thread_range(n, 1, thread, count);
  }
};

// load_n of an optional tensor: zeros where it is absent.
template <class S>
LMKERN_INLINE Vec<Accumulate<S>> load_optional(const TensorView& view, std::int64_t at,
                                               std::int64_t n) {
  return view.defined() ? load_n(view.ptr<const S>() + at, n) : Vec<Accumulate<S>>{};
}

// Zoneout's share of the old value: a mask, a rate, or nothing.
template <class T>
LMKERN_INLINE Vec<T> zoneout_at(const TensorView& mask, double rate, std::int64_t at,
                                std::int64_t n) {
  return mask.defined() ? load_bools<T>(mask.ptr<const bool>() + at, n)
                        : splat<T>(static_cast<T>(rate));
}

template <class V>
LMKERN_INLINE V zoneout(V share, V before, V now) {
  return share * before + (1 - share) * now;
}

// Mean and 1 / sqrt(variance + eps) of `count` values that value(u, n) hands out in vectors.
template <class T>
struct Moments {
  T mean, rstd;

  template <class F>
  static LMKERN_INLINE Moments of(std::int64_t count, double eps, const F& value) {
    Vec<T> sum{}, squares{};
    for (std::int64_t u = 0; u < count; u += kLanes<T>)
      sum += value(u, count - u < kLanes<T> ? count - u : kLanes<T>);
    const T mean = sum_lanes(sum) / static_cast<T>(count);
    for (std::int64_t u = 0; u < count; u += kLanes<T>) {
      const std::int64_t n = count - u < kLanes<T> ? count - u : kLanes<T>;
      const Vec<T> centred = value(u, n) - mean;
      squares += lane_index<T>() < static_cast<typename VecTypes<T>::IntLane>(n) ? centred * centred
                                                                                 : Vec<T>{};
    }
    const T variance = sum_lanes(squares) / static_cast<T>(count);
    return {mean, T(1) / sqrt_of(variance + static_cast<T>(eps))};
  }

 private:
  static LMKERN_INLINE float sqrt_of(float x) { return __builtin_sqrtf(x); }
  static LMKERN_INLINE double sqrt_of(double x) { return __builtin_sqrt(x); }
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
