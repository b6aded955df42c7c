#include "ops/rotary.h"

#include "core/check.h"
#include "cpu/isa.h"

namespace lmkern {

void rotary_embedding(const RotaryArgs& a) {
  const Check check("rotary_embedding");
  check.floating("query", a.q);
  check.dims("query", a.q, 4, "[B, H, L, D]");
  const auto B = a.q.shape[0], L = a.q.shape[2], D = a.q.shape[3];
  check.dims("cos", a.cos, 3, "[1 or B, L, R/2]");
  const auto rows = a.cos.shape[0] == 1 ? 1 : B, pairs = a.cos.shape[2];
  const DType wide = a.q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check.tensor("cos", a.cos, wide, {rows, L, pairs}, "[1 or B, L, R/2]");
  check.tensor("sin", a.sin, wide, {rows, L, pairs}, "[1 or B, L, R/2]");
  if (2 * pairs > D)
    check.fail("cos must be [1 or B, L, R/2] with R <= D, got " + shape_string(a.cos));
  const auto pair = [&](const char* name, const TensorView& x, const TensorView& out) {
    check.dims(name, x, 4, "[B, H, L, D]");
    for (const TensorView* view : {&x, &out}) {
      check.dtype(name, *view, a.q.dtype);
      check.shape(name, *view, {B, x.shape[1], L, D}, "[B, H, L, D]");
      check.last_contiguous(name, *view);
    }
  };
  pair("query", a.q, a.q_out);
  if (a.k.defined()) pair("key", a.k, a.k_out);
  cpu::kernels().rotary_embedding(a);
}

}  // namespace lmkern
