#include "ops/vec_math.h"

#include "core/check.h"
#include "cpu/isa.h"

namespace lmkern {

void vec_math(const VecMathArgs& a) {
  const Check check("vec_math");
  check.floating("x", a.x);
  if (a.x.dtype != DType::kFloat32 && a.x.dtype != DType::kFloat64)
    check.fail_type(std::string("x must be float32 or float64, got ") + dtype_name(a.x.dtype));
  check.dims("x", a.x, 1, "[N]");
  check.contiguous("x", a.x);
  check.tensor("out", a.out, a.x.dtype, {a.x.shape[0]}, "[N]");
  cpu::kernels().vec_math(a);
}

}  // namespace lmkern
