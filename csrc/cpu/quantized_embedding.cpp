// Rows of 8 or 4 bits an element (csrc/ops/quantized_embedding.h).
//
// Parallel  lookup over indices; bags as in embedding_bag.cpp.
// Traffic   a row of D bits / 8 + 8 bytes read for each index; lookup N D written, bags B D.
// Limits    the lookup writes four or eight times what it reads: it is the store that takes the time.
#include "ops/quantized_embedding.h"

#include "cpu/bag_terms.h"
#include "cpu/row_sums.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

using WideWords = WordVec<double>;
// Rows whose lines are asked for before they are needed; of bags, which sum eight at a time, more.
constexpr std::int64_t kAhead = 4, kTermsAhead = 16;

// As many bytes as there are lanes, by instruction where there is one: compilers take them one by one.
LMKERN_INLINE Words widen_bytes(const std::uint8_t* p) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  Words words;
  for (int i = 0; i < kLanes<float>; i += 8) {
    const __m256i part = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + i)));
    __builtin_memcpy((std::uint32_t*)&words + i, &part, sizeof part);
  }
  return words;
#else
  VecTypes<float>::Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Words);
#endif
}
LMKERN_INLINE WideWords widen_bytes_to_64(const std::uint8_t* p) {
#if defined(__AVX512F__)
  return (WideWords)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__AVX2__)
  WideWords words;
  for (int i = 0; i < kLanes<double>; i += 4) {
    std::int32_t four;
    __builtin_memcpy(&four, p + i, sizeof four);
    const __m256i part = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    __builtin_memcpy((std::uint64_t*)&words + i, &part, sizeof part);
  }
  return words;
#else
  VecTypes<double>::Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, WideWords);
#endif
}

// The numbers of a whole vector, of kLanes kBits / 8 bytes.
template <int kBits>
LMKERN_INLINE Vec<float> numbers(const std::uint8_t* p, TypeTag<float>) {
  if constexpr (kBits == 8)
    return __builtin_convertvector((IntVec<float>)widen_bytes(p), Vec<float>);
  // A byte b in 64 bits, and again 28 bits higher: the lower half has b & 15, the upper one b >> 4.
  const WideWords b = widen_bytes_to_64(p);
  const Words q = (Words)((b | b << 28) & 0x0000000f0000000fu);
  return __builtin_convertvector((IntVec<float>)q, Vec<float>);
}
template <int kBits>
LMKERN_INLINE Vec<double> numbers(const std::uint8_t* p, TypeTag<double>) {
  Vec<double> q;
  for (int i = 0; i < kLanes<double>; ++i)
    q[i] = kBits == 8 ? p[i] : i % 2 == 0 ? p[i / 2] & 15 : p[i / 2] >> 4;
  return q;
}

// The numbers d .. d + n of a row; d is a multiple of the lanes.
template <class T, int kBits>
LMKERN_INLINE Vec<T> unpack(const std::uint8_t* row, std::int64_t d, std::int64_t n) {
  const std::uint8_t* const from = row + d * kBits / 8;
  if (n == kLanes<T>) return numbers<kBits>(from, TypeTag<T>{});
  std::uint8_t bytes[kLanes<T>] = {};
  for (std::int64_t i = 0; i < (n * kBits + 7) / 8; ++i) bytes[i] = from[i];
  return numbers<kBits>(bytes, TypeTag<T>{});
}

// A Row of cpu/row_sums.h: weight (q scale + minimum).
template <class S, int kBits>
struct QuantizedRow {
  using T = Accumulate<S>;
  const std::uint8_t* data;
  T scale, minimum;
  LMKERN_INLINE Vec<T> at_n(std::int64_t d, std::int64_t n) const {
    return unpack<T, kBits>(data, d, n) * scale + minimum;
  }
  LMKERN_INLINE Vec<T> at(std::int64_t d) const { return at_n(d, kLanes<T>); }
};

LMKERN_INLINE const std::uint8_t* row_at(const QuantizedTable& table, std::int64_t v) {
  return table.rows.ptr<const std::uint8_t>() + v * table.rows.strides[0];
}

LMKERN_INLINE void prefetch_row(const QuantizedTable& table, std::int64_t v) {
  const std::uint8_t* const row = row_at(table, v);
  const std::int64_t bytes = table.rows.shape[1];
  for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
  __builtin_prefetch(row + bytes - 1);
}

template <class S, int kBits>
LMKERN_INLINE QuantizedRow<S, kBits> quantized_row(const QuantizedTable& table, std::int64_t v,
                                                   Accumulate<S> weight) {
  const std::uint8_t* const row = row_at(table, v);
  float affine[2];
  __builtin_memcpy(affine, row + table.packed(), sizeof affine);
  return {row, affine[0] * weight, affine[1] * weight};
}

template <class S, int kBits>
void lookup(const QuantizedEmbeddingArgs& a) {
  using T = Accumulate<S>;
  const std::int64_t count = a.indices.numel(), width = a.table.width;
  dispatch_index_types(a.indices.dtype, [&](auto tag) {
    const auto* const index = a.indices.ptr<const typename decltype(tag)::type>();
    parallel(threads_for(count * width), [&](int thread, int threads) {
      const Range own = thread_range(count, 1, thread, threads);
      for (std::int64_t i = own.begin; i < own.end; ++i) {
        const auto row = quantized_row<S, kBits>(a.table, index[i], T(1));
        prefetch_row(a.table, index[i + kAhead < count ? i + kAhead : i]);
        S* const out = a.out.ptr<S>() + i * width;
        std::int64_t d = 0;
        for (; d + kLanes<T> <= width; d += kLanes<T>) store(out + d, row.at(d));
        if (d < width) store_n(out + d, row.at_n(d, width - d), width - d);
      }
    });
  });
}

template <class S, int kBits>
struct QuantizedTerms {
  using Row = QuantizedRow<S, kBits>;
  const QuantizedEmbeddingBagArgs& args;
  const BagTerms& terms;
  const std::int64_t count = terms.starts[terms.bags];
  LMKERN_INLINE Row row(std::int64_t i) const {
    if (i + kTermsAhead < count) prefetch_row(args.table, terms.rows[i + kTermsAhead]);
    return quantized_row<S, kBits>(args.table, terms.rows[i],
                                   sample_weight<S>(args.bags, terms.positions[i]));
  }
};

template <class S, int kBits>
void bags(const QuantizedEmbeddingBagArgs& a) {
  const std::int64_t width = a.table.width;
  BagTerms terms{a.out.shape[0]};
  RowSumItem* items = nullptr;
  Scratch::place([&](Scratch& scratch) {
    terms.layout(scratch, a.bags);
    items = scratch.take<RowSumItem>(most_row_sum_items(terms.bags, a.bags.indices.numel(), width));
  });
  terms.fill(a.bags);
  const RowSums sums{
      nullptr, terms.starts, nullptr, terms.bags, 0, width, a.bags.mode == BagMode::kMean, items};
  write_row_sums(sums, QuantizedTerms<S, kBits>{a, terms}, a.out.ptr<S>());
}

}  // namespace

void quantized_embedding(const QuantizedEmbeddingArgs& a) {
  dispatch_float_types(a.out.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    a.table.bits == 8 ? lookup<S, 8>(a) : lookup<S, 4>(a);
  });
}

void quantized_embedding_bag(const QuantizedEmbeddingBagArgs& a) {
  dispatch_float_types(a.out.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    a.table.bits == 8 ? bags<S, 8>(a) : bags<S, 4>(a);
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
