#include "core/check.h"

namespace lmkern {
namespace {

template <class It>
std::string join(It first, It last) {
  std::string out = "[";
  for (It it = first; it != last; ++it) {
    if (it != first) out += ", ";
    out += std::to_string(*it);
  }
  return out + "]";
}

}  // namespace

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kBool: return "bool";
    case DType::kUInt8: return "uint8";
    case DType::kOther: break;
  }
  return "another dtype";
}

std::string shape_string(const TensorView& view) {
  return join(view.shape, view.shape + view.ndim);
}

void Check::fail(const std::string& message) const {
  throw std::invalid_argument(std::string(op_) + ": " + message);
}
void Check::fail_type(const std::string& message) const {
  throw TypeError(std::string(op_) + ": " + message);
}
void Check::fail_index(const std::string& message) const {
  throw std::out_of_range(std::string(op_) + ": " + message);
}

void Check::on_device(const char* name, const TensorView& view) const {
  if (view.device != kDevice)
    fail(std::string(name) + " must be on " +
         (kDevice == DeviceType::kCpu ? "the CPU" : "a CUDA device") + " like the other arguments");
  if (device_index_ >= 0 && view.device_index != device_index_)
    fail(std::string(name) + " must be on device " + std::to_string(device_index_) +
         " like the other arguments, got device " + std::to_string(view.device_index));
  device_index_ = view.device_index;
  if (view.data == nullptr && view.numel() > 0) fail(std::string(name) + " has no storage");
}

void Check::dims(const char* name, const TensorView& view, int ndim, const char* symbolic) const {
  if (view.ndim != ndim)
    fail(std::string(name) + " must be " + symbolic + ", got " + shape_string(view));
}

void Check::shape(const char* name, const TensorView& view,
                  std::initializer_list<std::int64_t> expected, const char* symbolic) const {
  bool same = view.ndim == static_cast<int>(expected.size());
  int i = 0;
  for (std::int64_t extent : expected) same = same && view.shape[i++] == extent;
  if (!same)
    fail(std::string(name) + " must be " + symbolic + " = " +
         join(expected.begin(), expected.end()) + ", got " + shape_string(view));
}

void Check::dtype(const char* name, const TensorView& view, DType expected) const {
  on_device(name, view);
  if (view.dtype != expected)
    fail_type(std::string(name) + " must be " + dtype_name(expected) + ", got " +
              dtype_name(view.dtype));
}

void Check::floating(const char* name, const TensorView& view) const {
  on_device(name, view);
  if (view.dtype != DType::kFloat32 && view.dtype != DType::kFloat64 &&
      view.dtype != DType::kBFloat16 && view.dtype != DType::kFloat16)
    fail_type(std::string(name) + " must be float32, float64, bfloat16 or float16, got " +
              dtype_name(view.dtype));
}

void Check::contiguous(const char* name, const TensorView& view) const {
  std::int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] != 1 && view.strides[i] != stride && view.numel() > 0)
      fail(std::string(name) + " must be contiguous");
    stride *= view.shape[i];
  }
}

void Check::last_contiguous(const char* name, const TensorView& view) const {
  const int last = view.ndim - 1;
  if (view.shape[last] > 1 && view.strides[last] != 1 && view.numel() > 0)
    fail(std::string(name) + " must be contiguous in its last dimension");
}

void Check::tensor(const char* name, const TensorView& view, DType expected,
                   std::initializer_list<std::int64_t> extents, const char* symbolic) const {
  dtype(name, view, expected);
  shape(name, view, extents, symbolic);
  contiguous(name, view);
}

void Check::optional(const char* name, const TensorView& view, DType expected,
                     std::initializer_list<std::int64_t> extents, const char* symbolic) const {
  if (view.defined()) tensor(name, view, expected, extents, symbolic);
}

}  // namespace lmkern
