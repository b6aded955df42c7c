// torch.Tensor -> TensorView, through DLPack's C exchange API: 0.1 us a tensor.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/dlpack.h"
#include "core/check.h"
#include "core/tensor_view.h"
#if defined(LMKERN_CUDA_MODULE)
#include "cuda/stream.h"
#endif

namespace lmkern::dlpack {

inline DType dtype_of(DataType type) {
  constexpr std::uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6;
  if (type.lanes != 1) return DType::kOther;
  if (type.code == kFloat && type.bits == 32) return DType::kFloat32;
  if (type.code == kFloat && type.bits == 64) return DType::kFloat64;
  if (type.code == kFloat && type.bits == 16) return DType::kFloat16;
  if (type.code == kBfloat && type.bits == 16) return DType::kBFloat16;
  if (type.code == kInt && type.bits == 32) return DType::kInt32;
  if (type.code == kInt && type.bits == 64) return DType::kInt64;
  if (type.code == kBool && type.bits == 8) return DType::kBool;
  if (type.code == kUInt && type.bits == 8) return DType::kUInt8;
  return DType::kOther;
}

inline bool view_of(PyObject* object, TensorView* view) {
  const ExchangeApi* api = exchange_api(Py_TYPE(object));
  if (api == nullptr) return false;
  Tensor tensor;
  if (api->tensor_from_py_object(object, &tensor) != 0) throw pybind11::error_already_set();
  if (tensor.ndim > kMaxDims)
    throw std::invalid_argument("lmkern: tensors may have at most " + std::to_string(kMaxDims) +
                                " dimensions, got " + std::to_string(tensor.ndim));
  view->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view->dtype = dtype_of(tensor.dtype);
  view->device = tensor.device.type == kCpu    ? DeviceType::kCpu
                 : tensor.device.type == kCuda ? DeviceType::kCuda
                                               : DeviceType::kOther;
  view->device_index = tensor.device.id;
  view->ndim = tensor.ndim;
  for (int i = 0; i < tensor.ndim; ++i) {
    view->shape[i] = tensor.shape[i];
    view->strides[i] = tensor.strides[i];
  }
  if (view->dtype == DType::kOther)
    throw TypeError("lmkern: unsupported dtype (DLPack code " + std::to_string(tensor.dtype.code) +
                    ", " + std::to_string(tensor.dtype.bits) + " bits)");
#if defined(LMKERN_CUDA_MODULE)
  void* stream = nullptr;
  if (tensor.device.type == kCuda && api->current_work_stream != nullptr &&
      api->current_work_stream(kCuda, tensor.device.id, &stream) != 0)
    throw pybind11::error_already_set();
  cuda::note_argument(*view, stream);
#endif
  return true;
}

}  // namespace lmkern::dlpack

namespace pybind11::detail {

// None becomes an undefined view: an absent optional argument.
template <>
struct type_caster<lmkern::TensorView> {
  PYBIND11_TYPE_CASTER(lmkern::TensorView, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    return source.is_none() || lmkern::dlpack::view_of(source.ptr(), &value);
  }
};

}  // namespace pybind11::detail
