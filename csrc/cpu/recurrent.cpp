// Forward pass of the recurrent layers (csrc/ops/recurrent.h).
//
// Parallel  RecurrentPlan: a thread owns rows of the batch or panels of hidden units, for all
//           steps.
// Traffic   per step W_hh once (from L2 if a thread's share fits there: read for each tile of
//           rows), gates once in and, when training, once out. At B = 1 bound by reading W_hh, from
//           about B = 8 on by FMA.
// Limits    W_hh is packed at each call, in panels of one vector of units with their gates
//           adjacent, so that an epilogue finds all gates of a unit side by side. That costs about
//           two time steps at B = 1. A pack cached across calls would go stale unseen when weights
//           are written through `.data`, which does not count up a tensor's version.
//
// A step has up to three phases, with a barrier after each where threads divide the units:
//   gates       product with W_hh; without norm, the cell follows panel by panel
//   rows        under norm: statistics over a whole row, then the cell
//   projection  product with W_hr
#include <stdexcept>

#include "core/dispatch.h"
#include "cpu/recurrent.h"
#include "ops/recurrent.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

// S: storage type. W: type of the packed weights, S or what S accumulates in.
template <class S, class Cell, class W>
class ForwardPass {
  using T = Accumulate<S>;
  using V = Vec<T>;
  static constexpr int kGates = Cell::kGates;
  static constexpr int kVecs = kGates == 1 ? 2 : 1;
  static constexpr std::int64_t kLane = kLanes<T>, kUnits = kVecs * kLane;
  static constexpr int kColumns = kGates * kVecs;
  static constexpr int kProjectionVecs = 2;

  const RecurrentForwardArgs& a;
  const RecurrentOptions& o = a.options;
  const std::int64_t width = o.w_hh.shape[1], hidden = o.w_hh.shape[0] / kGates;
  const std::int64_t padded_width = (width + kLane - 1) / kLane * kLane;
  const std::int64_t padded = (hidden + kLane - 1) / kLane * kLane;
  const std::int64_t panels = (hidden + kUnits - 1) / kUnits;
  const bool norm = o.norm_hh.defined(), projects = o.w_hr.defined();
  const std::int64_t projection_panels =
      projects ? (width + kProjectionVecs * kLane - 1) / (kProjectionVecs * kLane) : 0;
  Steps steps{o, a.y.shape[0]};
  // A single step's product comes from the caller, and a first step from zeros has none.
  const bool multiplies =
      !a.first_hh.defined() && (steps.count > 1 || a.h0.defined() || a.workspace.defined());
  const bool tiles = multiplies && use_tiles<S>(steps.batch);
  const RecurrentPlan plan{
      steps, panels, panels * width * kColumns * kLane * (tiles ? 6 : std::int64_t{sizeof(W)}),
      2 * steps.batch * kGates * hidden * width, tiles};
  StepProduct<S, W, kColumns> recurrent;
  StepProduct<S, W, kProjectionVecs> projection;
  T* h;      // [B][padded_width], carried
  T* c;      // [B][padded], carried
  T* hh;     // [B][G*H], under norm where the caller keeps none
  T* tile;   // [threads][B][columns of a panel]
  T* row_c;  // [threads][2][padded]: the output gate and c of one row, under norm
  static constexpr std::int64_t kTileColumns =
      (kColumns > kProjectionVecs ? kColumns : kProjectionVecs) * kLane;

  struct Row {
    std::int64_t t, b, index;
    bool reset, continues, reset_next;
    int next;  // slot of the next step's operand
  };

 public:
  explicit ForwardPass(const RecurrentForwardArgs& args) : a(args) {
    const auto weights = [this](Scratch& scratch) {
      recurrent.place_weights(scratch, width, multiplies ? panels : 0, tiles);
      projection.place_weights(scratch, hidden, projection_panels, tiles);
    };
    if (a.workspace.defined() &&
        Scratch::place_at(a.workspace.data, weights) > a.workspace.numel() * sizeof(float))
      throw std::invalid_argument("recurrent_forward: workspace is too small");
    Scratch::place([&](Scratch& scratch) {
      if (!a.workspace.defined()) weights(scratch);
      steps.place(scratch);
      recurrent.place_operands(scratch, steps.batch);
      projection.place_operands(scratch, projects ? steps.batch : 0);
      h = scratch.take<T>(steps.batch * padded_width);
      c = scratch.take<T>(Cell::kHasC ? steps.batch * padded : 0);
      hh = scratch.take<T>(norm ? steps.batch * kGates * hidden : 0);
      tile = scratch.take<T>(plan.threads * steps.batch * kTileColumns);
      row_c = scratch.take<T>(norm ? plan.threads * 2 * padded : 0);
    });
    steps.prepare();
  }

