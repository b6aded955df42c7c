// Loads and stores of up to 16 bytes at once (PTX 9.7.9.8, ld.v4). The address must be a multiple of
// the size.
#pragma once
#include <cstring>

#include "cuda/device/base.h"

namespace lmkern::cuda {

// kCount elements of S, 16 bytes unless said otherwise.
template <class S, int kCount = 16 / static_cast<int>(sizeof(S))>
struct alignas(sizeof(S) * kCount) Vector {
  static constexpr int kSize = kCount;
  S at[kCount];
};

template <class V, class S>
LMKERN_DEVICE V load_vector(const S* address LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::check_aligned(address, sizeof(V), site);
  simt::check_read(address, sizeof(V), site);
  V value;
  __builtin_memcpy(&value, address, sizeof(V));
  return value;
#else
  return *reinterpret_cast<const V*>(address);
#endif
}

template <class V, class S>
LMKERN_DEVICE void store_vector(S* address, const V& value LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::check_aligned(address, sizeof(V), site);
  simt::check_write(address, sizeof(V), site);
  __builtin_memcpy(address, &value, sizeof(V));
#else
  *reinterpret_cast<V*>(address) = value;
#endif
}

}  // namespace lmkern::cuda
