// Gradient of token + position + segment, norm and dropout (csrc/ops/token_position.h).
//
// Parallel  a block for 16 to 64 rows that follow each other position by position, as in forward; a thread
//           for 16 bytes of columns of all of them, so that it sums d_weight, d_bias and d_position alone.
//           Two rows go through it together, with one barrier for their two sums. What blocks have
//           summed, add_parts adds in their order. Which rows a block has follows from N and L: same bits
//           on any GPU.
// Traffic   2 N D read (tokens, d_out; without a norm d_out alone) and N D written; of each block's rows 2
//           partial sums in float, written and read: 2 to 8 % of that. Bound by memory.
// Limits    rows wider than 512 threads' pieces (2 K floats, 4 K of 16 bits, 512 without 16-byte
//           alignment) go one by one, are added up twice, and their sums are kept in memory rather than in
//           registers. Some thousand rows are too few for the bandwidth: N / 16 blocks.
#include "core/dispatch.h"
#include "cuda/column_sums.h"
#include "cuda/dropout.h"
#include "cuda/kernels.h"
#include "cuda/norm_row.h"
#include "cuda/stream.h"
#include "cuda/token_position.h"

namespace lmkern::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr std::int64_t kLeastRows = 16, kMostRows = 64, kWantedBlocks = 1024;

// The rows of each block.
struct BlockRows {
  std::int64_t rows, repeats;  // N, and of a position
  std::int64_t pieces;         // blocks that share a position; 1: a block has whole positions
  std::int64_t size;           // rows of a block, of a position's last block at most that
  std::int64_t blocks;

  BlockRows(std::int64_t rows, std::int64_t length)
      : rows(rows), repeats(length > 0 ? rows / length : 0), pieces(1), size(0), blocks(0) {
    if (rows == 0) return;
    size = std::clamp((rows + kWantedBlocks - 1) / kWantedBlocks, kLeastRows, kMostRows);
    if (repeats > size) {
      pieces = (repeats + size - 1) / size;
      blocks = length * pieces;
    } else {
      size = size / repeats * repeats;
      blocks = (rows + size - 1) / size;
    }
  }
  // In the order of RowOrder.
  LMKERN_DEVICE std::int64_t begin(std::int64_t block) const {
    if (pieces == 1) return block * size;
    return block / pieces * repeats + block % pieces * size;
  }
  LMKERN_DEVICE std::int64_t end(std::int64_t block) const {
    const std::int64_t past = begin(block) + size;
    const std::int64_t most = pieces == 1 ? rows : (block / pieces + 1) * repeats;
    return past < most ? past : most;
  }
};

template <class S>
struct BackwardRows {
  using T = Accumulate<S>;
  AddedRows<S> tables;
  RowOrder order;
  BlockRows blocks;
  std::int64_t width;
  const S* d_out;
  const T* statistics;  // [2 or 1, N]; null: no norm
  bool centred;
  NormParameter<S> weight;
  DropoutRule<T> dropout;
  S *d_sum, *d_position;  // null: not wanted
  // [blocks, D]: what the blocks have summed; null: not wanted. That of positions is needed where blocks
  // share one, or a thread has several pieces of columns.
  T *weight_parts, *bias_parts, *position_parts;
};

// One of a block's sums over rows: in registers if a thread has one piece of columns, else where the parts
// are.
template <class T, int kVec, bool kOne>
struct BlockSum {
  T* part;  // of this block, null: not wanted
  T at[kVec];

  LMKERN_DEVICE void clear(std::int64_t column) {
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) at[i] = T(0);
    if (!kOne) write(column);
  }
  LMKERN_DEVICE void read(std::int64_t column) {
    if (part == nullptr) return;
    Piece<T, kVec> piece;
    piece.load(part + column);
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) at[i] = piece.at[i];
  }
  LMKERN_DEVICE void write(std::int64_t column) const {
    if (part == nullptr) return;
    Piece<T, kVec> piece;
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i) piece.at[i] = at[i];
    piece.store(part + column);
  }
};

// A piece of a row: g = d_out keep, and the normalised sum.
template <class T, int kVec>
struct GradientPiece {
  T g[kVec], xhat[kVec];
};

template <class T, bool kOne>  // two, where registers suffice
inline constexpr int kRowsTogether = kOne && sizeof(T) == 4 ? 2 : 1;

