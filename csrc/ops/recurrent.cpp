#include "ops/recurrent.h"

#include "core/backend.h"
#include "core/check.h"

namespace lmkern {
namespace {

// The extents that all shapes are made of.
struct Extents {
  std::int64_t N, B, G, H, P;
  DType dtype, accumulate;
};

void require(const Check& check, const char* name, const TensorView& view) {
  if (!view.defined()) check.fail(std::string(name) + " must be given");
}

// Packed weights on the CPU; on a GPU what lies between the steps.
void check_workspace(const Check& check, const RecurrentOptions& options, const TensorView& view,
                     bool backward) {
#if defined(LMKERN_CUDA_MODULE)
  const std::int64_t bytes = cuda::recurrent_workspace(options, backward);
  check.tensor("workspace", view, DType::kUInt8, {bytes}, "[recurrent_workspace]");
#else
  if (options.lengths.defined() || options.offsets.defined())
    check.fail("lengths and offsets must be absent on the CPU, whose rows are sorted");
  if (!view.defined()) return;
  if (backward) check.fail("workspace must be absent in the backward pass");
  check.dtype("workspace", view, DType::kFloat32);
  check.contiguous("workspace", view);
#endif
}

void check_cell(const Check& check, RecurrentCell cell) {
  if (cell < RecurrentCell::kLstm || cell > RecurrentCell::kRnnSigmoid)
    check.fail("cell must be 0 to 4, got " + std::to_string(static_cast<int>(cell)));
}

Extents check_options(const Check& check, const RecurrentOptions& o, const TensorView& gates) {
  check_cell(check, o.cell);
  const std::int64_t G = gates_of(o.cell);
  check.floating("gates", gates);
  check.dims("gates", gates, 2, "[N, G*H]");
  check.dims("w_hh", o.w_hh, 2, "[G*H, P]");
  const std::int64_t H = o.w_hh.shape[0] / G, P = o.w_hh.shape[1], N = gates.shape[0];
  const Extents e{N,
                  o.batch,
                  G,
                  H,
                  P,
                  gates.dtype,
                  gates.dtype == DType::kFloat64 ? gates.dtype : DType::kFloat32};
  check.tensor("w_hh", o.w_hh, e.dtype, {G * H, P}, "[G*H, P]");
  check.tensor("gates", gates, e.dtype, {N, G * H}, "[N, G*H]");
  check.optional("b_hh", o.b_hh, e.dtype, {G * H}, "[G*H]");
  check.optional("w_hr", o.w_hr, e.dtype, {P, H}, "[P, H]");
  check.optional("peephole", o.peephole, e.dtype, {3 * H}, "[3H]");
  check.optional("norm_hh", o.norm_hh, e.dtype, {G * H}, "[G*H]");
  check.optional("norm_c_weight", o.norm_c_weight, e.dtype, {H}, "[H]");
  check.optional("norm_c_bias", o.norm_c_bias, e.dtype, {H}, "[H]");
  check.optional("h_mask", o.h_mask, e.dtype, {e.B, P}, "[B, P]");
  check.optional("zoneout_h", o.zoneout_h, DType::kBool, {N, P}, "[N, P]");
  check.optional("zoneout_c", o.zoneout_c, DType::kBool, {N, H}, "[N, H]");
  check.optional("reset", o.reset, DType::kBool, {N}, "[N]");
  const bool lstm = o.cell == RecurrentCell::kLstm;
  if (!lstm && (o.w_hr.defined() || o.peephole.defined() || o.norm_c_weight.defined() ||
                o.zoneout_c.defined()))
    check.fail("w_hr, peephole, norm_c_weight and zoneout_c must be absent but for the LSTM");
  if (!o.w_hr.defined() && P != H)
    check.fail("w_hh must be [G*H, H] without w_hr, got " + shape_string(o.w_hh));
  if (o.norm_c_weight.defined() != o.norm_c_bias.defined())
    check.fail("norm_c_weight and norm_c_bias must be given together");
  if (o.norm_c_weight.defined() && !o.norm_hh.defined())
    check.fail("norm_hh must be given with norm_c_weight");
  if (e.B < 0) check.fail("batch must be >= 0, got " + std::to_string(e.B));
  check.optional("lengths", o.lengths, DType::kInt64, {e.B}, "[B]");
  if (o.offsets.defined()) {
    check.dims("offsets", o.offsets, 1, "[T]");
    check.tensor("offsets", o.offsets, DType::kInt64, {o.offsets.shape[0]}, "[T]");
    require(check, "lengths", o.lengths);
  }
  if (!kReadable && o.batch_sizes.defined())
    check.fail("batch_sizes must be absent on a GPU, which takes offsets and lengths");
  if (o.batch_sizes.defined()) {
    check.dtype("batch_sizes", o.batch_sizes, DType::kInt64);
    check.dims("batch_sizes", o.batch_sizes, 1, "[T]");
    check.contiguous("batch_sizes", o.batch_sizes);
    std::int64_t rows = 0, before = e.B;
    for (std::int64_t t = 0; t < o.batch_sizes.shape[0]; ++t) {
      const std::int64_t size = o.batch_sizes.ptr<const std::int64_t>()[t];
      if (size < 0 || size > before)
        check.fail("batch_sizes must not increase and lie in [0, B], got " + std::to_string(size) +
                   " after " + std::to_string(before));
      rows += before = size;
    }
    if (rows != N)
      check.fail("batch_sizes must add up to the " + std::to_string(N) + " rows of gates, got " +
                 std::to_string(rows));
  } else if (!o.offsets.defined() && (e.B == 0 ? N != 0 : N % e.B != 0)) {
    check.fail("gates must have a multiple of " + std::to_string(e.B) + " rows, got " +
               shape_string(gates));
  }
  return e;
}

}  // namespace

int gates_of(RecurrentCell cell) {
  return cell == RecurrentCell::kLstm ? 4 : cell == RecurrentCell::kGru ? 3 : 1;
}

void recurrent_forward(const RecurrentForwardArgs& a) {
  const Check check("recurrent_forward");
  const auto [N, B, G, H, P, dtype, accumulate] = check_options(check, a.options, a.gates);
  const bool lstm = a.options.cell == RecurrentCell::kLstm;
  check.optional("h0", a.h0, dtype, {B, P}, "[B, P]");
  check.optional("c0", a.c0, dtype, {B, H}, "[B, H]");
  check.optional("first_hh", a.first_hh, dtype, {B, G * H}, "[B, G*H]");
  check.tensor("y", a.y, dtype, {N, P}, "[N, P]");
  check.tensor("h_n", a.h_n, dtype, {B, P}, "[B, P]");
  if (lstm) check.tensor("c_n", a.c_n, dtype, {B, H}, "[B, H]");
  check.optional("cells", a.cells, accumulate, {N, H}, "[N, H]");
  check.optional("hidden", a.hidden, accumulate, {N, H}, "[N, H]");
  check.optional("hh", a.hh, accumulate, {N, G * H}, "[N, G*H]");
  check.optional("unprojected", a.unprojected, dtype, {N, H}, "[N, H]");
  check_workspace(check, a.options, a.workspace, false);
  if (a.first_hh.defined() && N != B) check.fail("first_hh must be absent but for a single step");
  backend::kernels().recurrent_forward(a);
}

void recurrent_backward(const RecurrentBackwardArgs& a) {
  const Check check("recurrent_backward");
  const auto [N, B, G, H, P, dtype, accumulate] = check_options(check, a.options, a.gates);
  const RecurrentOptions& o = a.options;
  check.optional("d_y", a.d_y, dtype, {N, P}, "[N, P]");
  check.optional("d_h_n", a.d_h_n, dtype, {B, P}, "[B, P]");
  check.optional("d_c_n", a.d_c_n, dtype, {B, H}, "[B, H]");
  check.optional("d_cells", a.d_cells, dtype, {N, H}, "[N, H]");
  check.optional("h0", a.h0, dtype, {B, P}, "[B, P]");
  check.optional("c0", a.c0, dtype, {B, H}, "[B, H]");
  check.tensor("y", a.y, dtype, {N, P}, "[N, P]");
  check.optional("cells", a.cells, accumulate, {N, H}, "[N, H]");
  check.optional("hidden", a.hidden, accumulate, {N, H}, "[N, H]");
  check.optional("hh", a.hh, accumulate, {N, G * H}, "[N, G*H]");
  check.tensor("d_gates", a.d_gates, dtype, {N, G * H}, "[N, G*H]");
  check.optional("d_hh", a.d_hh, dtype, {N, G * H}, "[N, G*H]");
  check.optional("d_h", a.d_h, dtype, {N, P}, "[N, P]");
  check.optional("d_normed", a.d_normed, dtype, {N, G * H}, "[N, G*H]");
  check.optional("c_now", a.c_now, accumulate, {N, H}, "[N, H]");
  check.optional("d_c_normed", a.d_c_normed, dtype, {N, H}, "[N, H]");
  check.optional("d_h0", a.d_h0, dtype, {B, P}, "[B, P]");
  check.optional("d_c0", a.d_c0, dtype, {B, H}, "[B, H]");
  if (o.cell == RecurrentCell::kLstm) require(check, "cells", a.cells);
  if (o.cell == RecurrentCell::kGru && !a.recompute) require(check, "hidden", a.hidden);
  if (o.norm_hh.defined() || a.recompute) require(check, "hh", a.hh);
  check_workspace(check, o, a.workspace, true);
  if (o.w_hr.defined()) require(check, "d_h", a.d_h);
  if (o.norm_c_weight.defined()) require(check, "d_c_normed", a.d_c_normed);
  backend::kernels().recurrent_backward(a);
}

void recurrent_step(const RecurrentStepArgs& a) {
  const Check check("recurrent_step");
  check_cell(check, a.cell);
  const bool given = a.from_x.defined(), lstm = a.cell == RecurrentCell::kLstm;
  const TensorView& first = given ? a.from_x : a.x;
  check.floating(given ? "from_x" : "x", first);
  check.dims(given ? "from_x" : "x", first, 2, given ? "[B, G*H]" : "[B, I]");
  check.dims("h_next", a.h_next, 2, "[B, H]");
  const DType dtype = first.dtype;
  const DType accumulate = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  const std::int64_t B = first.shape[0], H = a.h_next.shape[1], GH = gates_of(a.cell) * H;
  if (given) {
    check.tensor("from_x", a.from_x, dtype, {B, GH}, "[B, G*H]");
    check.optional("from_h", a.from_h, dtype, {B, GH}, "[B, G*H]");
  } else {
    const std::int64_t I = a.x.shape[1];
    check.tensor("x", a.x, dtype, {B, I}, "[B, I]");
    check.tensor("w_ih", a.w_ih, dtype, {GH, I}, "[G*H, I]");
    check.tensor("w_hh", a.w_hh, dtype, {GH, H}, "[G*H, H]");
    check.optional("b_ih", a.b_ih, dtype, {GH}, "[G*H]");
    check.optional("b_hh", a.b_hh, dtype, {GH}, "[G*H]");
  }
  check.optional("h", a.h, dtype, {B, H}, "[B, H]");
  check.optional("c", a.c, dtype, {B, H}, "[B, H]");
  check.tensor("h_next", a.h_next, dtype, {B, H}, "[B, H]");
  check.optional("y", a.y, dtype, {B, H}, "[B, H]");
  if (lstm) check.tensor("c_next", a.c_next, dtype, {B, H}, "[B, H]");
  check.optional("gates", a.gates, dtype, {B, GH}, "[B, G*H]");
  check.optional("cells", a.cells, accumulate, {B, H}, "[B, H]");
  check.optional("hidden", a.hidden, accumulate, {B, H}, "[B, H]");
  if (a.gates.defined() && a.cell == RecurrentCell::kGru) require(check, "hidden", a.hidden);
  backend::kernels().recurrent_step(a);
}

void recurrent_step_backward(const RecurrentStepBackwardArgs& a) {
  const Check check("recurrent_step_backward");
  check_cell(check, a.cell);
  check.floating("gates", a.gates);
  check.dims("gates", a.gates, 2, "[B, G*H]");
  const DType dtype = a.gates.dtype;
  const std::int64_t B = a.gates.shape[0], GH = a.gates.shape[1], H = GH / gates_of(a.cell);
  check.tensor("gates", a.gates, dtype, {B, gates_of(a.cell) * H}, "[B, G*H]");
  check.optional("d_h", a.d_h, dtype, {B, H}, "[B, H]");
  check.optional("d_y", a.d_y, dtype, {B, H}, "[B, H]");
  check.optional("d_c", a.d_c, dtype, {B, H}, "[B, H]");
  check.optional("h", a.h, dtype, {B, H}, "[B, H]");
  check.optional("c", a.c, dtype, {B, H}, "[B, H]");
  check.optional("d_b_ih", a.d_b_ih, dtype, {GH}, "[G*H]");
  check.optional("d_b_hh", a.d_b_hh, dtype, {GH}, "[G*H]");
  check.tensor("d_gates", a.d_gates, dtype, {B, GH}, "[B, G*H]");
  if (a.cell == RecurrentCell::kLstm) check.tensor("d_c_prev", a.d_c_prev, dtype, {B, H}, "[B, H]");
  if (a.cell == RecurrentCell::kGru) {
    check.tensor("hidden", a.hidden, dtype == DType::kFloat64 ? dtype : DType::kFloat32, {B, H},
                 "[B, H]");
    check.tensor("d_hh", a.d_hh, dtype, {B, GH}, "[B, G*H]");
    check.tensor("d_h_prev", a.d_h_prev, dtype, {B, H}, "[B, H]");
  }
  backend::kernels().recurrent_step_backward(a);
}

}  // namespace lmkern
