// What the normalising kernels share: the arithmetic of one row, which lies in L1 (a row of 768
// floats has 3 KB), and sums over all rows that do not depend on the number of threads.
//
// Formulas: csrc/ops/norm.h. Where a function takes `ahead`, it calls ahead(d) for the vectors of the
// row, once and away from its last pass: the place to prefetch the next row of all operands, outputs
// too, so that the memory does not pause while a row is in L1 (a sixth to a quarter of the time).
#pragma once
#include "core/dispatch.h"
#include "core/parallel.h"
#include "cpu/vec.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

inline constexpr int kChains = 4;  // independent sums, to hide the latency of an addition

// f(d, n, chain) for the vectors of a row: n elements from d on, all lanes but for the last vector.
template <class T, class F>
LMKERN_INLINE void for_vectors(std::int64_t width, const F& f) {
  constexpr std::int64_t kLane = kLanes<T>;
  std::int64_t d = 0;
  for (; d + kChains * kLane <= width; d += kChains * kLane) {
    LMKERN_UNROLL
    for (int chain = 0; chain < kChains; ++chain) f(d + chain * kLane, kLane, chain);
  }
  for (; d + kLane <= width; d += kLane) f(d, kLane, 0);
  if (d < width) f(d, width - d, 0);
}

template <class T>
LMKERN_INLINE T sum_chains(const Vec<T> (&chains)[kChains]) {
  return sum_lanes((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

// A parameter in the type of the arithmetic: as it is, or from the buffer; all `absent` if it is.
template <class T>
LMKERN_INLINE const T* widened(const TensorView& p, std::int64_t width, T absent, T* buffer) {
  if (!p.defined()) {
    for (std::int64_t d = 0; d < width; ++d) buffer[d] = absent;
    return buffer;
  }
  if (p.dtype == (sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32))
    return p.ptr<const T>();
  dispatch_float_types(p.dtype, [&](auto tag) __attribute__((always_inline)) {
    const auto* from = p.ptr<const typename decltype(tag)::type>();
    for (std::int64_t d = 0; d < width; ++d) buffer[d] = static_cast<T>(to_accumulate(from[d]));
  });
  return buffer;
}

// xhat = (x - mean - rest) rstd. `rest` is what rounding left out of the mean.
template <class T>
struct Moments {
  T mean, rest, rstd;
};

LMKERN_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
LMKERN_INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <class S, class P>
LMKERN_INLINE Moments<Accumulate<S>> moments(const S* x, std::int64_t width, double eps,
                                             bool centred, const P& ahead) {
  using T = Accumulate<S>;
  T mean = 0;
  if (centred) {
    Vec<T> sum[kChains] = {};
    for_vectors<T>(width, [&](std::int64_t d, std::int64_t n, int chain)
                              __attribute__((always_inline)) { sum[chain] += load_n(x + d, n); });
    mean = sum_chains<T>(sum) / static_cast<T>(width);
  }
  Vec<T> sum[kChains] = {}, squares[kChains] = {};
  for_vectors<T>(
      width, [&](std::int64_t d, std::int64_t n, int chain) __attribute__((always_inline)) {
        ahead(d);
        Vec<T> deviation = load_n(x + d, n) - mean;
        if (n < kLanes<T>)
          deviation = lane_index<T>() < static_cast<typename VecTypes<T>::IntLane>(n) ? deviation
                                                                                      : Vec<T>{};
        sum[chain] += deviation;
        squares[chain] += deviation * deviation;
      });
  const T rest = centred ? sum_chains<T>(sum) / static_cast<T>(width) : T(0);
  const T variance = sum_chains<T>(squares) / static_cast<T>(width) - rest * rest;
  return {mean, rest, T(1) / square_root((variance < 0 ? T(0) : variance) + static_cast<T>(eps))};
}

// emit(d, n, xhat weight + bias)
template <class S, class T, class F>
LMKERN_INLINE void normalise(const S* x, const Moments<T>& m, const T* weight, const T* bias,
                             std::int64_t width, const F& emit) {
  const T shift = -m.rest * m.rstd;
  for_vectors<T>(width, [&](std::int64_t d, std::int64_t n, int) __attribute__((always_inline)) {
    const Vec<T> xhat = (load_n(x + d, n) - m.mean) * m.rstd + shift;
    emit(d, n, xhat * load_n(weight + d, n) + load_n(bias + d, n));
  });
}

// Adds a row's share of d_weight and d_bias (whole vectors; either may be null), then calls
// emit(d, n, d_x).
template <class S, class G, class T, class P, class F>
LMKERN_INLINE void normalise_backward(const S* x, const G* d_out, T mean, T rstd, bool centred,
                                      const T* weight, std::int64_t width, T* d_weight, T* d_bias,
                                      const P& ahead, const F& emit) {
  Vec<T> sum[kChains] = {}, sum_xhat[kChains] = {};
  for_vectors<T>(
      width, [&](std::int64_t d, std::int64_t n, int chain) __attribute__((always_inline)) {
        ahead(d);
        const Vec<T> grad = load_n(d_out + d, n), xhat = (load_n(x + d, n) - mean) * rstd;
        const Vec<T> g = grad * load_n(weight + d, n);
        sum[chain] += g;
        sum_xhat[chain] += g * xhat;
        if (d_weight != nullptr) store(d_weight + d, load(d_weight + d) + grad * xhat);
        if (d_bias != nullptr) store(d_bias + d, load(d_bias + d) + grad);
      });
  const T mean_g = centred ? sum_chains<T>(sum) / static_cast<T>(width) : T(0);
  const T mean_g_xhat = sum_chains<T>(sum_xhat) / static_cast<T>(width);
  for_vectors<T>(width, [&](std::int64_t d, std::int64_t n, int) __attribute__((always_inline)) {
    const Vec<T> g = load_n(d_out + d, n) * load_n(weight + d, n);
    const Vec<T> xhat = (load_n(x + d, n) - mean) * rstd;
    emit(d, n, (g - mean_g - xhat * mean_g_xhat) * rstd);
  });
}

// Sums over rows: each block of rows has its own, in whole vectors; in the end they are added in
// the order of the blocks.
template <class T>
struct ColumnSums {
  static constexpr std::int64_t kMostBlocks = 64, kLeastRows = 16;

  std::int64_t rows, width;
  int kinds;                             // sums of each column
  std::int64_t least_rows = kLeastRows;  // of a block
  std::int64_t stride = (width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  std::int64_t block_rows = block_rows_of(rows, least_rows);
  std::int64_t blocks = (rows + block_rows - 1) / block_rows;
  T* sums = nullptr;  // [blocks, kinds, stride], uninitialised

  std::int64_t size() const { return blocks * kinds * stride; }
  T* of(std::int64_t block, int kind) const { return sums + (block * kinds + kind) * stride; }
  void clear(std::int64_t block) const {
    __builtin_memset(of(block, 0), 0, kinds * stride * sizeof(T));
  }

  // One thread's columns of a finished sum; nothing if `out` is absent.
  void total(int kind, const TensorView& out, int thread, int threads) const {
    if (!out.defined()) return;
    const Range own = thread_range(width, kLanes<T>, thread, threads);
    for (std::int64_t d = own.begin; d < own.end; d += kLanes<T>) {
      Vec<T> sum{};
      for (std::int64_t block = 0; block < blocks; ++block) sum += load(of(block, kind) + d);
      store_n(out.ptr<T>() + d, sum, own.end - d < kLanes<T> ? own.end - d : kLanes<T>);
    }
  }

 private:
  static LMKERN_INLINE std::int64_t block_rows_of(std::int64_t rows, std::int64_t least) {
    const std::int64_t even = (rows + kMostBlocks - 1) / kMostBlocks;
    return even < least ? least : even;
  }
};

inline constexpr std::int64_t kForkElements =
    1 << 15;  // below, a parallel region costs more than it saves

// Threads for so many elements, in items that are not divided.
LMKERN_INLINE int threads_for(std::int64_t elements, std::int64_t items) {
  const int most = elements < kForkElements ? 1 : max_threads();
  return items < most ? static_cast<int>(items) : most;
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
