// A gradient that was lent out becomes zeros again (embedding_clear, embedding_is_clear in
// csrc/ops/embedding.h).
//
// Parallel  clear: over pages.
// Traffic   clear: V D read, and written only where it is not zero: half of what memset moves.
// Limits    is_clear looks at the beginning of a few rows: it sees a write to all of them.
#include "core/dispatch.h"
#include "core/parallel.h"
#include "cpu/vec.h"
#include "ops/embedding.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

typedef std::uint64_t Bits __attribute__((vector_size(kVecBytes)));

LMKERN_INLINE bool is_zero(const char* data, std::int64_t bytes) {
  Bits seen[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kVecBytes <= bytes; i += 4 * kVecBytes) {
    LMKERN_UNROLL
    for (int k = 0; k < 4; ++k) {
      Bits bits;
      __builtin_memcpy(&bits, data + i + k * kVecBytes, sizeof bits);
      seen[k] |= bits;
    }
  }
  for (; i < bytes; ++i) seen[0][0] |= static_cast<unsigned char>(data[i]);
  const Bits all = seen[0] | seen[1] | seen[2] | seen[3];
  std::uint64_t any = 0;
  for (unsigned k = 0; k < kVecBytes / sizeof any; ++k) any |= all[k];
  return any == 0;
}

std::int64_t row_bytes(const TensorView& d_weight) {
  std::int64_t bytes = 0;
  dispatch_float_types(d_weight.dtype, [&](auto s) {
    bytes = d_weight.shape[1] * static_cast<std::int64_t>(sizeof(typename decltype(s)::type));
  });
  return bytes;
}

bool contains(const TensorView& ids, std::int64_t wanted) {
  const std::int64_t* const id = ids.ptr<const std::int64_t>();
  std::int64_t low = 0, high = ids.defined() ? ids.shape[0] : 0;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (id[middle] == wanted) return true;
    if (id[middle] < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return false;
}

}  // namespace

void embedding_clear(const EmbeddingClearArgs& a) {
  constexpr std::int64_t kPage = 4096;
  char* const data = a.d_weight.ptr<char>();
  const std::int64_t bytes = a.d_weight.shape[0] * row_bytes(a.d_weight);
  const std::int64_t pages = (bytes + kPage - 1) / kPage;
  parallel(pages < 16 ? 1 : max_threads(), [&](int thread, int threads) {
    const Range range = thread_range(pages, 1, thread, threads);
    for (std::int64_t page = range.begin; page < range.end; ++page) {
      char* const begin = data + page * kPage;
      const std::int64_t size = bytes - page * kPage < kPage ? bytes - page * kPage : kPage;
      if (!is_zero(begin, size)) __builtin_memset(begin, 0, size);
    }
  });
}

bool embedding_is_clear(const EmbeddingIsClearArgs& a) {
  const std::int64_t rows = a.d_weight.shape[0], bytes = row_bytes(a.d_weight);
  const std::int64_t step = rows / a.samples > 0 ? rows / a.samples : 1;
  for (std::int64_t v = step / 2; v < rows; v += step)
    if (!is_zero(a.d_weight.ptr<const char>() + v * bytes, bytes < 64 ? bytes : 64) &&
        !contains(a.written, v))
      return false;
  return true;
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
