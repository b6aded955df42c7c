#include "cuda/index_errors.h"

#include <mutex>

#include "cuda/stream.h"
#include "ops/indices.h"

namespace lmkern::cuda {
namespace {

constexpr int kMaxDevices = 64;

#if defined(LMKERN_SIMT)

IndexRecord* all_records() {
  static IndexRecord records[kMaxDevices];
  static const simt::GlobalMemory known(records, sizeof records);
  return records;
}
int current_device() { return 0; }

#else

// Pinned, and seen by all devices at the same address.
IndexRecord* all_records() {
  static IndexRecord* const records = [] {
    // A stream that is being captured forbids allocations, unless the thread says it knows better.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
    void* memory = nullptr;
    const cudaError_t error = cudaHostAlloc(&memory, kMaxDevices * sizeof(IndexRecord),
                                            cudaHostAllocPortable | cudaHostAllocMapped);
    check(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
    check(error, "memory for index errors");
    return static_cast<IndexRecord*>(memory);
  }();
  return records;
}
int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  return device;
}

#endif

std::mutex taking;
bool in_use = false;  // whether any kernel was given the records

IndexRecord* records() {
  static IndexRecord* const ready = [] {
    IndexRecord* const all = all_records();
    for (int i = 0; i < kMaxDevices; ++i) all[i] = {1, 0, 0, 0, 0, {}};
    const std::lock_guard<std::mutex> lock(taking);
    in_use = true;
    return all;
  }();
  return ready;
}

IndexErrors errors(const char* op, const TensorView& view, std::int64_t rows, const char* argument,
                   const char* extent) {
  const int device = current_device();
  if (device >= kMaxDevices) throw std::runtime_error("lmkern: more than 64 CUDA devices");
  IndexErrors result{records() + device, {op, argument, extent, rows, view.ndim, {}}};
  for (int i = 0; i < view.ndim; ++i) result.indexed_by.shape[i] = view.shape[i];
  return result;
}

std::string message_of(const IndexRecord& record) {
  const IndexedBy& by = record.indexed_by;
  TensorView view;
  view.ndim = by.ndim;
  for (int i = 0; i < by.ndim; ++i) view.shape[i] = by.shape[i];
  const std::string position = position_string(view, record.position);
  if (by.extent == nullptr)
    return std::string(by.op) + ": offsets must begin with 0, not decrease and not exceed N = " +
           std::to_string(by.rows) + ", got " + std::to_string(record.index) + " at position " +
           position;
  return std::string(by.op) + ": " +
         index_message(by.argument, record.index, position, by.extent, by.rows);
}

}  // namespace

IndexErrors index_errors(const char* op, const TensorView& indices, std::int64_t rows,
                         const char* argument, const char* extent) {
  return errors(op, indices, rows, argument, extent);
}

IndexErrors offset_errors(const char* op, const TensorView& offsets, std::int64_t count) {
  return errors(op, offsets, count, "offsets", nullptr);
}

std::optional<std::string> take_index_error() {
  const std::lock_guard<std::mutex> lock(taking);
  if (!in_use) return std::nullopt;
  for (int i = 0; i < kMaxDevices; ++i) {
    IndexRecord& record = records()[i];
    if (__atomic_load_n(&record.written, __ATOMIC_ACQUIRE) != record.epoch) continue;
    std::string message = message_of(record);
    __atomic_store_n(&record.epoch, record.epoch + 1, __ATOMIC_RELEASE);
    return message;
  }
  return std::nullopt;
}

}  // namespace lmkern::cuda
