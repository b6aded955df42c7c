// Optimizer steps on rows (csrc/ops/embedding_optimizer.h). On a GPU rows are ascending, so that those
// of one row of the weight follow each other; Python sorts where they do not.
//
// Parallel  a warp for each segment of each of the N gradients; that of the first of a run of equal rows sums
//           the run and updates the row, the others have nothing to do. No atomics, one order of
//           addition. Segments are whole rows where a row has something to be read and written once.
// Traffic   as on the CPU: with n of the N distinct, (N + 2 n) D elements for sgd, (N + 4 n) D for adagrad,
//           (N + 6 n) D for adam. Bound by memory bandwidth.
// Limits    a run is read by one warp: a row with k gradients takes about k * 1 us / kInFlight at its end.
#include "core/dispatch.h"
#include "cuda/device/barrier.h"
#include "cuda/device/launch.h"
#include "cuda/device/math.h"
#include "cuda/device/shuffle.h"
#include "cuda/index_errors.h"
#include "cuda/kernels.h"
#include "cuda/rows.h"
#include "cuda/stream.h"

namespace lmkern::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTurns = 2;  // pieces that a thread has of a segment

template <class S>
struct OptimizerRows {
  S* weight;
  std::int64_t stride, width, extent, count;
  std::int64_t segments;     // of a row
  const std::int64_t* rows;  // null: gradient r is row r's
  const S* gradient;         // null: only decay
  double* touched;
  double decay;
  IndexErrors errors;
};

// A piece of a row: its place in the table, what the row's gradients add up to there, and the weight.
template <class S, int kVec>
struct RowPiece {
  using T = Accumulate<S>;
  T gradient[kVec], weight[kVec], growth;
  LMKERN_DEVICE T decayed(int i) const {
    // Infinities survive a step without decay.
    return growth == T(0) ? weight[i] : weight[i] + weight[i] * growth;
  }
};

template <class S>
struct SgdRule {
  using T = Accumulate<S>;
  static constexpr bool kWholeRow = false;
  T step;
  template <int kVec>
  LMKERN_DEVICE void update(std::int64_t, RowPiece<S, kVec>& p) const {
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) p.weight[i] = p.decayed(i) - step * p.gradient[i];
  }
};

template <class S>
struct AdagradRule {
  using T = Accumulate<S>;
  static constexpr bool kWholeRow = false;
  T* sum;  // [V, D]
  T scale, step, weight_decay, eps;
  LMKERN_DEVICE T gradient(T g, T weight) const {
    return weight_decay == T(0) ? g * scale : g * scale + weight_decay * weight;
  }
  template <int kVec>
  LMKERN_DEVICE void update(std::int64_t at, RowPiece<S, kVec>& p) const {
    Piece<T, kVec> s;
    s.load(sum + at);
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) {
      const T g = gradient(p.gradient[i], p.weight[i]);
      s.at[i] += g * g;
      p.weight[i] = p.decayed(i) - step * (g / (square_root(s.at[i]) + eps));
    }
    s.store(sum + at);
  }
};

// One sum for a row: the row is read twice, first for its squares.
template <class S>
struct RowAdagradRule : AdagradRule<S> {
  using T = Accumulate<S>;
  static constexpr bool kWholeRow = true;
  T rate = T(0);  // of this warp's row
  template <int kVec>
  LMKERN_DEVICE T squares(const RowPiece<S, kVec>& p) const {
    T total = T(0);
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) {
      const T g = this->gradient(p.gradient[i], p.weight[i]);
      total += g * g;
    }
    return total;
  }
  LMKERN_DEVICE void finish(std::int64_t row, T squares, std::int64_t width) {
    const T now = this->sum[row] + warp_sum(squares) / static_cast<T>(width);
    warp_barrier();  // all have read it
    if (lane_index() == 0) this->sum[row] = now;
    rate = this->step / (square_root(now) + this->eps);
  }
  template <int kVec>
  LMKERN_DEVICE void update(std::int64_t, RowPiece<S, kVec>& p) const {
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i)
      p.weight[i] = p.decayed(i) - rate * this->gradient(p.gradient[i], p.weight[i]);
  }
};

template <class S>
struct AdamRule {
  using T = Accumulate<S>;
  static constexpr bool kWholeRow = false;
  T *exp_avg, *exp_avg_sq;
  T scale, step, blend1, keep, blend2, eps;
  template <int kVec>
  LMKERN_DEVICE void update(std::int64_t at, RowPiece<S, kVec>& p) const {
    Piece<T, kVec> m, v;
    m.load(exp_avg + at);
    v.load(exp_avg_sq + at);
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) {
      const T g = p.gradient[i] * scale;
      m.at[i] += blend1 * (g - m.at[i]);
      v.at[i] = keep * v.at[i] + blend2 * g * g;
      p.weight[i] = p.decayed(i) - step * (m.at[i] / (square_root(v.at[i]) + eps));
    }
    m.store(exp_avg + at);
    v.store(exp_avg_sq + at);
  }
};

template <class S, int kVec>
LMKERN_DEVICE void load_piece(const OptimizerRows<S>& r, std::int64_t row, std::int64_t first,
                              std::int64_t end, std::int64_t column, RowPiece<S, kVec>& p) {
  using T = Accumulate<S>;
  Piece<S, kVec> piece, weight;
  weight.load(r.weight + row * r.stride + column);
  LMKERN_UNROLL
  for (int i = 0; i < kVec; ++i) p.gradient[i] = T(0);
  for (std::int64_t n = first; r.gradient != nullptr && n < end; ++n) {
    piece.load(r.gradient + n * r.width + column);
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) p.gradient[i] += to_accumulate(piece.at[i]);
  }
  LMKERN_UNROLL
  for (int i = 0; i < kVec; ++i) p.weight[i] = to_accumulate(weight.at[i]);
}

