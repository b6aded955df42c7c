// From a run-time dtype to a compile-time type.
#pragma once
#include "core/dtype.h"

namespace lmkern {

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<S>{}) with the storage type S of `dtype`. The checks of csrc/ops have admitted
// only these four, so there is no default to fall into.
template <class F>
LMKERN_INLINE void dispatch_float_types(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: f(TypeTag<float>{}); break;
    case DType::kFloat64: f(TypeTag<double>{}); break;
    case DType::kBFloat16: f(TypeTag<bfloat16>{}); break;
    case DType::kFloat16: f(TypeTag<float16>{}); break;
    default: break;
  }
}

template <class F>
LMKERN_INLINE void dispatch_index_types(DType dtype, F&& f) {
  if (dtype == DType::kInt32)
    f(TypeTag<std::int32_t>{});
  else
    f(TypeTag<std::int64_t>{});
}

}  // namespace lmkern
