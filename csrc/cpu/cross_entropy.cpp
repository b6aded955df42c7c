// Cross entropy (csrc/ops/cross_entropy.h).
//
// Parallel  threads own positions. P = 1: lanes are classes of one; P > 1: lanes are positions, in
//           blocks of kWide vectors and tiles of kTile classes.
// Traffic   forward reads the logits, backward reads and writes them: the bound where they come from
//           memory. A row of classes, or a tile, is read twice, for the maximum and for the sum, the
//           second time from L1 or L2; beside an exponential of about 4 ns a vector.
// Limits    few positions with many classes run on few threads.
#include "ops/cross_entropy.h"

#include "core/dispatch.h"
#include "core/parallel.h"
#include "cpu/vec_math.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kForkElements = 16 << 10;
constexpr int kWide = 4, kTile = 32;  // 8 KB of float: a tile stays in L1

template <class Args>
int threads_for(const Args& a) {
  return a.logits.numel() < kForkElements ? 1 : max_threads();
}

LMKERN_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// What both passes know of the problem. `kPlain`: class indices, no softcap, no weights or smoothing
// inside of the loop over classes, which a branch there would double.
template <class S, bool kPlain>
struct Problem {
  using T = Accumulate<S>;
  using V = Vec<T>;
  using M = VecMath<T>;
  static constexpr std::int64_t kLane = kLanes<T>;

  const TensorView& logits;
  const CrossEntropyTarget& target;
  const std::int64_t classes = logits.shape[1], positions = logits.shape[2];
  const std::int64_t* const index = target.index.ptr<const std::int64_t>();
  const T* const weight = target.weight.ptr<const T>();
  const T* const bias = target.bias.ptr<const T>();
  const T cap = static_cast<T>(target.softcap);
  const T inverse_cap = cap > 0 ? 1 / cap : T(0);

  LMKERN_INLINE V capped(V z) const {
    if constexpr (kPlain) return z;
    return cap > 0 ? M::tanh(z * inverse_cap) * cap : z;
  }
  // The class that `position` picks, counted from the first of these logits; -1 if not among them.
  LMKERN_INLINE std::int64_t picked(std::int64_t position) const {
    if (index == nullptr || index[position] == target.ignore_index) return -1;
    const std::int64_t c = index[position] - target.first;
    return c >= 0 && c < classes ? c : -1;
  }
  // Logits of neighbouring classes, and of one, with their biases.
  LMKERN_INLINE V biased(V z, std::int64_t at, std::int64_t count) const {
    if constexpr (kPlain) return z;
    return bias != nullptr ? z + load_n(bias + at, count) : z;
  }
  LMKERN_INLINE T single(const S* z, std::int64_t at) const {
    return to_accumulate(z[at]) + (bias != nullptr ? bias[at] : T(0));
  }
  static LMKERN_INLINE V lowest() { return splat<T>(-T(__builtin_inf())); }
};

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

template <class Pass, class Args>
void run(const Args& a) {
  const Pass pass(a);
  const std::int64_t batch = a.logits.shape[0], positions = a.logits.shape[2];
  constexpr std::int64_t kBlock = kWide * Pass::kLane;
  const std::int64_t blocks = positions == 1 ? 1 : (positions + kBlock - 1) / kBlock;
  parallel(threads_for(a), [&](int thread, int of) {
    const Range own = thread_range(batch * blocks, 1, thread, of);
    for (std::int64_t i = own.begin; i < own.end; ++i) {
      if (positions == 1) {
        pass.row(i);
        continue;
      }
      std::int64_t p = i % blocks * kBlock;
      const std::int64_t end = least(p + kBlock, positions);
      if (end - p == kBlock) {
        pass.template lanes<kWide>(i / blocks, p, Pass::kLane);
        continue;
      }
      for (; p < end; p += Pass::kLane)
        pass.template lanes<1>(i / blocks, p, least(end - p, Pass::kLane));
    }
  });
}

template <template <class, bool> class Pass, class Args>
void dispatch(const Args& a, bool plain) {
  dispatch_float_types(a.logits.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (plain)
      run<Pass<S, true>>(a);
    else
      run<Pass<S, false>>(a);
  });
}

bool is_plain(const TensorView& logits, const CrossEntropyTarget& t, const TensorView& total) {
  const bool biased_rows = t.bias.defined() && logits.shape[2] == 1;
  return t.softcap == 0 && t.index.defined() && !total.defined() && !biased_rows;
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForwardArgs& a) {
  dispatch<Forward>(a, is_plain(a.logits, a.target, a.total));
}

void cross_entropy_backward(const CrossEntropyBackwardArgs& a) {
  dispatch<Backward>(a, is_plain(a.logits, a.target, a.d_total));
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
