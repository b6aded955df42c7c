// A new torch.Tensor in memory of the pool (core/pool.h), which takes it back when torch is done.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "bindings/dlpack.h"
#include "core/pool.h"

namespace lmkern::dlpack {

struct PoolTensor {
  ManagedTensor managed;
  std::vector<std::int64_t> shape, strides;
  std::size_t bytes;

  static void release(ManagedTensor* managed) {
    auto* self = static_cast<PoolTensor*>(managed->context);
    pool_free(self->managed.tensor.data, self->bytes);
    delete self;
  }
};

// Uninitialised, on the CPU, dense: with `strides`, a permutation of contiguous ones, or contiguous
// if there are none. `code` and `bits` are DLPack's of the dtype.
inline pybind11::object pool_empty(std::vector<std::int64_t> shape,
                                   std::vector<std::int64_t> strides, int code, int bits) {
  static PyObject* const type =
      pybind11::object(pybind11::module_::import("torch").attr("Tensor")).release().ptr();
  const ExchangeApi* api = exchange_api(reinterpret_cast<PyTypeObject*>(type));
  if (api == nullptr) throw std::runtime_error("lmkern: torch.Tensor has no DLPack exchange API");
  auto made = std::make_unique<PoolTensor>();
  const bool contiguous = strides.empty();
  strides.resize(shape.size());
  std::int64_t count = 1, bytes = 0;
  bool overflow = false;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (contiguous) strides[i] = count;
    overflow |= __builtin_mul_overflow(count, shape[i], &count);
  }
  if (overflow || __builtin_mul_overflow(count, bits / 8, &bytes) || bytes < 0)
    throw std::runtime_error("lmkern: a tensor of more than 2^63 bytes was asked for");
  made->shape = std::move(shape);
  made->strides = std::move(strides);
  made->bytes = static_cast<std::size_t>(bytes);
  void* const data = pool_allocate(made->bytes);
  made->managed = {{kMajor, 0},
                   made.get(),
                   &PoolTensor::release,
                   0,
                   {data,
                    {kCpu, 0},
                    static_cast<std::int32_t>(made->shape.size()),
                    {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1},
                    made->shape.data(),
                    made->strides.data(),
                    0}};
  void* tensor = nullptr;
  PoolTensor* const owned = made.release();
  if (api->managed_tensor_to_py_object(&owned->managed, &tensor) != 0) {
    PoolTensor::release(&owned->managed);
    throw pybind11::error_already_set();
  }
  return pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(tensor));
}

}  // namespace lmkern::dlpack
