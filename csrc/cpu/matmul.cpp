// Matrix product (csrc/ops/matmul.h) on AMX; other instruction sets leave it to the caller.
//
// Parallel  a grid of threads over rows and columns of out, never over the depth. Panels of b are
//           packed once, by all threads together; a is split by whoever multiplies it.
// Traffic   a and b once; the panels of b, 6 bytes an element, from L2 or L3 once for each
//           kBlockRows rows; out once for each kChunk of depth. Bound by the tile products, but for
//           N < 100 by splitting a (as much work as 50 columns) and reading it.
// Limits    at M < 100 packing b takes as long as multiplying it.
#include "ops/matmul.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "cpu/amx.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

#ifdef __AMX_BF16__
namespace {

constexpr int kPanelTiles = 4;
constexpr std::int64_t kPanelColumns = kPanelTiles * amx::kTile;
constexpr std::int64_t kPanelBlock = amx::kPanelBlock<kPanelTiles>;
constexpr std::int64_t kGrainRows = 2 * amx::kTile;
// What L2 holds beside a panel: 192 rows x 768 of a, 0.9 MB as three planes. Sums of 768 are also
// short enough for their errors not to pile up.
constexpr std::int64_t kBlockRows = 192, kChunk = 768 / amx::kDepth;
// What is packed of b at a time: enough that few barriers are needed, little enough for L3.
constexpr std::int64_t kStageColumns = 4096, kStageElements = 12 << 20;
constexpr std::int64_t kForkFlops = 2'000'000;  // a parallel region costs about 4 us
constexpr std::int64_t kSplitColumns = 50;  // splitting a row costs as much as this many columns

std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }
std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// The size of the parts when n is cut into equal ones of at most `most`, in multiples of `grain`.
std::int64_t equal_part(std::int64_t n, std::int64_t most, std::int64_t grain) {
  return ceil_div(ceil_div(n, ceil_div(n, most)), grain) * grain;
}

// The part of b that is packed at a time.
struct Stage {
  std::int64_t column, columns;  // the first one, and how many
  std::int64_t block, blocks;    // of depth, in units of amx::kDepth
};

struct Multiplication {
  const MatmulArgs& args;
  const float* const a = args.a.ptr<const float>();
  const float* const b = args.b.ptr<const float>();
  const std::int64_t a_stride = args.a.strides[0], b_stride = args.b.strides[0];
  const std::int64_t rows = args.out.shape[0], columns = args.out.shape[1];
  const std::int64_t depth = args.a.shape[args.transpose_a ? 0 : 1];
  const std::int64_t blocks = amx::blocks_of(depth), chunk = equal_part(blocks, kChunk, 1);
  const std::int64_t stage_columns = equal_part(columns, kStageColumns, kPanelColumns);
  const std::int64_t stage_blocks = [this] {
    const std::int64_t chunks =
        kStageElements / (stage_columns / kPanelColumns * kPanelBlock * chunk);
    return least(blocks, (chunks < 1 ? 1 : chunks) * chunk);
  }();
  const std::int64_t plane_stride = amx::plane_stride(chunk * amx::kDepth);
  const std::int64_t plane =
      least(kBlockRows, ceil_div(rows, kGrainRows) * kGrainRows) * plane_stride;
  const int threads = 2 * rows * columns * depth < kForkFlops ? 1 : max_threads();

  struct Seen {
    amx::Magnitude a, b;
  };
  Seen* seen;         // [threads]
  float* bias;        // [columns, padded to whole panels]
  amx::Half* packed;  // [panels of a stage][blocks of a stage][kPanelBlock]
  amx::Half* planes;  // [threads][hi, mid, lo][kBlockRows][plane_stride]

  explicit Multiplication(const MatmulArgs& arguments) : args(arguments) {
    const std::int64_t padded = ceil_div(columns, kPanelColumns) * kPanelColumns;
    const std::int64_t halves =
        stage_columns / kPanelColumns * stage_blocks * kPanelBlock + threads * amx::kPlanes * plane;
    seen = static_cast<Seen*>(thread_scratch(threads * sizeof(Seen) + padded * sizeof(float) +
                                             halves * sizeof(amx::Half)));
    bias = reinterpret_cast<float*>(seen + threads);
    packed = reinterpret_cast<amx::Half*>(bias + padded);
    planes = packed + halves - threads * amx::kPlanes * plane;
    for (std::int64_t i = 0; i < padded; ++i)
      bias[i] = i < columns && args.bias.defined() ? args.bias.ptr<const float>()[i] : 0.0f;
  }

  // Columns from `block` of depth on that exist, of `count` blocks.
  std::int64_t depth_of(std::int64_t block, std::int64_t count) const {
    return least(count * amx::kDepth, depth - block * amx::kDepth);
  }

  static void scan(const TensorView& view, int thread, int of, amx::Magnitude& magnitude) {
    const Range range = thread_range(view.shape[0], 1, thread, of);
    for (std::int64_t i = range.begin; i < range.end; ++i)
      for (std::int64_t j = 0; j < view.shape[1]; j += kLanes<float>)
        magnitude.see(load_n(view.ptr<const float>() + i * view.strides[0] + j,
                             least(kLanes<float>, view.shape[1] - j)));
  }

  bool all_in_range(int of) const {
    float a_most = 0, b_most = 0;
    const auto merge = [](float& most, float value) {  // a NaN comes to stay
      if (most == most && !(value <= most)) most = value;
    };
    for (int i = 0; i < of; ++i) {
      merge(a_most, seen[i].a.largest());
      merge(b_most, seen[i].b.largest());
    }
    return amx::in_range(a_most, b_most, depth);
  }

