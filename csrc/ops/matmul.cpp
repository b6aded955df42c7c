#include "ops/matmul.h"

#include "core/check.h"
#include "cpu/isa.h"

namespace lmkern {

bool matmul(const MatmulArgs& a) {
  const Check check("matmul");
  const auto matrix = [&](const char* name, const TensorView& view, const char* symbolic) {
    check.dtype(name, view, DType::kFloat32);
    check.dims(name, view, 2, symbolic);
    check.last_contiguous(name, view);
  };
  matrix("a", a.a, a.transpose_a ? "[K, M]" : "[M, K]");
  matrix("b", a.b, a.transpose_b ? "[N, K]" : "[K, N]");
  matrix("out", a.out, "[M, N]");
  const std::int64_t rows = a.a.shape[a.transpose_a], depth = a.a.shape[!a.transpose_a];
  const std::int64_t columns = a.b.shape[!a.transpose_b];
  if (a.transpose_b)
    check.shape("b", a.b, {columns, depth}, "[N, K]");
  else
    check.shape("b", a.b, {depth, columns}, "[K, N]");
  check.shape("out", a.out, {rows, columns}, "[M, N]");
  check.optional("bias", a.bias, DType::kFloat32, {columns}, "[N]");
  return cpu::kernels().matmul(a);
}

}  // namespace lmkern
