#include "ops/recurrent.h"

#include "core/check.h"
#include "cpu/isa.h"

namespace lmkern {
namespace {

DType accumulate_dtype(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

}  // namespace

void lstm_forward(const LstmForwardArgs& a) {
  const Check check("lstm_forward");
  check.floating("gates", a.gates);
  check.dims("gates", a.gates, 3, "[T, B, 4H]");
  check.dims("w_hh", a.w_hh, 2, "[4H, H]");
  const DType dtype = a.gates.dtype;
  const auto T = a.gates.shape[0], B = a.gates.shape[1], H = a.w_hh.shape[1];
  check.tensor("w_hh", a.w_hh, dtype, {4 * H, H}, "[4H, H]");
  check.tensor("gates", a.gates, dtype, {T, B, 4 * H}, "[T, B, 4H]");
  check.optional("h0", a.h0, dtype, {B, H}, "[B, H]");
  check.optional("c0", a.c0, dtype, {B, H}, "[B, H]");
  check.tensor("y", a.y, dtype, {T, B, H}, "[T, B, H]");
  check.tensor("h_n", a.h_n, dtype, {B, H}, "[B, H]");
  check.tensor("c_n", a.c_n, dtype, {B, H}, "[B, H]");
  check.optional("cells", a.cells, accumulate_dtype(dtype), {T, B, H}, "[T, B, H]");
  cpu::kernels().lstm_forward(a);
}

void lstm_backward(const LstmBackwardArgs& a) {
  const Check check("lstm_backward");
  check.floating("gates", a.gates);
  check.dims("gates", a.gates, 3, "[T, B, 4H]");
  check.dims("w_hh", a.w_hh, 2, "[4H, H]");
  const DType dtype = a.gates.dtype;
  const auto T = a.gates.shape[0], B = a.gates.shape[1], H = a.w_hh.shape[1];
  check.tensor("w_hh", a.w_hh, dtype, {4 * H, H}, "[4H, H]");
  check.tensor("gates", a.gates, dtype, {T, B, 4 * H}, "[T, B, 4H]");
  check.optional("d_y", a.d_y, dtype, {T, B, H}, "[T, B, H]");
  check.optional("d_h_n", a.d_h_n, dtype, {B, H}, "[B, H]");
  check.optional("d_c_n", a.d_c_n, dtype, {B, H}, "[B, H]");
  check.optional("c0", a.c0, dtype, {B, H}, "[B, H]");
  check.tensor("cells", a.cells, accumulate_dtype(dtype), {T, B, H}, "[T, B, H]");
  check.tensor("d_gates", a.d_gates, dtype, {T, B, 4 * H}, "[T, B, 4H]");
  check.optional("d_c0", a.d_c0, dtype, {B, H}, "[B, H]");
  cpu::kernels().lstm_backward(a);
}

}  // namespace lmkern
