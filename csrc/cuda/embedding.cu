// Embedding lookup, renormalisation of rows, and the keys that backward sorts (csrc/ops/embedding.h).
//
// Parallel  lookup: out as one line of pieces of the largest of 16, 8, 4, 2 bytes that divides rows; a
//           thread has kInFlight of them, a block's length apart, so that a warp stores neighbours,
//           any D keeps all lanes busy, and 4 loads are under way before the first is awaited.
//           Scaled lookup and renorm: a warp for each row.
// Traffic   lookup: N D read (once each distinct row that stays in L2) + N D written + N indices; a
//           copy's bandwidth is the bound. The scaled one reads a row a second time, from L1.
// Limits    lookup: rows of fewer than 2^30 pieces. General p-norms take a pow in double for each
//           element. 64 registers, no spills.
#include "core/dispatch.h"
#include "cuda/index_errors.h"
#include "cuda/kernels.h"
#include "cuda/row_norm.h"
#include "cuda/rows.h"
#include "cuda/stream.h"

namespace lmkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;

// n / divisor for n < 2^31, by a multiplication (Granlund and Montgomery 1994, figure 4.1).
struct Divider {
  std::uint32_t divisor, magic, shift;

  explicit Divider(std::uint32_t by) : divisor(by), magic(0), shift(0) {
    while ((std::uint64_t{1} << shift) < by) ++shift;
    magic = static_cast<std::uint32_t>(
        ((std::uint64_t{1} << shift) - by) * (std::uint64_t{1} << 32) / by + 1);
  }
  LMKERN_DEVICE std::uint32_t divide(std::uint32_t n) const {
    const auto high = static_cast<std::uint32_t>(static_cast<std::uint64_t>(n) * magic >> 32);
    return (high + n) >> shift;
  }
};

struct Gather {
  const char* weight;
  std::int64_t stride;  // of weight's rows, in bytes
  Integers indices;
  char* out;
  std::int64_t pieces;  // of out
  Divider of_a_row;
  IndexErrors errors;
};

// registers: 64, spills: 0
template <class Word, int kWords>
LMKERN_KERNEL(kThreads, 4)
gather(Gather g) {
  using Bytes = Vector<Word, kWords>;
  const std::int64_t base = std::int64_t{block_x()} * (kThreads * kInFlight);
  const RowThread block = split_index(base, g.of_a_row.divisor);
  std::int64_t row[kInFlight];
  std::uint32_t column[kInFlight];
  bool active[kInFlight];
  LMKERN_UNROLL
  for (int k = 0; k < kInFlight; ++k) {
    const std::uint32_t offset = static_cast<std::uint32_t>(k * kThreads + thread_index());
    const std::uint32_t local = static_cast<std::uint32_t>(block.column) + offset;
    const std::uint32_t rows = g.of_a_row.divide(local);
    row[k] = block.row + rows;
    column[k] = local - rows * g.of_a_row.divisor;
    active[k] = base + offset < g.pieces;
  }
  std::int64_t index[kInFlight];
  LMKERN_UNROLL
  for (int k = 0; k < kInFlight; ++k) index[k] = active[k] ? g.indices.at(row[k]) : 0;
  Bytes bytes[kInFlight];
  LMKERN_UNROLL
  for (int k = 0; k < kInFlight; ++k) {
    if (!active[k]) continue;
    const char* const from = g.weight + g.errors.valid_row(index[k]) * g.stride;
    bytes[k] = load_vector<Bytes>(from + column[k] * sizeof(Bytes));
  }
  LMKERN_UNROLL
  for (int k = 0; k < kInFlight; ++k) {
    if (!active[k]) continue;
    store_vector(g.out + (base + k * kThreads + thread_index()) * sizeof(Bytes), bytes[k]);
    if (column[k] == 0 && g.errors.valid_row(index[k]) != index[k])
      g.errors.report(index[k], row[k]);
  }
}

// The number of this warp in the grid.
LMKERN_DEVICE std::int64_t warp_in_grid() {
  return std::int64_t{block_x()} * (kThreads / 32) + warp_index();
}

// registers: 64, spills: 0
template <class S>
LMKERN_KERNEL(kThreads, 4)
gather_scaled(const S* weight, std::int64_t stride, Integers indices, S* out, std::int64_t count,
              RowScale scale_of, IndexErrors errors) {
  const std::int64_t n = warp_in_grid();
  if (n >= count) return;
  const std::int64_t index = indices.at(n), valid = errors.valid_row(index);
  if (index != valid && lane_index() == 0) errors.report(index, n);
  const S* const from = weight + valid * stride;
  S* const to = out + n * scale_of.width;
  const Accumulate<S> scale = scale_of(from);
  for (std::int64_t d = lane_index(); d < scale_of.width; d += 32)
    to[d] = scale == 1 ? from[d] : from_accumulate<S>(to_accumulate(from[d]) * scale);
}

