#include "ops/activation.h"

#include "core/check.h"
#include "cpu/isa.h"

namespace lmkern {
namespace {

std::int64_t last_extent(const TensorView& view) {
  return view.ndim == 0 ? 1 : view.shape[view.ndim - 1];
}

// [..., width] of as many elements as rows of that width take, of one dtype.
void check_rows(const Check& check, const char* name, const TensorView& view, DType dtype,
                std::int64_t rows, std::int64_t width) {
  check.dtype(name, view, dtype);
  if (view.numel() != rows * width || (view.numel() > 0 && last_extent(view) != width))
    check.fail(std::string(name) + " must be [..., D] with D = " + std::to_string(width) + " and " +
               std::to_string(rows) + " rows, got " + shape_string(view));
  if (view.numel() == 0) return;  // strides mean nothing
  if (view.ndim == 2)
    check.last_contiguous(name, view);
  else
    check.contiguous(name, view);
}

struct Extents {
  std::int64_t rows, width;  // of out
};

Extents check_problem(const Check& check, const ActivationProblem& p) {
  check.floating("input", p.input);
  const std::int64_t inputs = last_extent(p.input);
  const bool halves = p.gated && !p.up.defined();
  if (halves && (p.input.ndim == 0 || inputs % 2 != 0))
    check.fail("input must be [..., 2D], two halves, got " + shape_string(p.input));
  const std::int64_t width = halves ? inputs / 2 : inputs;
  const std::int64_t rows = inputs == 0 ? 0 : p.input.numel() / inputs;
  check_rows(check, "input", p.input, p.input.dtype, rows, inputs);
  if (p.up.defined()) check_rows(check, "up", p.up, p.input.dtype, rows, width);
  check.optional("bias", p.bias, p.input.dtype, {inputs}, halves ? "[2D]" : "[D]");
  return {rows, width};
}

// What is written: contiguous.
void check_result(const Check& check, const char* name, const TensorView& view, DType dtype,
                  std::int64_t rows, std::int64_t width) {
  check_rows(check, name, view, dtype, rows, width);
  check.contiguous(name, view);
}

}  // namespace

void activation_forward(const ActivationForwardArgs& a) {
  const Check check("activation");
  const Extents e = check_problem(check, a.problem);
  check_result(check, "out", a.out, a.problem.input.dtype, e.rows, e.width);
  cpu::kernels().activation_forward(a);
}

void activation_backward(const ActivationBackwardArgs& a) {
  const Check check("activation_backward");
  const ActivationProblem& p = a.problem;
  const Extents e = check_problem(check, p);
  const DType dtype = p.input.dtype;
  check_rows(check, "d_out", a.d_out, dtype, e.rows, e.width);
  check_result(check, "d_input", a.d_input, dtype, e.rows, last_extent(p.input));
  if (p.up.defined()) check_result(check, "d_up", a.d_up, dtype, e.rows, e.width);
  if (p.bias.defined()) check.tensor("d_bias", a.d_bias, dtype, {p.bias.shape[0]}, "[D]");
  cpu::kernels().activation_backward(a);
}

}  // namespace lmkern
