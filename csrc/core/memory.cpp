#include "core/memory.h"

#include <cstdlib>
#include <new>

namespace lmkern {
namespace {

struct Buffer {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

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

}  // namespace lmkern
