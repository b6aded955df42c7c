// Indices that are out of range, on a GPU: checks cannot read them there, and a kernel that stopped
// would take the whole context with it. So kernels go on with a valid row in their place, and the first
// one is written to memory of the host, without waiting for anybody: take_index_error() gives the
// message once the kernel has run. What the message says travels in the kernel's parameters, so a CUDA
// graph may hold them and be replayed.
#pragma once
#include <optional>
#include <string>

#include "core/tensor_view.h"
#include "cuda/device/atomic.h"

namespace lmkern::cuda {

// What an argument indexes. Names are the host's, and live as long as the process.
struct IndexedBy {
  const char* op;
  const char* argument;  // null: input
  const char* extent;    // null: the argument is an offset, which must be at most `rows`
  std::int64_t rows;
  int ndim;
  std::int64_t shape[kMaxDims];  // of the argument
};

// The first bad index on one device since the last that the host took. Each number has one writer: the
// host `epoch`, the device's threads among themselves the rest.
struct IndexRecord {
  std::uint32_t epoch;    // of the error that may come next
  std::uint32_t claimed;  // the last epoch of which a thread may write
  std::uint32_t written;  // the last epoch of which a thread has written
  std::int64_t index, position;
  IndexedBy indexed_by;
};

// By value in a kernel's parameters.
struct IndexErrors {
  IndexRecord* record;
  IndexedBy indexed_by;

  LMKERN_DEVICE void report(std::int64_t index, std::int64_t position) const {
    const std::uint32_t epoch = load_from_host(&record->epoch);
    if (max_relaxed(&record->claimed, epoch) >= epoch) return;
    record->index = index;
    record->position = position;
    record->indexed_by.op = indexed_by.op;
    record->indexed_by.argument = indexed_by.argument;
    record->indexed_by.extent = indexed_by.extent;
    record->indexed_by.rows = indexed_by.rows;
    record->indexed_by.ndim = indexed_by.ndim;
    LMKERN_UNROLL
    for (int i = 0; i < kMaxDims; ++i) record->indexed_by.shape[i] = indexed_by.shape[i];
    store_to_host(&record->written, epoch);
  }

  // `index`, or the nearest row there is. rows > 0.
  LMKERN_DEVICE std::int64_t valid_row(std::int64_t index) const {
    const std::int64_t last = indexed_by.rows - 1;
    return index < 0 ? 0 : (index > last ? last : index);
  }
};

// Those of the device that this call runs on, for a lookup by `indices` in `rows` rows.
IndexErrors index_errors(const char* op, const TensorView& indices, std::int64_t rows,
                         const char* argument = nullptr, const char* extent = "V");
// For `offsets` of bags of `count` positions.
IndexErrors offset_errors(const char* op, const TensorView& offsets, std::int64_t count);

// The message of a bad index on any device, which is then forgotten.
std::optional<std::string> take_index_error();

}  // namespace lmkern::cuda
