// One product of a step's operand with weights of any size.
//
// Parallel  a block 64 rows of the result for 64 rows of the batch; its 8 warps are 4 tiles of 16 rows
//           times 2 halves of the depth.
// Traffic   the weights once from the L2 cache (or memory, where they do not fit it): K * M elements,
//           which bounds it for a small batch; the operand once for each 64 rows of the result.
// Limits    none on extents. 16-bit weights whose rows begin at multiples of 16 bytes are copied
//           asynchronously, others element by element.
#include "cuda/step_product.h"

#include "cuda/device/launch.h"
#include "cuda/stream.h"

namespace lmkern::cuda {
namespace {

constexpr int kRows = 4 * kTileRows;

template <class S>
struct StepProductParams {
  const S *weights, *operand;
  Accumulate<S>* out;
  int rows, depth, batch;
  bool vectors;  // rows of the weights begin at multiples of 16 bytes
};

// Copies a chunk of the weights: [64][kChunk] or, transposed, [kChunk][64], zeros beyond the extents.
template <class S, bool kTransposed>
LMKERN_DEVICE void stage_weights(const StepProductParams<S>& p, S* stage, int first_row,
                                 int first_k) {
  using Shape = SliceShape<S>;
  constexpr int kWide = Shape::kPad;
  constexpr int kOuter = kTransposed ? Shape::kChunk : kRows;
  constexpr int kInner = kTransposed ? kRows : Shape::kChunk;
  const int outer_extent = kTransposed ? p.depth : p.rows,
            inner_extent = kTransposed ? p.rows : p.depth;
  const int first_outer = kTransposed ? first_k : first_row,
            first_inner = kTransposed ? first_row : first_k;
  constexpr int kVectors = kInner / kWide;
  for (int i = thread_index(); i < kOuter * kVectors; i += kProductThreads) {
    const int o = i / kVectors, n = i % kVectors * kWide;
    const int left = first_outer + o < outer_extent ? inner_extent - first_inner - n : 0;
    const int valid = left <= 0 ? 0 : left >= kWide ? kWide : left;
    S* const to = stage + o * (kInner + kWide) + n;
    const std::int64_t from =
        valid > 0 ? static_cast<std::int64_t>(first_outer + o) * inner_extent + first_inner + n : 0;
    if (p.vectors) {
      copy_async<16>(to, p.weights + from, valid * static_cast<int>(sizeof(S)));
    } else {
      LMKERN_UNROLL
      for (int e = 0; e < kWide; ++e)
        to[e] = e < valid ? p.weights[from + e] : from_accumulate<S>(Accumulate<S>(0));
    }
  }
}

// registers: 208, spills: 0
template <class S, bool kTransposed>
LMKERN_KERNEL(kProductThreads, 1)
step_product_kernel(StepProductParams<S> p) {
  using Shape = SliceShape<S>;
  using A = Accumulate<S>;
  constexpr int kWeightStride = (kTransposed ? kRows : Shape::kChunk) + Shape::kPad;
  constexpr int kWeightElements = (kTransposed ? Shape::kChunk : kRows) * kWeightStride;
  const int first_row = block_x() * kRows, b0 = block_y() * kTileColumns;
  const int columns = p.batch - b0 < kTileColumns ? p.batch - b0 : kTileColumns;
  const Shape shape{kRows, p.depth, columns};
  S* const weights = shared_memory<S>();
  S* const stages = shared_memory<S>(2 * sizeof(S) * kWeightElements);
  const int stage_elements = kTileColumns * Shape::stage_stride();
  A* const partial = shared_memory<A>(2 * sizeof(S) * (kWeightElements + stage_elements));
  const SliceProduct<S> product{shape, partial};
  const S* const operand = p.operand + static_cast<std::int64_t>(b0) * shape.operand_stride();

  WarpTile<S> acc;
  acc.clear();
  const int depth = shape.padded_depth();
  stage_weights<S, kTransposed>(p, weights, first_row, 0);
  product.stage_operand(stages, operand, 0);
  copy_commit();
  for (int k = 0, turn = 0; k < depth; k += Shape::kChunk, turn ^= 1) {
    if (k + Shape::kChunk < depth) {
      stage_weights<S, kTransposed>(p, weights + (turn ^ 1) * kWeightElements, first_row,
                                    k + Shape::kChunk);
      product.stage_operand(stages + (turn ^ 1) * stage_elements, operand, k + Shape::kChunk);
    }
    copy_commit();
    copy_wait<1>();
    block_barrier();
    const int count = depth - k < Shape::kChunk ? depth - k : Shape::kChunk;
    product.template multiply<kTransposed>(acc, weights + turn * kWeightElements, kWeightStride,
                                           stages + turn * stage_elements, count);
    block_barrier();
  }
  copy_wait<0>();
  product.store(acc);
  block_barrier();
  for (int i = thread_index(); i < kRows * columns; i += kProductThreads) {
    const int row = i % kRows, b = i / kRows;
    if (first_row + row < p.rows)
      p.out[static_cast<std::int64_t>(b0 + b) * p.rows + first_row + row] = product.sum(row, b);
  }
}

}  // namespace

template <class S>
void step_product(const S* weights, int rows, int depth, bool transposed, const S* operand,
                  int batch, Accumulate<S>* out) {
  if (rows == 0 || batch == 0) return;
  using Shape = SliceShape<S>;
  const Shape shape{kRows, depth, kTileColumns};
  const std::size_t stride =
      static_cast<std::size_t>((transposed ? kRows : Shape::kChunk) + Shape::kPad);
  const std::size_t elements =
      static_cast<std::size_t>(transposed ? Shape::kChunk : kRows) * stride +
      static_cast<std::size_t>(kTileColumns) * Shape::stage_stride();
  const std::size_t row_bytes = sizeof(S) * static_cast<std::size_t>(transposed ? rows : depth);
  const StepProductParams<S> p{
      weights,
      operand,
      out,
      rows,
      depth,
      batch,
      row_bytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(weights) % 16 == 0};
  const Grid grid{.x = static_cast<unsigned>((rows + kRows - 1) / kRows),
                  .y = static_cast<unsigned>((batch + kTileColumns - 1) / kTileColumns),
                  .threads = kProductThreads,
                  .shared_bytes = 2 * sizeof(S) * elements + shape.partial_bytes()};
  if (transposed)
    launch<step_product_kernel<S, true>>(grid, current_stream(), p);
  else
    launch<step_product_kernel<S, false>>(grid, current_stream(), p);
}

template void step_product(const float*, int, int, bool, const float*, int, float*);
template void step_product(const double*, int, int, bool, const double*, int, double*);
template void step_product(const bfloat16*, int, int, bool, const bfloat16*, int, float*);
template void step_product(const float16*, int, int, bool, const float16*, int, float*);

}  // namespace lmkern::cuda
