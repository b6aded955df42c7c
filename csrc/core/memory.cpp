#include "core/memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace lmkern {
namespace {

struct Buffer {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

std::size_t element_bytes(DType dtype) {
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

void* thread_scratch(std::size_t bytes) {
  thread_local Buffer scratch;
  if (bytes > scratch.bytes) {
    std::free(scratch.data);
    scratch.bytes = 0;
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    scratch.data = std::aligned_alloc(64, rounded);
    if (scratch.data == nullptr) throw std::bad_alloc();
    scratch.bytes = rounded;
  }
  return scratch.data;
}

void prefer_huge_pages(const TensorView& fresh) {
  constexpr std::size_t kWorthwhile = 8u << 20, kPage = 4096;
  const std::size_t bytes = fresh.numel() * element_bytes(fresh.dtype);
  if (!fresh.on_cpu || bytes < kWorthwhile) return;
#ifdef MADV_HUGEPAGE
  const auto begin = (reinterpret_cast<std::uintptr_t>(fresh.data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(fresh.data) + bytes) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace lmkern