  void run() {
    Barrier barrier;
    parallel(plan.threads, [&](int thread, int threads) {
      const Range rows = plan.rows_of(steps, thread, threads);
      const Range own = plan.share_of(panels, thread, threads);
      const Range own_projection = plan.share_of(projection_panels, thread, threads);
      T* const own_tile = tile + thread * steps.batch * kTileColumns;
      const auto meet = [&] {
        if (!plan.by_rows) barrier.wait(threads);
      };
      const TileRegisters registers(tiles);
      if (!a.packed_ready) pack(thread, threads);
      const Range mine = plan.by_rows ? rows : thread_range(steps.batch, 1, thread, threads);
      load_state(mine);
      barrier.wait(threads);
      for (std::int64_t s = 0; s < steps.count; ++s) {
        const std::int64_t t = steps.time(s), active = steps.rows(t);
        const Range now{rows.begin, rows.end < active ? rows.end : active};
        if (now.begin < now.end || !plan.by_rows) {
          gates_phase(s, t, now, own, own_tile);
          meet();
          if (norm) {
            const Range share = plan.by_rows ? now : thread_range(active, 1, thread, threads);
            for (std::int64_t b = share.begin; b < share.end; ++b)
              normed_row(row_at(s, t, b), row_c + thread * 2 * padded);
            meet();
          }
          if (projects) {
            projection_phase(s, t, now, own_projection, own_tile);
            meet();
          }
        }
      }
      store_state(mine);
    });
  }

 private:
  LMKERN_INLINE std::int64_t units_at(std::int64_t u, std::int64_t extent) const {
    const std::int64_t left = extent - u;
    return left < 0 ? 0 : left < kLane ? left : kLane;
  }

  LMKERN_INLINE bool resets(std::int64_t index) const {
    return o.reset.defined() && o.reset.ptr<const bool>()[index];
  }

  LMKERN_INLINE Row row_at(std::int64_t s, std::int64_t t, std::int64_t b) const {
    const std::int64_t next = steps.neighbour(t, 1), index = steps.offset(t) + b;
    const bool continues = steps.takes_part(next, b);
    return {t,
            b,
            index,
            resets(index),
            continues,
            continues && resets(steps.offset(next) + b),
            static_cast<int>((s + 1) % 2)};
  }

  void pack(int thread, int threads) {
    const Range own = thread_range(multiplies ? panels : 0, 1, thread, threads);
    for (std::int64_t p = own.begin; p < own.end; ++p) {
      const S* rows[kColumns];
      std::int64_t counts[kColumns];
      for (int g = 0; g < kGates; ++g)
        for (int v = 0; v < kVecs; ++v) {
          const std::int64_t u = p * kUnits + v * kLane, n = units_at(u, hidden),
                             from = g * hidden + u;
          rows[g * kVecs + v] = o.w_hh.ptr<const S>() + (n > 0 ? from * width : 0);
          counts[g * kVecs + v] = n;
          recurrent.set_bias(p, g * kVecs + v, norm ? V{} : load_optional<S>(o.b_hh, from, n));
        }
      recurrent.pack_rows(p, rows, counts, width);
    }
    const Range projected = thread_range(projection_panels, 1, thread, threads);
    for (std::int64_t p = projected.begin; p < projected.end; ++p) {
      const S* rows[kProjectionVecs];
      std::int64_t counts[kProjectionVecs];
      for (int v = 0; v < kProjectionVecs; ++v) {
        const std::int64_t u = (p * kProjectionVecs + v) * kLane, n = units_at(u, width);
        rows[v] = o.w_hr.ptr<const S>() + (n > 0 ? u * hidden : 0);
        counts[v] = n;
        projection.set_bias(p, v, V{});
      }
      projection.pack_rows(p, rows, counts, hidden);
    }
  }

  // What enters W_hh: h_{t-1} under the recurrent dropout's mask, unless the step resets.
  LMKERN_INLINE V masked(V value, std::int64_t b, std::int64_t u, std::int64_t n,
                         bool reset) const {
    if (reset) return V{};
    return o.h_mask.defined() ? value * load_n(o.h_mask.ptr<const S>() + b * width + u, n) : value;
  }

