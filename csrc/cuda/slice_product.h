// A block's product of some rows of weights with the rows of a batch. The block's 8 warps divide the
// tiles of 16 rows and, where those are fewer, the depth; their parts are added in a fixed order.
#pragma once
#include "cuda/device/barrier.h"
#include "cuda/device/copy.h"
#include "cuda/warp_tile.h"

namespace lmkern::cuda {

inline constexpr int kProductWarps = 8, kProductThreads = 32 * kProductWarps;

LMKERN_HOST_DEVICE constexpr int round_up(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Extents of the product, and where its parts lie in shared memory.
template <class S>
struct SliceShape {
  using A = Accumulate<S>;
  static constexpr int kPad = WarpTile<S>::kPad;
  // Of k, staged at a time: two of these hide the latency of reading from the L2 cache.
  static constexpr int kChunk = 256 / static_cast<int>(sizeof(S));
  int rows, depth, columns;  // columns: rows of the batch

  LMKERN_HOST_DEVICE int tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  LMKERN_HOST_DEVICE int splits() const {
    return tiles() >= kProductWarps ? 1 : kProductWarps / tiles();
  }
  LMKERN_HOST_DEVICE int padded_depth() const { return round_up(depth, 16); }
  LMKERN_HOST_DEVICE int padded_columns() const { return round_up(columns, 8); }
  LMKERN_HOST_DEVICE int weight_stride() const { return padded_depth() + kPad; }
  // Rows of an operand in global memory begin at multiples of 16 bytes.
  LMKERN_HOST_DEVICE int operand_stride() const { return round_up(depth, kPad); }
  static LMKERN_HOST_DEVICE constexpr int stage_stride() { return kChunk + kPad; }

  LMKERN_HOST_DEVICE std::size_t weight_bytes() const {
    return sizeof(S) * static_cast<std::size_t>(tiles() * kTileRows) * weight_stride();
  }
  LMKERN_HOST_DEVICE std::size_t stage_bytes() const {
    return sizeof(S) * static_cast<std::size_t>(padded_columns()) * stage_stride();
  }
  LMKERN_HOST_DEVICE int partial_stride() const { return padded_columns() + 1; }
  LMKERN_HOST_DEVICE std::size_t partial_bytes() const {
    const std::size_t all =
        sizeof(A) * static_cast<std::size_t>(splits() * tiles() * kTileRows) * partial_stride();
    return (all + 15) / 16 * 16;
  }
};

template <class S>
struct SliceProduct {
  using A = Accumulate<S>;
  using Shape = SliceShape<S>;
  Shape shape;
  A* partial;

  // Copies k = first .. first + kChunk of the operand's rows to `stage`, zeros beyond its extents; the
  // caller commits and waits.
  LMKERN_DEVICE void stage_operand(S* stage, const S* operand, int first) const {
    constexpr int kWide = Shape::kPad;  // elements in 16 bytes
    constexpr int kVectors = Shape::kChunk / kWide;
    const int stride = shape.operand_stride();
    for (int i = thread_index(); i < shape.padded_columns() * kVectors; i += kProductThreads) {
      const int row = i / kVectors, k = i % kVectors * kWide;
      const int left = row < shape.columns ? shape.depth - first - k : 0;
      const int valid = left <= 0 ? 0 : left >= kWide ? kWide : left;
      const std::int64_t from = valid > 0 ? static_cast<std::int64_t>(row) * stride + first + k : 0;
      copy_async<16>(stage + row * Shape::stage_stride() + k, operand + from,
                     valid * static_cast<int>(sizeof(S)));
    }
  }

  // The tile of this warp, or -1, and its part of the depth.
  LMKERN_DEVICE int tile() const {
    const int own = warp_index() / shape.splits();
    return own < shape.tiles() && own < kProductWarps / shape.splits() ? own : -1;
  }
  LMKERN_DEVICE int split() const { return warp_index() % shape.splits(); }

  // acc += this warp's part of a chunk of `count` values of k, a multiple of 16.
  template <bool kTransposed>
  LMKERN_DEVICE void multiply(WarpTile<S>& acc, const S* weights, int weight_stride, const S* stage,
                              int count) const {
    const int splits = shape.splits(), own = tile();
    const int steps = count / 16, per = (steps + splits - 1) / splits;
    const int begin = 16 * per * split();
    const int end = begin + 16 * per < count ? begin + 16 * per : count;
    if (own < 0 || begin >= end) return;
    const S* const w = kTransposed ? weights + begin * weight_stride + own * kTileRows
                                   : weights + own * kTileRows * weight_stride + begin;
    acc.template multiply<kTransposed>(w, weight_stride, stage + begin, Shape::stage_stride(),
                                       end - begin, shape.padded_columns());
  }

  // After a barrier, sum() gives the product to every thread.
  LMKERN_DEVICE void store(const WarpTile<S>& acc) const {
    const int own = tile();
    if (own < 0) return;
    A* const to = partial + static_cast<std::size_t>(split() * shape.tiles() + own) * kTileRows *
                                shape.partial_stride();
    LMKERN_UNROLL
    for (int j = 0; j < kTileColumns / 8; ++j) {
      if (8 * j >= shape.padded_columns()) break;
      LMKERN_UNROLL
      for (int i = 0; i < 4; ++i)
        to[acc.row(i) * shape.partial_stride() + acc.column(j, i)] = acc.acc[j][i];
    }
  }

  LMKERN_DEVICE A sum(int row, int column) const {
    A total = A(0);
    for (int s = 0; s < shape.splits(); ++s)
      total += partial[(static_cast<std::size_t>(s) * shape.tiles() * kTileRows + row) *
                           shape.partial_stride() +
                       column];
    return total;
  }

  // The whole product with weights that lie in shared memory, [tiles * 16][weight_stride]; `stages`: two.
  LMKERN_DEVICE void run(const S* weights, S* stages, const S* operand LMKERN_AND_SITE) const {
    WarpTile<S> acc;
    acc.clear();
    const int depth = shape.padded_depth();
    const int stage_elements = shape.padded_columns() * Shape::stage_stride();
    stage_operand(stages, operand, 0);
    copy_commit();
    for (int k = 0, turn = 0; k < depth; k += Shape::kChunk, turn ^= 1) {
      if (k + Shape::kChunk < depth)
        stage_operand(stages + (turn ^ 1) * stage_elements, operand, k + Shape::kChunk);
      copy_commit();
      copy_wait<1>(LMKERN_HERE);
      block_barrier(LMKERN_HERE);
      const int count = depth - k < Shape::kChunk ? depth - k : Shape::kChunk;
      multiply<false>(acc, weights + k, shape.weight_stride(), stages + turn * stage_elements,
                      count);
      block_barrier(LMKERN_HERE);
    }
    copy_wait<0>(LMKERN_HERE);
    store(acc);
    block_barrier(LMKERN_HERE);
  }
};

}  // namespace lmkern::cuda
