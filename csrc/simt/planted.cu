#include "simt/planted.h"

#include <map>

#include "cuda/device/atomic.h"
#include "cuda/device/barrier.h"
#include "cuda/device/bulk_copy.h"
#include "cuda/device/copy.h"
#include "cuda/device/launch.h"
#include "cuda/device/shuffle.h"
#include "cuda/device/vector.h"

// Tests find the line that a report must name by these comments: `// bug: NAME` ends the line of the
// access or call that is reported.

namespace lmkern::cuda {
namespace {

constexpr int kThreads = 64;

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
shared_out_of_bounds(const float*, float* out) {
  float* const s = shared_memory<float>();
  const int i = thread_index();
  s[kBug ? i + 1 : i] = 1.0f;  // bug: shared_out_of_bounds
  out[i] = 1.0f;
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
global_out_of_bounds(const float* in, float* out) {
  const int i = thread_index();
  out[i] = in[kBug ? i + 1 : i];  // bug: global_out_of_bounds
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
missing_block_barrier(const float* in, float* out) {
  float* const s = shared_memory<float>();
  const int i = thread_index();
  s[i] = in[i];
  if constexpr (!kBug) block_barrier();
  out[63 - i] = s[63 - i];  // bug: missing_block_barrier
}

// Rows of 16 of which the last ones do not exist: 64 - 4 of them are to be zeros.
template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
unmasked_copy(const float* in, float* out) {
  float* const s = shared_memory<float>();
  const int i = thread_index(), rows = 32;
  if (i < rows) {
    const int row = kBug || i < 16 ? i : 0, valid = kBug || i < 16 ? 16 : 0;
    copy_async<16>(s + 4 * i, in + 4 * row, valid);  // bug: unmasked_copy
  }
  copy_commit();
  copy_wait<0>();
  block_barrier();
  out[i] = s[i];
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
weak_wait_group(const float* in, float* out) {
  float* const s = shared_memory<float>();
  const int i = thread_index();
  if (i < 8) copy_async<16>(s + 4 * i, in + 4 * i);
  copy_commit();
  if (i < 8) copy_async<16>(s + 32 + 4 * i, in + 32 + 4 * i);  // bug: weak_wait_group
  copy_commit();
  copy_wait<kBug ? 1 : 0>();
  block_barrier();
  out[i] = s[i];  // bug: weak_wait_group
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
double_buffer_race(const float* in, float* out) {
  float* const s = shared_memory<float>();
  const int i = thread_index();
  float sum = 0.0f;
  s[i] = in[i];
  block_barrier();
  for (int step = 0; step < 4; ++step) {
    float* const now = s + 64 * (step % 2);
    float* const next = s + 64 * ((step + 1) % 2);
    sum += now[63 - i], next[i] = now[i];  // bug: double_buffer_race
    if (!kBug || step == 0) block_barrier();
  }
  out[63 - i] = sum / 4;
}

// Each block writes its part, then all read all.
template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
block_for_grid_barrier(const float* in, float* out, float* work, std::uint32_t* flag) {
  const int i = thread_index(), half = block_x() * 32;
  if (i < 32) work[half + i] = in[half + i];  // bug: block_for_grid_barrier
  block_barrier();
  if constexpr (!kBug) {
    if (i == 0) {
      add_release(flag, 1);
      while (load_acquire(flag) < 2) spin();
    }
    block_barrier();
  }
  if (block_x() == 0) out[i] = work[i];  // bug: block_for_grid_barrier
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
block_for_cluster_barrier(const float* in, float* out) {
  float* const s = shared_memory<float>();
  const int i = thread_index(), rank = cluster_rank();
  s[i] = in[i];
  if constexpr (kBug)
    block_barrier();
  else
    cluster_barrier();
  const float other = *map_shared(s + i, 1 - rank);  // bug: block_for_cluster_barrier
  if (rank == 0) out[i] = other;
  cluster_barrier();
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
divergent_barrier(const float* in, float* out) {
  const int i = thread_index();
  if constexpr (kBug) {
    if (i < 32)
      block_barrier();  // bug: divergent_barrier
    else
      block_barrier();  // bug: divergent_barrier
  } else {
    block_barrier();
  }
  out[i] = in[i];
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
abandoned_barrier(const float* in, float* out) {
  const int i = thread_index();
  out[i] = in[i];
  if (kBug && i == 40) return;
  block_barrier();  // bug: abandoned_barrier
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
shuffle_mask_of_others(const float* in, float* out) {
  const int i = thread_index();
  float value = in[i];
  if (lane_index() < 16)
    value = shuffle_xor(value, 1, kBug ? kAllLanes : 0xffffu);  // bug: shuffle_mask_of_others
  out[lane_index() < 16 ? i ^ 1 : i] = value;
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
shuffle_mask_without_self(const float* in, float* out) {
  const int i = thread_index();
  const std::uint32_t mask = kBug ? 0x7fffffffu : kAllLanes;
  out[i ^ 1] = shuffle_xor(in[i], 1, mask);  // bug: shuffle_mask_without_self
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
plain_histogram(const float* in, float* out, float*, std::uint32_t* bins) {
  const int i = thread_index();
  if constexpr (kBug)
    bins[i % 4] += 1;  // bug: plain_histogram
  else
    add_relaxed(bins + i % 4, 1);
  out[i] = in[i];
}

// A producer fills two stages in turn, a consumer empties them.
template <bool kFullWait, bool kEmptyWait>
LMKERN_DEVICE void pipeline(const float* in, float* out) {
  float* const stages = shared_memory<float>();
  Mbarrier* const full = shared_memory<Mbarrier>(512);
  Mbarrier* const empty = full + 2;
  const int i = thread_index();
  if (i == 0)
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, 32);
    }
  block_barrier();
  for (int step = 0; step < 8; ++step) {
    const int stage = step % 2, parity = step / 2 % 2;
    if (i == 0) {
      if constexpr (kEmptyWait)
        mbarrier_wait(empty + stage, 1 - parity);
      else if (step >= 2)
        mbarrier_wait(full + stage, 1 - parity);  // its last copy is over, but is it read?
      mbarrier_arrive_expect(full + stage, 32);
      bulk_copy(stages + 8 * stage, in + 8 * step, 32, full + stage);  // bug: no_empty_wait
    } else if (i >= 32) {
      if constexpr (kFullWait) mbarrier_wait(full + stage, parity);
      if (i < 40)
        out[8 * step + i - 32] = stages[8 * stage + i - 32];  // bug: no_full_wait, no_empty_wait
      mbarrier_arrive(empty + stage);
    }
  }
}
template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
no_full_wait(const float* in, float* out) {
  pipeline<!kBug, true>(in, out);
}
template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
no_empty_wait(const float* in, float* out) {
  pipeline<true, !kBug>(in, out);
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
implicit_warp_synchrony(const float* in, float* out) {
  float* const s = shared_memory<float>();
  const int i = thread_index();
  s[i] = in[i];
  if constexpr (!kBug) warp_barrier();
  out[i ^ 1] = s[i ^ 1];  // bug: implicit_warp_synchrony
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
shuffle_as_fence(const float* in, float* out) {
  float* const s = shared_memory<float>();
  const int i = thread_index();
  s[i] = in[i];
  if constexpr (kBug)
    shuffle(i, 0);
  else
    warp_barrier();
  out[i ^ 1] = s[i ^ 1];  // bug: shuffle_as_fence
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
misaligned_vector(const float* in, float* out) {
  const int i = thread_index();
  if (i >= 8) {
    if (i >= 32) out[i] = in[i];
    return;
  }
  const auto v = load_vector<Vector<float>>(in + 4 * i + (kBug ? 1 : 0));  // bug: misaligned_vector
  store_vector(out + 4 * i, v);
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
uninitialised_shared(const float* in, float* out) {
  float* const s = shared_memory<float>();
  const int i = thread_index();
  if (!kBug || i != 5) s[i] = in[i];
  block_barrier();
  out[i] = s[i];  // bug: uninitialised_shared
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
never_flagged(const float* in, float* out, float*, std::uint32_t* flag) {
  const int i = thread_index();
  if (i == 0) add_release(flag, 1);
  if (i == 32)
    while (load_acquire(flag) < (kBug ? 2u : 1u)) spin();  // bug: never_flagged
  out[i] = in[i];
}

template <bool kBug>
LMKERN_KERNEL(kThreads, 1)
remote_store_without_wait(const float* in, float* out) {
  float* const s = shared_memory<float>();
  Mbarrier* const full = shared_memory<Mbarrier>(512);
  const int i = thread_index();
  if (i == 0) {
    mbarrier_init(full, 1);
    mbarrier_arrive_expect(full, 256);
  }
  cluster_barrier();
  store_async(s + i, in[i], full, 1 - cluster_rank());  // bug: remote_store_without_wait
  if constexpr (!kBug) mbarrier_wait(full, 0);
  if (cluster_rank() == 0) out[i] = s[i];  // bug: remote_store_without_wait
  cluster_barrier();
}

// Global memory with nothing behind its end.
template <class T>
struct Buffer {
  explicit Buffer(int count)
      : data(new T[static_cast<std::size_t>(count)]),
        known(data, sizeof(T) * static_cast<std::size_t>(count)) {
    for (int i = 0; i < count; ++i) data[i] = T(0);
  }
  ~Buffer() { delete[] data; }
  T* const data;
  simt::GlobalMemory known;
};

struct Planted {
  void (*run)(bool bug, const float* in, float* out, float* work, std::uint32_t* flags);
};

template <auto kBroken, auto kRight, std::size_t kShared, int kBlocks, int kCluster, bool kResident>
void run(bool bug, const float* in, float* out, float* work, std::uint32_t* flags) {
  const Grid grid{.x = kBlocks,
                  .threads = kThreads,
                  .shared_bytes = kShared,
                  .cluster = kCluster,
                  .resident = kResident};
  if constexpr (requires { kRight(in, out, work, flags); })
    bug ? launch<kBroken>(grid, nullptr, in, out, work, flags)
        : launch<kRight>(grid, nullptr, in, out, work, flags);
  else
    bug ? launch<kBroken>(grid, nullptr, in, out) : launch<kRight>(grid, nullptr, in, out);
}

#define LMKERN_PLANTED(name, shared, blocks, cluster, resident)                \
  {                                                                            \
    #name, { run<name<true>, name<false>, shared, blocks, cluster, resident> } \
  }
const std::map<std::string, Planted> kPlanted = {
    LMKERN_PLANTED(shared_out_of_bounds, 256, 1, 1, false),
    LMKERN_PLANTED(global_out_of_bounds, 0, 1, 1, false),
    LMKERN_PLANTED(missing_block_barrier, 256, 1, 1, false),
    LMKERN_PLANTED(unmasked_copy, 512, 1, 1, false),
    LMKERN_PLANTED(weak_wait_group, 256, 1, 1, false),
    LMKERN_PLANTED(double_buffer_race, 512, 1, 1, false),
    LMKERN_PLANTED(block_for_grid_barrier, 0, 2, 1, true),
    LMKERN_PLANTED(block_for_cluster_barrier, 256, 2, 2, false),
    LMKERN_PLANTED(divergent_barrier, 0, 1, 1, false),
    LMKERN_PLANTED(abandoned_barrier, 0, 1, 1, false),
    LMKERN_PLANTED(shuffle_mask_of_others, 0, 1, 1, false),
    LMKERN_PLANTED(shuffle_mask_without_self, 0, 1, 1, false),
    LMKERN_PLANTED(plain_histogram, 0, 1, 1, false),
    LMKERN_PLANTED(no_full_wait, 544, 1, 1, false),
    LMKERN_PLANTED(no_empty_wait, 544, 1, 1, false),
    LMKERN_PLANTED(implicit_warp_synchrony, 256, 1, 1, false),
    LMKERN_PLANTED(shuffle_as_fence, 256, 1, 1, false),
    LMKERN_PLANTED(misaligned_vector, 0, 1, 1, false),
    LMKERN_PLANTED(uninitialised_shared, 256, 1, 1, false),
    LMKERN_PLANTED(never_flagged, 0, 1, 1, false),
    LMKERN_PLANTED(remote_store_without_wait, 520, 2, 2, false),
};

}  // namespace
}  // namespace lmkern::cuda

namespace lmkern::simt {

std::vector<std::string> planted_names() {
  std::vector<std::string> names;
  for (const auto& [name, planted] : cuda::kPlanted) names.push_back(name);
  return names;
}

bool run_planted(const std::string& name, bool bug) {
  cuda::Buffer<float> in(64), out(64), work(64);
  cuda::Buffer<std::uint32_t> flags(4);
  for (int i = 0; i < 64; ++i) in.data[i] = 1.0f;
  cuda::kPlanted.at(name).run(bug, in.data, out.data, work.data, flags.data);
  for (int i = 0; i < 64; ++i)
    if (!(out.data[i] == 1.0f)) return false;
  return name != "plain_histogram" || flags.data[1] == 16;
}

}  // namespace lmkern::simt
