// Argument checks, written once for every op and backend (csrc/ops/*.cpp). They run before
// anything is written, and throw; the bindings turn the exceptions into ValueError, TypeError
// and IndexError.
//
//   check.shape("w_hh", a.w_hh, {4 * H, H}, "[4H, H]")
//   -> ValueError: lstm_forward: w_hh must be [4H, H] = [1024, 256], got [1024, 128]
#pragma once
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "core/tensor_view.h"

namespace lmkern {

struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

const char* dtype_name(DType dtype);
std::string shape_string(const TensorView& view);

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  [[noreturn]] void fail(const std::string& message) const;        // ValueError
  [[noreturn]] void fail_type(const std::string& message) const;   // TypeError
  [[noreturn]] void fail_index(const std::string& message) const;  // IndexError

  // The number of dimensions; `symbolic` names them, e.g. "[T, B, 4H]".
  void dims(const char* name, const TensorView& view, int ndim, const char* symbolic) const;
  // The exact shape.
  void shape(const char* name, const TensorView& view, std::initializer_list<std::int64_t> shape,
             const char* symbolic) const;
  // The dtype, and that the tensor is on this module's device, the same as the arguments before.
  void dtype(const char* name, const TensorView& view, DType expected) const;
  // One of float32, float64, bfloat16, float16.
  void floating(const char* name, const TensorView& view) const;
  // Row-major without gaps.
  void contiguous(const char* name, const TensorView& view) const;
  // Elements of the last dimension are neighbours.
  void last_contiguous(const char* name, const TensorView& view) const;
  // All of the above for the common case.
  void tensor(const char* name, const TensorView& view, DType dtype,
              std::initializer_list<std::int64_t> shape, const char* symbolic) const;
  // As `tensor`, where the argument may be absent.
  void optional(const char* name, const TensorView& view, DType dtype,
                std::initializer_list<std::int64_t> shape, const char* symbolic) const;

 private:
  void on_device(const char* name, const TensorView& view) const;
  const char* op_;
  mutable int device_index_ = -1;  // of the first argument
};

}  // namespace lmkern