  void load_state(Range rows) {
    if (multiplies) recurrent.clear_padding(rows);
    if (projects) projection.clear_padding(rows);
    for (std::int64_t b = rows.begin; b < rows.end; ++b) {
      const std::int64_t length = steps.length(b), first = steps.reverse ? length - 1 : 0;
      const bool reset = length > 0 && resets(steps.offset(first) + b);
      for (std::int64_t u = 0; u < width; u += kLane) {
        const std::int64_t n = units_at(u, width);
        const V value = load_optional<S>(a.h0, b * width + u, n);
        store(h + b * padded_width + u, value);
        for (int slot = 0; multiplies && slot < 2; ++slot)
          recurrent.set_operand(slot, b, u, masked(value, b, u, n, reset), n);
      }
      if constexpr (Cell::kHasC)
        for (std::int64_t u = 0; u < hidden; u += kLane)
          store(c + b * padded + u, load_optional<S>(a.c0, b * hidden + u, units_at(u, hidden)));
    }
  }

  void store_state(Range rows) const {
    for (std::int64_t b = rows.begin; b < rows.end; ++b) {
      for (std::int64_t u = 0; u < width; u += kLane)
        store_n(a.h_n.ptr<S>() + b * width + u, load(h + b * padded_width + u), units_at(u, width));
      if constexpr (Cell::kHasC)
        for (std::int64_t u = 0; u < hidden; u += kLane)
          store_n(a.c_n.ptr<S>() + b * hidden + u, load(c + b * padded + u), units_at(u, hidden));
    }
  }

  // h W_hh^T before norm: kept by the caller for the backward pass, or here for the step.
  LMKERN_INLINE T* raw_row(const Row& row) const {
    return a.hh.defined() ? a.hh.ptr<T>() + row.index * kGates * hidden
                          : hh + row.b * kGates * hidden;
  }

  void gates_phase(std::int64_t s, std::int64_t t, Range rows, Range own, T* out) {
    for (std::int64_t p = own.begin; p < own.end; ++p) {
      const std::int64_t u0 = p * kUnits;
      if (multiplies)
        recurrent.multiply(static_cast<int>(s % 2), rows, p, s > 0 || a.h0.defined(), out);
      for (std::int64_t b = rows.begin; b < rows.end; ++b) {
        const Row row = row_at(s, t, b);
        for (int v = 0; v < kVecs; ++v) {
          const std::int64_t u = u0 + v * kLane, n = units_at(u, hidden);
          if (n == 0) break;
          V product[kGates];
          LMKERN_UNROLL
          for (int g = 0; g < kGates; ++g)
            product[g] =
                multiplies
                    ? load(out + (b - rows.begin) * kColumns * kLane + (g * kVecs + v) * kLane)
                    : given_product(b, g * hidden + u, n);
          if (norm) {
            LMKERN_UNROLL
            for (int g = 0; g < kGates; ++g) store_n(raw_row(row) + g * hidden + u, product[g], n);
          } else {
            V gates[kGates], c_now;
            update(row, u, n, product, gates, c_now);
            output(row, u, n, gates, c_now);
          }
        }
      }
    }
  }

  LMKERN_INLINE V given_product(std::int64_t b, std::int64_t at, std::int64_t n) const {
    const V bias = norm ? V{} : load_optional<S>(o.b_hh, at, n);
    return a.first_hh.defined()
               ? bias + load_n(a.first_hh.ptr<const S>() + b * kGates * hidden + at, n)
               : bias;
  }

  void normed_row(const Row& row, T* scratch) {
    const T* const raw = raw_row(row);
    const auto moments = Moments<T>::of(
        kGates * hidden, o.eps, [&](std::int64_t u, std::int64_t n) { return load_n(raw + u, n); });
    const bool normed_c = o.norm_c_weight.defined();
    for (std::int64_t u = 0; u < hidden; u += kLane) {
      const std::int64_t n = units_at(u, hidden);
      V product[kGates], gates[kGates], c_now;
      LMKERN_UNROLL
      for (int g = 0; g < kGates; ++g) {
        const std::int64_t at = g * hidden + u;
        product[g] = (load_n(raw + at, n) - moments.mean) * moments.rstd *
                         load_n(o.norm_hh.ptr<const S>() + at, n) +
                     load_optional<S>(o.b_hh, at, n);
      }
      update(row, u, n, product, gates, c_now);
      if (normed_c) {
        store(scratch + u, gates[kGates - 1]);
        store(scratch + padded + u, c_now);
      } else {
        output(row, u, n, gates, c_now);
      }
    }
    if (!normed_c) return;
    const auto of_c = Moments<T>::of(hidden, o.eps, [&](std::int64_t u, std::int64_t n) {
      const V value = load(scratch + padded + u);
      return n == kLane ? value : load_n(scratch + padded + u, n);
    });
    for (std::int64_t u = 0; u < hidden; u += kLane) {
      const std::int64_t n = units_at(u, hidden);
      V gates[kGates];
      gates[kGates - 1] = load(scratch + u);
      const V c_read = (load(scratch + padded + u) - of_c.mean) * of_c.rstd *
                           load_n(o.norm_c_weight.ptr<const S>() + u, n) +
                       load_n(o.norm_c_bias.ptr<const S>() + u, n);
      output(row, u, n, gates, c_read);
    }
  }

