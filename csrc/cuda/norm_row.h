// What kernels share that normalise rows (csrc/ops/norm.h): parameters, and sums over the threads of a row.
#pragma once
#include "cuda/device/block_reduce.h"
#include "cuda/device/math.h"
#include "cuda/rows.h"

namespace lmkern::cuda {

// A weight or bias [D], of the rows' type or of the one that is computed in; null if absent.
template <class S>
struct NormParameter {
  using T = Accumulate<S>;
  const void* data;
  bool accumulated;

  explicit NormParameter(const TensorView& p)
      : data(p.data),
        accumulated(p.dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32)) {}

  template <int kVec>
  LMKERN_DEVICE void load(std::int64_t column, T absent, T (&out)[kVec] LMKERN_AND_SITE) const {
    if (data == nullptr) {
      LMKERN_UNROLL
      for (int i = 0; i < kVec; ++i) out[i] = absent;
    } else if (accumulated) {
      Piece<T, kVec> piece;
      piece.load(static_cast<const T*>(data) + column LMKERN_AND_HERE);
      LMKERN_UNROLL
      for (int i = 0; i < kVec; ++i) out[i] = piece.at[i];
    } else {
      Piece<S, kVec> piece;
      piece.load(static_cast<const S*>(data) + column LMKERN_AND_HERE);
      LMKERN_UNROLL
      for (int i = 0; i < kVec; ++i) out[i] = to_accumulate(piece.at[i]);
    }
  }
};

// Sums over the threads that share a row, the same bits in each: over the warp, or over the block by way
// of `scratch`, kCount T for each warp in shared memory, to be used again after the next barrier.
template <bool kBlock, int kCount, class T>
LMKERN_DEVICE void row_sums(T (&values)[kCount], T* scratch LMKERN_AND_SITE) {
  if constexpr (kBlock) {
    block_sums(values, scratch LMKERN_AND_HERE);
  } else {
    LMKERN_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i] LMKERN_AND_HERE);
  }
}

// A row's mean and 1 / sqrt(variance + eps). `rest` is what rounding left out of the mean.
template <class T>
struct NormMoments {
  T mean, rest, rstd;

  LMKERN_DEVICE T normalise(T x) const { return (x - mean - rest) * rstd; }

  // each(f) calls f(column, x) for this thread's pieces of the row, each time the same. scratch: 3 T for each
  // warp of the block, to be used again after the next barrier.
  template <bool kBlock, int kVec, class Each>
  static LMKERN_DEVICE NormMoments of(const Each& each, std::int64_t width, T eps, bool centred,
                                      T* scratch LMKERN_AND_SITE) {
    const T count = static_cast<T>(width);
    T mean = T(0);
    if (centred) {
      T sum[1] = {T(0)};
      each([&](std::int64_t, const T(&x)[kVec]) {
        LMKERN_UNROLL
        for (int i = 0; i < kVec; ++i) sum[0] += x[i];
      });
      row_sums<kBlock>(sum, scratch LMKERN_AND_HERE);
      mean = sum[0] / count;
    }
    T sums[2] = {T(0), T(0)};  // of the deviations and their squares
    each([&](std::int64_t, const T(&x)[kVec]) {
      LMKERN_UNROLL
      for (int i = 0; i < kVec; ++i) {
        const T deviation = x[i] - mean;
        sums[0] += deviation;
        sums[1] += deviation * deviation;
      }
    });
    row_sums<kBlock>(sums, scratch + warp_count() LMKERN_AND_HERE);
    const T rest = centred ? sums[0] / count : T(0);
    const T variance = sums[1] / count - rest * rest;
    return {mean, rest, T(1) / square_root((variance < T(0) ? T(0) : variance) + eps)};
  }

  // Of value(u), u < count, by a block.
  template <class Value>
  static LMKERN_DEVICE NormMoments of_values(int count, T eps, T* scratch,
                                             const Value& value LMKERN_AND_SITE) {
    const auto each = [&](const auto& f) {
      for (int u = thread_index(); u < count; u += thread_count()) {
        const T x[1] = {value(u)};
        f(u, x);
      }
    };
    return of<true, 1>(each, count, eps, true, scratch LMKERN_AND_HERE);
  }
};

}  // namespace lmkern::cuda
