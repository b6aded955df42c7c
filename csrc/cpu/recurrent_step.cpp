// One step of a recurrent cell for a few rows (csrc/ops/recurrent.h).
//
// Parallel  threads own units; nothing is shared, so nobody waits.
// Traffic   W_ih and W_hh once, straight from the caller's rows: at one or two rows of the batch a
// step is
//           bound by reading them, and packing would read them twice. A row of W and the operand
//           are both walked along k, so sums end up spread over lanes and are folded at the end: a
//           vector of units costs one transposition for each gate.
// Limits    each group of kRows rows of the batch reads the weights again.
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/recurrent.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

// out[m][lane] = bias + sum_k a_m[k] w[lane][k] for `count` rows of w; lanes beyond are zero.
template <int M, class S>
LMKERN_INLINE void dot_rows(std::int64_t depth, const S* const (&a)[M], const S* w,
                            std::int64_t w_stride, std::int64_t count,
                            Vec<Accumulate<S>> (&out)[M]) {
  using T = Accumulate<S>;
  constexpr int n = kLanes<T>, kGroup = n < 8 ? n : 8;  // rows of w at a time
  Vec<T> sums[M][n] = {};
  const std::int64_t whole = depth / n * n, rest = depth - whole;
  LMKERN_UNROLL
  for (int group = 0; group < n; group += kGroup) {
    if (group >= count) break;
    const S* rows[kGroup];  // rows beyond the last are read as the last, and dropped
    LMKERN_UNROLL
    for (int i = 0; i < kGroup; ++i)
      rows[i] = w + (group + i < count ? group + i : count - 1) * w_stride;
    Vec<T> acc[M][kGroup] = {};
    const auto add = [&](std::int64_t k, const auto& load_at) __attribute__((always_inline)) {
      Vec<T> x[M];
      LMKERN_UNROLL
      for (int m = 0; m < M; ++m) x[m] = load_at(a[m] + k);
      LMKERN_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        const Vec<T> row = load_at(rows[i] + k);
        __builtin_prefetch(rows[i] + k + kGroup * w_stride);  // the next group, beyond the last too
        LMKERN_UNROLL
        for (int m = 0; m < M; ++m) acc[m][i] += x[m] * row;
      }
    };
    for (std::int64_t k = 0; k < whole; k += n)
      add(k, [](const S* p) __attribute__((always_inline)) { return load(p); });
    if (rest > 0)
      add(whole, [rest](const S* p) __attribute__((always_inline)) { return load_n(p, rest); });
    LMKERN_UNROLL
    for (int m = 0; m < M; ++m) {
      LMKERN_UNROLL
      for (int i = 0; i < kGroup; ++i) sums[m][group + i] = acc[m][i];
    }
  }
  LMKERN_UNROLL
  for (int m = 0; m < M; ++m) {
    transpose<T>(sums[m]);  // lane i of every vector is now a part of row i's sum
    LMKERN_UNROLL
    for (int width = n / 2; width > 0; width /= 2) {
      LMKERN_UNROLL
      for (int i = 0; i < width; ++i) sums[m][i] += sums[m][i + width];
    }
    out[m] =
        lane_index<T>() < static_cast<typename VecTypes<T>::IntLane>(count) ? sums[m][0] : Vec<T>{};
  }
}

template <class S, class Cell>
struct StepPass {
  using T = Accumulate<S>;
  using V = Vec<T>;
  static constexpr int kGates = Cell::kGates;
  static constexpr std::int64_t kLane = kLanes<T>;
  static constexpr int kRows = 2;

  const RecurrentStepArgs& a;
  const std::int64_t batch = a.h_next.shape[0], hidden = a.h_next.shape[1];
  const std::int64_t features = a.x.defined() ? a.x.shape[1] : 0;

  // from_x and from_h of M rows and n units from u on.
  template <int M>
  LMKERN_INLINE void products(std::int64_t b, std::int64_t u, std::int64_t n,
                              V (&from_x)[kGates][M], V (&from_h)[kGates][M]) const {
    if (a.from_x.defined()) {
      for (int g = 0; g < kGates; ++g)
        for (int m = 0; m < M; ++m) {
          const std::int64_t at = ((b + m) * kGates + g) * hidden + u;
          from_x[g][m] = load_n(a.from_x.ptr<const S>() + at, n);
          from_h[g][m] = load_optional<S>(a.from_h, at, n);
        }
      return;
    }
    const S *x[M], *h[M];
    for (int m = 0; m < M; ++m) {
      x[m] = a.x.ptr<const S>() + (b + m) * features;
      h[m] = a.h.defined() ? a.h.ptr<const S>() + (b + m) * hidden : nullptr;
    }
    for (int g = 0; g < kGates; ++g) {
      const std::int64_t row = g * hidden + u;
      for (int m = 0; m < M; ++m) from_h[g][m] = V{};
      dot_rows<M>(features, x, a.w_ih.ptr<const S>() + row * features, features, n, from_x[g]);
      if (a.h.defined())
        dot_rows<M>(hidden, h, a.w_hh.ptr<const S>() + row * hidden, hidden, n, from_h[g]);
      for (int m = 0; m < M; ++m) {
        from_x[g][m] += load_optional<S>(a.b_ih, row, n);
        from_h[g][m] += load_optional<S>(a.b_hh, row, n);
      }
    }
  }