  // Gates and c of n units from u on; c_now is c_t before zoneout, which is what the output reads.
  LMKERN_INLINE void update(const Row& row, std::int64_t u, std::int64_t n,
                            const V (&product)[kGates], V (&gates)[kGates], V& c_now) {
    S* const gate = a.gates.ptr<S>() + row.index * kGates * hidden + u;
    LMKERN_UNROLL
    for (int g = 0; g < kGates; ++g) gates[g] = load_n(gate + g * hidden, n);
    V peephole[3];
    if constexpr (Cell::kHasC)
      for (int i = 0; o.peephole.defined() && i < 3; ++i)
        peephole[i] = load_n(o.peephole.ptr<const S>() + i * hidden + u, n);
    V c_prev{};
    if constexpr (Cell::kHasC) c_prev = row.reset ? V{} : load(c + row.b * padded + u);
    c_now = c_prev;
    Cell::update(gates, product, o.peephole.defined() ? peephole : nullptr, c_now);
    if (a.save) {
      LMKERN_UNROLL
      for (int g = 0; g < kGates; ++g) store_n(gate + g * hidden, gates[g], n);
    }
    const std::int64_t at = row.index * hidden + u;
    if constexpr (Cell::kSavesHidden)
      if (a.hidden.defined()) store_n(a.hidden.ptr<T>() + at, product[kGates - 1], n);
    if constexpr (Cell::kHasC) {
      V carried = c_now;
      if (o.zoneout_c.defined() || o.zoneout_c_rate != 0)
        carried = zoneout(zoneout_at<T>(o.zoneout_c, o.zoneout_c_rate, at, n), c_prev, c_now);
      store(c + row.b * padded + u, carried);
      if (a.cells.defined()) store_n(a.cells.ptr<T>() + at, carried, n);
    }
  }

  LMKERN_INLINE void output(const Row& row, std::int64_t u, std::int64_t n,
                            const V (&gates)[kGates], V c_read) {
    V h_prev{};
    if constexpr (Cell::kReadsH) h_prev = row.reset ? V{} : load(h + row.b * padded_width + u);
    const V value = Cell::output(gates, c_read, h_prev);
    if (projects) {
      projection.set_operand(0, row.b, u, value, n);
      if (a.unprojected.defined())
        store_n(a.unprojected.ptr<S>() + row.index * hidden + u, value, n);
    } else {
      emit(row, u, n, value);
    }
  }

  void projection_phase(std::int64_t s, std::int64_t t, Range rows, Range own, T* out) {
    for (std::int64_t p = own.begin; p < own.end; ++p) {
      projection.multiply(0, rows, p, true, out);
      for (std::int64_t b = rows.begin; b < rows.end; ++b)
        for (int v = 0; v < kProjectionVecs; ++v) {
          const std::int64_t u = (p * kProjectionVecs + v) * kLane, n = units_at(u, width);
          if (n > 0)
            emit(row_at(s, t, b), u, n,
                 load(out + ((b - rows.begin) * kProjectionVecs + v) * kLane));
        }
    }
  }

  // h_t: zoneout, output, carried state and the next step's operand.
  LMKERN_INLINE void emit(const Row& row, std::int64_t u, std::int64_t n, V value) {
    T* const carried = h + row.b * padded_width + u;
    const std::int64_t at = row.index * width + u;
    if (o.zoneout_h.defined() || o.zoneout_h_rate != 0) {
      const V before = row.reset ? V{} : load(carried);
      value = zoneout(zoneout_at<T>(o.zoneout_h, o.zoneout_h_rate, at, n), before, value);
    }
    store(carried, value);
    store_n(a.y.ptr<S>() + at, value, n);
    if (row.continues)
      recurrent.set_operand(row.next, row.b, u, masked(value, row.b, u, n, row.reset_next), n);
  }
};

}  // namespace

void recurrent_forward(const RecurrentForwardArgs& a) {
  dispatch_float_types(a.y.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    dispatch_cell<Accumulate<S>>(a.options.cell, [&](auto cell) {
      using Cell = typename decltype(cell)::type;
      // For few rows a step is bound by reading the weights: half as many bytes, twice as fast.
      constexpr std::int64_t kFewRows = 4;
      if constexpr (sizeof(S) < sizeof(Accumulate<S>)) {
        if (a.options.batch <= kFewRows) return ForwardPass<S, Cell, S>(a).run();
      }
      ForwardPass<S, Cell, Accumulate<S>>(a).run();
    });
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
