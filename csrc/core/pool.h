// Large memory, kept for the next tensor of its size.
//
// The system hands out large blocks page by page, zeroed, at a fault each: writing 50 MB takes 3 ms
// into live memory and 8 ms into fresh. A training step asks for the same sizes again and again, so
// what a freed tensor leaves is kept and handed out once more.
//
// Bound: what is in use and what is kept are together never more than the most that was ever in use
// at once, so the pool does not raise a program's peak. Memory comes in 2 MiB pages where there are
// any.
#pragma once
#include <cstddef>

namespace lmkern {

// At least `bytes`, aligned to 4096, uninitialised; throws std::runtime_error. From any thread.
void* pool_allocate(std::size_t bytes);
// Gives back what pool_allocate(bytes) returned, from any thread.
void pool_free(void* data, std::size_t bytes) noexcept;

// Returns what is kept to the system.
void pool_clear();
// Whether freed memory is kept at all. Under AddressSanitizer it never is: use after free shows.
void pool_enable(bool enabled);

struct PoolBytes {
  std::size_t used, kept, most_used;
};
PoolBytes pool_bytes();

}  // namespace lmkern
