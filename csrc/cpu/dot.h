// Products of rows with rows: sums over k where both operands are walked along k, for a few rows of
// `a` against rows of `w` that are read where they lie, once.
//
// Sums end up spread over lanes; `fold` (vec.h) brings them together, 30 shuffles for 16 of them.
#pragma once
#include "cpu/vec.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

// Rows of a and of w in one tile of sums: as many as the registers hold.
inline constexpr int kDotRows = 3;
template <class T>
inline constexpr int kDotGroup = kLanes<T> <= kAccumulators / kDotRows ? kLanes<T> : kLanes<T> / 2;
template <class T>
inline constexpr int kDotGroups = kLanes<T> / kDotGroup<T>;  // of a vector of rows of w: 1 or 2

// Keeps a loaded vector in its register: GCC otherwise reads memory again in each of the operations
// that use it, and the loads become the bound.
template <class V>
LMKERN_INLINE void hold(V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  if constexpr (sizeof v <= 32) asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// sums[m][i] += a_m[k] w_i[k], lane by lane; rows of a are a_m apart. Prefetches what lies `ahead`
// of the rows of w.
template <bool Prefetch, int M, int N, class A, class S>
LMKERN_INLINE void add_dots(std::int64_t depth, const A* a, std::int64_t a_m,
                            const S* const (&w)[N], std::int64_t ahead,
                            Vec<Accumulate<S>> (&sums)[M][N]) {
  using T = Accumulate<S>;
  const auto add = [&](std::int64_t k, const auto& load_at) __attribute__((always_inline)) {
    Vec<T> x[M];
    LMKERN_UNROLL
    for (int m = 0; m < M; ++m) x[m] = load_at(a + m * a_m + k);
    LMKERN_UNROLL
    for (int i = 0; i < N; ++i) {
      Vec<T> row = load_at(w[i] + k);
      if constexpr (M > 1) hold(row);
      if (Prefetch) __builtin_prefetch(w[i] + k + ahead);  // beyond the last row too
      LMKERN_UNROLL
      for (int m = 0; m < M; ++m) sums[m][i] += x[m] * row;
    }
  };
  constexpr std::int64_t n = kLanes<T>;
  const std::int64_t whole = depth / n * n, rest = depth - whole;
  for (std::int64_t k = 0; k < whole; k += n)
    add(k, [](const auto* p) __attribute__((always_inline)) { return load(p); });
  if (rest > 0)
    add(whole, [rest](const auto* p) __attribute__((always_inline)) { return load_n(p, rest); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
