// Embedding (csrc/ops/embedding.h).
//
// Parallel  forward over indices; backward over blocks of rows of d_weight, handed out dynamically,
//           since ids are usually Zipf-distributed.
// Traffic   forward N D read + N D written. Backward N D read + V D written, of which the zeros of
//           untouched rows are nearly everything at a large V.
// Limits    the bucketing itself is serial: 2 passes over the ids and 1 over V counters.
#include "ops/embedding.h"
#include "core/dispatch.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "cpu/vec.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kForkElements = 1
                                       << 15;  // below, a parallel region costs more than it saves

int threads_for(std::int64_t elements) { return elements < kForkElements ? 1 : max_threads(); }

// A row is a kilobyte or so: too short for memcpy to earn its start-up back.
void copy_bytes(const void* from, std::size_t bytes, void* to) {
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

template <class S, class I>
void gather(const EmbeddingForwardArgs& a) {
  const std::int64_t n = a.indices.numel(), width = a.weight.shape[1], stride = a.weight.strides[0];
  const S* const weight = a.weight.ptr<const S>();
  const I* const index = a.indices.ptr<const I>();
  S* const out = a.out.ptr<S>();
  parallel(threads_for(n * width), [&](int thread, int threads) {
    const Range range = thread_range(n, 1, thread, threads);
    for (std::int64_t i = range.begin; i < range.end; ++i)
      copy_bytes(weight + index[i] * stride, width * sizeof(S), out + i * width);
  });
}

// The positions of each row's ids, in ascending order: ids[starts[v] .. starts[v + 1]).
struct Buckets {
  std::int64_t* starts;
  std::int64_t* ids;
};

template <class I>
Buckets bucket(const I* index, std::int64_t n, std::int64_t rows) {
  auto* const starts =
      static_cast<std::int64_t*>(thread_scratch((rows + 2 + n) * sizeof(std::int64_t)));
  auto* const ids = starts + rows + 2;
  // Counting sort; counts are kept two places up, so that after the second pass
  // starts[v] is row v's.
  for (std::int64_t v = 0; v < rows + 2; ++v) starts[v] = 0;
  for (std::int64_t i = 0; i < n; ++i) ++starts[index[i] + 2];
  for (std::int64_t v = 2; v < rows + 2; ++v) starts[v] += starts[v - 1];
  for (std::int64_t i = 0; i < n; ++i) ids[starts[index[i] + 1]++] = i;
  return {starts, ids};
}

// row[:] = scale * sum of the given rows of d_out
template <class S>
void sum_rows(const S* d_out, std::int64_t width, const std::int64_t* ids, std::int64_t count,
              Accumulate<S> scale, S* row) {
  using T = Accumulate<S>;
  constexpr int kVecs = 4;
  constexpr std::int64_t kLane = kLanes<T>;
  std::int64_t d = 0;
  for (; d + kVecs * kLane <= width; d += kVecs * kLane) {
    Vec<T> sum[kVecs] = {};
    for (std::int64_t i = 0; i < count; ++i) {
      const S* from = d_out + ids[i] * width + d;
      LMKERN_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[v] += load(from + v * kLane);
    }
    LMKERN_UNROLL
    for (int v = 0; v < kVecs; ++v) store(row + d + v * kLane, sum[v] * scale);
  }
  for (; d < width; d += kLane) {
    const std::int64_t n = width - d < kLane ? width - d : kLane;
    Vec<T> sum{};
    for (std::int64_t i = 0; i < count; ++i) sum += load_n(d_out + ids[i] * width + d, n);
    store_n(row + d, sum * scale, n);
  }
}

template <class S, class I>
void scatter_sum(const EmbeddingBackwardArgs& a) {
  const std::int64_t rows = a.d_weight.shape[0], width = a.d_weight.shape[1], n = a.indices.numel();
  const Buckets buckets = bucket(a.indices.ptr<const I>(), n, rows);
  const std::int64_t block = 64, blocks = (rows + block - 1) / block;
  WorkQueue queue(blocks);
  parallel(threads_for((rows + n) * width), [&](int, int) {
    for (std::int64_t item; queue.next(&item);) {
      const std::int64_t end = (item + 1) * block < rows ? (item + 1) * block : rows;
      for (std::int64_t v = item * block; v < end; ++v) {
        S* const row = a.d_weight.ptr<S>() + v * width;
        const std::int64_t first = buckets.starts[v], count = buckets.starts[v + 1] - first;
        if (count == 0 || v == a.padding_idx)
          __builtin_memset(row, 0, width * sizeof(S));
        else
          sum_rows<S>(a.d_out.ptr<const S>(), width, buckets.ids + first, count,
                      a.scale_grad_by_freq ? Accumulate<S>(1) / count : Accumulate<S>(1), row);
      }
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

void embedding_backward(const EmbeddingBackwardArgs& a) {
  dispatch_float_types(a.d_weight.dtype, [&](auto s) {
    dispatch_index_types(a.indices.dtype, [&](auto i) {
      scatter_sum<typename decltype(s)::type, typename decltype(i)::type>(a);
    });
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
