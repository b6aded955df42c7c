// Cross entropy, backward (csrc/ops/cross_entropy.h). Parallel, Traffic, Limits: cross_entropy.h.
#include "cpu/cross_entropy.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

using namespace cross_entropy;

template <class S, bool kPlain>
struct Backward : Problem<S, kPlain> {
  using Base = Problem<S, kPlain>;
  using Base::classes, Base::positions, Base::weight, Base::bias, Base::kLane;
  using typename Base::M;
  using typename Base::T;
  using typename Base::V;

  const CrossEntropyBackwardArgs& a;

  explicit Backward(const CrossEntropyBackwardArgs& args)
      : Base{args.logits, args.target}, a(args) {}

  struct Terms {
    V maximum, log_sum, d_lse, d_picked, d_total;
  };

  LMKERN_INLINE Terms terms(std::int64_t position, std::int64_t n) const {
    const auto at = [&](const TensorView& term) {
      return load_n(term.ptr<const T>() + position, n);
    };
    return {at(a.maximum), at(a.log_sum), at(a.d_lse), at(a.d_picked),
            a.d_total.defined() ? at(a.d_total) : V{}};
  }

  // The gradient of a vector of logits of which none is picked by index; `extra` is what picks.
  LMKERN_INLINE V gradient(V raw, const Terms& k, V w, V t, V extra) const {
    V s = raw, slope = splat<T>(1);
    if constexpr (!kPlain) {
      if (this->cap > 0) {
        // 1 - tanh^2 = 4 e / (1 + e)^2, without the cancellation where tanh is close to 1.
        const V u = raw * this->inverse_cap, e = M::exp_nonpositive(M::abs(u) * T(-2));
        s = M::tanh(u) * this->cap;
        slope = T(4) * e / ((T(1) + e) * (T(1) + e));
      }
    }
    V d = M::exp_nonpositive((s - k.maximum) - k.log_sum) * k.d_lse + extra;
    if constexpr (kPlain) return d;
    d += k.d_total * w;
    if (a.target.probabilities.defined()) d += k.d_picked * t * w;
    return d * slope;
  }

  void row(std::int64_t n) const {
    const S* const z = a.logits.ptr<const S>() + n * a.logits.strides[0];
    S* const d = a.d_logits.ptr<S>() + n * a.d_logits.strides[0];
    const auto at = [&](const TensorView& term) { return splat<T>(term.ptr<const T>()[n]); };
    const Terms k{at(a.maximum), at(a.log_sum), at(a.d_lse), at(a.d_picked),
                  a.d_total.defined() ? at(a.d_total) : V{}};
    if (k.d_lse[0] == 0 && k.d_picked[0] == 0 && k.d_total[0] == 0) {
      for (std::int64_t j = 0; j < classes; j += kLane)
        store_n(d + j, V{}, least(classes - j, kLane));
      return;
    }
    const S* const t =
        a.target.probabilities.defined()
            ? a.target.probabilities.template ptr<const S>() + n * a.target.probabilities.strides[0]
            : nullptr;
    const auto weight_at = [&](std::int64_t j, std::int64_t count) __attribute__((always_inline)) {
      return weight != nullptr ? load_n(weight + j, count) : splat<T>(1);
    };
    const std::int64_t c = this->picked(n);
    V at_picked{};
    if (c >= 0)  // before `d`, which may be `z`, is written
      at_picked = gradient(splat<T>(this->single(z, c)), k,
                           splat<T>(weight != nullptr ? weight[c] : T(1)), V{}, k.d_picked);
    const auto step = [&](std::int64_t j, std::int64_t count) __attribute__((always_inline)) {
      V w{}, probability{};
      if constexpr (!kPlain) {
        w = weight_at(j, count);
        if (t != nullptr) probability = load_n(t + j, count);
      }
      store_n(d + j, gradient(this->biased(load_n(z + j, count), j, count), k, w, probability, V{}),
              count);
    };
    std::int64_t j = 0;
    for (; j + kLane <= classes; j += kLane) step(j, kLane);
    if (j < classes) step(j, classes - j);
    if (c >= 0) store_n(d + c, at_picked, 1);
  }

  template <int K>
  void lanes(std::int64_t n, std::int64_t p, std::int64_t count) const {
    const S* const z = a.logits.ptr<const S>() + n * a.logits.strides[0] + p;
    S* const d = a.d_logits.ptr<S>() + n * a.d_logits.strides[0] + p;
    const TensorView& probabilities = a.target.probabilities;
    const std::int64_t first = n * positions + p;
    Terms k[K];
    IntVec<T> own[K], zero[K];
    LMKERN_UNROLL
    for (int v = 0; v < K; ++v) {
      const std::int64_t width = v == K - 1 ? count : kLane;
      k[v] = terms(first + v * kLane, width);
      zero[v] = (k[v].d_lse == V{}) & (k[v].d_picked == V{}) & (k[v].d_total == V{});
      for (int lane = 0; lane < kLane; ++lane)
        own[v][lane] = lane < width ? this->picked(first + v * kLane + lane) : -1;
    }
    for (std::int64_t j = 0; j < classes; ++j) {
      const V w = splat<T>(weight != nullptr ? weight[j] : T(1));
      const T b = bias != nullptr ? bias[j] : T(0);
      LMKERN_UNROLL
      for (int v = 0; v < K; ++v) {
        const std::int64_t width = v == K - 1 ? count : kLane, at = v * kLane;
        const auto mine = own[v] == static_cast<typename VecTypes<T>::IntLane>(j);
        const V t = probabilities.defined()
                        ? load_n(probabilities.ptr<const S>() + n * probabilities.strides[0] +
                                     j * probabilities.strides[1] + p + at,
                                 width)
                        : V{};
        const V value = gradient(load_n(z + j * a.logits.strides[1] + at, width) + b, k[v], w, t,
                                 mine ? k[v].d_picked : V{});
        store_n(d + j * a.d_logits.strides[1] + at, zero[v] ? V{} : value, width);
      }
    }
  }
};

}  // namespace

void cross_entropy_backward(const CrossEntropyBackwardArgs& a) {
  dispatch<Backward>(a, is_plain(a.logits, a.target, a.d_total));
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
