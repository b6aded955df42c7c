// The product of a recurrent step, out = operand weights + bias, over panels of N vectors of columns.
//
// Weights are packed once for all steps. The operand is written by the epilogue of the step before, so
// there are two of them. Two forms, chosen once per call:
//   vectors  csrc/cpu/gemm.h: panels in W, a storage type or what it accumulates in; any batch
//   tiles    csrc/cpu/amx.h: float32 in three bfloat16 planes each, where the processor has tiles and
//            the batch fills them. Six bytes a weight, 2.7 times the rate of FMA
#pragma once
#include "core/memory.h"
#include "core/parallel.h"
#include "cpu/amx.h"
#include "cpu/gemm.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

template <class A, class B>
inline constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

// Whether products of this storage type may run on tiles.
template <class S>
#ifdef __AMX_BF16__
inline constexpr bool kTilesFor = kSame<S, float>;
#else
inline constexpr bool kTilesFor = false;
namespace amx {
struct TileRegisters {
  LMKERN_INLINE explicit TileRegisters(bool) {}
  LMKERN_INLINE ~TileRegisters() {}
};
}  // namespace amx
#endif

// Whether a batch gains from tiles: they have 16 rows, used or not.
LMKERN_INLINE bool fills_tiles(std::int64_t batch) { return batch >= 10; }

template <class S, class W, int N>
class StepProduct {
  using T = Accumulate<S>;

 public:
  static constexpr std::int64_t kColumns = N * kLanes<T>;  // of a panel

  LMKERN_INLINE void place(Scratch& scratch, std::int64_t rows, std::int64_t depth,
                           std::int64_t panels, bool tiles) {
    depth_ = depth;
    tiles_ = tiles;
    bias_ = scratch.take<T>(panels * kColumns);
    if constexpr (kTilesFor<S>) {
      if (tiles) {
        stride_ = amx::plane_stride(depth);
        plane_ = (rows + 15) / 16 * 16 * stride_;
        tile_panels_ = scratch.take<std::uint16_t>(panels * panel_size());
        for (auto*& planes : planes_) planes = scratch.take<std::uint16_t>(3 * plane_);
        return;
      }
    }
    stride_ = (depth + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    packed_ = scratch.take<W>(panels * depth * kColumns);
    for (T*& operand : operands_) operand = scratch.take<T>(rows * stride_);
  }

  // A panel from a matrix whose rows are columns here: `counts[j]` rows from rows[j] on make vector j.
  LMKERN_INLINE void pack_rows(std::int64_t panel, const S* const (&rows)[N],
                               const std::int64_t (&counts)[N], std::int64_t stride) {
    if constexpr (kTilesFor<S>) {
      if (tiles_) {
        amx::Magnitude unused;
        amx::pack_panel_from_rows<N>(rows, counts, stride, depth_,
                                     tile_panels_ + panel * panel_size(), unused);
        return;
      }
    }
    for (int j = 0; j < N; ++j)
      transpose_into(rows[j], stride, counts[j], kLanes<T>, depth_,
                     packed_ + panel * depth_ * kColumns + j * kLanes<T>, kColumns);
  }
  // A panel from a matrix that has the columns (`count` of them) side by side.
  LMKERN_INLINE void pack_columns(std::int64_t panel, const S* from, std::int64_t count,
                                  std::int64_t stride) {
    if constexpr (kTilesFor<S>) {
      if (tiles_) {
        amx::Magnitude unused;
        amx::pack_panel_from_columns<N>(from, count, stride, depth_,
                                        tile_panels_ + panel * panel_size(), unused);
        return;
      }
    }
    W* const to = packed_ + panel * depth_ * kColumns;
    for (std::int64_t k = 0; k < depth_; ++k)
      for (int j = 0; j < N; ++j) {
        const std::int64_t left = count - j * kLanes<T>;
        const std::int64_t n = left < 0 ? 0 : left < kLanes<T> ? left : kLanes<T>;
        store(to + k * kColumns + j * kLanes<T>, load_n(from + k * stride + j * kLanes<T>, n));
      }
  }
  LMKERN_INLINE void set_bias(std::int64_t panel, int j, Vec<T> bias) {
    store(bias_ + panel * kColumns + j * kLanes<T>, bias);
  }

  // Before the first set_operand of these rows.
  LMKERN_INLINE void clear_padding(Range rows) {
    if constexpr (kTilesFor<S>)
      for (std::int64_t b = rows.begin; tiles_ && b < rows.end; ++b)
        for (auto* planes : planes_)
          for (int p = 0; p < 3; ++p)
            __builtin_memset(planes + p * plane_ + b * stride_ + depth_, 0,
                             (stride_ - depth_) * sizeof *planes);
  }
  LMKERN_INLINE void set_operand(int slot, std::int64_t row, std::int64_t k, Vec<T> v,
                                 std::int64_t n) {
    if constexpr (kTilesFor<S>)
      if (tiles_) return amx::store_planes_n(v, n, planes_[slot] + row * stride_ + k, plane_);
    store_n(operands_[slot] + row * stride_ + k, v, n);
  }

  // nonzero: false where the operand is known to be zero. Tiles need TileRegisters, and rows.begin a
  // multiple of 16.
  LMKERN_INLINE void multiply(int slot, Range rows, std::int64_t panel, bool nonzero, T* out) const {
    if constexpr (kTilesFor<S>)
      if (tiles_)
        return multiply_on_tiles({.rows = rows.end - rows.begin,
                                  .columns = kColumns,
                                  .k_blocks = nonzero ? amx::blocks_of(depth_) : 0,
                                  .a = planes_[slot] + rows.begin * stride_,
                                  .a_stride = stride_,
                                  .a_plane = plane_,
                                  .panel = tile_panels_ + panel * panel_size(),
                                  .bias = bias_ + panel * kColumns,
                                  .out = out,
                                  .out_stride = kColumns,
                                  .accumulate = false});
    multiply_panel<N, T, W>(rows.end - rows.begin, nonzero ? depth_ : 0,
                            operands_[slot] + rows.begin * stride_, stride_,
                            packed_ + panel * depth_ * kColumns, bias_ + panel * kColumns, out);
  }

 private:
  // Out of line, as multiply_panel is.
  template <class P>
  static __attribute__((noinline)) void multiply_on_tiles(const P& product) {
    amx::multiply_tiles<N>(product);
  }
  LMKERN_INLINE std::int64_t panel_size() const {
    return (depth_ + 31) / 32 * 3 * N * 16 * 32;
  }

  std::int64_t depth_, stride_, plane_ = 0;
  bool tiles_;
  T* bias_;         // [panels][N vectors]
  W* packed_;       // [panels][depth][N vectors]
  T* operands_[2];  // [rows][stride]
  std::uint16_t* tile_panels_;
  std::uint16_t* planes_[2];  // [3][rows, padded][stride]
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
