// torch.Tensor -> TensorView, through DLPack's C exchange API: no libtorch, so no ABI to mismatch,
// and 0.1 us a tensor. Each tensor type (Tensor, Parameter) carries a table of C functions in a
// capsule, `type.__dlpack_c_exchange_api__` (torch >= 2.10).
//
// The declarations below are the part of DLPack 1.x that is read here.
// Source: github.com/dmlc/dlpack, include/dlpack/dlpack.h, version 1.3.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "core/check.h"
#include "core/tensor_view.h"

namespace lmkern::dlpack {

struct Version {
  std::uint32_t major, minor;
};
struct Device {
  std::int32_t type, id;
};
struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {  // DLTensor
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct ExchangeApi {  // DLPackExchangeAPI
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* object,
                               Tensor* out);  // borrowed, valid until the GIL is released
  void* current_work_stream;
};

inline constexpr std::int32_t kCpu = 1;
inline constexpr std::uint32_t kMajor = 1;

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

// The table of a type, or null if it has none. Two types are common, so two are remembered.
inline const ExchangeApi* exchange_api(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const ExchangeApi* api;
  };
  thread_local Entry cache[2] = {};
  for (const Entry& entry : cache)
    if (entry.type == type) return entry.api;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (api == nullptr) throw pybind11::error_already_set();
  while (api != nullptr && api->version.major != kMajor) api = api->previous;
  if (api == nullptr) throw std::runtime_error("lmkern: torch offers no DLPack 1.x exchange API");
  // A type is remembered only if it lives as long as the process: a static one,
  // or torch's Parameter.
  cache[1] = cache[0];
  cache[0] = {type, api};
  Py_INCREF(type);
  return api;
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
  view->on_cpu = tensor.device.type == kCpu;
  view->ndim = tensor.ndim;
  for (int i = 0; i < tensor.ndim; ++i) {
    view->shape[i] = tensor.shape[i];
    view->strides[i] = tensor.strides[i];
  }
  if (view->dtype == DType::kOther)
    throw TypeError("lmkern: unsupported dtype (DLPack code " + std::to_string(tensor.dtype.code) +
                    ", " + std::to_string(tensor.dtype.bits) + " bits)");
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
