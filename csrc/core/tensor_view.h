// A borrowed tensor: what a kernel needs to know of a torch.Tensor, and nothing that owns memory.
//
// The bindings fill it through DLPack's C exchange API (csrc/bindings/tensor_caster.h) and the
// shape and strides are copied, so a view stays valid without the GIL for as long as the caller
// keeps the tensor alive, which op implementations do by holding their arguments.
#pragma once
#include <cstdint>

#include "core/device.h"
#include "core/dtype.h"

namespace lmkern {

inline constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kOther;
  DeviceType device = DeviceType::kOther;
  int device_index = 0;
  int ndim = 0;
  std::int64_t shape[kMaxDims] = {};
  std::int64_t strides[kMaxDims] = {};  // in elements

  // An absent optional argument is a view without dimensions and data.
  LMKERN_INLINE bool defined() const { return dtype != DType::kOther; }

  LMKERN_INLINE std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }

  template <class T>
  LMKERN_INLINE T* ptr() const {
    return static_cast<T*>(data);
  }
};

}  // namespace lmkern