  template <int M>
  void units(std::int64_t b, std::int64_t u) const {
    const std::int64_t n = hidden - u < kLane ? hidden - u : kLane;
    V from_x[kGates][M], from_h[kGates][M];
    products<M>(b, u, n, from_x, from_h);
    for (int m = 0; m < M; ++m) {
      const std::int64_t at = (b + m) * hidden + u;
      V gates[kGates], product[kGates], c{}, h_prev{};
      for (int g = 0; g < kGates; ++g) {
        gates[g] = from_x[g][m];
        product[g] = from_h[g][m];
      }
      if constexpr (Cell::kHasC) c = load_optional<S>(a.c, at, n);
      if constexpr (Cell::kReadsH) h_prev = load_optional<S>(a.h, at, n);
      Cell::update(gates, product, static_cast<const V*>(nullptr), c);
      const V h_next = Cell::output(gates, c, h_prev);
      store_n(a.h_next.ptr<S>() + at, h_next, n);
      if (a.y.defined()) store_n(a.y.ptr<S>() + at, h_next, n);
      if constexpr (Cell::kHasC) store_n(a.c_next.ptr<S>() + at, c, n);
      if (!a.gates.defined()) continue;
      for (int g = 0; g < kGates; ++g)
        store_n(a.gates.ptr<S>() + (b + m) * kGates * hidden + g * hidden + u, gates[g], n);
      if constexpr (Cell::kHasC)
        if (a.cells.defined()) store_n(a.cells.ptr<T>() + at, c, n);
      if constexpr (Cell::kSavesHidden) store_n(a.hidden.ptr<T>() + at, product[kGates - 1], n);
    }
  }

  void run() const {
    const std::int64_t vectors = (hidden + kLane - 1) / kLane;
    constexpr std::int64_t kForkBytes = 300'000;  // what a core reads from its cache in about 4 us
    const std::int64_t bytes =
        kGates * hidden * (a.from_x.defined() ? 20 : features + hidden) * std::int64_t{sizeof(S)};
    int threads = bytes * batch < kForkBytes ? 1 : max_threads();
    if (threads > vectors) threads = static_cast<int>(vectors);
    parallel(threads, [&](int thread, int count) {
      const Range own = thread_range(vectors, 1, thread, count);
      for (std::int64_t v = own.begin; v < own.end; ++v) {
        std::int64_t b = 0;
        for (; b + kRows <= batch; b += kRows) units<kRows>(b, v * kLane);
        if (b < batch) units<1>(b, v * kLane);
      }
    });
  }
};

template <class S, class Cell>
void step_backward(const RecurrentStepBackwardArgs& a) {
  using T = Accumulate<S>;
  constexpr int kGates = Cell::kGates;
  constexpr std::int64_t kForkElements = 20'000;
  const std::int64_t batch = a.gates.shape[0], hidden = a.gates.shape[1] / kGates;
  int threads = batch * hidden < kForkElements ? 1 : max_threads();
  if (threads > batch) threads = static_cast<int>(batch);
  parallel(threads, [&](int thread, int count) {
    const Range own = thread_range(batch, 1, thread, count);
    for (std::int64_t b = own.begin; b < own.end; ++b)
      for (std::int64_t u = 0; u < hidden; u += kLanes<T>) {
        const std::int64_t n = hidden - u < kLanes<T> ? hidden - u : kLanes<T>;
        const std::int64_t at = b * hidden + u, row = b * kGates * hidden + u;
        Vec<T> gates[kGates], d_act[kGates], d_hh[kGates], d_c_read{}, d_h_prev, c_now{}, saved{};
        for (int g = 0; g < kGates; ++g)
          gates[g] = load_n(a.gates.ptr<const S>() + row + g * hidden, n);
        const Vec<T> h_prev = Cell::kReadsH ? load_optional<S>(a.h, at, n) : Vec<T>{};
        const Vec<T> c_prev = Cell::kHasC ? load_optional<S>(a.c, at, n) : Vec<T>{};
        if constexpr (Cell::kHasC) c_now = gates[1] * c_prev + gates[0] * gates[2];
        if constexpr (Cell::kSavesHidden) saved = load_n(a.hidden.ptr<const T>() + at, n);
        Cell::output_backward(gates, c_now, h_prev, load_optional<S>(a.d_h, at, n), d_act, d_c_read,
                              d_h_prev);
        Vec<T> d_c = d_c_read;
        if constexpr (Cell::kHasC) d_c += load_optional<S>(a.d_c, at, n);
        Cell::update_backward(gates, saved, c_prev, static_cast<const Vec<T>*>(nullptr), d_act,
                              d_hh, d_c);
        for (int g = 0; g < kGates; ++g) {
          store_n(a.d_gates.ptr<S>() + row + g * hidden, d_act[g], n);
          if constexpr (Cell::kSavesHidden) store_n(a.d_hh.ptr<S>() + row + g * hidden, d_hh[g], n);
        }
        if constexpr (Cell::kReadsH) store_n(a.d_h_prev.ptr<S>() + at, d_h_prev, n);
        if constexpr (Cell::kHasC) store_n(a.d_c_prev.ptr<S>() + at, d_c, n);
      }
  });
}

}  // namespace

void recurrent_step(const RecurrentStepArgs& a) {
  dispatch_float_types(a.h_next.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    dispatch_cell<Accumulate<S>>(
        a.cell, [&](auto cell) { StepPass<S, typename decltype(cell)::type>{a}.run(); });
  });
}

void recurrent_step_backward(const RecurrentStepBackwardArgs& a) {
  dispatch_float_types(a.gates.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    dispatch_cell<Accumulate<S>>(
        a.cell, [&](auto cell) { step_backward<S, typename decltype(cell)::type>(a); });
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
