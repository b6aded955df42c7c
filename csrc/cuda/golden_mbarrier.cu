// Golden tests of mbarrier.h, and of copies from global memory that complete on one (bulk_copy.h).
#include "cuda/device/barrier.h"
#include "cuda/device/bulk_copy.h"
#include "cuda/device/mbarrier.h"
#include "cuda/golden_case.h"

namespace lmkern::cuda {
namespace {

constexpr int kPhases = 6;
constexpr std::size_t kData = 64;  // bytes before it: the mbarriers

// All arrive and wait, in phase after phase; two buffers in turn need no other barrier.
//
// registers: 24, spills: 0
LMKERN_KERNEL(64, 1)
phases(int* out) {
  auto* const barrier = shared_memory<Mbarrier>();
  int* const s = shared_memory<int>(kData);
  const int i = thread_index();
  if (i == 0) mbarrier_init(barrier, 64);
  block_barrier();
  mbarrier_wait(barrier, 1);  // the phase before the first counts as complete
  for (int phase = 0; phase < kPhases; ++phase) {
    int* const mine = s + 64 * (phase % 2);
    mine[i] = 1000 * phase + i;
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, phase % 2);
    out[64 * phase + i] = mine[63 - i];
  }
}

std::string run_phases() {
  DeviceBuffer<int> out(64 * kPhases);
  launch<phases>({.threads = 64, .shared_bytes = kData + 2 * 64 * sizeof(int)}, Stream{},
                 out.data());
  std::vector<int> expected;
  for (int phase = 0; phase < kPhases; ++phase)
    for (int i = 0; i < 64; ++i) expected.push_back(1000 * phase + 63 - i);
  return first_difference(expected, out.values(), by("phase", 64, "thread"));
}

// A ring of two slots, three warps that fill and one that drains them: counts below the number of
// threads, and a full and an empty mbarrier for each slot.
//
// registers: 32, spills: 0
LMKERN_KERNEL(128, 1)
ring(int* out) {
  auto* const full = shared_memory<Mbarrier>();
  Mbarrier* const empty = full + 2;
  int* const s = shared_memory<int>(kData);
  const int lane = lane_index(), warp = warp_index();
  if (thread_index() < 2) {
    mbarrier_init(full + thread_index(), 3);
    mbarrier_init(empty + thread_index(), 1);
  }
  block_barrier();
  for (int step = 0; step < kPhases; ++step) {
    const int slot = step % 2, parity = step / 2 % 2;
    int* const data = s + 96 * slot;
    if (warp < 3) {
      mbarrier_wait(empty + slot, 1 - parity);
      data[32 * warp + lane] = 1000 * step + 32 * warp + lane;
      warp_barrier();
      if (lane == 0) mbarrier_arrive(full + slot);
    } else {
      mbarrier_wait(full + slot, parity);
      for (int part = 0; part < 3; ++part)
        out[96 * step + 32 * part + lane] = data[32 * part + 31 - lane];
      warp_barrier();
      if (lane == 0) mbarrier_arrive(empty + slot);
    }
  }
}

std::string run_ring() {
  DeviceBuffer<int> out(96 * kPhases);
  launch<ring>({.threads = 128, .shared_bytes = kData + 2 * 96 * sizeof(int)}, Stream{},
               out.data());
  std::vector<int> expected;
  for (int step = 0; step < kPhases; ++step)
    for (int i = 0; i < 96; ++i) expected.push_back(1000 * step + i / 32 * 32 + 31 - i % 32);
  return first_difference(expected, out.values(), by("step", 96, "element"));
}

constexpr int kSmall = 4, kLarge = 1020;  // elements of two copies

// The first phase promises the bytes before the copies, the second afterwards, and with an arrival
// more.
//
// registers: 40, spills: 0
LMKERN_KERNEL(64, 1)
bulk_copies(const int* in, int* out) {
  auto* const barrier = shared_memory<Mbarrier>();
  int* const s = shared_memory<int>(kData);
  const int i = thread_index();
  if (i == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init(barrier + 1, 2);
  }
  block_barrier();
  if (i == 0) {
    mbarrier_arrive_expect(barrier, (kSmall + kLarge) * sizeof(int));
    bulk_copy(s + kLarge, in, kSmall * sizeof(int), barrier);
    bulk_copy(s, in + kSmall, kLarge * sizeof(int), barrier);
  }
  mbarrier_wait(barrier, 0);
  for (int j = i; j < kSmall + kLarge; j += 64) out[j] = s[j];
  int* const t = s + kSmall + kLarge;
  if (i == 0) {
    bulk_copy(t, in + 2 * kSmall, kLarge * sizeof(int), barrier + 1);
    mbarrier_arrive_expect(barrier + 1, kLarge * sizeof(int));
  }
  if (i == 32) mbarrier_arrive(barrier + 1);
  mbarrier_wait(barrier + 1, 0);
  for (int j = i; j < kLarge; j += 64) out[kSmall + kLarge + j] = t[kLarge - 1 - j];
}

std::string run_bulk_copies() {
  std::vector<int> source, expected;
  for (int i = 0; i < 2 * kSmall + kLarge; ++i) source.push_back(1000 * (i / 64) + i % 64);
  for (int i = 0; i < kLarge; ++i) expected.push_back(source[static_cast<std::size_t>(kSmall + i)]);
  for (int i = 0; i < kSmall; ++i) expected.push_back(source[static_cast<std::size_t>(i)]);
  for (int i = kLarge - 1; i >= 0; --i)
    expected.push_back(source[static_cast<std::size_t>(2 * kSmall + i)]);
  DeviceBuffer<int> in(source), out(expected.size());
  launch<bulk_copies>({.threads = 64, .shared_bytes = kData + (kSmall + 2 * kLarge) * sizeof(int)},
                      Stream{}, static_cast<const int*>(in.data()), out.data());
  return first_difference(expected, out.values(),
                          [](int i) { return "element " + std::to_string(i); });
}

}  // namespace

std::vector<GoldenCase> mbarrier_goldens() {
  return {
      {"mbarrier.phases", run_phases},
      {"mbarrier.ring", run_ring},
      {"bulk_copy", needs_clusters(run_bulk_copies)},
  };
}

}  // namespace lmkern::cuda
