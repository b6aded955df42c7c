// Fresh memory is expensive: the kernel zeroes it page by page, at a fault each. Two remedies.
#pragma once
#include <cstddef>

#include "core/tensor_view.h"

namespace lmkern {

// A buffer of the calling thread that only grows, for the few hundred kilobytes that a kernel wants
// at each call. 64-byte aligned, uninitialised; valid until the thread's next call.
void* thread_scratch(std::size_t bytes);

// Asks for 2 MiB pages under a large contiguous tensor that was just allocated and not yet written:
// first touch of 150 MB then takes 28 ms in place of 64. A hint; where the system has no such
// pages, or the tensor is small, nothing happens.
void prefer_huge_pages(const TensorView& fresh);

}  // namespace lmkern
