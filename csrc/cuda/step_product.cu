// One product of a step's operand with weights of any size.
//
// Parallel  a block 64 rows of the result for 64 rows of the batch, its 8 warps 4 tiles of 16 rows times
//           2 halves of the depth; or 16 rows, and 8 parts of the depth, where those blocks would not
//           fill the device.
// Traffic   the weights once from the L2 cache (or memory, where they do not fit it): K * M elements,
//           which bounds it for a small batch; the operand once for each 64 (16) rows of the result.
// Limits    none on extents. 16-bit weights whose rows begin at multiples of 16 bytes are copied
//           asynchronously, others element by element.
#include "cuda/step_product.h"

#include <algorithm>

#include "cuda/device/launch.h"
#include "cuda/stream.h"

namespace lmkern::cuda {
namespace {

template <class S>
struct StepProductParams {
  const S *weights, *operand;
  Accumulate<S>* out;
  int rows, depth, batch;
  bool vectors;  // rows of the weights begin at multiples of 16 bytes
  bool tf32;
};

// A block's part of the weights in shared memory, a chunk of the depth: [kRows][kChunk] or, transposed,
// [kChunk][kRows].
template <class S, bool kTransposed, int kTiles>
struct StepStage {
  static constexpr int kRows = kTiles * kTileRows, kChunk = SliceShape<S>::kLeastChunk,
                       kWide = SliceShape<S>::kPad;
  static constexpr int kOuter = kTransposed ? kChunk : kRows, kInner = kTransposed ? kRows : kChunk;
  static constexpr int kStride = kInner + kWide, kElements = kOuter * kStride;

  static SliceShape<S> shape(int depth, int columns) { return {kRows, depth, columns, kChunk}; }
  static std::size_t operand_elements() {
    return static_cast<std::size_t>(shape(1, kTileColumns).stage_elements());
  }
  // What the warps add up lies where the stages were.
  static std::size_t shared_bytes() {
    return std::max(2 * sizeof(S) * (kElements + operand_elements()),
                    shape(1, kTileColumns).partial_bytes());
  }

  // Copies the chunk that begins at first_k, zeros beyond the extents.
  static LMKERN_DEVICE void load(const StepProductParams<S>& p, S* stage, int first_row,
                                 int first_k) {
    const int outer_extent = kTransposed ? p.depth : p.rows,
              inner_extent = kTransposed ? p.rows : p.depth;
    const int first_outer = kTransposed ? first_k : first_row,
              first_inner = kTransposed ? first_row : first_k;
    constexpr int kVectors = kInner / kWide;
    for (int i = thread_index(); i < kOuter * kVectors; i += kProductThreads) {
      const int o = i / kVectors, n = i % kVectors * kWide;
      const int left = first_outer + o < outer_extent ? inner_extent - first_inner - n : 0;
      const int valid = left <= 0 ? 0 : left >= kWide ? kWide : left;
      S* const to = stage + o * kStride + n;
      const std::int64_t from =
          valid > 0 ? static_cast<std::int64_t>(first_outer + o) * inner_extent + first_inner + n
                    : 0;
      if (p.vectors) {
        copy_async<16>(to, p.weights + from, valid * static_cast<int>(sizeof(S)));
      } else {
        LMKERN_UNROLL
        for (int e = 0; e < kWide; ++e)
          to[e] = e < valid ? p.weights[from + e] : from_accumulate<S>(Accumulate<S>(0));
      }
    }
  }
};

// registers: 240, spills: 0
template <class S, bool kTransposed, int kTiles>
LMKERN_KERNEL(kProductThreads, 1)
step_product_kernel(StepProductParams<S> p) {
  using Stage = StepStage<S, kTransposed, kTiles>;
  using A = Accumulate<S>;
  constexpr int kChunk = Stage::kChunk;
  const int first_row = block_x() * Stage::kRows, b0 = block_y() * kTileColumns;
  const int columns = p.batch - b0 < kTileColumns ? p.batch - b0 : kTileColumns;
  const SliceShape<S> shape{Stage::kRows, p.depth, columns, kChunk};
  S* const weights = shared_memory<S>();
  S* const stages = weights + 2 * Stage::kElements;
  const int stage_elements = kTileColumns * shape.stage_stride();
  const SliceProduct<S> product(shape, shared_memory<A>(), p.tf32);
  const S* const operand = p.operand + static_cast<std::int64_t>(b0) * shape.operand_stride();

  WarpTile<S> acc;
  acc.clear();
  const int depth = shape.padded_depth();
  Stage::load(p, weights, first_row, 0);
  product.stage_operand(stages, operand, 0);
  copy_commit();
  for (int k = 0, turn = 0; k < depth; k += kChunk, turn ^= 1) {
    if (k + kChunk < depth) {
      Stage::load(p, weights + (turn ^ 1) * Stage::kElements, first_row, k + kChunk);
      product.stage_operand(stages + (turn ^ 1) * stage_elements, operand, k + kChunk);
    }
    copy_commit();
    copy_wait<1>();
    block_barrier();
    const int count = depth - k < kChunk ? depth - k : kChunk;
    product.template multiply<kTransposed>(acc, weights + turn * Stage::kElements, Stage::kStride,
                                           stages + turn * stage_elements, count);
    block_barrier();
  }
  product.store(acc);
  block_barrier();
  for (int i = thread_index(); i < Stage::kRows * columns; i += kProductThreads) {
    const int row = i % Stage::kRows, b = i / Stage::kRows;
    if (first_row + row < p.rows)
      p.out[static_cast<std::int64_t>(b0 + b) * p.rows + first_row + row] = product.sum(row, b);
  }
}

template <class S, bool kTransposed, int kTiles>
void launch_step_product(const StepProductParams<S>& p) {
  using Stage = StepStage<S, kTransposed, kTiles>;
  launch<step_product_kernel<S, kTransposed, kTiles>>(
      Grid{.x = static_cast<unsigned>((p.rows + Stage::kRows - 1) / Stage::kRows),
           .y = static_cast<unsigned>((p.batch + kTileColumns - 1) / kTileColumns),
           .threads = kProductThreads,
           .shared_bytes = Stage::shared_bytes()},
      current_stream(), p);
}

}  // namespace

template <class S>
void step_product(const S* weights, int rows, int depth, bool transposed, const S* operand,
                  int batch, Accumulate<S>* out, bool tf32) {
  if (rows == 0 || batch == 0) return;
  const std::size_t row_bytes = sizeof(S) * static_cast<std::size_t>(transposed ? rows : depth);
  const bool vectors = row_bytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(weights) % 16 == 0;
  const StepProductParams<S> p{weights, operand, out, rows, depth, batch, vectors, tf32};
  const int wide_blocks = (rows + 63) / 64 * ((batch + kTileColumns - 1) / kTileColumns);
  const bool narrow = wide_blocks < device_limits().multiprocessors;
  if (transposed && narrow)
    launch_step_product<S, true, 1>(p);
  else if (transposed)
    launch_step_product<S, true, 4>(p);
  else if (narrow)
    launch_step_product<S, false, 1>(p);
  else
    launch_step_product<S, false, 4>(p);
}

template void step_product(const float*, int, int, bool, const float*, int, float*, bool);
template void step_product(const double*, int, int, bool, const double*, int, double*, bool);
template void step_product(const bfloat16*, int, int, bool, const bfloat16*, int, float*, bool);
template void step_product(const float16*, int, int, bool, const float16*, int, float*, bool);

}  // namespace lmkern::cuda