  void pack(const Stage& stage, int thread, int of, amx::Magnitude& magnitude) const {
    const std::int64_t panels = ceil_div(stage.columns, kPanelColumns);
    const std::int64_t chunks = ceil_div(stage.blocks, chunk);
    const Range range = thread_range(panels * chunks, 1, thread, of);
    for (std::int64_t item = range.begin; item < range.end; ++item) {
      const std::int64_t column = item / chunks * kPanelColumns, block = item % chunks * chunk;
      const std::int64_t width = least(kPanelColumns, stage.columns - column);
      const std::int64_t n = stage.column + column, k = (stage.block + block) * amx::kDepth;
      const std::int64_t length = depth_of(stage.block + block, least(chunk, stage.blocks - block));
      amx::with_tiles(width, [&](auto tiles) {
        constexpr int N = decltype(tiles)::value;
        amx::Half* const to =
            packed + item / chunks * stage.blocks * kPanelBlock + block * amx::kPanelBlock<N>;
        if (!args.transpose_b)
          return amx::pack_panel_from_columns<N>(b + k * b_stride + n, width, b_stride, length, to,
                                                 magnitude);
        const float* from[N];
        std::int64_t counts[N];
        for (int t = 0; t < N; ++t) {
          from[t] = b + (n + t * amx::kTile) * b_stride + k;
          counts[t] = least(amx::kTile, width - t * amx::kTile);
        }
        amx::pack_panel_from_rows<N>(from, counts, b_stride, length, to, magnitude);
      });
    }
  }

  // out[own rows, columns of own panels], over the depth of this stage.
  void multiply(const Stage& stage, Range own, Range panels, amx::Half* split,
                amx::Magnitude& magnitude) const {
    const std::int64_t step =
        own.begin < own.end ? equal_part(own.end - own.begin, kBlockRows, kGrainRows) : 1;
    for (std::int64_t row = own.begin; row < own.end; row += step) {
      const std::int64_t height = least(step, own.end - row);
      for (std::int64_t block = 0; block < stage.blocks; block += chunk) {
        const std::int64_t count = least(chunk, stage.blocks - block);
        const std::int64_t k = (stage.block + block) * amx::kDepth;
        const std::int64_t length = depth_of(stage.block + block, count);
        if (args.transpose_a)
          amx::planes_from_columns(a + k * a_stride + row, a_stride, height, length, split,
                                   plane_stride, plane, magnitude);
        else
          amx::planes_from_rows(a + row * a_stride + k, a_stride, height, length, split,
                                plane_stride, plane, magnitude);
        for (std::int64_t p = panels.begin; p < panels.end; ++p) {
          const std::int64_t column = stage.column + p * kPanelColumns;
          const std::int64_t width = least(kPanelColumns, stage.column + stage.columns - column);
          amx::with_tiles(width, [&](auto tiles) {
            constexpr int N = decltype(tiles)::value;
            amx::multiply_tiles<N>(
                {.rows = height,
                 .columns = width,
                 .k_blocks = count,
                 .a = split,
                 .a_stride = plane_stride,
                 .a_plane = plane,
                 .panel = packed + p * stage.blocks * kPanelBlock + block * amx::kPanelBlock<N>,
                 .bias = k == 0 ? bias + column : nullptr,
                 .out = args.out.ptr<float>() + row * args.out.strides[0] + column,
                 .out_stride = args.out.strides[0],
                 .accumulate = args.accumulate || k > 0});
          });
        }
      }
    }
  }

  // How many parts of the rows: the grid whose largest part is least work.
  int parts_of_rows(std::int64_t panels, int of) const {
    int best = 1;
    std::int64_t least_cost = INT64_MAX;
    for (int down = 1; down <= of; ++down) {
      if (of % down != 0) continue;
      const std::int64_t height = ceil_div(ceil_div(rows, kGrainRows), down) * kGrainRows;
      const std::int64_t width = ceil_div(panels, of / down) * kPanelColumns;
      if (height * (width + kSplitColumns) < least_cost) {
        least_cost = height * (width + kSplitColumns);
        best = down;
      }
    }
    return best;
  }

  bool run() const {
    Barrier barrier;
    parallel(threads, [&](int thread, int of) {
      Seen own{};
      if (args.accumulate) {  // nothing may be added before everything is known to be in range
        scan(args.a, thread, of, own.a);
        scan(args.b, thread, of, own.b);
        seen[thread] = own;
        barrier.wait(of);
        if (!all_in_range(of)) return;
      }
      const amx::TileRegisters registers;
      amx::Half* const split = planes + thread * amx::kPlanes * plane;
      for (std::int64_t n = 0; n < columns; n += stage_columns)
        for (std::int64_t k = 0; k < blocks; k += stage_blocks) {
          const Stage stage{n, least(stage_columns, columns - n), k,
                            least(stage_blocks, blocks - k)};
          const std::int64_t panels = ceil_div(stage.columns, kPanelColumns);
          const int down = parts_of_rows(panels, of), across = of / down;
          pack(stage, thread, of, own.b);
          barrier.wait(of);
          multiply(stage, thread_range(rows, kGrainRows, thread / across, down),
                   thread_range(panels, 1, thread % across, across), split, own.a);
          barrier.wait(of);
        }
      seen[thread] = own;
    });
    return all_in_range(threads);
  }
};

}  // namespace

bool matmul(const MatmulArgs& a) {
  if (a.out.numel() == 0 || a.a.numel() == 0) return false;
  return Multiplication(a).run();
}
#else
bool matmul(const MatmulArgs&) { return false; }
#endif

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
