// Cross entropy, forward (csrc/ops/cross_entropy.h). Parallel, Traffic, Limits: cross_entropy.h.
#include "cpu/cross_entropy.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

using namespace cross_entropy;

// (maximum, sum) of one lane or a vector of them, continued: sum e^(s - maximum).
template <class T>
LMKERN_INLINE void merge(Vec<T> before_most, Vec<T> before_sum, Vec<T>& most, Vec<T>& sum) {
  using M = VecMath<T>;
  const Vec<T> low = splat<T>(-T(__builtin_inf()));
  const Vec<T> now = max(before_most, most);
  // -inf - -inf is no number; nothing has been summed there.
  const Vec<T> first = before_most > low ? M::exp_nonpositive(before_most - now) : Vec<T>{};
  const Vec<T> second = most > low ? M::exp_nonpositive(most - now) : Vec<T>{};
  sum = (before_sum == Vec<T>{} ? Vec<T>{} : before_sum * first) +
        (sum == Vec<T>{} ? Vec<T>{} : sum * second);
  most = now;
}

template <class S, bool kPlain>
struct Forward : Problem<S, kPlain> {
  using Base = Problem<S, kPlain>;
  using Base::classes, Base::positions, Base::weight, Base::bias, Base::kLane;
  using typename Base::M;
  using typename Base::T;
  using typename Base::V;

  const CrossEntropyForwardArgs& a;

  explicit Forward(const CrossEntropyForwardArgs& args) : Base{args.logits, args.target}, a(args) {}

  // Terms of n positions from `position` on, in the lanes of vectors.
  struct Terms {
    V most = Base::lowest(), sum{}, picked{}, mass{}, total{};
  };

  LMKERN_INLINE void finish(std::int64_t position, std::int64_t n, Terms t) const {
    const bool continued = a.target.first > 0;
    const auto at = [&](const TensorView& term) { return term.ptr<T>() + position; };
    const auto add = [&](const TensorView& term, V value) {
      store_n(at(term), continued ? load_n(at(term), n) + value : value, n);
    };
    if (continued) merge<T>(load_n(at(a.maximum), n), load_n(at(a.sum), n), t.most, t.sum);
    store_n(at(a.maximum), t.most, n);
    store_n(at(a.sum), t.sum, n);
    add(a.picked, t.picked);
    if (a.target.probabilities.defined()) add(a.mass, t.mass);
    if (a.total.defined()) add(a.total, t.total);
  }

  // Adds what a vector of values s of classes or positions gives to the terms beside (most, sum).
  LMKERN_INLINE void add_terms(V s, V w, V t, Terms& terms) const {
    if (a.total.defined()) terms.total += s * w;
    if (a.target.probabilities.defined()) {
      terms.picked += t == V{} ? V{} : s * w * t;  // 0 * -inf: torch's softmax would say NaN
      terms.mass += w * t;
    }
  }

  // One row of classes.
  void row(std::int64_t n) const {
    const S* const z = a.logits.ptr<const S>() + n * a.logits.strides[0];
    V most = Base::lowest();
    std::int64_t j = 0;
    for (; j + kLane <= classes; j += kLane) most = max(this->biased(load(z + j), j, kLane), most);
    for (; j < classes; ++j) most = max(splat<T>(this->single(z, j)), most);
    T top = most[0];
    for (int lane = 1; lane < kLane; ++lane) top = most[lane] > top ? most[lane] : top;
    Terms terms;
    const V limit = this->capped(splat<T>(top));
    const V shift = top > -T(__builtin_inf()) ? limit : V{};
    const S* const t =
        a.target.probabilities.defined()
            ? a.target.probabilities.template ptr<const S>() + n * a.target.probabilities.strides[0]
            : nullptr;
    const auto value = [&](V raw, std::int64_t at,
                           std::int64_t count) __attribute__((always_inline)) {
      const V s = this->capped(this->biased(raw, at, count));
      if constexpr (!kPlain)
        add_terms(s, weight != nullptr ? load_n(weight + at, count) : splat<T>(1),
                  t != nullptr ? load_n(t + at, count) : V{}, terms);
      return M::exp_nonpositive(s - shift);
    };
    constexpr int kChains = 4;
    V sums[kChains] = {};
    for (j = 0; j + kChains * kLane <= classes; j += kChains * kLane) {
      LMKERN_UNROLL
      for (int v = 0; v < kChains; ++v)
        sums[v] += value(load(z + j + v * kLane), j + v * kLane, kLane);
    }
    for (; j < classes; j += kLane) {
      const std::int64_t count = least(classes - j, kLane);
      V raw = load_n(z + j, count);
      const auto inside = lane_index<T>() < static_cast<typename VecTypes<T>::IntLane>(count);
      const V exponential = value(raw, j, count);
      // A lane beyond the last class holds z = 0: no terms (its weight is loaded as 0), but e^0.
      sums[0] += inside ? exponential : V{};
    }
    const T sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    terms.most = limit;
    terms.sum = splat<T>(sum);
    if constexpr (!kPlain) {
      terms.mass = splat<T>(sum_lanes(terms.mass));
      terms.total = splat<T>(sum_lanes(terms.total));
      terms.picked = splat<T>(sum_lanes(terms.picked));
    }
    const std::int64_t c = this->picked(n);
    if (c >= 0) terms.picked = this->capped(splat<T>(this->single(z, c)));
    finish(n, 1, terms);
  }

