// Backward pass of the recurrent layers (csrc/ops/recurrent.h).
//
// Parallel  RecurrentPlan, as forward.
// Traffic   per step W_hh once, saved activations once in, d_gates once out. Step t's product
//           d_hh_t W_hh ends in the epilogue that computes d_gates_{t-1} for the same units, while
//           d_h_{t-1} is still at hand: one barrier per step.
// Limits    d_gates is rounded to the storage type for the caller's products over all steps, but
//           the recurrence itself goes on in the accumulate type.
//
// Steps are taken in the opposite order, and one more at the end, which only passes d_h and d_c on
// to the initial state; in a packed batch that runs backwards, rows come to that point one by one.
// The phases of a step, with a barrier after each where threads divide the units:
//   hidden      product of the later step's d_hh with W_hh gives d_h;
//               then, panel by panel, the cell
//   projection  product of d_h with W_hr
//   rows        under norm: statistics over a whole row, then the cell
#include "core/dispatch.h"
#include "cpu/recurrent.h"
#include "ops/recurrent.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class S, class Cell, class W>
class BackwardPass {
  using T = Accumulate<S>;
  using V = Vec<T>;
  static constexpr int kGates = Cell::kGates;
  static constexpr int kVecs = 2;
  static constexpr std::int64_t kLane = kLanes<T>, kUnits = kVecs * kLane;

  const RecurrentBackwardArgs& a;
  const RecurrentOptions& o = a.options;
  const std::int64_t width = o.w_hh.shape[1], depth = o.w_hh.shape[0], hidden = depth / kGates;
  const std::int64_t padded_width = (width + kLane - 1) / kLane * kLane;
  const std::int64_t padded = (hidden + kLane - 1) / kLane * kLane;
  const std::int64_t panels = (width + kUnits - 1) / kUnits;
  const bool norm = o.norm_hh.defined(), normed_c = o.norm_c_weight.defined();
  const bool projects = o.w_hr.defined();
  const bool zones_h = o.zoneout_h.defined() || o.zoneout_h_rate != 0;
  const bool zones_c = o.zoneout_c.defined() || o.zoneout_c_rate != 0;
  const std::int64_t projection_panels = projects ? (hidden + kUnits - 1) / kUnits : 0;
  Steps steps{o, a.y.shape[0]};
  // The product of a rectangle's single step is the caller's.
  const bool multiplies = steps.count > 1 || steps.sizes != nullptr;
  const bool tiles = multiplies && use_tiles<S>(steps.batch);
  const RecurrentPlan plan{steps, panels,
                           panels * depth * kUnits * (tiles ? 6 : std::int64_t{sizeof(W)}),
                           2 * steps.batch * depth * width, tiles};
  StepProduct<S, W, kVecs> recurrent, projection;
  T* d_h;    // [B][padded_width]: dL/dh_t, what bypasses W_hh; before a step, from the later one
  T* d_c;    // [B][padded]: dL/dc_t from the later step
  T* d_out;  // [B][padded]: dL/d(o * tanh c), where a phase ends with it
  T* tile;   // [threads][B][units of a panel]
  T* row_scratch;  // [threads][(G + 2) padded], under norm

  struct Row {
    std::int64_t t, b, index;
    std::int64_t before;  // index of the row that holds h_{t-1} and c_{t-1}; -1: the initial state
    bool reset;
    int slot;  // of this step's operand for the next product
  };

 public:
  explicit BackwardPass(const RecurrentBackwardArgs& args) : a(args) {
    Scratch::place([this](Scratch& scratch) {
      steps.place(scratch);
      recurrent.place_weights(scratch, depth, multiplies ? panels : 0, tiles);
      recurrent.place_operands(scratch, steps.batch);
      projection.place_weights(scratch, width, projection_panels, tiles);
      projection.place_operands(scratch, projects ? steps.batch : 0);
      d_h = scratch.take<T>(steps.batch * padded_width);
      d_c = scratch.take<T>(Cell::kHasC ? steps.batch * padded : 0);
      d_out = scratch.take<T>(norm ? steps.batch * padded : 0);
      tile = scratch.take<T>(plan.threads * steps.batch * kUnits);
      row_scratch = scratch.take<T>(norm ? plan.threads * row_scratch_size() : 0);
    });
    steps.prepare();
  }

