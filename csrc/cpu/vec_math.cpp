#include "cpu/vec_math.h"

#include "core/dispatch.h"
#include "ops/vec_math.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class T>
LMKERN_INLINE Vec<T> apply(VecFunction function, Vec<T> x) {
  switch (function) {
    case VecFunction::kExp: return VecMath<T>::exp(x);
    case VecFunction::kExpNonpositive: return VecMath<T>::exp_nonpositive(x);
    case VecFunction::kExpNormal: return VecMath<T>::exp_normal(x);
    case VecFunction::kLog: return VecMath<T>::log(x);
    case VecFunction::kTanh: return VecMath<T>::tanh(x);
    case VecFunction::kSigmoid: return VecMath<T>::sigmoid(x);
    case VecFunction::kErf: return VecMath<T>::erf(x);
    case VecFunction::kNormalTail: break;
  }
  Vec<T> density;
  return VecMath<T>::normal_tail(x, density);
}

template <class T>
void run(const VecMathArgs& a) {
  const std::int64_t n = a.x.shape[0];
  for (std::int64_t i = 0; i < n; i += kLanes<T>) {
    const std::int64_t lanes = n - i < kLanes<T> ? n - i : kLanes<T>;
    store_n(a.out.ptr<T>() + i, apply<T>(a.function, load_n(a.x.ptr<const T>() + i, lanes)), lanes);
  }
}

}  // namespace

void vec_math(const VecMathArgs& a) {
  if (a.x.dtype == DType::kFloat64)
    run<double>(a);
  else
    run<float>(a);
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
