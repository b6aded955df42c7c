#include "cuda/stream.h"

#include <deque>
#include <memory>
#include <vector>

namespace lmkern::cuda {
namespace {

struct Call {
  int device = -1;
  void* stream = nullptr;
#if defined(LMKERN_SIMT)
  std::vector<std::unique_ptr<simt::GlobalMemory>> known;  // what the arguments span
#endif
};
thread_local Call noted;
thread_local Stream running = nullptr;

}  // namespace

#if defined(LMKERN_SIMT)

namespace {
std::size_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    default: return 1;
  }
}
}  // namespace

void note_argument(const TensorView& view, void*) {
  if (view.numel() == 0) return;
  std::int64_t last = 0;
  for (int i = 0; i < view.ndim; ++i) last += (view.shape[i] - 1) * view.strides[i];
  noted.known.push_back(std::make_unique<simt::GlobalMemory>(
      view.data, static_cast<std::size_t>(last + 1) * bytes_of(view.dtype)));
}
CallScope::CallScope() : device_before_(-1) {}
CallScope::~CallScope() { noted.known.clear(); }

DeviceLimits device_limits() {
  const simt::Device& device = simt::device();
  return {device.multiprocessors, device.max_cluster, device.max_shared_bytes};
}

#else

void note_argument(const TensorView& view, void* stream) {
  if (view.device != DeviceType::kCuda) return;
  noted.device = view.device_index;
  noted.stream = stream;
}

CallScope::CallScope() : device_before_(-1) {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  if (noted.device >= 0 && noted.device != device) {
    device_before_ = device;
    check(cudaSetDevice(noted.device), "device of the arguments");
  }
  running = static_cast<Stream>(noted.stream);
}
CallScope::~CallScope() {
  if (device_before_ >= 0) cudaSetDevice(device_before_);
}

DeviceLimits device_limits() {
  struct Known {
    int device;
    DeviceLimits limits;
  };
  thread_local std::deque<Known> known;
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  for (const Known& k : known)
    if (k.device == device) return k.limits;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
    return value;
  };
  const bool clusters = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  known.push_back({device,
                   {attribute(cudaDevAttrMultiProcessorCount), clusters ? 16 : 1,
                    static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))}});
  return known.back().limits;
}

#endif

Stream current_stream() { return running; }

}  // namespace lmkern::cuda
