// Values handed from lane to lane, and reductions built on that. None of this orders memory.
#pragma once
#include <cstring>

#include "cuda/device/thread.h"

namespace lmkern::cuda {

#if defined(LMKERN_SIMT)
namespace detail {
// shfl.sync by rendezvous: each lane says which lane it wants to hear.
template <class T>
struct ShuffleOperand {
  T value;
  int source;
  static void combine(void* const (&operands)[32], std::uint32_t mask) {
    T values[32];
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) values[lane] = static_cast<ShuffleOperand*>(operands[lane])->value;
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      auto& operand = *static_cast<ShuffleOperand*>(operands[lane]);
      // From a lane that does not take part comes nothing that may be used.
      if (mask >> operand.source & 1)
        operand.value = values[operand.source];
      else
        std::memset(&operand.value, 0xff, sizeof(T));
    }
  }
};
template <class T>
T shuffle_from(T value, int source, std::uint32_t mask, Site site) {
  ShuffleOperand<T> operand{value, source & 31};
  simt::collective("shuffle", mask, ShuffleOperand<T>::combine, &operand, site);
  return operand.value;
}
struct Vote {
  bool predicate;
  std::uint32_t result;
  static void combine(void* const (&operands)[32], std::uint32_t mask) {
    std::uint32_t result = 0;
    for (int lane = 0; lane < 32; ++lane)
      if ((mask >> lane & 1) && static_cast<Vote*>(operands[lane])->predicate) result |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) static_cast<Vote*>(operands[lane])->result = result;
  }
};
}  // namespace detail
#endif

// PTX 9.7.9.6, shfl.sync: the value of lane `source`.
template <class T>
LMKERN_DEVICE T shuffle(T value, int source, std::uint32_t mask = kAllLanes LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  return detail::shuffle_from(value, source, mask, site);
#else
  return __shfl_sync(mask, value, source);
#endif
}
// The value of the lane whose number differs in the bits of `lanes`.
template <class T>
LMKERN_DEVICE T shuffle_xor(T value, int lanes, std::uint32_t mask = kAllLanes LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  return detail::shuffle_from(value, lane_index() ^ lanes, mask, site);
#else
  return __shfl_xor_sync(mask, value, lanes);
#endif
}
// The value of the lane `delta` before; the first ones keep their own.
template <class T>
LMKERN_DEVICE T shuffle_up(T value, int delta, std::uint32_t mask = kAllLanes LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  const int lane = lane_index();
  return detail::shuffle_from(value, lane < delta ? lane : lane - delta, mask, site);
#else
  return __shfl_up_sync(mask, value, delta);
#endif
}

// PTX 9.7.13.5, vote.sync.ballot: a bit for each lane.
LMKERN_DEVICE std::uint32_t vote(bool predicate, std::uint32_t mask = kAllLanes LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  detail::Vote operand{predicate, 0};
  simt::collective("vote", mask, detail::Vote::combine, &operand, site);
  return operand.result;
#else
  return __ballot_sync(mask, predicate);
#endif
}

// Sum and maximum over the warp, the same bits in every lane.
template <class T>
LMKERN_DEVICE T warp_sum(T value LMKERN_AND_SITE) {
  LMKERN_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2)
    value += shuffle_xor(value, lanes, kAllLanes LMKERN_AND_HERE);
  return value;
}
template <class T>
LMKERN_DEVICE T warp_max(T value LMKERN_AND_SITE) {
  LMKERN_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const T other = shuffle_xor(value, lanes, kAllLanes LMKERN_AND_HERE);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace lmkern::cuda
