// What all passes of attention share about their problem: which rows make a sequence, which keys a
// query sees, and where the rows of a head lie.
#pragma once
#include "core/memory.h"
#include "core/parallel.h"
#include "core/tensor_view.h"
#include "cpu/gemm.h"
#include "cpu/vec_math.h"
#include "ops/attention.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

inline constexpr std::int64_t kKeyBlock = 64;

// One element of the batch, or one packed sequence. Queries and keys count from its first row.
struct Sequence {
  std::int64_t index, batch;  // of itself, and of the rows of q, k, v that hold it
  std::int64_t first_query, queries;
  std::int64_t first_key, keys;
  std::int64_t offset;  // query i stands at position i + offset
};

LMKERN_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
LMKERN_INLINE std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
LMKERN_INLINE std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

struct Geometry {
  const AttentionProblem& p;
  const std::int64_t batch = p.q.shape[0], heads = p.q.shape[1], depth = p.q.shape[3];
  const std::int64_t key_heads = p.k.shape[1], width = p.v.shape[3];
  const std::int64_t group = key_heads > 0 ? heads / key_heads : 1;
  const std::int64_t sequences = p.cu_q.defined() ? p.cu_q.shape[0] - 1 : batch;
  std::int64_t most_queries = 0, most_keys = 0;  // of one sequence
  std::int64_t pairs = 0;                        // of a query and a key that it may see

  explicit Geometry(const AttentionProblem& problem) : p(problem) {
    for (std::int64_t i = 0; i < sequences; ++i) {
      const Sequence s = sequence(i);
      most_queries = most(most_queries, s.queries);
      most_keys = most(most_keys, s.keys);
      pairs += s.queries * s.keys;
    }
  }

  LMKERN_INLINE Sequence sequence(std::int64_t i) const {
    Sequence s{i, i, 0, p.q.shape[2], 0, p.k.shape[2], 0};
    if (p.cu_q.defined()) {
      const std::int64_t* const q = p.cu_q.ptr<const std::int64_t>() + i;
      const std::int64_t* const k = p.cu_k.ptr<const std::int64_t>() + i;
      s = {i, 0, q[0], q[1] - q[0], k[0], k[1] - k[0], 0};
    } else if (p.key_lengths.defined()) {
      s.keys = p.key_lengths.ptr<const std::int64_t>()[i];
    }
    if (p.bottom_right) s.offset = s.keys - s.queries;
    return s;
  }

  // The keys that any of `count` queries from `query` on sees; from a multiple of kKeyBlock on.
  LMKERN_INLINE Range visible(const Sequence& s, std::int64_t query, std::int64_t count) const {
    const std::int64_t position = query + s.offset;
    std::int64_t begin = 0, end = s.keys;
    if (p.window_left >= 0) begin = most(0, position - p.window_left) / kKeyBlock * kKeyBlock;
    if (p.window_right >= 0) end = least(end, position + count + p.window_right);
    return {begin, end > begin ? end : begin};
  }

  // Whether some of these queries do not see some of these keys, for their positions' sake.
  LMKERN_INLINE bool cuts(const Sequence& s, std::int64_t query, std::int64_t count,
                          std::int64_t key, std::int64_t n_keys) const {
    const std::int64_t position = query + s.offset;
    return (p.window_right >= 0 && key + n_keys - 1 > position + p.window_right) ||
           (p.window_left >= 0 && key < position + count - 1 - p.window_left);
  }
};

// Rows of one sequence and head of a [B, H, N, D] tensor: D contiguous elements each.
template <class S>
struct HeadRows {
  S* data;
  std::int64_t stride;

  LMKERN_INLINE HeadRows(const TensorView& view, std::int64_t batch, std::int64_t head,
                         std::int64_t first)
      : data(view.ptr<S>() + batch * view.strides[0] + head * view.strides[1] +
             first * view.strides[2]),
        stride(view.strides[2]) {}
  LMKERN_INLINE S* row(std::int64_t i) const { return data + i * stride; }
};

// to[r][:] = factor * from[first + r][:], with columns up to `padded` zero.
template <class S>
LMKERN_INLINE void copy_rows(HeadRows<const S> from, std::int64_t first, std::int64_t rows,
                             std::int64_t columns, std::int64_t padded, Accumulate<S> factor,
                             Accumulate<S>* to) {
  constexpr std::int64_t n = kLanes<Accumulate<S>>;
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < padded; c += n)
      store_n(to + r * padded + c, load_n(from.row(first + r) + c, least(columns - c, n)) * factor,
              least(padded - c, n));
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
