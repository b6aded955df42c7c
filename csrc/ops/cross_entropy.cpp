#include "ops/cross_entropy.h"

#include "core/check.h"
#include "cpu/isa.h"

namespace lmkern {
namespace {

void check_layout(const Check& check, const char* name, const TensorView& view) {
  const int inner = view.shape[2] > 1 ? 2 : 1;
  if (view.shape[inner] > 1 && view.strides[inner] != 1)
    check.fail(std::string(name) + " must have contiguous " +
               (inner == 2 ? "positions" : "classes"));
}

// Logits and what they are compared with; returns the dtype of the terms.
DType check_target(const Check& check, const TensorView& logits, const CrossEntropyTarget& t) {
  check.floating("logits", logits);
  check.dims("logits", logits, 3, "[N, C, P]");
  check_layout(check, "logits", logits);
  const auto N = logits.shape[0], C = logits.shape[1], P = logits.shape[2];
  const DType wide = logits.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (t.first < 0 || t.first + C > t.classes)
    check.fail("classes must be at least first + C = " + std::to_string(t.first + C) + ", got " +
               std::to_string(t.classes));
  check.optional("weight", t.weight, wide, {C}, "[C]");
  check.optional("bias", t.bias, wide, {C}, "[C]");
  if (t.index.defined() == t.probabilities.defined())
    check.fail("target must be either class indices or probabilities");
  if (t.probabilities.defined()) {
    check.dtype("target", t.probabilities, logits.dtype);
    check.shape("target", t.probabilities, {N, C, P}, "[N, C, P]");
    check_layout(check, "target", t.probabilities);
    return wide;
  }
  check.tensor("target", t.index, DType::kInt64, {N, P}, "[N, P]");
  const auto* index = t.index.ptr<const std::int64_t>();
  for (std::int64_t i = 0; i < N * P; ++i)
    if ((index[i] < 0 || index[i] >= t.classes) && index[i] != t.ignore_index)
      check.fail_index("target " + std::to_string(index[i]) + " at position " + std::to_string(i) +
                       " is out of range for " + std::to_string(t.classes) + " classes");
  return wide;
}

void check_term(const Check& check, const char* name, const TensorView& term,
                const TensorView& logits, DType wide) {
  check.tensor(name, term, wide, {logits.shape[0], logits.shape[2]}, "[N, P]");
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForwardArgs& a) {
  const Check check("cross_entropy");
  const DType wide = check_target(check, a.logits, a.target);
  check_term(check, "maximum", a.maximum, a.logits, wide);
  check_term(check, "sum", a.sum, a.logits, wide);
  check_term(check, "picked", a.picked, a.logits, wide);
  if (a.target.probabilities.defined()) check_term(check, "mass", a.mass, a.logits, wide);
  if (a.total.defined()) check_term(check, "total", a.total, a.logits, wide);
  cpu::kernels().cross_entropy_forward(a);
}

void cross_entropy_backward(const CrossEntropyBackwardArgs& a) {
  const Check check("cross_entropy_backward");
  const DType wide = check_target(check, a.logits, a.target);
  check_term(check, "maximum", a.maximum, a.logits, wide);
  check_term(check, "log_sum", a.log_sum, a.logits, wide);
  check_term(check, "d_lse", a.d_lse, a.logits, wide);
  check_term(check, "d_picked", a.d_picked, a.logits, wide);
  if (a.d_total.defined()) check_term(check, "d_total", a.d_total, a.logits, wide);
  check.dtype("d_logits", a.d_logits, a.logits.dtype);
  check.shape("d_logits", a.d_logits, {a.logits.shape[0], a.logits.shape[1], a.logits.shape[2]},
              "[N, C, P]");
  check_layout(check, "d_logits", a.d_logits);
  cpu::kernels().cross_entropy_backward(a);
}

}  // namespace lmkern