  void run() {
    Barrier barrier;
    parallel(plan.threads, [&](int thread, int threads) {
      const Range rows = plan.rows_of(steps, thread, threads);
      const Range own = plan.share_of(panels, thread, threads);
      const Range own_projection = plan.share_of(projection_panels, thread, threads);
      T* const own_tile = tile + thread * steps.batch * kUnits;
      const auto meet = [&] {
        if (!plan.by_rows) barrier.wait(threads);
      };
      const TileRegisters registers(tiles);
      pack(thread, threads);
      load_state(plan.by_rows ? rows : thread_range(steps.batch, 1, thread, threads));
      barrier.wait(threads);
      for (std::int64_t s = steps.count - 1; s >= -1; --s) {
        const std::int64_t t = steps.time(s), later = steps.time(s + 1);
        const std::int64_t active = s < 0 ? 0 : steps.rows(t);
        const std::int64_t coming = s + 1 < steps.count ? steps.rows(later) : 0;
        hidden_phase(s, clip(rows, active > coming ? active : coming), active, coming, own,
                     own_tile);
        if (s < 0) break;
        meet();
        if (projects) {
          projection_phase(s, clip(rows, active), own_projection, own_tile);
          meet();
        }
        if (norm) {
          const Range share =
              plan.by_rows ? clip(rows, active) : thread_range(active, 1, thread, threads);
          for (std::int64_t b = share.begin; b < share.end; ++b)
            normed_row(row_at(s, b), row_scratch + thread * row_scratch_size());
          meet();
        }
      }
      // Rows without a single step keep what came from the final state.
      const Range mine = plan.by_rows ? rows : thread_range(steps.batch, 1, thread, threads);
      meet();
      store_state(mine);
    });
  }

 private:
  static LMKERN_INLINE Range clip(Range range, std::int64_t end) {
    return {range.begin < end ? range.begin : end, range.end < end ? range.end : end};
  }
  LMKERN_INLINE std::int64_t units_at(std::int64_t u, std::int64_t extent) const {
    const std::int64_t left = extent - u;
    return left < 0 ? 0 : left < kLane ? left : kLane;
  }
  LMKERN_INLINE bool resets(std::int64_t index) const {
    return o.reset.defined() && o.reset.ptr<const bool>()[index];
  }
  std::int64_t row_scratch_size() const { return (kGates + 2) * padded; }

  LMKERN_INLINE Row row_at(std::int64_t s, std::int64_t b) const {
    const std::int64_t t = steps.time(s), index = steps.offset(t) + b,
                       before = steps.neighbour(t, -1);
    return {t,
            b,
            index,
            steps.takes_part(before, b) ? steps.offset(before) + b : -1,
            resets(index),
            static_cast<int>(s & 1)};
  }

  void pack(int thread, int threads) {
    const Range own = thread_range(multiplies ? panels : 0, 1, thread, threads);
    for (std::int64_t p = own.begin; p < own.end; ++p) {
      const std::int64_t u = p * kUnits, left = width - u;
      recurrent.pack_columns(p, o.w_hh.ptr<const S>() + u, left < kUnits ? left : kUnits, width);
      for (int v = 0; v < kVecs; ++v) recurrent.set_bias(p, v, V{});
    }
    const Range projected = thread_range(projection_panels, 1, thread, threads);
    for (std::int64_t p = projected.begin; p < projected.end; ++p) {
      const std::int64_t u = p * kUnits, left = hidden - u;
      projection.pack_columns(p, o.w_hr.ptr<const S>() + u, left < kUnits ? left : kUnits, hidden);
      for (int v = 0; v < kVecs; ++v) projection.set_bias(p, v, V{});
    }
  }

  void load_state(Range rows) {
    if (multiplies) recurrent.clear_padding(rows);
    if (projects) projection.clear_padding(rows);
    for (std::int64_t b = rows.begin; b < rows.end; ++b) {
      for (std::int64_t u = 0; u < width; u += kLane)
        store(d_h + b * padded_width + u,
              load_optional<S>(a.d_h_n, b * width + u, units_at(u, width)));
      if constexpr (Cell::kHasC)
        for (std::int64_t u = 0; u < hidden; u += kLane)
          store(d_c + b * padded + u,
                load_optional<S>(a.d_c_n, b * hidden + u, units_at(u, hidden)));
    }
  }

  void store_state(Range rows) const {
    for (std::int64_t b = rows.begin; b < rows.end; ++b) {
      if (a.d_h0.defined())
        for (std::int64_t u = 0; u < width; u += kLane)
          store_n(a.d_h0.ptr<S>() + b * width + u, load(d_h + b * padded_width + u),
                  units_at(u, width));
      if constexpr (Cell::kHasC)
        if (a.d_c0.defined())
          for (std::int64_t u = 0; u < hidden; u += kLane)
            store_n(a.d_c0.ptr<S>() + b * hidden + u, load(d_c + b * padded + u),
                    units_at(u, hidden));
    }
  }