// kOne: a thread has at most one piece of a row's columns.
// registers: 128, spills: 16
template <class S, int kVec, bool kOne>
LMKERN_KERNEL(kMostThreads, 1)
row_gradients(BackwardRows<S> r) {
  using T = Accumulate<S>;
  constexpr int kTogether = kRowsTogether<T, kOne>;
  const std::int64_t begin = r.blocks.begin(block_x()), end = r.blocks.end(block_x());
  const std::int64_t first = std::int64_t{thread_index()} * kVec;
  const std::int64_t step = std::int64_t{thread_count()} * kVec;
  const bool norm = r.statistics != nullptr;
  const Dropout<T> dropout(r.dropout);
  const auto part = [&](T* parts) {
    return parts == nullptr ? nullptr : parts + block_x() * r.width;
  };
  BlockSum<T, kVec, kOne> weight_sum{part(r.weight_parts), {}}, bias_sum{part(r.bias_parts), {}},
      position_sum{part(r.position_parts), {}};
  const auto each_column = [&](const auto& f) {
    if constexpr (kOne) {
      if (first < r.width) f(first);
    } else {
      for (std::int64_t column = first; column < r.width; column += step) f(column);
    }
  };
  each_column([&](std::int64_t column) {
    weight_sum.clear(column);
    bias_sum.clear(column);
    position_sum.clear(column);
  });

  for (std::int64_t k = begin; k < end; k += kTogether) {
    RowOrder::Place place[kTogether];
    Addends<S> addends[kTogether];
    T mean[kTogether], rstd[kTogether];
    LMKERN_UNROLL
    for (int j = 0; j < kTogether; ++j) {
      place[j] = r.order.at(k + j < end ? k + j : k);
      if (!norm) continue;
      addends[j] = r.tables.at(place[j].n, place[j].l, thread_index() == 0 && k + j < end);
      mean[j] = r.centred ? r.statistics[place[j].n] : T(0);
      rstd[j] = r.statistics[(r.centred ? r.blocks.rows : 0) + place[j].n];
    }
    Piece<S, kVec> d_out[kTogether], tokens[kTogether];
    const auto read = [&](int j, std::int64_t column) {
      d_out[j].load(r.d_out + place[j].n * r.width + column);
      if (norm) tokens[j].load(addends[j].token + column);
    };
    const auto convert = [&](int j, std::int64_t column, GradientPiece<T, kVec>& p) {
      const std::int64_t flat = place[j].n * r.width + column;
      if (norm) addends[j].add(column, tokens[j], p.xhat);
      LMKERN_UNROLL
      for (int i = 0; i < kVec; ++i) {
        p.g[i] = to_accumulate(d_out[j].at[i]);
        p.xhat[i] = norm ? (p.xhat[i] - mean[j]) * rstd[j] : T(0);
      }
      dropout.apply(flat, p.g);
    };

    GradientPiece<T, kVec> held[kTogether];
    T sums[2 * kTogether];  // of g weight, and of that times xhat
    LMKERN_UNROLL
    for (int i = 0; i < 2 * kTogether; ++i) sums[i] = T(0);
    if (norm || kOne) {
      each_column([&](std::int64_t column) {
        T weight[kVec];
        r.weight.load(column, T(1), weight);
        LMKERN_UNROLL
        for (int j = 0; j < kTogether; ++j) read(j, column);  // before the first is awaited
        LMKERN_UNROLL
        for (int j = 0; j < kTogether; ++j) {
          convert(j, column, held[j]);
          LMKERN_UNROLL
          for (int i = 0; i < kVec; ++i) {
            const T g = held[j].g[i] * weight[i];
            sums[2 * j] += g;
            sums[2 * j + 1] += g * held[j].xhat[i];
          }
        }
      });
    }
    if (norm) {
      // Two places in turn: a sum is read until the barrier of the next.
      const bool odd = ((k - begin) / kTogether & 1) != 0;
      row_sums<true>(sums, shared_memory<T>() + (odd ? 2 * kTogether * warp_count() : 0));
      LMKERN_UNROLL
      for (int i = 0; i < 2 * kTogether; ++i)
        sums[i] = i % 2 == 0 && !r.centred ? T(0) : sums[i] / static_cast<T>(r.width);
    }

    each_column([&](std::int64_t column) {
      T weight[kVec];
      r.weight.load(column, T(1), weight);
      LMKERN_UNROLL
      for (int j = 0; j < kTogether; ++j) {
        if (k + j >= end) continue;
        GradientPiece<T, kVec>& p = held[j];
        if constexpr (!kOne) {
          read(j, column);
          convert(j, column, p);
          weight_sum.read(column);
          bias_sum.read(column);
          position_sum.read(column);
        }
        Piece<S, kVec> d_sum;
        LMKERN_UNROLL
        for (int i = 0; i < kVec; ++i) {
          weight_sum.at[i] += p.g[i] * p.xhat[i];
          bias_sum.at[i] += p.g[i];
          T d = p.g[i];
          if (norm) d = (d * weight[i] - sums[2 * j] - p.xhat[i] * sums[2 * j + 1]) * rstd[j];
          position_sum.at[i] += d;
          d_sum.at[i] = from_accumulate<S>(d);
        }
        if (r.d_sum != nullptr) d_sum.store(r.d_sum + place[j].n * r.width + column);
        // The last row of a position.
        if (r.d_position != nullptr && r.blocks.pieces == 1 &&
            place[j].n + r.order.length >= r.blocks.rows) {
          Piece<S, kVec> d_position;
          LMKERN_UNROLL
          for (int i = 0; i < kVec; ++i) d_position.at[i] = from_accumulate<S>(position_sum.at[i]);
          d_position.store(r.d_position + place[j].l * r.width + column);
          position_sum.clear(column);
        } else if constexpr (!kOne) {
          position_sum.write(column);
        }
        if constexpr (!kOne) {
          weight_sum.write(column);
          bias_sum.write(column);
        }
      }
    });
  }
  if constexpr (kOne) {
    each_column([&](std::int64_t column) {
      weight_sum.write(column);
      bias_sum.write(column);
      position_sum.write(column);
    });
  }
}

