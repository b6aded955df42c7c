// The factor that brings a row's p-norm down to max_norm (csrc/ops/embedding.h), by a warp.
#pragma once
#include <cmath>

#include "cuda/device/convert.h"
#include "cuda/device/shuffle.h"

namespace lmkern::cuda {

struct RowScale {
  std::int64_t width;
  double max_norm, p;

  static constexpr double infinity() { return kInfinity; }

  // max_norm / (norm + 1e-7) where the norm is above max_norm, else 1; the same in every lane.
  template <class S>
  LMKERN_DEVICE Accumulate<S> operator()(const S* row) const {
    const double length = norm(row);
    return length > max_norm ? static_cast<Accumulate<S>>(max_norm / (length + 1e-7))
                             : Accumulate<S>(1);
  }

 private:
  // As torch.linalg.vector_norm, in double whatever the storage.
  template <class S>
  LMKERN_DEVICE double norm(const S* row) const {
    if (p == 2) return ::sqrt(sum(row, [](double x) { return x * x; }));
    if (p == 1) return sum(row, [](double x) { return x; });
    if (p == 0) return sum(row, [](double x) { return x != 0 ? 1.0 : 0.0; });
    if (p > kLargest) return extreme(row, false);
    if (p < -kLargest) return extreme(row, true);
    const double power = p;
    return ::pow(sum(row, [power](double x) { return ::pow(x, power); }), 1 / p);
  }

  template <class S, class Term>
  LMKERN_DEVICE double sum(const S* row, const Term& term) const {
    double total = 0;
    for (std::int64_t d = lane_index(); d < width; d += 32) total += term(magnitude(row[d]));
    return warp_sum(total);
  }

  // The largest or smallest magnitude; NaN if there is one.
  template <class S>
  LMKERN_DEVICE double extreme(const S* row, bool smallest) const {
    double best = smallest ? kInfinity : 0;
    const auto take = [&](double x) {
      if (x != x || (smallest ? x < best : x > best)) best = x;
    };
    for (std::int64_t d = lane_index(); d < width; d += 32) take(magnitude(row[d]));
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const double other = shuffle_xor(best, lanes);
      if (best == best) take(other);
    }
    return best;
  }

  template <class S>
  static LMKERN_DEVICE double magnitude(S value) {
    return ::fabs(static_cast<double>(to_accumulate(value)));
  }

  static constexpr double kLargest = 1.7976931348623157e308;
  static constexpr double kInfinity = __builtin_huge_val();
};

}  // namespace lmkern::cuda