  // rows: of this thread, those that have a step now or come from a later one.
  void hidden_phase(std::int64_t s, Range rows, std::int64_t active, std::int64_t coming, Range own,
                    T* out) {
    const Range multiplied = clip(rows, coming);
    const std::int64_t later = steps.time(s + 1);
    if (s < 0 && !(a.d_h0.defined() && multiplies)) return;
    for (std::int64_t p = own.begin; p < own.end; ++p) {
      if (multiplied.begin < multiplied.end)
        recurrent.multiply(static_cast<int>((s + 1) & 1), multiplied, p, true, out);
      for (std::int64_t b = rows.begin; b < rows.end; ++b)
        for (int v = 0; v < kVecs; ++v) {
          const std::int64_t u = p * kUnits + v * kLane, n = units_at(u, width);
          if (n == 0) break;
          T* const carried = d_h + b * padded_width + u;
          V gradient = load(carried);
          if (b < coming && !resets(steps.offset(later) + b)) {
            const V product = load(out + ((b - multiplied.begin) * kVecs + v) * kLane);
            gradient += o.h_mask.defined()
                            ? product * load_n(o.h_mask.ptr<const S>() + b * width + u, n)
                            : product;
          }
          if (b < active)
            hidden_gradient(row_at(s, b), u, n, gradient);
          else
            store(carried, gradient);
        }
    }
  }

  // d_h_t is whole but for y's share; zoneout passes a part of it by.
  LMKERN_INLINE void hidden_gradient(const Row& row, std::int64_t u, std::int64_t n, V gradient) {
    const std::int64_t at = row.index * width + u;
    gradient += load_optional<S>(a.d_y, at, n);
    V bypass{};
    if (zones_h) {
      const V share = zoneout_at<T>(o.zoneout_h, o.zoneout_h_rate, at, n);
      bypass = row.reset ? V{} : share * gradient;
      gradient = (1 - share) * gradient;
    }
    if (projects) {
      store(d_h + row.b * padded_width + u, bypass);
      store_n(a.d_h.ptr<S>() + at, gradient, n);
      projection.set_operand(0, row.b, u, gradient, n);
    } else if (norm) {
      store(d_h + row.b * padded_width + u, bypass);
      store(d_out + row.b * padded + u, gradient);
    } else {
      store(d_h + row.b * padded_width + u, bypass + plain_unit(row, u, n, gradient));
    }
  }

  void projection_phase(std::int64_t s, Range rows, Range own, T* out) {
    for (std::int64_t p = own.begin; p < own.end; ++p) {
      projection.multiply(0, rows, p, true, out);
      for (std::int64_t b = rows.begin; b < rows.end; ++b)
        for (int v = 0; v < kVecs; ++v) {
          const std::int64_t u = p * kUnits + v * kLane, n = units_at(u, hidden);
          if (n == 0) break;
          const V gradient = load(out + ((b - rows.begin) * kVecs + v) * kLane);
          if (norm)
            store(d_out + b * padded + u, gradient);
          else
            plain_unit(row_at(s, b), u, n, gradient);
        }
    }
  }

  // What both ways through the cell read for n units from u on.
  struct Unit {
    V gates[kGates], hidden, h_prev, c_prev, c_now, peephole[3];
  };

  LMKERN_INLINE void load_unit(const Row& row, std::int64_t u, std::int64_t n,
                               const V (&product)[kGates], Unit& unit) const {
    const std::int64_t at = row.index * hidden + u, b = row.b;
    LMKERN_UNROLL
    for (int g = 0; g < kGates; ++g)
      unit.gates[g] = load_n(a.gates.ptr<const S>() + row.index * depth + g * hidden + u, n);
    unit.h_prev = unit.c_prev = V{};
    if (!row.reset) {
      if constexpr (Cell::kReadsH)
        unit.h_prev = row.before < 0 ? load_optional<S>(a.h0, b * width + u, n)
                                     : load_n(a.y.ptr<const S>() + row.before * width + u, n);
      if constexpr (Cell::kHasC)
        unit.c_prev = row.before < 0 ? load_optional<S>(a.c0, b * hidden + u, n)
                                     : load_n(a.cells.ptr<const T>() + row.before * hidden + u, n);
    }
    if constexpr (Cell::kHasC)
      for (int i = 0; o.peephole.defined() && i < 3; ++i)
        unit.peephole[i] = load_n(o.peephole.ptr<const S>() + i * hidden + u, n);
    if (a.recompute) {
      unit.c_now = unit.c_prev;
      Cell::update(unit.gates, product, peephole_of(unit), unit.c_now);
      unit.hidden = product[kGates - 1];
    } else {
      if constexpr (Cell::kHasC)  // before zoneout, so not the one that was saved
        unit.c_now = unit.gates[1] * unit.c_prev + unit.gates[0] * unit.gates[2];
      if constexpr (Cell::kSavesHidden) unit.hidden = load_n(a.hidden.ptr<const T>() + at, n);
    }
  }