template <class S, int kVec>
void launch_row_gradients(BackwardRows<S> r) {
  using T = Accumulate<S>;
  const std::int64_t columns = r.width / kVec;
  const bool one = columns <= kMostThreads;
  if (one && r.blocks.pieces == 1) r.position_parts = nullptr;
  const int threads = one ? static_cast<int>((columns + 31) / 32 * 32) : kMostThreads;
  const int together = one ? kRowsTogether<T, true> : 1;
  const Grid grid{.x = static_cast<unsigned>(r.blocks.blocks),
                  .threads = threads,
                  .shared_bytes = 2 * 2 * together * sizeof(T) * threads / 32};
  if (one)
    launch<row_gradients<S, kVec, true>>(grid, current_stream(), r);
  else
    launch<row_gradients<S, kVec, false>>(grid, current_stream(), r);
}

template <class S>
void backward(const TokenPositionBackwardArgs& a) {
  using T = Accumulate<S>;
  const std::int64_t rows = a.d_out.shape[0], width = a.d_out.shape[1], length = a.rows.length;
  const BlockRows blocks(rows, length);
  T* parts = a.workspace.ptr<T>();
  const auto take = [&](const TensorView& wanted) -> T* {
    if (!wanted.defined()) return nullptr;
    T* const taken = parts;
    parts += blocks.blocks * width;
    return taken;
  };
  T *const weight_parts = take(a.d_weight), *const bias_parts = take(a.d_bias),
           *const position_parts = take(a.d_position);
  if (rows > 0 && width > 0) {
    const BackwardRows<S> r{AddedRows<S>("token_position_backward", a.rows),
                            RowOrder(rows, length),
                            blocks,
                            width,
                            a.d_out.ptr<const S>(),
                            a.statistics.ptr<const T>(),
                            a.statistics.defined() && a.statistics.shape[0] == 2,
                            NormParameter<S>(a.weight),
                            DropoutRule<T>(a.dropout_p, a.seed),
                            a.d_sum.ptr<S>(),
                            a.d_position.ptr<S>(),
                            weight_parts,
                            bias_parts,
                            position_parts};
    if (is_wide<S>(width, {&a.d_out, &a.rows.token, &a.rows.position, &a.rows.segment, &a.weight,
                           &a.d_sum, &a.d_position, &a.workspace}))
      launch_row_gradients<S, kWide<S>>(r);
    else
      launch_row_gradients<S, 1>(r);
  }
  if (a.d_weight.defined())
    launch_add_parts<T>(weight_parts, a.d_weight.ptr<T>(), 1, blocks.blocks, width);
  if (a.d_bias.defined())
    launch_add_parts<T>(bias_parts, a.d_bias.ptr<T>(), 1, blocks.blocks, width);
  if (a.d_position.defined() && (blocks.pieces > 1 || rows == 0))
    launch_add_parts<S>(position_parts, a.d_position.ptr<S>(), length,
                        rows == 0 ? 0 : blocks.pieces, width);
}

}  // namespace

std::int64_t token_position_workspace(std::int64_t rows, std::int64_t length, std::int64_t width,
                                      int sums, bool is_double) {
  return BlockRows(rows, length).blocks * width * sums * (is_double ? 8 : 4);
}

void Kernels::token_position_backward(const TokenPositionBackwardArgs& a) {
  dispatch_float_types(a.d_out.dtype,
                       [&](auto storage) { backward<typename decltype(storage)::type>(a); });
}

}  // namespace lmkern::cuda