// registers: 56, spills: 0
template <class S>
LMKERN_KERNEL(kThreads, 4)
renorm(S* weight, std::int64_t stride, std::int64_t rows, const std::int64_t* ids,
       std::int64_t count, RowScale scale_of) {
  const std::int64_t n = warp_in_grid();
  if (n >= count) return;
  const std::int64_t id = ids[n];
  if (id < 0 || id >= rows || (n > 0 && ids[n - 1] == id)) return;
  S* const row = weight + id * stride;
  const Accumulate<S> scale = scale_of(row);
  if (scale == 1) return;
  for (std::int64_t d = lane_index(); d < scale_of.width; d += 32)
    row[d] = from_accumulate<S>(to_accumulate(row[d]) * scale);
}

// registers: 48, spills: 0
LMKERN_KERNEL(kThreads, 4)
make_keys(Integers indices, std::int64_t count, std::int64_t padding_idx, Integers covered,
          std::int32_t* keys, IndexErrors errors) {
  const std::int64_t n = std::int64_t{block_x()} * kThreads + thread_index();
  if (n >= count) return;
  const std::int64_t index = indices.at(n);
  const bool valid = errors.valid_row(index) == index;
  if (!valid) errors.report(index, n);
  const bool has_gradient =
      valid && index != padding_idx && (covered.data == nullptr || n < covered.at(0));
  keys[n] = static_cast<std::int32_t>(has_gradient ? index : errors.indexed_by.rows);
}

template <class Word, int kWords>
void launch_gather(const Gather& g) {
  launch<gather<Word, kWords>>(
      Grid{.x = blocks_for(g.pieces, kThreads * kInFlight), .threads = kThreads}, current_stream(),
      g);
}

std::int64_t size_of(DType dtype) {
  std::int64_t size = 0;
  dispatch_float_types(dtype, [&](auto s) { size = sizeof(typename decltype(s)::type); });
  return size;
}

}  // namespace

void Kernels::embedding_forward(const EmbeddingForwardArgs& a) {
  const std::int64_t n = a.indices.numel(), width = a.weight.shape[1];
  if (n == 0 || width == 0) return;
  const IndexErrors errors = index_errors("embedding", a.indices, a.weight.shape[0]);
  if (a.max_norm < RowScale::infinity()) {
    dispatch_float_types(a.weight.dtype, [&](auto s) {
      using S = typename decltype(s)::type;
      launch<gather_scaled<S>>(Grid{.x = blocks_for(n, kThreads / 32), .threads = kThreads},
                               current_stream(), a.weight.ptr<const S>(), a.weight.strides[0],
                               Integers(a.indices), a.out.ptr<S>(), n,
                               RowScale{width, a.max_norm, a.norm_type}, errors);
    });
    return;
  }
  const std::int64_t size = size_of(a.weight.dtype), row = width * size;
  const std::int64_t stride = a.weight.strides[0] * size;
  // The lowest bit that is set anywhere: what divides all addresses.
  const auto bits = reinterpret_cast<std::uintptr_t>(a.weight.data) |
                    reinterpret_cast<std::uintptr_t>(a.out.data) |
                    static_cast<std::uintptr_t>(row) | static_cast<std::uintptr_t>(stride) | 16;
  const auto bytes = static_cast<std::int64_t>(bits & ~(bits - 1));
  if (row / bytes >= 1 << 30) throw std::invalid_argument("embedding: D is too large");
  const Gather g{a.weight.ptr<const char>(),
                 stride,
                 Integers(a.indices),
                 a.out.ptr<char>(),
                 n * (row / bytes),
                 Divider(static_cast<std::uint32_t>(row / bytes)),
                 errors};
  switch (bytes) {
    case 16: launch_gather<std::uint32_t, 4>(g); break;
    case 8: launch_gather<std::uint32_t, 2>(g); break;
    case 4: launch_gather<std::uint32_t, 1>(g); break;
    default: launch_gather<std::uint16_t, 1>(g); break;
  }
}

void Kernels::embedding_renorm(const EmbeddingRenormArgs& a) {
  const std::int64_t n = a.ids.shape[0], width = a.weight.shape[1];
  if (n == 0 || width == 0) return;
  dispatch_float_types(a.weight.dtype, [&](auto s) {
    using S = typename decltype(s)::type;
    launch<renorm<S>>(Grid{.x = blocks_for(n, kThreads / 32), .threads = kThreads},
                      current_stream(), a.weight.ptr<S>(), a.weight.strides[0], a.weight.shape[0],
                      a.ids.ptr<const std::int64_t>(), n, RowScale{width, a.max_norm, a.norm_type});
  });
}

void Kernels::embedding_keys(const EmbeddingKeysArgs& a) {
  const std::int64_t n = a.indices.numel();
  if (n == 0) return;
  launch<make_keys>(Grid{.x = blocks_for(n, kThreads), .threads = kThreads}, current_stream(),
                    Integers(a.indices), n, a.padding_idx, Integers(a.covered),
                    a.keys.ptr<std::int32_t>(),
                    index_errors("embedding", a.indices, a.num_embeddings));
}

}  // namespace lmkern::cuda
