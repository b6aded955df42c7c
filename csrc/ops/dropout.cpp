#include "ops/dropout.h"

#include "core/check.h"
#include "cpu/isa.h"

namespace lmkern {

void dropout(const DropoutArgs& a) {
  const Check check("dropout");
  check.floating("input", a.input);
  check.contiguous("input", a.input);
  check.dtype("out", a.out, a.input.dtype);
  check.contiguous("out", a.out);
  if (a.out.numel() != a.input.numel())
    check.fail("out must be like input " + shape_string(a.input) + ", got " + shape_string(a.out));
  if (!(a.p >= 0 && a.p <= 1)) check.fail("p must be in [0, 1], got " + std::to_string(a.p));
  cpu::kernels().dropout(a);
}

}  // namespace lmkern
