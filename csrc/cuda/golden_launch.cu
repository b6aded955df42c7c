// Golden tests of thread.h and launch.h.
#include "cuda/device/barrier.h"
#include "cuda/device/launch.h"
#include "cuda/device/thread.h"
#include "cuda/golden_case.h"

namespace lmkern::cuda {
namespace {

struct Sizes {
  int x, y, threads;
};

// registers: 24, spills: 0
LMKERN_KERNEL(96, 1)
who_am_i(Sizes sizes, int* out) {
  const bool sized = blocks_x() == sizes.x && blocks_y() == sizes.y &&
                     thread_count() == sizes.threads && warp_count() == sizes.threads / 32;
  const int block = block_y() * blocks_x() + block_x();
  int* const o = out + 2 * (block * thread_count() + thread_index());
  o[0] = sized ? 10000 * block_y() + 1000 * block_x() + thread_index() : -2;
  o[1] = 1000 * warp_index() + lane_index();
}

std::string run_who_am_i() {
  const Sizes sizes{3, 2, 96};
  DeviceBuffer<int> out(2 * 3 * 2 * 96);
  launch<who_am_i>({.x = 3, .y = 2, .threads = 96}, Stream{}, sizes, out.data());
  std::vector<int> expected;
  for (int y = 0; y < 2; ++y)
    for (int x = 0; x < 3; ++x)
      for (int i = 0; i < 96; ++i) {
        expected.push_back(10000 * y + 1000 * x + i);
        expected.push_back(1000 * (i / 32) + i % 32);
      }
  return first_difference(expected, out.values(), by("thread", 2, "value"));
}

// The ends of shared memory, passed from thread to thread.
//
// registers: 24, spills: 0
LMKERN_KERNEL(1024, 1)
ends(int size, int* out) {
  int* const s = shared_memory<int>();
  const int i = thread_index(), half = thread_count() / 2;
  s[i < half ? i : size - 1 - (i - half)] = 1000 + i;
  block_barrier();
  out[i] = s[i < half ? half - 1 - i : size - half + (i - half)];
}

// The most threads, and all shared memory that a block may have.
std::string run_limits() {
  const auto size = static_cast<int>(device_limits().shared_bytes / sizeof(int));
  DeviceBuffer<int> out(1024);
  launch<ends>({.threads = 1024, .shared_bytes = size * sizeof(int)}, Stream{}, size, out.data());
  std::vector<int> expected;
  for (int i = 0; i < 512; ++i) expected.push_back(1000 + 511 - i);
  for (int i = 512; i < 1024; ++i) expected.push_back(1000 + 1023 - (i - 512));
  return first_difference(expected, out.values(),
                          [](int i) { return "thread " + std::to_string(i); });
}

bool refused(const Grid& grid) {
  DeviceBuffer<int> out(4096);
  try {
    launch<ends>(grid, Stream{}, 1024, out.data());
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

// What no device can do is refused, and the device goes on.
std::string run_refusals() {
  const std::size_t bytes = 1024 * sizeof(int);
  if (!refused({.threads = 2048, .shared_bytes = bytes})) return "2048 threads: nothing was thrown";
  if (!refused({.threads = 1024, .shared_bytes = 1 << 20}))
    return "1 MiB of shared memory: nothing was thrown";
  if (!refused({.x = 33, .threads = 32, .shared_bytes = bytes, .cluster = 32}))
    return "a cluster of 32 blocks: nothing was thrown";
  return run_who_am_i();
}

}  // namespace

std::vector<GoldenCase> launch_goldens() {
  return {
      {"thread", run_who_am_i},
      {"launch.limits", run_limits},
      {"launch.refusals", run_refusals},
  };
}

}  // namespace lmkern::cuda
