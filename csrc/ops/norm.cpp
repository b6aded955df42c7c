#include "ops/norm.h"

#include "core/check.h"
#include "cpu/isa.h"

namespace lmkern {
namespace {

DType wide(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

// What the arguments must agree in. Turns each into the matrix, or the vector, that the kernels see.
class Rows {
 public:
  Rows(const Check& check, std::int64_t width, const TensorView& statistics)
      : check_(check), D_(width) {
    check.dims("statistics", statistics, 2, "[2 or 1, N]");
    N_ = statistics.shape[1];
    if (statistics.shape[0] != 1) check.shape("statistics", statistics, {2, N_}, "[2 or 1, N]");
  }

  void first(const char* name, TensorView& x, const TensorView& statistics) {
    check_.floating(name, x);
    dtype_ = x.dtype;
    check_.tensor("statistics", statistics, wide(dtype_), {statistics.shape[0], N_}, "[2 or 1, N]");
    read(name, x);
  }
  void read(const char* name, TensorView& x) const {
    if (!x.defined()) return;
    check_.dtype(name, x, dtype_);
    if (x.ndim == 2 && x.shape[0] == N_ && x.shape[1] == D_)
      check_.last_contiguous(name, x);
    else
      flatten(name, x);
  }
  void written(const char* name, TensorView& x) const {
    check_.dtype(name, x, dtype_);
    flatten(name, x);
  }
  void parameter(const char* name, TensorView& p) const {
    if (!p.defined()) return;
    check_.floating(name, p);
    d_parameter(name, p, p.dtype == wide(dtype_) ? p.dtype : dtype_);
  }
  void d_parameter(const char* name, TensorView& p) const { d_parameter(name, p, wide(dtype_)); }

 private:
  void flatten(const char* name, TensorView& x) const {
    check_.contiguous(name, x);
    if (x.numel() != N_ * D_)
      check_.fail(std::string(name) + " must have N D = " + std::to_string(N_ * D_) +
                  " elements, got " + shape_string(x));
    x.ndim = 2;
    x.shape[0] = N_, x.shape[1] = D_;
    x.strides[0] = D_, x.strides[1] = 1;
  }
  void d_parameter(const char* name, TensorView& p, DType dtype) const {
    if (!p.defined()) return;
    check_.dtype(name, p, dtype);
    check_.contiguous(name, p);
    if (p.numel() != D_)
      check_.fail(std::string(name) + " must have D = " + std::to_string(D_) + " elements, got " +
                  shape_string(p));
  }

  const Check& check_;
  std::int64_t N_, D_;
  DType dtype_ = DType::kOther;
};

void check_dropout(const Check& check, double p) {
  if (!(p >= 0 && p <= 1)) check.fail("dropout_p must be in [0, 1], got " + std::to_string(p));
}

}  // namespace

void norm_forward(const NormForwardArgs& args) {
  const Check check("norm");
  NormForwardArgs a = args;
  Rows rows(check, a.width, a.statistics);
  rows.first("input", a.input, a.statistics);
  rows.parameter("weight", a.weight);
  rows.parameter("bias", a.bias);
  rows.parameter("input_bias", a.input_bias);
  rows.written("out", a.out);
  check_dropout(check, a.dropout_p);
  if (a.residual.defined()) {
    rows.read("residual", a.residual);
    rows.written("sum", a.sum);
  } else if (a.input_bias.defined() || a.sum.defined() || a.dropout_p > 0) {
    check.fail("input_bias, sum and dropout_p need a residual");
  }
  cpu::kernels().norm_forward(a);
}

void norm_backward(const NormBackwardArgs& args) {
  const Check check("norm_backward");
  NormBackwardArgs a = args;
  Rows rows(check, a.width, a.statistics);
  rows.first("x", a.x, a.statistics);
  rows.read("d_out", a.d_out);
  rows.read("d_sum", a.d_sum);
  rows.parameter("weight", a.weight);
  check_dropout(check, a.dropout_p);
  rows.written("d_x", a.d_x);
  if (a.dropout_p > 0)
    rows.written("d_input", a.d_input);
  else if (a.d_input.defined())
    check.fail("d_input must be absent without dropout");
  rows.d_parameter("d_weight", a.d_weight);
  rows.d_parameter("d_bias", a.d_bias);
  rows.d_parameter("d_input_bias", a.d_input_bias);
  cpu::kernels().norm_backward(a);
}

}  // namespace lmkern
