#include "core/pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace lmkern {
namespace {

constexpr std::size_t kPage = 4096, kHugePage = 2u << 20;
// Eight sizes between a power of two and the next: batches of varying lengths meet in a few.
constexpr std::size_t kSizes = 8;

struct Block {
  void* data;
  std::size_t bytes;
};

std::size_t rounded(std::size_t bytes) {
  std::size_t step = kPage;
  while (step * kSizes * 2 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* from_system(std::size_t bytes) {
  // One huge page more than wanted, to begin at the start of one; the ends go back at once.
  const std::size_t reserved = bytes + kHugePage;
  void* raw = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED)  // a RuntimeError, as torch's
    throw std::runtime_error("lmkern: cannot allocate " + std::to_string(bytes) +
                             " bytes of memory");
  const auto start = reinterpret_cast<std::uintptr_t>(raw);
  const auto begin = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (begin > start) munmap(raw, begin - start);
  if (const std::size_t rest = start + reserved - (begin + bytes))
    munmap(reinterpret_cast<void*>(begin + bytes), rest);
  void* data = reinterpret_cast<void*>(begin);
#ifdef MADV_HUGEPAGE
  (void)madvise(data, bytes, MADV_HUGEPAGE);  // a hint: where there are none, nothing happens
#endif
  return data;
}

void to_system(const Block& block) { munmap(block.data, block.bytes); }

class Pool {
 public:
  void* allocate(std::size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (void* data = take(bytes)) return data;
      used_ += bytes;
      most_used_ = std::max(most_used_, used_);
      trim();
    }
    try {
      return from_system(bytes);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      used_ -= bytes;
      throw;
    }
  }

  void free(const Block& block) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    used_ -= block.bytes;
    if (enabled_) {
      try {
        kept_.push_back(block);
        kept_bytes_ += block.bytes;
        return;
      } catch (const std::bad_alloc&) {
      }
    }
    to_system(block);
  }

  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    drop(kept_.size());
    most_used_ = used_;
  }

  void enable(bool enabled) {
    if (!enabled) clear();
    std::lock_guard<std::mutex> lock(mutex_);
    enabled_ = enabled;
  }

  PoolBytes bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {used_, kept_bytes_, most_used_};
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // A kept block of this size, the last one freed first: its lines may still be in cache.
  void* take(std::size_t bytes) {
    const auto found = std::find_if(kept_.rbegin(), kept_.rend(),
                                    [bytes](const Block& block) { return block.bytes == bytes; });
    if (found == kept_.rend()) return nullptr;
    void* data = found->data;
    kept_.erase(std::next(found).base());
    kept_bytes_ -= bytes;
    used_ += bytes;
    return data;
  }

  void trim() {
    std::size_t count = 0, excess = used_ + kept_bytes_;
    for (; excess > most_used_ && count < kept_.size(); ++count) excess -= kept_[count].bytes;
    drop(count);
  }

  void drop(std::size_t count) {  // the blocks that were freed first
    for (std::size_t i = 0; i < count; ++i) {
      kept_bytes_ -= kept_[i].bytes;
      to_system(kept_[i]);
    }
    kept_.erase(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(count));
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // in the order in which they were freed
  std::size_t used_ = 0, kept_bytes_ = 0, most_used_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  bool enabled_ = false;
#else
  bool enabled_ = true;
#endif
};

// Never destroyed: tensors may outlive every static object. A child of fork() finds the lock free.
Pool& pool() {
  static Pool* const instance = [] {
    auto* made = new Pool;
    pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); },
                   [] { pool().mutex().unlock(); });
    return made;
  }();
  return *instance;
}

}  // namespace

void* pool_allocate(std::size_t bytes) { return pool().allocate(rounded(bytes)); }
void pool_free(void* data, std::size_t bytes) noexcept { pool().free({data, rounded(bytes)}); }
void pool_clear() { pool().clear(); }
void pool_enable(bool enabled) { pool().enable(enabled); }
PoolBytes pool_bytes() { return pool().bytes(); }

}  // namespace lmkern