  // K vectors of neighbouring positions of batch n, from p on; the last has `count` of them.
  template <int K>
  void lanes(std::int64_t n, std::int64_t p, std::int64_t count) const {
    const S* const z = a.logits.ptr<const S>() + n * a.logits.strides[0] + p;
    const TensorView& probabilities = a.target.probabilities;
    const std::int64_t step = a.logits.strides[1];
    const auto at = [&](std::int64_t j, int v) __attribute__((always_inline)) {
      return load_n(z + j * step + v * kLane, v == K - 1 ? count : kLane) +
             (bias != nullptr ? bias[j] : T(0));
    };
    Terms terms[K];
    for (std::int64_t tile = 0; tile < classes; tile += kTile) {
      const std::int64_t end = least(tile + kTile, classes);
      V most[K], sum[K] = {};
      LMKERN_UNROLL
      for (int v = 0; v < K; ++v) most[v] = Base::lowest();
      for (std::int64_t j = tile; j < end; ++j) {
        LMKERN_UNROLL
        for (int v = 0; v < K; ++v) most[v] = max(at(j, v), most[v]);
      }
      V shift[K];
      LMKERN_UNROLL
      for (int v = 0; v < K; ++v) {
        const auto finite = most[v] > Base::lowest();
        most[v] = this->capped(most[v]);
        shift[v] = finite ? most[v] : V{};
      }
      for (std::int64_t j = tile; j < end; ++j) {
        LMKERN_UNROLL
        for (int v = 0; v < K; ++v) {
          const V s = this->capped(at(j, v));
          sum[v] += M::exp_nonpositive(s - shift[v]);
          if constexpr (!kPlain)
            add_terms(s, splat<T>(weight != nullptr ? weight[j] : T(1)),
                      probabilities.defined()
                          ? load_n(probabilities.ptr<const S>() + n * probabilities.strides[0] +
                                       j * probabilities.strides[1] + p + v * kLane,
                                   v == K - 1 ? count : kLane)
                          : V{},
                      terms[v]);
        }
      }
      LMKERN_UNROLL
      for (int v = 0; v < K; ++v) {
        merge<T>(terms[v].most, terms[v].sum, most[v], sum[v]);
        terms[v].most = most[v];
        terms[v].sum = sum[v];
      }
    }
    LMKERN_UNROLL
    for (int v = 0; v < K; ++v) {
      const std::int64_t width = v == K - 1 ? count : kLane;
      const std::int64_t first = n * positions + p + v * kLane;
      for (int lane = 0; lane < width; ++lane) {
        const std::int64_t c = this->picked(first + lane);
        if (c < 0) continue;
        const T value = to_accumulate(z[c * step + v * kLane + lane]);
        terms[v].picked[lane] =
            this->capped(splat<T>(value + (bias != nullptr ? bias[c] : T(0))))[0];
      }
      finish(first, width, terms[v]);
    }
  }
};

}  // namespace

void cross_entropy_forward(const CrossEntropyForwardArgs& a) {
  dispatch<Forward>(a, is_plain(a.logits, a.target, a.total));
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
