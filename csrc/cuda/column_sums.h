// Sums over rows of partial sums, in a fixed order.
#pragma once
#include <algorithm>

#include "cuda/device/barrier.h"
#include "cuda/device/thread.h"
#include "cuda/rows.h"
#include "cuda/stream.h"

namespace lmkern::cuda {

inline constexpr int kMostSumWarps = 32;
inline constexpr int kPartsInFlight = 4;

// out[group, :] = the sum of parts[group, part, :] over part < count. A block has 32 columns of a group; each of
// its warps adds some neighbouring parts, then those sums are added in their order.
// registers: 64, spills: 0
template <class T, class Out>
LMKERN_KERNEL(kMostSumWarps * 32, 1)
add_parts(const T* parts, Out* out, std::int64_t count, std::int64_t width) {
  T* const sums = shared_memory<T>();  // [warps, 32]
  const RowThread block = split_index(block_x(), (width + 31) / 32);
  const int lane = lane_index(), warp = warp_index(), warps = warp_count();
  const std::int64_t column = block.column * 32 + lane;
  const bool active = column < width;
  T sum = T(0);
  if (active) {
    const T* const part = parts + block.row * count * width + column;
    const std::int64_t end = count * (warp + 1) / warps;
    for (std::int64_t k = count * warp / warps; k < end; k += kPartsInFlight) {
      T terms[kPartsInFlight];
      LMKERN_UNROLL
      for (int j = 0; j < kPartsInFlight; ++j)
        terms[j] = k + j < end ? part[(k + j) * width] : T(0);
      LMKERN_UNROLL
      for (int j = 0; j < kPartsInFlight; ++j) sum += terms[j];
    }
  }
  sums[warp * 32 + lane] = sum;
  block_barrier();
  if (warp != 0 || !active) return;
  for (int other = 1; other < warps; ++other) sum += sums[other * 32 + lane];
  out[block.row * width + column] = from_accumulate<Out>(sum);
}

// The order of addition follows from the extents alone. count = 0 gives zeros.
template <class Out>
void launch_add_parts(const Accumulate<Out>* parts, Out* out, std::int64_t groups,
                      std::int64_t count, std::int64_t width) {
  using T = Accumulate<Out>;
  if (groups == 0 || width == 0) return;
  const std::int64_t wanted = (count + kPartsInFlight - 1) / kPartsInFlight;
  const int warps = static_cast<int>(std::clamp<std::int64_t>(wanted, 1, kMostSumWarps));
  launch<add_parts<T, Out>>(Grid{.x = static_cast<unsigned>(groups * ((width + 31) / 32)),
                                 .threads = warps * 32,
                                 .shared_bytes = warps * 32 * sizeof(T)},
                            current_stream(), parts, out, count, width);
}

}  // namespace lmkern::cuda
