// The part of DLPack 1.x that the bindings use, and torch's table of its C functions.
//
// Each tensor type (Tensor, Parameter) carries that table in a capsule,
// `type.__dlpack_c_exchange_api__` (torch >= 2.10): no libtorch, so no ABI to mismatch.
// Source: github.com/dmlc/dlpack, include/dlpack/dlpack.h, version 1.3.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

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
struct ManagedTensor {  // DLManagedTensorVersioned
  Version version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  std::uint64_t flags;
  Tensor tensor;
};
struct ExchangeApi {  // DLPackExchangeAPI
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  int (*managed_tensor_to_py_object)(ManagedTensor* tensor, void** object);
  int (*tensor_from_py_object)(void* object,
                               Tensor* out);  // borrowed, valid until the GIL is released
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

inline constexpr std::int32_t kCpu = 1, kCuda = 2;
inline constexpr std::uint32_t kMajor = 1;

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

}  // namespace lmkern::dlpack
