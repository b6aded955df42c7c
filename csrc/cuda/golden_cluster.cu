// Golden tests of cluster.h, and of what crosses the blocks of a cluster (barrier.h, mbarrier.h,
// bulk_copy.h).
#include "cuda/device/barrier.h"
#include "cuda/device/bulk_copy.h"
#include "cuda/device/cluster.h"
#include "cuda/device/mbarrier.h"
#include "cuda/golden_case.h"

namespace lmkern::cuda {
namespace {

// Two clusters of four blocks. Each kernel ends with a barrier of the cluster: no block may go while
// another still looks at its memory.
constexpr int kSize = 4, kBlocks = 8, kThreads = 64;
constexpr std::size_t kData = 64;  // bytes before it: the mbarriers

Grid grid(std::size_t shared_bytes) {
  return {.x = kBlocks, .threads = kThreads, .shared_bytes = shared_bytes, .cluster = kSize};
}

// registers: 24, spills: 0
LMKERN_KERNEL(kThreads, 1)
ranks(int* out) {
  out[kThreads * block_x() + thread_index()] = 1000 * cluster_rank() + cluster_size();
}

std::string run_ranks() {
  DeviceBuffer<int> out(kThreads * kBlocks);
  launch<ranks>(grid(0), Stream{}, out.data());
  std::vector<int> expected;
  for (int block = 0; block < kBlocks; ++block)
    for (int i = 0; i < kThreads; ++i) expected.push_back(1000 * (block % kSize) + kSize);
  return first_difference(expected, out.values(), by("block", kThreads, "thread"));
}

// Reads from one neighbour, then writes to the other, between the two halves of a barrier as well.
//
// registers: 32, spills: 0
LMKERN_KERNEL(kThreads, 1)
neighbours(int* out) {
  int* const s = shared_memory<int>();
  const int i = thread_index(), rank = cluster_rank();
  s[i] = 1000 * block_x() + i;
  cluster_barrier();
  int* const o = out + 2 * (kThreads * block_x() + i);
  o[0] = map_shared(s, (rank + 1) % kSize)[63 - i];
  map_shared(s, (rank + kSize - 1) % kSize)[kThreads + i] = 2000 * block_x() + i;
  cluster_arrive();
  s[2 * kThreads + i] = i;
  cluster_wait();
  o[1] = s[kThreads + 63 - i] + s[2 * kThreads + i];
  cluster_barrier();
}

std::string run_neighbours() {
  DeviceBuffer<int> out(2 * kThreads * kBlocks);
  launch<neighbours>(grid(3 * kThreads * sizeof(int)), Stream{}, out.data());
  std::vector<int> expected;
  for (int block = 0; block < kBlocks; ++block)
    for (int i = 0; i < kThreads; ++i) {
      const int next = block / kSize * kSize + (block + 1) % kSize;
      expected.push_back(1000 * next + 63 - i);
      expected.push_back(2000 * next + 63 - i + i);
    }
  return first_difference(expected, out.values(), by("thread", 2, "value"));
}

// Every block puts a word into every block and arrives there.
//
// registers: 24, spills: 0
LMKERN_KERNEL(kThreads, 1)
remote_arrivals(int* out) {
  auto* const barrier = shared_memory<Mbarrier>();
  int* const s = shared_memory<int>(kData);
  const int i = thread_index(), rank = cluster_rank();
  if (i == 0) mbarrier_init(barrier, kSize);
  cluster_barrier();
  for (int phase = 0; phase < 2; ++phase) {
    if (i < kSize) {
      map_shared(s, i)[kSize * phase + rank] = 1000 * phase + 100 * block_x() + i;
      mbarrier_arrive_remote(barrier, i);
    }
    mbarrier_wait(barrier, phase);
    if (i < kSize) out[2 * kSize * block_x() + kSize * phase + i] = s[kSize * phase + i];
    cluster_barrier();  // else a fast block's second arrival could count in the first phase
  }
}

std::string run_remote_arrivals() {
  DeviceBuffer<int> out(2 * kSize * kBlocks);
  launch<remote_arrivals>(grid(kData + 2 * kSize * sizeof(int)), Stream{}, out.data());
  std::vector<int> expected;
  for (int block = 0; block < kBlocks; ++block)
    for (int phase = 0; phase < 2; ++phase)
      for (int from = 0; from < kSize; ++from)
        expected.push_back(1000 * phase + 100 * (block / kSize * kSize + from) + block % kSize);
  return first_difference(expected, out.values(), by("block", 2 * kSize, "word"));
}

// Each block sends what it wrote to the next one.
//
// registers: 24, spills: 0
LMKERN_KERNEL(kThreads, 1)
remote_copies(int* out) {
  auto* const barrier = shared_memory<Mbarrier>();
  int* const from = shared_memory<int>(kData);
  int* const to = from + kThreads;
  const int i = thread_index();
  from[i] = 1000 * block_x() + i;
  fence_for_bulk_copy();
  if (i == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_arrive_expect(barrier, kThreads * sizeof(int));
  }
  cluster_barrier();
  if (i == 0) {
    const int next = (cluster_rank() + 1) % kSize;
    bulk_copy_remote(to + 4, from, 60 * sizeof(int), barrier, next);
    bulk_copy_remote(to, from + 60, 4 * sizeof(int), barrier, next);
  }
  mbarrier_wait(barrier, 0);
  out[kThreads * block_x() + i] = to[i];
  cluster_barrier();
}

std::string run_remote_copies() {
  DeviceBuffer<int> out(kThreads * kBlocks);
  launch<remote_copies>(grid(kData + 2 * kThreads * sizeof(int)), Stream{}, out.data());
  std::vector<int> expected;
  for (int block = 0; block < kBlocks; ++block)
    for (int i = 0; i < kThreads; ++i)
      expected.push_back(1000 * (block / kSize * kSize + (block + kSize - 1) % kSize) +
                         (i < 4 ? 60 + i : i - 4));
  return first_difference(expected, out.values(), by("block", kThreads, "element"));
}

// Thread i of each block stores one V in another block, so that all come from everywhere.
//
// registers: 24, spills: 0
template <class V>
LMKERN_KERNEL(kThreads, 1)
remote_stores(float* out) {
  constexpr int kWidth = V::kSize;
  auto* const barrier = shared_memory<Mbarrier>();
  float* const s = shared_memory<float>(kData);
  const int i = thread_index(), rank = cluster_rank();
  if (i == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_arrive_expect(barrier, kThreads * sizeof(V));
  }
  cluster_barrier();
  V value;
  for (int c = 0; c < kWidth; ++c) value.at[c] = static_cast<float>(10000 * block_x() + 10 * i + c);
  // To block (rank + i) % 4: 16 from each, by rank.
  V* const place = reinterpret_cast<V*>(s) + 16 * rank + i / kSize;
  store_async(place, value, barrier, (rank + i) % kSize);
  mbarrier_wait(barrier, 0);
  for (int c = 0; c < kWidth; ++c) out[kWidth * (kThreads * block_x() + i) + c] = s[kWidth * i + c];
  cluster_barrier();
}

template <class V>
std::string run_remote_stores() {
  constexpr int kWidth = V::kSize;
  DeviceBuffer<float> out(kWidth * kThreads * kBlocks);
  launch<remote_stores<V>>(grid(kData + kThreads * sizeof(V)), Stream{}, out.data());
  std::vector<float> expected;
  for (int block = 0; block < kBlocks; ++block)
    for (int i = 0; i < kThreads; ++i)
      for (int c = 0; c < kWidth; ++c) {
        const int from = i / 16, rank = block % kSize;
        const int thread = i % 16 * kSize + (rank - from + kSize) % kSize;
        const int sender = block / kSize * kSize + from;
        expected.push_back(static_cast<float>(10000 * sender + 10 * thread + c));
      }
  return first_difference(expected, out.values(), by("block", kWidth * kThreads, "element"));
}

}  // namespace

std::vector<GoldenCase> cluster_goldens() {
  return {
      {"cluster_rank", needs_clusters(run_ranks)},
      {"map_shared", needs_clusters(run_neighbours)},
      {"mbarrier_arrive_remote", needs_clusters(run_remote_arrivals)},
      {"bulk_copy_remote", needs_clusters(run_remote_copies)},
      {"store_async.4", needs_clusters(run_remote_stores<Vector<float, 1>>)},
      {"store_async.16", needs_clusters(run_remote_stores<Vector<float, 4>>)},
  };
}

}  // namespace lmkern::cuda
