// A block's product of some rows of weights with the rows of a batch. The block's 8 warps divide the
// tiles of 16 rows and, where those are fewer, the depth; their parts are added in a fixed order.
#pragma once
#include "cuda/device/barrier.h"
#include "cuda/device/copy.h"
#include "cuda/warp_tile.h"

namespace lmkern::cuda {

inline constexpr int kProductWarps = 8, kProductThreads = 32 * kProductWarps;
inline constexpr int kMostStages = 4;  // chunks of the operand in shared memory at a time

LMKERN_HOST_DEVICE constexpr int round_up(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Extents of the product, and where its parts lie in shared memory.
template <class S>
struct SliceShape {
  using A = Accumulate<S>;
  static constexpr int kPad = WarpTile<S>::kPad;
  static constexpr int kLeastChunk = 256 / static_cast<int>(sizeof(S));
  int rows, depth, columns;  // columns: rows of the batch
  int chunk = 0;             // of k, staged at a time

  LMKERN_HOST_DEVICE int tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  LMKERN_HOST_DEVICE int splits() const {
    return tiles() >= kProductWarps ? 1 : kProductWarps / tiles();
  }
  LMKERN_HOST_DEVICE int padded_depth() const { return round_up(depth, kTileDepth); }
  LMKERN_HOST_DEVICE int padded_columns() const { return round_up(columns, 8); }
  LMKERN_HOST_DEVICE int weight_stride() const { return padded_depth() + kPad; }
  // Rows of an operand in global memory begin at multiples of 16 bytes.
  LMKERN_HOST_DEVICE int operand_stride() const { return round_up(depth, kPad); }
  LMKERN_HOST_DEVICE int stage_stride() const { return chunk + kPad; }

  LMKERN_HOST_DEVICE std::size_t weight_bytes() const {
    return sizeof(S) * static_cast<std::size_t>(tiles() * kTileRows) * weight_stride();
  }
  LMKERN_HOST_DEVICE int stage_elements() const { return padded_columns() * stage_stride(); }
  LMKERN_HOST_DEVICE int stages() const {
    const int chunks = (padded_depth() + chunk - 1) / chunk;
    return chunks < kMostStages ? chunks : kMostStages;
  }
  LMKERN_HOST_DEVICE std::size_t staged_bytes() const {
    return sizeof(S) * static_cast<std::size_t>(stages()) * stage_elements();
  }
  LMKERN_HOST_DEVICE int partial_stride() const { return padded_columns() + 1; }
  LMKERN_HOST_DEVICE std::size_t partial_bytes() const {
    const std::size_t all =
        sizeof(A) * static_cast<std::size_t>(splits() * tiles() * kTileRows) * partial_stride();
    return (all + 15) / 16 * 16;
  }

  // Takes the largest chunk whose stages fit, at best all of the depth: each costs the latency of the L2
  // cache, and a barrier. False if none does.
  bool fit_chunk(std::size_t bytes) {
    chunk = padded_depth();
    if (staged_bytes() <= bytes) return true;
    const std::size_t row = bytes / (sizeof(S) * kMostStages * padded_columns());
    chunk = static_cast<int>(row < kPad ? 0 : (row - kPad) / kLeastChunk * kLeastChunk);
    return chunk > 0 && staged_bytes() <= bytes;
  }
};

template <class S>
struct SliceProduct {
  using A = Accumulate<S>;
  using Shape = SliceShape<S>;
  Shape shape;
  A* partial;
  bool tf32;  // whether float may be rounded to tf32
  int tiles, splits;
  int tile, split;  // of this warp; tile = -1: none

  LMKERN_DEVICE SliceProduct(const Shape& shape, A* partial, bool tf32)
      : shape(shape),
        partial(partial),
        tf32(tf32),
        tiles(shape.tiles()),
        splits(shape.splits()),
        tile(warp_index() / splits),
        split(warp_index() % splits) {
    if (tile >= tiles) tile = -1;
  }

  // Copies k = first .. first + chunk of the operand's rows to `stage`, zeros beyond its extents; the
  // caller commits and waits.
  LMKERN_DEVICE void stage_operand(S* stage, const S* operand, int first) const {
    constexpr int kWide = Shape::kPad;  // elements in 16 bytes
    const int stride = shape.operand_stride(), rest = shape.padded_depth() - first;
    const int count = rest < shape.chunk ? rest : shape.chunk;
    for (int row = warp_index(); row < shape.padded_columns(); row += kProductWarps)
      for (int k = lane_index() * kWide; k < count; k += 32 * kWide) {
        const int left = row < shape.columns ? shape.depth - first - k : 0;
        const int valid = left <= 0 ? 0 : left >= kWide ? kWide : left;
        const std::int64_t from =
            valid > 0 ? static_cast<std::int64_t>(row) * stride + first + k : 0;
        copy_async<16>(stage + row * shape.stage_stride() + k, operand + from,
                       valid * static_cast<int>(sizeof(S)));
      }
  }

  // acc += this warp's part of a chunk of `count` values of k, a multiple of 16.
  template <bool kTransposed>
  LMKERN_DEVICE void multiply(WarpTile<S>& acc, const S* weights, int weight_stride, const S* stage,
                              int count) const {
    const int steps = count / kTileDepth, per = (steps + splits - 1) / splits;
    const int begin = kTileDepth * per * split;
    const int end = begin + kTileDepth * per < count ? begin + kTileDepth * per : count;
    if (tile < 0 || begin >= end) return;
    const S* const w = kTransposed ? weights + begin * weight_stride + tile * kTileRows
                                   : weights + tile * kTileRows * weight_stride + begin;
    acc.template multiply<kTransposed>(
        {w, stage + begin, weight_stride, shape.stage_stride(), end - begin, shape.columns, tf32});
  }

  // After a barrier, sum() gives the product to every thread.
  LMKERN_DEVICE void store(const WarpTile<S>& acc) const {
    if (tile < 0) return;
    const int stride = shape.partial_stride();
    A* const to = partial + static_cast<std::size_t>(split * tiles + tile) * kTileRows * stride;
    LMKERN_UNROLL
    for (int j = 0; j < kTileColumns / 8; ++j) {
      if (8 * j >= shape.columns) break;
      LMKERN_UNROLL
      for (int i = 0; i < 4; ++i) to[acc.row(i) * stride + acc.column(j, i)] = acc.acc[j][i];
    }
  }

  LMKERN_DEVICE A sum(int row, int column) const {
    const int stride = shape.partial_stride(), part = tiles * kTileRows * stride;
    const A* from = partial + row * stride + column;
    A total = A(0);
    for (int s = 0; s < splits; ++s, from += part) total += *from;
    return total;
  }

  // The whole product with weights that lie in shared memory, [tiles * 16][weight_stride].
  LMKERN_DEVICE void run(const S* weights, S* stages, const S* operand LMKERN_AND_SITE) const {
    WarpTile<S> acc;
    acc.clear();
    const int depth = shape.padded_depth(), chunk = shape.chunk;
    const int elements = shape.stage_elements(), weight_stride = shape.weight_stride();
    LMKERN_UNROLL
    for (int i = 0; i < kMostStages - 1; ++i) {
      if (i * chunk < depth) stage_operand(stages + i * elements, operand, i * chunk);
      copy_commit();
    }
    for (int k = 0, i = 0; k < depth; k += chunk, ++i) {
      copy_wait<kMostStages - 2>(LMKERN_HERE);
      block_barrier(LMKERN_HERE);  // the chunk is there, and all are done with the one before it
      const int next = k + (kMostStages - 1) * chunk;
      if (next < depth)
        stage_operand(stages + (i + kMostStages - 1) % kMostStages * elements, operand, next);
      copy_commit();
      const int count = depth - k < chunk ? depth - k : chunk;
      multiply<false>(acc, weights + k, weight_stride, stages + i % kMostStages * elements, count);
    }
    store(acc);
    block_barrier(LMKERN_HERE);
  }
};

}  // namespace lmkern::cuda
