// The device and stream that a call of the module runs on: those of its tensors, as torch has them.
#pragma once
#include "core/tensor_view.h"
#include "cuda/device/launch.h"

namespace lmkern::cuda {

// By the bindings, for each tensor among the arguments. `stream`: torch's current one on its device.
void note_argument(const TensorView& view, void* stream);

// While a call runs: its device is the current one of the thread.
class CallScope {
 public:
  CallScope();
  ~CallScope();
  CallScope(const CallScope&) = delete;
  CallScope& operator=(const CallScope&) = delete;

 private:
  int device_before_;
};

Stream current_stream();

// Multiprocessors of the device, blocks of a cluster it can run at most (1: no clusters), and bytes of
// shared memory that a block may have.
struct DeviceLimits {
  int multiprocessors, max_cluster;
  std::size_t shared_bytes;
};
DeviceLimits device_limits();

}  // namespace lmkern::cuda