  LMKERN_INLINE const V* peephole_of(const Unit& unit) const {
    return o.peephole.defined() ? unit.peephole : nullptr;
  }

  // The cell's gradient from d_act and, for c, what the output passed on;
  // d_hh is left to the caller.
  LMKERN_INLINE void update_gradient(const Row& row, std::int64_t u, std::int64_t n,
                                     const Unit& unit, V (&d_act)[kGates], V d_c_read,
                                     V (&d_hh)[kGates]) {
    V d_c_now{}, bypass{};
    T* const carried = d_c + row.b * padded + u;
    const std::int64_t at = row.index * hidden + u;
    if constexpr (Cell::kHasC) {
      d_c_now = load(carried) + load_optional<S>(a.d_cells, at, n);
      if (zones_c) {
        const V share = zoneout_at<T>(o.zoneout_c, o.zoneout_c_rate, at, n);
        bypass = share * d_c_now;
        d_c_now = (1 - share) * d_c_now;
      }
      d_c_now += d_c_read;
    }
    Cell::update_backward(unit.gates, unit.hidden, unit.c_prev, peephole_of(unit), d_act, d_hh,
                          d_c_now);
    if constexpr (Cell::kHasC) store(carried, row.reset ? V{} : bypass + d_c_now);
    LMKERN_UNROLL
    for (int g = 0; g < kGates; ++g)
      store_n(a.d_gates.ptr<S>() + row.index * depth + g * hidden + u, d_act[g], n);
  }

  LMKERN_INLINE void keep_c(const Row& row, std::int64_t u, std::int64_t n,
                            const Unit& unit) const {
    if constexpr (Cell::kHasC)
      if (a.c_now.defined()) store_n(a.c_now.ptr<T>() + row.index * hidden + u, unit.c_now, n);
  }

  LMKERN_INLINE void put_hh(const Row& row, std::int64_t at, std::int64_t n, V gradient) {
    recurrent.set_operand(row.slot, row.b, at, gradient, n);
    if (a.d_hh.defined()) store_n(a.d_hh.ptr<S>() + row.index * depth + at, gradient, n);
  }

  // Without norm; returns the part of d_h_{t-1} that bypasses W_hh.
  LMKERN_INLINE V plain_unit(const Row& row, std::int64_t u, std::int64_t n, V gradient) {
    V product[kGates], d_act[kGates], d_hh[kGates], d_c_read{}, d_h_prev;
    if (a.recompute) {
      LMKERN_UNROLL
      for (int g = 0; g < kGates; ++g)
        product[g] = load_n(a.hh.ptr<const T>() + row.index * depth + g * hidden + u, n);
    }
    Unit unit;
    load_unit(row, u, n, product, unit);
    keep_c(row, u, n, unit);
    Cell::output_backward(unit.gates, unit.c_now, unit.h_prev, gradient, d_act, d_c_read, d_h_prev);
    update_gradient(row, u, n, unit, d_act, d_c_read, d_hh);
    LMKERN_UNROLL
    for (int g = 0; g < kGates; ++g) put_hh(row, g * hidden + u, n, d_hh[g]);
    return row.reset ? V{} : d_h_prev;
  }

