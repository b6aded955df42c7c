// What the golden tests share: memory of the device, and the comparison.
#pragma once
#include <cstring>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/device/launch.h"
#include "cuda/stream.h"

namespace lmkern::cuda {

struct GoldenCase {
  std::string name;
  std::function<std::string()> run;
};

std::vector<GoldenCase> atomic_goldens();
std::vector<GoldenCase> cluster_goldens();
std::vector<GoldenCase> convert_goldens();
std::vector<GoldenCase> copy_goldens();
std::vector<GoldenCase> launch_goldens();
std::vector<GoldenCase> matrix_goldens();
std::vector<GoldenCase> mbarrier_goldens();
std::vector<GoldenCase> warp_goldens();

// Elements in the memory of the device. Without values, all bytes are 0xff: NaN, or -1.
template <class T>
class DeviceBuffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit DeviceBuffer(std::size_t count) : DeviceBuffer(filled(count)) {}
#if defined(LMKERN_SIMT)
  explicit DeviceBuffer(std::vector<T> values)
      : values_(std::move(values)), known_(values_.data(), values_.size() * sizeof(T)) {}
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  T* data() { return values_.data(); }
  std::vector<T> values() const { return values_; }
#else
  explicit DeviceBuffer(const std::vector<T>& values) : count_(values.size()) {
    check(cudaMalloc(&data_, count_ * sizeof(T)), "memory");
    check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  T* data() { return static_cast<T*>(data_); }
  std::vector<T> values() const {
    std::vector<T> result(count_);
    check(cudaMemcpy(result.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return result;
  }
#endif

 private:
  static std::vector<T> filled(std::size_t count) {
    std::vector<T> values(count);
    std::memset(static_cast<void*>(values.data()), 0xff, count * sizeof(T));
    return values;
  }
#if defined(LMKERN_SIMT)
  std::vector<T> values_;
  simt::GlobalMemory known_;
#else
  std::size_t count_;
  void* data_ = nullptr;
#endif
};

// "5", "0.25": what a message says of a value.
template <class T>
std::string shown(T value) {
  std::ostringstream text;
  text.precision(17);
  text << +value;
  return text.str();
}

// The bits are the same, or both are NaN.
template <class T>
bool same_value(T a, T b) {
  return (a != a && b != b) || std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <class T>
std::string difference(const std::string& place, T expected, T got) {
  return place + ": expected " + shown(expected) + ", got " + shown(got);
}

// The first element that is not as expected, at place(index); nothing if all are.
template <class T, class Place>
std::string first_difference(const std::vector<T>& expected, const std::vector<T>& got,
                             Place place) {
  if (expected.size() != got.size()) return "the test compares lists of different lengths";
  for (std::size_t i = 0; i < expected.size(); ++i)
    if (!same_value(expected[i], got[i]))
      return difference(place(static_cast<int>(i)), expected[i], got[i]);
  return "";
}

// The place of element i where each of the threads, or rows, has `each` elements.
inline auto by(const char* row, int each, const char* column) {
  return [=](int i) {
    return row + (" " + std::to_string(i / each)) + ", " + column + " " + std::to_string(i % each);
  };
}

// The same where a device has clusters; elsewhere a word why not.
inline std::function<std::string()> needs_clusters(std::function<std::string()> run) {
  return [run] {
    if (device_limits().max_cluster < 2)
      return std::string("skipped: needs compute capability 9.0 (clusters)");
    return run();
  };
}

}  // namespace lmkern::cuda
