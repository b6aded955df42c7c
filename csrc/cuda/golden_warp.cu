// Golden tests of shuffle.h, block_reduce.h and barrier.h.
#include <cmath>

#include "cuda/device/block_reduce.h"
#include "cuda/golden_case.h"

namespace lmkern::cuda {
namespace {

constexpr int kShuffles = 9;

// registers: 40, spills: 0
template <class T>
LMKERN_KERNEL(64, 1)
shuffles(T* out) {
  const int lane = lane_index();
  const T mine = static_cast<T>(1000 * warp_index() + lane);
  const std::uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  T* const o = out + kShuffles * thread_index();
  o[0] = shuffle(mine, 5);
  o[1] = shuffle(mine, (7 * lane + 3) % 32);
  o[2] = shuffle_xor(mine, 1);
  o[3] = shuffle_xor(mine, 22);
  o[4] = shuffle_up(mine, 1);
  o[5] = shuffle_up(mine, 9);
  o[6] = shuffle(mine, lane / 16 * 16 + 3, half);
  o[7] = shuffle_xor(mine, 5, half);
  warp_barrier();
  if (lane % 2 == 0)
    o[8] = shuffle(mine, 30 - lane, 0x55555555u);
  else
    o[8] = shuffle(mine, (lane + 4) % 32, 0xaaaaaaaau);
}

// PTX 9.7.9.6: the value of the source lane; of shfl.up, one's own where there is none.
template <class T>
std::string run_shuffles() {
  DeviceBuffer<T> out(64 * kShuffles);
  launch<shuffles<T>>({.threads = 64}, Stream{}, out.data());
  std::vector<T> expected;
  for (int thread = 0; thread < 64; ++thread) {
    const int lane = thread % 32;
    const int sources[kShuffles] = {5,
                                    (7 * lane + 3) % 32,
                                    lane ^ 1,
                                    lane ^ 22,
                                    lane >= 1 ? lane - 1 : lane,
                                    lane >= 9 ? lane - 9 : lane,
                                    lane < 16 ? 3 : 19,
                                    lane ^ 5,
                                    lane % 2 == 0 ? 30 - lane : (lane + 4) % 32};
    for (int source : sources) expected.push_back(static_cast<T>(1000 * (thread / 32) + source));
  }
  return first_difference(expected, out.values(), by("thread", kShuffles, "shuffle"));
}

// registers: 24, spills: 0
LMKERN_KERNEL(64, 1)
votes(std::uint32_t* out) {
  const int lane = lane_index(), warp = warp_index();
  std::uint32_t* const o = out + 3 * thread_index();
  o[0] = vote((lane + warp) % 3 == 0);
  o[1] = vote(lane % 2 == 1, lane < 8 ? 0x000000ffu : 0xffffff00u);
  warp_barrier();
  o[2] = lane < 20 ? vote(true, 0x000fffffu) : 0;
}

// PTX 9.7.13.5: bit i is the predicate of lane i, 0 of those outside the mask.
std::string run_votes() {
  DeviceBuffer<std::uint32_t> out(64 * 3);
  launch<votes>({.threads = 64}, Stream{}, out.data());
  std::vector<std::uint32_t> expected;
  for (int thread = 0; thread < 64; ++thread) {
    std::uint32_t thirds = 0;
    for (int lane = 0; lane < 32; ++lane)
      if ((lane + thread / 32) % 3 == 0) thirds |= 1u << lane;
    expected.push_back(thirds);
    expected.push_back(thread % 32 < 8 ? 0x000000aau : 0xaaaaaa00u);
    expected.push_back(thread % 32 < 20 ? 0x000fffffu : 0u);
  }
  return first_difference(expected, out.values(), by("thread", 3, "vote"));
}

// registers: 40, spills: 0
template <class T>
LMKERN_KERNEL(64, 1)
warp_reductions(T* out) {
  const int lane = lane_index(), warp = warp_index();
  T* const o = out + 3 * thread_index();
  o[0] = warp_sum(static_cast<T>(1000 * warp + lane));
  // The greatest is another lane in each warp.
  o[1] = warp_max(static_cast<T>((13 * lane + 5 + warp) % 32 - 100));
  o[2] = warp_sum(T(1) / static_cast<T>(lane + 1));
}

template <class T>
std::string run_warp_reductions() {
  DeviceBuffer<T> out(64 * 3);
  launch<warp_reductions<T>>({.threads = 64}, Stream{}, out.data());
  const std::vector<T> got = out.values();
  std::vector<T> expected;
  for (int thread = 0; thread < 64; ++thread) {
    expected.push_back(static_cast<T>(32 * 1000 * (thread / 32) + 31 * 32 / 2));
    expected.push_back(static_cast<T>(31 - 100));
    expected.push_back(got[2]);  // inexact: the same bits in every lane are what counts
  }
  const double harmonic = 4.05849519543652;  // 1 + 1/2 + ... + 1/32
  if (std::is_floating_point_v<T> && !(std::abs(static_cast<double>(got[2]) - harmonic) < 1e-5))
    return difference("sum of 1 / (lane + 1)", harmonic, static_cast<double>(got[2]));
  return first_difference(expected, got, by("thread", 3, "reduction"));
}

// registers: 40, spills: 0
LMKERN_KERNEL(96, 1)
block_sums(float* out) {
  float* const scratch = shared_memory<float>();
  const int i = thread_index();
  out[2 * i] = block_sum(static_cast<float>(1000 * warp_index() + lane_index()), scratch);
  block_barrier();
  out[2 * i + 1] = block_sum(static_cast<float>(i % 7), scratch);
}

std::string run_block_sums() {
  DeviceBuffer<float> out(96 * 2);
  launch<block_sums>({.threads = 96, .shared_bytes = 3 * sizeof(float)}, Stream{}, out.data());
  float first = 0, second = 0;
  for (int i = 0; i < 96; ++i) {
    first += static_cast<float>(1000 * (i / 32) + i % 32);
    second += static_cast<float>(i % 7);
  }
  std::vector<float> expected;
  for (int i = 0; i < 96; ++i) expected.insert(expected.end(), {first, second});
  return first_difference(expected, out.values(), by("thread", 2, "sum"));
}

// registers: 24, spills: 0
LMKERN_KERNEL(96, 1)
block_barriers(int* out) {
  int* const s = shared_memory<int>();
  const int i = thread_index();
  for (int round = 0; round < 4; ++round) {
    s[i] = 1000 * round + i;
    block_barrier();
    out[4 * i + round] = s[95 - i];
    block_barrier();
  }
}

std::string run_block_barriers() {
  DeviceBuffer<int> out(96 * 4);
  launch<block_barriers>({.threads = 96, .shared_bytes = 96 * sizeof(int)}, Stream{}, out.data());
  std::vector<int> expected;
  for (int i = 0; i < 96; ++i)
    for (int round = 0; round < 4; ++round) expected.push_back(1000 * round + 95 - i);
  return first_difference(expected, out.values(), by("thread", 4, "round"));
}

// Two halves of the block meet at barriers of their own, a different number of times, then both at
// another.
//
// registers: 24, spills: 0
LMKERN_KERNEL(128, 1)
named_barriers(int* out) {
  int* const s = shared_memory<int>();
  const int thread = thread_index(), half = thread / 64, i = thread % 64;
  int* const mine = s + 64 * half;
  int value = 1000 * half + i;
  for (int round = 0; round < 2 + 3 * half; ++round) {
    mine[i] = value;
    named_barrier(1 + half, 64);
    value = mine[(i + 37) % 64];
    named_barrier(1 + half, 64);
  }
  s[thread] = value;
  named_barrier(15, 128);
  out[thread] = s[127 - thread];
}

std::string run_named_barriers() {
  DeviceBuffer<int> out(128);
  launch<named_barriers>({.threads = 128, .shared_bytes = 128 * sizeof(int)}, Stream{}, out.data());
  std::vector<int> expected;
  for (int thread = 0; thread < 128; ++thread) {
    const int other = 127 - thread, half = other / 64, rounds = 2 + 3 * half;
    expected.push_back(1000 * half + (other % 64 + 37 * rounds) % 64);
  }
  return first_difference(expected, out.values(),
                          [](int i) { return "thread " + std::to_string(i); });
}

// registers: 24, spills: 0
LMKERN_KERNEL(64, 1)
warp_barriers(int* out) {
  const int lane = lane_index(), thread = thread_index();
  int* const s = shared_memory<int>() + 32 * warp_index();
  s[lane] = 1000 * warp_index() + lane;
  warp_barrier();
  out[2 * thread] = s[31 - lane];
  warp_barrier();
  // The lower eight lanes by themselves, the others too.
  s[lane] = 2000 + lane;
  warp_barrier(lane < 8 ? 0x000000ffu : 0xffffff00u);
  out[2 * thread + 1] = lane < 8 ? s[7 - lane] : s[39 - lane];
}

std::string run_warp_barriers() {
  DeviceBuffer<int> out(64 * 2);
  launch<warp_barriers>({.threads = 64, .shared_bytes = 64 * sizeof(int)}, Stream{}, out.data());
  std::vector<int> expected;
  for (int thread = 0; thread < 64; ++thread) {
    const int lane = thread % 32;
    expected.push_back(1000 * (thread / 32) + 31 - lane);
    expected.push_back(2000 + (lane < 8 ? 7 : 39) - lane);
  }
  return first_difference(expected, out.values(), by("thread", 2, "read"));
}

}  // namespace

std::vector<GoldenCase> warp_goldens() {
  return {
      {"shuffle.int", run_shuffles<int>},
      {"shuffle.float", run_shuffles<float>},
      {"shuffle.double", run_shuffles<double>},
      {"shuffle.uint64", run_shuffles<unsigned long long>},
      {"vote", run_votes},
      {"warp_sum_max.int", run_warp_reductions<int>},
      {"warp_sum_max.float", run_warp_reductions<float>},
      {"warp_sum_max.double", run_warp_reductions<double>},
      {"block_sum", run_block_sums},
      {"block_barrier", run_block_barriers},
      {"named_barrier", run_named_barriers},
      {"warp_barrier", run_warp_barriers},
  };
}

}  // namespace lmkern::cuda
