// Embedding (csrc/ops/embedding.h): the lookup, and renormalisation of rows.
//
// Parallel  over indices.
// Traffic   N D read + N D written. The norm of a row is taken again for each of its indices: it is
//           in L1 by then or about to be.
// Limits    general p-norms take an exp and a log in double for each element.
#include "ops/embedding.h"
#include "core/dispatch.h"
#include "cpu/row_norm.h"
#include "cpu/row_sums.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

// A row is a kilobyte or so: too short for memcpy to earn its start-up back.
LMKERN_INLINE void copy_bytes(const void* from, std::size_t bytes, void* to) {
  typedef char Bytes __attribute__((vector_size(kVecBytes)));
  const auto* source = static_cast<const char*>(from);
  auto* target = static_cast<char*>(to);
  std::size_t i = 0;
  for (; i + 2 * kVecBytes <= bytes; i += 2 * kVecBytes) {
    Bytes a, b;
    __builtin_memcpy(&a, source + i, kVecBytes);
    __builtin_memcpy(&b, source + i + kVecBytes, kVecBytes);
    __builtin_memcpy(target + i, &a, kVecBytes);
    __builtin_memcpy(target + i + kVecBytes, &b, kVecBytes);
  }
  __builtin_memcpy(target + i, source + i, bytes - i);
}

// to[:] = scale * from[:]; the two may be one.
template <class S>
LMKERN_INLINE void scale_row(const S* from, std::int64_t width, Accumulate<S> scale, S* to) {
  using T = Accumulate<S>;
  std::int64_t d = 0;
  for (; d + kLanes<T> <= width; d += kLanes<T>) store(to + d, load(from + d) * scale);
  if (d < width) store_n(to + d, load_n(from + d, width - d) * scale, width - d);
}

template <class S, class I>
void gather(const EmbeddingForwardArgs& a) {
  const std::int64_t n = a.indices.numel(), width = a.weight.shape[1], stride = a.weight.strides[0];
  const S* const weight = a.weight.ptr<const S>();
  const I* const index = a.indices.ptr<const I>();
  S* const out = a.out.ptr<S>();
  const RowScale<S> scale_of(width, a.max_norm, a.norm_type);
  parallel(threads_for(n * width), [&](int thread, int threads) {
    const Range range = thread_range(n, 1, thread, threads);
    for (std::int64_t i = range.begin; i < range.end; ++i) {
      const S* const row = weight + index[i] * stride;
      const Accumulate<S> scale = scale_of(row);
      if (scale == 1)
        copy_bytes(row, width * sizeof(S), out + i * width);
      else
        scale_row(row, width, scale, out + i * width);
    }
  });
}

template <class S>
void renorm(const EmbeddingRenormArgs& a) {
  const std::int64_t n = a.ids.shape[0], width = a.weight.shape[1], stride = a.weight.strides[0];
  const std::int64_t* const ids = a.ids.ptr<const std::int64_t>();
  const RowScale<S> scale_of(width, a.max_norm, a.norm_type);
  parallel(threads_for(n * width), [&](int thread, int threads) {
    const Range range = thread_range(n, 1, thread, threads);
    for (std::int64_t i = range.begin; i < range.end; ++i) {
      if (i > 0 && ids[i] == ids[i - 1]) continue;
      S* const row = a.weight.ptr<S>() + ids[i] * stride;
      const Accumulate<S> scale = scale_of(row);
      if (scale != 1) scale_row(row, width, scale, row);
    }
  });
}

}  // namespace

void embedding_forward(const EmbeddingForwardArgs& a) {
  dispatch_float_types(a.weight.dtype, [&](auto s) {
    dispatch_index_types(a.indices.dtype, [&](auto i) {
      gather<typename decltype(s)::type, typename decltype(i)::type>(a);
    });
  });
}

void embedding_renorm(const EmbeddingRenormArgs& a) {
  dispatch_float_types(a.weight.dtype, [&](auto s) { renorm<typename decltype(s)::type>(a); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
