// Golden tests of atomic.h and group_barrier.h.
#include <algorithm>

#include "cuda/device/atomic.h"
#include "cuda/device/barrier.h"
#include "cuda/device/group_barrier.h"
#include "cuda/device/thread.h"
#include "cuda/golden_case.h"

namespace lmkern::cuda {
namespace {

constexpr int kRounds = 8;

// Two blocks in turn: one writes and releases the flag, the other acquires it and reads.
//
// registers: 24, spills: 0
LMKERN_KERNEL(64, 1)
messages(int* data, std::uint32_t* flag, int* out) {
  const int i = thread_index();
  for (int round = 0; round < kRounds; ++round) {
    int* const message = data + 64 * round;
    if (round % 2 == block_x()) {
      message[i] = 1000 * round + i;
      block_barrier();
      if (i == 0) store_release(flag, static_cast<std::uint32_t>(round + 1));
    } else {
      if (i == 0)
        while (load_acquire(flag) < static_cast<std::uint32_t>(round + 1)) spin();
      block_barrier();
      out[64 * round + i] = message[63 - i];
    }
  }
}

std::string run_messages() {
  DeviceBuffer<int> data(64 * kRounds), out(64 * kRounds);
  DeviceBuffer<std::uint32_t> flag(std::vector<std::uint32_t>{0});
  launch<messages>({.x = 2, .threads = 64, .resident = true}, Stream{}, data.data(), flag.data(),
                   out.data());
  std::vector<int> expected;
  for (int round = 0; round < kRounds; ++round)
    for (int i = 0; i < 64; ++i) expected.push_back(1000 * round + 63 - i);
  return first_difference(expected, out.values(), by("round", 64, "thread"));
}

// The last block to come sums what all have written; which one that is, nobody knows.
//
// registers: 48, spills: 0
LMKERN_KERNEL(32, 1)
last_block(int* data, std::uint32_t* arrived, std::uint32_t* before, int* sum) {
  const int i = thread_index(), block = block_x();
  auto* const order = shared_memory<std::uint32_t>();
  data[32 * block + i] = 1000 * block + i;
  block_barrier();
  if (i == 0) {
    *order = add_acquire_release(arrived, 1);
    before[block] = *order;
  }
  block_barrier();
  if (*order + 1 != static_cast<std::uint32_t>(blocks_x())) return;
  int total = 0;
  for (int other = 0; other < blocks_x(); ++other) total += data[32 * other + i];
  sum[i] = total;
}

std::string run_last_block() {
  constexpr int kBlocks = 12;
  DeviceBuffer<int> data(32 * kBlocks), sum(32);
  DeviceBuffer<std::uint32_t> arrived(std::vector<std::uint32_t>{0}), before(kBlocks);
  launch<last_block>({.x = kBlocks, .threads = 32, .shared_bytes = 4}, Stream{}, data.data(),
                     arrived.data(), before.data(), sum.data());
  std::vector<std::uint32_t> order = before.values(), counted;
  std::sort(order.begin(), order.end());
  for (std::uint32_t i = 0; i < kBlocks; ++i) counted.push_back(i);
  std::vector<int> expected;
  for (int i = 0; i < 32; ++i) expected.push_back(1000 * (kBlocks - 1) * kBlocks / 2 + kBlocks * i);
  const std::string wrong =
      first_difference(counted, order, [](int i) { return "arrival " + std::to_string(i); });
  return !wrong.empty() ? wrong : first_difference(expected, sum.values(), [](int i) {
    return "sum of lane " + std::to_string(i);
  });
}

// add_release publishes, too: block 0 waits for all others.
//
// registers: 40, spills: 0
LMKERN_KERNEL(32, 1)
published(int* data, std::uint32_t* arrived, int* out) {
  const int i = thread_index(), block = block_x(), others = blocks_x() - 1;
  if (block != 0) {
    data[32 * block + i] = 1000 * block + i;
    block_barrier();
    if (i == 0) add_release(arrived, static_cast<std::uint32_t>(block));
    return;
  }
  if (i == 0)
    while (load_acquire(arrived) < static_cast<std::uint32_t>(others * (others + 1) / 2)) spin();
  block_barrier();
  for (int other = 1; other <= others; ++other)
    out[32 * (other - 1) + i] = data[32 * other + 31 - i];
}

std::string run_published() {
  constexpr int kOthers = 5;
  DeviceBuffer<int> data(32 * (kOthers + 1)), out(32 * kOthers);
  DeviceBuffer<std::uint32_t> arrived(std::vector<std::uint32_t>{0});
  launch<published>({.x = kOthers + 1, .threads = 32, .resident = true}, Stream{}, data.data(),
                    arrived.data(), out.data());
  std::vector<int> expected;
  for (int other = 1; other <= kOthers; ++other)
    for (int i = 0; i < 32; ++i) expected.push_back(1000 * other + 31 - i);
  return first_difference(expected, out.values(), by("block", 32, "thread"));
}

// Tickets: each value before is given once. In global memory over blocks, in shared memory over one.
//
// registers: 32, spills: 0
LMKERN_KERNEL(64, 1)
tickets(std::uint32_t* counter, std::uint32_t* out) {
  auto* const local = shared_memory<std::uint32_t>();
  const int i = thread_index(), all = 64 * blocks_x();
  if (i == 0) *local = 0;
  block_barrier();
  out[add_relaxed(counter, 1)] = 1;
  out[all + 64 * block_x() + static_cast<int>(add_relaxed(local, 1))] = 2;
}

std::string run_tickets() {
  constexpr int kBlocks = 4;
  DeviceBuffer<std::uint32_t> counter(std::vector<std::uint32_t>{0}), out(2 * 64 * kBlocks);
  launch<tickets>({.x = kBlocks, .threads = 64, .shared_bytes = 4}, Stream{}, counter.data(),
                  out.data());
  std::vector<std::uint32_t> expected(64 * kBlocks, 1);
  expected.resize(2 * 64 * kBlocks, 2);
  return first_difference(expected, out.values(), by("block", 64, "ticket"));
}

// registers: 24, spills: 0
LMKERN_KERNEL(64, 1)
minima(unsigned long long* out) {
  const int i = block_x() * 64 + thread_index();
  // Beyond 32 bits, the smallest in no thread's favour.
  const auto value = static_cast<unsigned long long>((i * 53 + 17) % 128) << 40;
  min_relaxed(out + i % 4, value + static_cast<unsigned long long>(i));
}

std::string run_minima() {
  DeviceBuffer<unsigned long long> out(4);
  launch<minima>({.x = 2, .threads = 64}, Stream{}, out.data());
  std::vector<unsigned long long> expected(4, ~0ull);
  for (int i = 0; i < 128; ++i) {
    const auto high = static_cast<unsigned long long>((i * 53 + 17) % 128);
    auto& least = expected[static_cast<std::size_t>(i % 4)];
    least = std::min(least, (high << 40) + static_cast<unsigned long long>(i));
  }
  return first_difference(expected, out.values(),
                          [](int i) { return "minimum " + std::to_string(i); });
}

constexpr int kMembers = 3, kGroups = 2;

// Each group of blocks goes its own pace.
//
// registers: 32, spills: 0
LMKERN_KERNEL(64, 1)
groups(std::uint32_t* counters, int* data, int* out) {
  const int i = thread_index(), group = block_x() / kMembers, member = block_x() % kMembers;
  GroupBarrier barrier{counters + group, kMembers};
  for (int round = 0; round < kRounds * (1 + group) / 2; ++round) {
    data[64 * block_x() + i] = 1000 * round + 100 * member + i;
    barrier.wait();
    const int other = group * kMembers + (member + 1 + round) % kMembers;
    out[(64 * block_x() + i) * kRounds + round] = data[64 * other + 63 - i];
    barrier.wait();
  }
}

std::string run_groups() {
  constexpr int kBlocks = kMembers * kGroups;
  DeviceBuffer<std::uint32_t> counters(std::vector<std::uint32_t>(kGroups, 0));
  DeviceBuffer<int> data(64 * kBlocks), out(64 * kBlocks * kRounds);
  launch<groups>({.x = kBlocks, .threads = 64, .resident = true}, Stream{}, counters.data(),
                 data.data(), out.data());
  std::vector<int> expected;
  for (int block = 0; block < kBlocks; ++block)
    for (int i = 0; i < 64; ++i)
      for (int round = 0; round < kRounds; ++round) {
        const int other = (block % kMembers + 1 + round) % kMembers;
        const bool done = round < kRounds * (1 + block / kMembers) / 2;
        expected.push_back(done ? 1000 * round + 100 * other + 63 - i : -1);
      }
  return first_difference(expected, out.values(), by("thread", kRounds, "round"));
}

}  // namespace

std::vector<GoldenCase> atomic_goldens() {
  return {
      {"load_acquire.store_release", run_messages},
      {"add_acquire_release", run_last_block},
      {"add_release", run_published},
      {"add_relaxed", run_tickets},
      {"min_relaxed", run_minima},
      {"group_barrier", run_groups},
  };
}

}  // namespace lmkern::cuda
