// One step of a recurrent cell (csrc/ops/recurrent.h).
//
// Parallel  threads own units; nothing is shared, so nobody waits.
// Traffic   W_ih and W_hh once, straight from the caller's rows: at one or two rows of the batch a
//           step is bound by reading them, and up to 95 (`reads_weights_directly` in
//           ops/recurrent_passes.py) packing them costs more than it saves. Rows of W and of the operand are both walked along k, so
//           sums end up spread over lanes and are folded at the end, 30 shuffles for 16 units of
//           one gate and row of the batch.
// Limits    the operands' rows are read again for every kDotGroup rows of W, from L2.
#include "core/dispatch.h"
#include "core/memory.h"
#include "cpu/dot.h"
#include "cpu/gemm.h"
#include "cpu/recurrent.h"
#include "ops/recurrent.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class S, class Cell>
struct StepPass {
  using T = Accumulate<S>;
  using V = Vec<T>;
  static constexpr int kGates = Cell::kGates;
  static constexpr std::int64_t kLane = kLanes<T>;
  static constexpr int kGroup = kDotGroup<T>, kGroups = kDotGroups<T>;  // of one vector of units
  // W_ih x and W_hh h may be added before they are folded, unless the cell treats them differently.
  static constexpr int kProducts = kGates + (Cell::kSavesHidden ? 1 : 0);

  const RecurrentStepArgs& a;
  const std::int64_t batch = a.h_next.shape[0], hidden = a.h_next.shape[1];
  const std::int64_t features = a.x.defined() ? a.x.shape[1] : 0;

  // sums[(product * batch + b) * kGroups + group]: the products of n units from u on, half folded.
  void products(std::int64_t u, std::int64_t n, V* sums) const {
    const S* const x = a.x.ptr<const S>();
    const S* const h = a.h.defined() ? a.h.ptr<const S>() : nullptr;
    for (int g = 0; g < kGates; ++g)
      for (int group = 0; group < kGroups; ++group) {
        const S *w_ih[kGroup], *w_hh[kGroup];
        LMKERN_UNROLL
        for (int i = 0; i < kGroup; ++i) {
          const std::int64_t unit = group * kGroup + i;  // beyond the last: read as it, dropped
          const std::int64_t row = g * hidden + u + (unit < n ? unit : n - 1);
          w_ih[i] = a.w_ih.ptr<const S>() + row * features;
          w_hh[i] = a.w_hh.ptr<const S>() + row * hidden;
        }
        const bool apart = Cell::kSavesHidden && g == kGates - 1;
        for_row_tiles<kDotRows>(
            batch, [&](std::int64_t b, auto tile) __attribute__((always_inline)) {
              constexpr int M = decltype(tile)::value;
              V acc[M][kGroup] = {};
              const auto keep = [&](int product) {
                LMKERN_UNROLL
                for (int m = 0; m < M; ++m)
                  sums[(product * batch + b + m) * kGroups + group] = fold<T>(acc[m]);
              };
              if (b == 0)
                add_dots<true>(features, x + b * features, features, w_ih, kGroup * features, acc);
              else
                add_dots<false>(features, x + b * features, features, w_ih, kGroup * features, acc);
              if (apart) {
                keep(g);
                LMKERN_UNROLL
                for (int m = 0; m < M; ++m)
                  for (V& sum : acc[m]) sum = V{};
              }
              if (h != nullptr) {
                if (b == 0)
                  add_dots<true>(hidden, h + b * hidden, hidden, w_hh, kGroup * hidden, acc);
                else
                  add_dots<false>(hidden, h + b * hidden, hidden, w_hh, kGroup * hidden, acc);
              }
              keep(apart ? kGates : g);
            });
      }
  }

  // from_x and from_h of row b and n units from u on.
  LMKERN_INLINE void operands(std::int64_t b, std::int64_t u, std::int64_t n, const V* sums,
                              V (&from_x)[kGates], V (&from_h)[kGates]) const {
    for (int g = 0; g < kGates; ++g) {
      const std::int64_t at = (b * kGates + g) * hidden + u, row = g * hidden + u;
      if (sums == nullptr) {
        from_x[g] = load_n(a.from_x.ptr<const S>() + at, n);
        from_h[g] = load_optional<S>(a.from_h, at, n);
        continue;
      }
      const auto product = [&](int p) {
        const V* parts = sums + (p * batch + b) * kGroups;
        if constexpr (kGroups == 1) return parts[0];
        return fold_halves<T>(parts[0], parts[1]);
      };
      from_x[g] = product(g) + load_optional<S>(a.b_ih, row, n);
      from_h[g] = load_optional<S>(a.b_hh, row, n);
      if (Cell::kSavesHidden && g == kGates - 1) from_h[g] += product(kGates);
    }
  }