  // Under norm. LN's gradient: with x^ the normalised values and d = dL/d(x^), in vectors over a
  // row, dL/dx = rstd (d - mean(d) - x^ mean(d x^)).
  void normed_row(const Row& row, T* scratch) {
    T* const d_normed = scratch;                        // [G][padded]: d of hh
    T* const now = scratch + kGates * padded;           // [padded]: c_t before zoneout
    T* const d_read = scratch + (kGates + 1) * padded;  // [padded]: d of c
    const T* const raw = a.hh.ptr<const T>() + row.index * depth;
    const auto moments = Moments<T>::of(
        depth, o.eps, [&](std::int64_t u, std::int64_t n) { return load_n(raw + u, n); });
    const auto normalised = [&](std::int64_t at, std::int64_t n) {
      return (load_n(raw + at, n) - moments.mean) * moments.rstd;
    };
    const auto unit_at = [&](std::int64_t u, std::int64_t n, Unit& unit) {
      V product[kGates];
      LMKERN_UNROLL
      for (int g = 0; g < kGates; ++g)
        product[g] =
            normalised(g * hidden + u, n) * load_n(o.norm_hh.ptr<const S>() + g * hidden + u, n) +
            load_optional<S>(o.b_hh, g * hidden + u, n);
      load_unit(row, u, n, product, unit);
    };

    Moments<T> of_c{};
    T mean_d = 0, mean_dx = 0;
    if (normed_c) {
      for (std::int64_t u = 0; u < hidden; u += kLane) {
        Unit unit;
        const std::int64_t n = units_at(u, hidden);
        unit_at(u, n, unit);
        store(now + u, unit.c_now);
      }
      of_c = Moments<T>::of(hidden, o.eps,
                            [&](std::int64_t u, std::int64_t n) { return load_n(now + u, n); });
      V sum_d{}, sum_dx{};
      for (std::int64_t u = 0; u < hidden; u += kLane) {
        const std::int64_t n = units_at(u, hidden);
        Unit unit;
        unit_at(u, n, unit);
        const V x = (unit.c_now - of_c.mean) * of_c.rstd,
                weight = load_n(o.norm_c_weight.ptr<const S>() + u, n);
        V d_act[kGates], d_normed_c{}, d_h_prev;
        Cell::output_backward(unit.gates, x * weight + load_n(o.norm_c_bias.ptr<const S>() + u, n),
                              unit.h_prev, load(d_out + row.b * padded + u), d_act, d_normed_c,
                              d_h_prev);
        store_n(a.d_c_normed.ptr<S>() + row.index * hidden + u, d_normed_c, n);
        const V d = d_normed_c * weight;  // zero beyond n, as the weight is
        store(d_read + u, d);
        sum_d += d;
        sum_dx += d * x;
      }
      mean_d = sum_lanes(sum_d) / static_cast<T>(hidden);
      mean_dx = sum_lanes(sum_dx) / static_cast<T>(hidden);
    }

    V sum_d{}, sum_dx{};
    for (std::int64_t u = 0; u < hidden; u += kLane) {
      const std::int64_t n = units_at(u, hidden);
      Unit unit;
      unit_at(u, n, unit);
      keep_c(row, u, n, unit);
      V d_act[kGates], d_hh[kGates], d_c_read{}, d_h_prev, c_read = unit.c_now, x{};
      if (normed_c) {
        x = (unit.c_now - of_c.mean) * of_c.rstd;
        c_read = x * load_n(o.norm_c_weight.ptr<const S>() + u, n) +
                 load_n(o.norm_c_bias.ptr<const S>() + u, n);
      }
      Cell::output_backward(unit.gates, c_read, unit.h_prev, load(d_out + row.b * padded + u),
                            d_act, d_c_read, d_h_prev);
      if (normed_c) d_c_read = of_c.rstd * (load(d_read + u) - mean_d - x * mean_dx);
      update_gradient(row, u, n, unit, d_act, d_c_read, d_hh);
      if constexpr (Cell::kReadsH)
        if (!row.reset) {
          T* const carried = d_h + row.b * padded_width + u;
          store(carried, load(carried) + d_h_prev);
        }
      LMKERN_UNROLL
      for (int g = 0; g < kGates; ++g) {
        if (a.d_normed.defined())
          store_n(a.d_normed.ptr<S>() + row.index * depth + g * hidden + u, d_hh[g], n);
        const V d = d_hh[g] * load_n(o.norm_hh.ptr<const S>() + g * hidden + u, n);
        store(d_normed + g * padded + u, d);
        sum_d += d;
        sum_dx += d * normalised(g * hidden + u, n);
      }
    }
    mean_d = sum_lanes(sum_d) / static_cast<T>(depth);
    mean_dx = sum_lanes(sum_dx) / static_cast<T>(depth);
    for (int g = 0; g < kGates; ++g)
      for (std::int64_t u = 0; u < hidden; u += kLane) {
        const std::int64_t n = units_at(u, hidden), at = g * hidden + u;
        const V d = load(d_normed + g * padded + u);
        put_hh(row, at, n, moments.rstd * (d - mean_d - normalised(at, n) * mean_dx));
      }
  }
};

}  // namespace

void recurrent_backward(const RecurrentBackwardArgs& a) {
  dispatch_float_types(a.y.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    dispatch_cell<Accumulate<S>>(a.options.cell, [&](auto cell) {
      BackwardPass<S, typename decltype(cell)::type, Accumulate<S>>(a).run();
    });
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
