// Positions sorted by index (embedding_buckets in csrc/ops/embedding.h): a radix sort, whose cost
// does not depend on V.
//
// Parallel  none: 10 ns an index, against the D elements that follow for each.
// Traffic   2 passes of 16 N bytes and a count per digit; one digit up to V = 2^11, two to 2^22.
// Limits    N V < 2^62, so that index and position fit one key.
#include "core/dispatch.h"
#include "core/memory.h"
#include "ops/embedding.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

using Key = std::uint64_t;  // index << position_bits | position

constexpr int kMaxDigitBits = 11;  // 16 KiB of counters: they stay in L1

LMKERN_INLINE int bits_of(std::int64_t count) {  // enough for 0 .. count - 1
  return count <= 1 ? 1 : 64 - __builtin_clzll(static_cast<unsigned long long>(count - 1));
}

template <class I>
std::int64_t bucket(const EmbeddingBucketsArgs& a) {
  const std::int64_t n = a.indices.numel();
  const I* const index = a.indices.ptr<const I>();
  const int position_bits = bits_of(n), index_bits = bits_of(a.num_embeddings);
  const int digits = (index_bits + kMaxDigitBits - 1) / kMaxDigitBits;
  const int digit_bits = (index_bits + digits - 1) / digits;
  const std::int64_t radix = std::int64_t{1} << digit_bits;
  std::int64_t* counts = nullptr;  // [digits, radix]
  Key* spare = nullptr;
  Scratch::place([&](Scratch& scratch) {
    counts = scratch.take<std::int64_t>(digits * radix);
    spare = scratch.take<Key>(n);
  });
  for (std::int64_t i = 0; i < digits * radix; ++i) counts[i] = 0;

  // The keys go back and forth and end in `order`.
  Key* const order = reinterpret_cast<Key*>(a.order.ptr<std::int64_t>());
  Key* from = digits % 2 ? spare : order;
  Key* to = digits % 2 ? order : spare;
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const auto v = static_cast<Key>(index[i]);
    if (index[i] == a.padding_idx) continue;
    from[kept++] = v << position_bits | static_cast<Key>(i);
    for (int d = 0; d < digits; ++d)
      ++counts[d * radix + static_cast<std::int64_t>(v >> d * digit_bits & Key(radix - 1))];
  }
  for (int d = 0; d < digits; ++d) {
    std::int64_t* const place = counts + d * radix;
    std::int64_t sum = 0;
    for (std::int64_t i = 0; i < radix; ++i) {
      const std::int64_t count = place[i];
      place[i] = sum;
      sum += count;
    }
    const int shift = position_bits + d * digit_bits;
    for (std::int64_t i = 0; i < kept; ++i)
      to[place[from[i] >> shift & Key(radix - 1)]++] = from[i];
    Key* const swap = from;
    from = to;
    to = swap;
  }

  std::int64_t* const ids = a.ids.ptr<std::int64_t>();
  std::int64_t* const starts = a.starts.ptr<std::int64_t>();
  std::int64_t distinct = 0;
  for (std::int64_t i = 0; i < kept; ++i) {
    const auto v = static_cast<std::int64_t>(order[i] >> position_bits);
    order[i] &= (Key(1) << position_bits) - 1;
    if (distinct == 0 || ids[distinct - 1] != v) {
      ids[distinct] = v;
      starts[distinct++] = i;
    }
  }
  starts[distinct] = kept;
  return distinct;
}

}  // namespace

std::int64_t embedding_buckets(const EmbeddingBucketsArgs& a) {
  std::int64_t distinct = 0;
  dispatch_index_types(a.indices.dtype,
                       [&](auto i) { distinct = bucket<typename decltype(i)::type>(a); });
  return distinct;
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