// registers: 128, spills: 0
template <class S, int kVec, class Rule>
LMKERN_KERNEL(kThreads, 2)
update_rows(OptimizerRows<S> r, Rule rule) {
  using T = Accumulate<S>;
  const RowThread warp = split_index(std::int64_t{block_x()} * kWarps + warp_index(), r.segments);
  const std::int64_t first = warp.row;
  if (first >= r.count) return;
  const std::int64_t row = r.rows != nullptr ? r.rows[first] : first;
  std::int64_t end = first + 1;
  if (r.rows != nullptr) {
    if (first > 0 && r.rows[first - 1] == row) return;
    if (row < 0 || row >= r.extent) {
      if (lane_index() == 0 && warp.column == 0) r.errors.report(row, first);
      return;
    }
    while (end < r.count && r.rows[end] == row) ++end;
  }
  double factor = r.decay;
  if (r.touched != nullptr) {
    factor /= r.touched[row];
    warp_barrier();  // all have read it
    if (lane_index() == 0) r.touched[row] = r.decay;
  }
  RowPiece<S, kVec> p;
  p.growth = static_cast<T>(factor - 1);
  if (r.gradient == nullptr && p.growth == T(0)) return;
  if constexpr (Rule::kWholeRow) {
    T squares = T(0);
    for (std::int64_t c = lane_index() * kVec; c < r.width; c += 32 * kVec) {
      load_piece(r, row, first, end, c, p);
      squares += rule.squares(p);
    }
    rule.finish(row, squares, r.width);
  }
  const std::int64_t size = r.segments == 1 ? r.width : 32 * kVec * kTurns;
  const std::int64_t last = warp.column + 1 == r.segments ? r.width : (warp.column + 1) * size;
  for (std::int64_t c = warp.column * size + lane_index() * kVec; c < last; c += 32 * kVec) {
    load_piece(r, row, first, end, c, p);
    rule.update(row * r.width + c, p);
    Piece<S, kVec> out;
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) out.at[i] = from_accumulate<S>(p.weight[i]);
    out.store(r.weight + row * r.stride + c);
  }
}

// states: what the rule reads and writes like the weight.
template <class S, class Rule>
void launch_rule(const char* op, const OptimizerTable& t, const Rule& rule,
                 std::initializer_list<const TensorView*> states) {
  const std::int64_t extent = t.weight.shape[0], width = t.weight.shape[1];
  const std::int64_t count = t.rows.defined() ? t.rows.shape[0] : extent;
  if (count == 0 || width == 0) return;
  // A row's sum of squares must not depend on how the weight lies in memory.
  bool wide = !Rule::kWholeRow && is_wide<S>(width, {&t.weight, &t.gradient});
  for (const TensorView* state : states)
    wide = wide && reinterpret_cast<std::uintptr_t>(state->data) % 16 == 0;
  const std::int64_t size = 32 * kTurns * (wide ? kWide<S> : 1);
  const bool once = Rule::kWholeRow || t.touched.defined();
  const OptimizerRows<S> rows{
      t.weight.ptr<S>(),
      t.weight.strides[0],
      width,
      extent,
      count,
      once ? 1 : (width + size - 1) / size,
      t.rows.ptr<const std::int64_t>(),
      t.gradient.ptr<const S>(),
      t.touched.ptr<double>(),
      t.decay,
      index_errors(op, t.rows.defined() ? t.rows : t.weight, extent, "rows")};
  const Grid grid{.x = blocks_for(count * rows.segments, kWarps), .threads = kThreads};
  if (wide)
    launch<update_rows<S, kWide<S>, Rule>>(grid, current_stream(), rows, rule);
  else
    launch<update_rows<S, 1, Rule>>(grid, current_stream(), rows, rule);
}

}  // namespace

void Kernels::embedding_sgd(const EmbeddingSgdArgs& a) {
  dispatch_float_types(a.table.weight.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    using T = Accumulate<S>;
    const T step = static_cast<T>(a.table.step_size * a.table.gradient_scale);
    launch_rule<S>("embedding_sgd", a.table, SgdRule<S>{step}, {});
  });
}

void Kernels::embedding_adagrad(const EmbeddingAdagradArgs& a) {
  dispatch_float_types(a.table.weight.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    using T = Accumulate<S>;
    const AdagradRule<S> rule{a.sum.ptr<T>(), static_cast<T>(a.table.gradient_scale),
                              static_cast<T>(a.table.step_size), static_cast<T>(a.weight_decay),
                              static_cast<T>(a.eps)};
    if (a.sum.ndim == 1)
      launch_rule<S>("embedding_adagrad", a.table, RowAdagradRule<S>{rule}, {});
    else
      launch_rule<S>("embedding_adagrad", a.table, rule, {&a.sum});
  });
}

void Kernels::embedding_adam(const EmbeddingAdamArgs& a) {
  dispatch_float_types(a.table.weight.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    using T = Accumulate<S>;
    const AdamRule<S> rule{a.exp_avg.ptr<T>(),
                           a.exp_avg_sq.ptr<T>(),
                           static_cast<T>(a.table.gradient_scale),
                           static_cast<T>(a.table.step_size),
                           static_cast<T>(1 - a.beta1),
                           static_cast<T>(a.beta2),
                           static_cast<T>(1 - a.beta2),
                           static_cast<T>(a.eps)};
    launch_rule<S>("embedding_adam", a.table, rule, {&a.exp_avg, &a.exp_avg_sq});
  });
}

}  // namespace lmkern::cuda
