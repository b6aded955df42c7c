// The factor that brings a row's p-norm down to max_norm (csrc/ops/embedding.h).
#pragma once
#include "cpu/vec_math.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

// The p-norm of a row as torch.linalg.vector_norm has it, in double whatever the storage: squares
// of large floats overflow in float, and the row comes from memory anyway.
template <class S>
class RowNorm {
 public:
  LMKERN_INLINE RowNorm(std::int64_t width, double p) : width_(width), p_(p) {}

  LMKERN_INLINE double operator()(const S* row) const {
    if (p_ == 2) return __builtin_sqrt(sum(row, [](D x) { return x * x; }));
    if (p_ == 1) return sum(row, [](D x) { return VecMath<double>::abs(x); });
    if (p_ == 0) return sum(row, [](D x) { return x != D{} ? D{} + 1 : D{}; });
    if (p_ == __builtin_inf()) return extreme(row, false);
    if (p_ == -__builtin_inf()) return extreme(row, true);
    const double p = p_;
    return __builtin_pow(
        sum(row,
            [p](D x) {
              return VecMath<double>::exp(VecMath<double>::log(VecMath<double>::abs(x)) * p);
            }),
        1 / p);
  }

 private:
  using D = Vec<double>;
  static constexpr std::int64_t kStep = kLanes<Accumulate<S>>;
  static constexpr int kParts = static_cast<int>(kStep) / kLanes<double>;

  // f(part, lanes) on the row, as doubles; lanes beyond it are told apart by their number.
  template <class F>
  LMKERN_INLINE void each(const S* row, const F& f) const {
    for (std::int64_t d = 0; d < width_; d += kStep) {
      const std::int64_t n = width_ - d < kStep ? width_ - d : kStep;
      Accumulate<S> lanes[kStep];
      store(lanes, load_n(row + d, n));
      LMKERN_UNROLL
      for (int part = 0; part < kParts; ++part) {
        typedef Accumulate<S> Part
            __attribute__((vector_size(kLanes<double> * sizeof(Accumulate<S>))));
        Part narrow;
        __builtin_memcpy(&narrow, lanes + part * kLanes<double>, sizeof narrow);
        f(part, __builtin_convertvector(narrow, D), n - part * kLanes<double>);
      }
    }
  }

  template <class F>
  LMKERN_INLINE double sum(const S* row, const F& term) const {
    D sums[kParts] = {};
    each(row, [&](int part, D x, std::int64_t n) {
      const D value = term(x);
      const D index = __builtin_convertvector(lane_index<double>(), D);
      sums[part] += index < D{} + static_cast<double>(n) ? value : D{};
    });
    D total = sums[0];
    for (int part = 1; part < kParts; ++part) total += sums[part];
    return sum_lanes(total);
  }

  // The largest or smallest magnitude; NaN if there is one.
  LMKERN_INLINE double extreme(const S* row, bool smallest) const {
    double best = smallest ? __builtin_inf() : 0;
    for (std::int64_t d = 0; d < width_; ++d) {
      const double x = __builtin_fabs(static_cast<double>(to_accumulate(row[d])));
      if (x != x || (smallest ? x < best : x > best)) best = x;
    }
    return best;
  }

  std::int64_t width_;
  double p_;
};

// max_norm / (norm + 1e-7) where the norm is above max_norm, else 1. max_norm = infinity: always 1.
template <class S>
class RowScale {
 public:
  LMKERN_INLINE RowScale(std::int64_t width, double max_norm, double p)
      : norm_(width, p), max_norm_(max_norm) {}

  LMKERN_INLINE Accumulate<S> operator()(const S* row) const {
    if (max_norm_ == __builtin_inf()) return 1;
    const double norm = norm_(row);
    return norm > max_norm_ ? static_cast<Accumulate<S>>(max_norm_ / (norm + 1e-7)) : 1;
  }

 private:
  RowNorm<S> norm_;
  double max_norm_;
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