  void units(std::int64_t u, V* sums) const {
    const std::int64_t n = hidden - u < kLane ? hidden - u : kLane;
    if (sums != nullptr) products(u, n, sums);
    for (std::int64_t b = 0; b < batch; ++b) {
      const std::int64_t at = b * hidden + u;
      V gates[kGates], product[kGates], c{}, h_prev{};
      operands(b, u, n, sums, gates, product);
      if constexpr (Cell::kHasC) c = load_optional<S>(a.c, at, n);
      if constexpr (Cell::kReadsH) h_prev = load_optional<S>(a.h, at, n);
      Cell::update(gates, product, static_cast<const V*>(nullptr), c);
      const V h_next = Cell::output(gates, c, h_prev);
      store_n(a.h_next.ptr<S>() + at, h_next, n);
      if (a.y.defined()) store_n(a.y.ptr<S>() + at, h_next, n);
      if constexpr (Cell::kHasC) store_n(a.c_next.ptr<S>() + at, c, n);
      if (!a.gates.defined()) continue;
      for (int g = 0; g < kGates; ++g)
        store_n(a.gates.ptr<S>() + b * kGates * hidden + g * hidden + u, gates[g], n);
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
      V* sums = nullptr;
      if (!a.from_x.defined())
        sums = static_cast<V*>(thread_scratch(kProducts * batch * kGroups * sizeof(V)));
      for (std::int64_t v = own.begin; v < own.end; ++v) units(v * kLane, sums);
    });
  }
};

// Threads own units, so that the sums over the batch for the biases are theirs alone.
template <class S, class Cell>
void step_backward(const RecurrentStepBackwardArgs& a) {
  using T = Accumulate<S>;
  constexpr int kGates = Cell::kGates;
  constexpr std::int64_t kLane = kLanes<T>, kForkElements = 20'000;
  const std::int64_t batch = a.gates.shape[0], hidden = a.gates.shape[1] / kGates;
  const std::int64_t vectors = (hidden + kLane - 1) / kLane;
  int threads = batch * hidden < kForkElements ? 1 : max_threads();
  if (threads > vectors) threads = static_cast<int>(vectors);
  parallel(threads, [&](int thread, int count) {
    const Range own = thread_range(vectors, 1, thread, count);
    for (std::int64_t u = own.begin * kLane; u < own.end * kLane && u < hidden; u += kLane) {
      const std::int64_t n = hidden - u < kLane ? hidden - u : kLane;
      Vec<T> d_b_ih[kGates] = {}, d_b_hh[kGates] = {};
      for (std::int64_t b = 0; b < batch; ++b) {
        const std::int64_t at = b * hidden + u, row = b * kGates * hidden + u;
        Vec<T> gates[kGates], d_act[kGates], d_hh[kGates], d_c_read{}, d_h_prev, c_now{}, saved{};
        for (int g = 0; g < kGates; ++g)
          gates[g] = load_n(a.gates.ptr<const S>() + row + g * hidden, n);
        const Vec<T> h_prev = Cell::kReadsH ? load_optional<S>(a.h, at, n) : Vec<T>{};
        const Vec<T> c_prev = Cell::kHasC ? load_optional<S>(a.c, at, n) : Vec<T>{};
        if constexpr (Cell::kHasC) c_now = gates[1] * c_prev + gates[0] * gates[2];
        if constexpr (Cell::kSavesHidden) saved = load_n(a.hidden.ptr<const T>() + at, n);
        const Vec<T> d_h = load_optional<S>(a.d_h, at, n) + load_optional<S>(a.d_y, at, n);
        Cell::output_backward(gates, c_now, h_prev, d_h, d_act, d_c_read, d_h_prev);
        Vec<T> d_c = d_c_read;
        if constexpr (Cell::kHasC) d_c += load_optional<S>(a.d_c, at, n);
        Cell::update_backward(gates, saved, c_prev, static_cast<const Vec<T>*>(nullptr), d_act,
                              d_hh, d_c);
        for (int g = 0; g < kGates; ++g) {
          store_n(a.d_gates.ptr<S>() + row + g * hidden, d_act[g], n);
          if constexpr (Cell::kSavesHidden) store_n(a.d_hh.ptr<S>() + row + g * hidden, d_hh[g], n);
          d_b_ih[g] += d_act[g];
          d_b_hh[g] += d_hh[g];
        }
        if constexpr (Cell::kReadsH) store_n(a.d_h_prev.ptr<S>() + at, d_h_prev, n);
        if constexpr (Cell::kHasC) store_n(a.d_c_prev.ptr<S>() + at, d_c, n);
      }
      for (int g = 0; g < kGates; ++g) {
        if (a.d_b_ih.defined()) store_n(a.d_b_ih.ptr<S>() + g * hidden + u, d_b_ih[g], n);
        if (a.d_b_hh.defined()) store_n(a.d_b_hh.ptr<S>() + g * hidden + u, d_b_hh[g], n);
      }
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
