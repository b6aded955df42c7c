// Element types and the one inlining macro every header shares.
#pragma once
#include <cstdint>

// Functions in headers that per-ISA files include must never exist out of line: the linker keeps
// one copy of an inline function for the whole module, and that copy may be the AVX-512 one.
#define LMKERN_INLINE inline __attribute__((always_inline))

#if defined(__CUDACC__)
#define LMKERN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LMKERN_HOST_DEVICE LMKERN_INLINE
#endif

namespace lmkern {

enum class DType : std::uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kInt32,
  kInt64,
  kBool,
  kUInt8,
  kOther
};

// Storage only; arithmetic happens in float.
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

// The type a storage type is computed and accumulated in.
template <class S>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class S>
using Accumulate = typename AccumulateOf<S>::type;

}  // namespace lmkern
