// The product of a recurrent step, out = operand weights + bias,
// over panels of N vectors of columns.
//
// Weights are packed once for all steps. The operand is written by the epilogue of the step before,
// so there are two of them. Two forms, chosen once per call:
//   vectors  csrc/cpu/gemm.h: panels in W, a storage type or what it accumulates in; any batch
//   tiles    csrc/cpu/amx.h: float32 in three bfloat16 planes each, where the processor has tiles
//            and the batch fills them. Six bytes a weight, 2.7 times the rate of FMA. Nobody checks
//            the range of amx.h here: parts below 2^-126 count as zero, and an Inf becomes a NaN
#pragma once
#include "core/memory.h"
#include "core/parallel.h"
#include "cpu/amx.h"
#include "cpu/gemm.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

#ifdef __AMX_BF16__
inline constexpr bool kHasTiles = true;

// The tile form: float32 operands and weights as planes.
template <int N>
class TileProduct {
 public:
  LMKERN_INLINE void place_weights(Scratch& scratch, std::int64_t depth, std::int64_t panels) {
    depth_ = depth;
    panels_ = scratch.take<amx::Half>(panels * panel_size());
  }
  LMKERN_INLINE void place_operands(Scratch& scratch, std::int64_t rows) {
    stride_ = amx::plane_stride(depth_);
    plane_ = (rows + amx::kTile - 1) / amx::kTile * amx::kTile * stride_;
    for (auto*& planes : planes_) planes = scratch.take<amx::Half>(amx::kPlanes * plane_);
  }
  LMKERN_INLINE void pack_rows(std::int64_t panel, const float* const (&rows)[N],
                               const std::int64_t (&counts)[N], std::int64_t stride) {
    amx::Magnitude unused;
    amx::pack_panel_from_rows<N>(rows, counts, stride, depth_, panels_ + panel * panel_size(),
                                 unused);
  }
  LMKERN_INLINE void pack_columns(std::int64_t panel, const float* from, std::int64_t count,
                                  std::int64_t stride) {
    amx::Magnitude unused;
    amx::pack_panel_from_columns<N>(from, count, stride, depth_, panels_ + panel * panel_size(),
                                    unused);
  }
  LMKERN_INLINE void clear_padding(Range rows) {
    for (std::int64_t b = rows.begin; b < rows.end; ++b)
      for (amx::Half* planes : planes_)
        for (int p = 0; p < amx::kPlanes; ++p)
          __builtin_memset(planes + p * plane_ + b * stride_ + depth_, 0,
                           (stride_ - depth_) * sizeof *planes);
  }
  LMKERN_INLINE void set_operand(int slot, std::int64_t row, std::int64_t k, Vec<float> v,
                                 std::int64_t n) {
    amx::store_planes_n(v, n, planes_[slot] + row * stride_ + k, plane_);
  }
  // Out of line, as multiply_panel is. Needs TileRegisters; rows.begin is a multiple of 16.
  __attribute__((noinline)) void multiply(int slot, Range rows, std::int64_t panel, bool nonzero,
                                          const float* bias, float* out) const {
    amx::multiply_tiles<N>({.rows = rows.end - rows.begin,
                            .columns = N * amx::kTile,
                            .k_blocks = nonzero ? amx::blocks_of(depth_) : 0,
                            .a = planes_[slot] + rows.begin * stride_,
                            .a_stride = stride_,
                            .a_plane = plane_,
                            .panel = panels_ + panel * panel_size(),
                            .bias = bias,
                            .out = out,
                            .out_stride = N * amx::kTile,
                            .accumulate = false});
  }

 private:
  LMKERN_INLINE std::int64_t panel_size() const {
    return amx::blocks_of(depth_) * amx::kPanelBlock<N>;
  }

  std::int64_t depth_, stride_, plane_;
  amx::Half* panels_;
  amx::Half* planes_[2];  // [3][rows, padded][stride]
};

using TileRegisters = amx::TileRegisters;
#else
inline constexpr bool kHasTiles = false;

struct TileRegisters {
  LMKERN_INLINE explicit TileRegisters(bool) {}
  LMKERN_INLINE ~TileRegisters() {}
};
#endif

// Whether products of this storage type and batch run on tiles: they have 16 rows, used or not.
template <class S>
LMKERN_INLINE bool use_tiles(std::int64_t) {
  return false;
}
template <>
LMKERN_INLINE bool use_tiles<float>(std::int64_t batch) {
  return kHasTiles && batch >= 10;
}

// The vector form.
template <class S, class W, int N>
class VectorProduct {
  using T = Accumulate<S>;

 public:
  static constexpr std::int64_t kColumns = N * kLanes<T>;

  LMKERN_INLINE void place_weights(Scratch& scratch, std::int64_t depth, std::int64_t panels) {
    depth_ = depth;
    panels_ = scratch.take<W>(panels * depth * kColumns);
  }
  LMKERN_INLINE void place_operands(Scratch& scratch, std::int64_t rows) {
    stride_ = (depth_ + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    for (T*& operand : operands_) operand = scratch.take<T>(rows * stride_);
  }
  LMKERN_INLINE void pack_rows(std::int64_t panel, const S* const (&rows)[N],
                               const std::int64_t (&counts)[N], std::int64_t stride) {
    for (int j = 0; j < N; ++j)
      transpose_into(rows[j], stride, counts[j], kLanes<T>, depth_,
                     panels_ + panel * depth_ * kColumns + j * kLanes<T>, kColumns);
  }
  LMKERN_INLINE void pack_columns(std::int64_t panel, const S* from, std::int64_t count,
                                  std::int64_t stride) {
    W* const to = panels_ + panel * depth_ * kColumns;
    for (std::int64_t k = 0; k < depth_; ++k)
      for (int j = 0; j < N; ++j) {
        const std::int64_t left = count - j * kLanes<T>;
        const std::int64_t n = left < 0 ? 0 : left < kLanes<T> ? left : kLanes<T>;
        store(to + k * kColumns + j * kLanes<T>, load_n(from + k * stride + j * kLanes<T>, n));
      }
  }
  LMKERN_INLINE void set_operand(int slot, std::int64_t row, std::int64_t k, Vec<T> v,
                                 std::int64_t n) {
    store_n(operands_[slot] + row * stride_ + k, v, n);
  }
  LMKERN_INLINE void multiply(int slot, Range rows, std::int64_t panel, bool nonzero, const T* bias,
                              T* out) const {
    multiply_panel<N, T, W>(rows.end - rows.begin, nonzero ? depth_ : 0,
                            operands_[slot] + rows.begin * stride_, stride_,
                            panels_ + panel * depth_ * kColumns, bias, out);
  }

 private:
  std::int64_t depth_, stride_;
  W* panels_;       // [panels][depth][N vectors]
  T* operands_[2];  // [rows][stride]
};

#ifdef __AMX_BF16__
// f(the form that is in use).
#define LMKERN_FORM(call)               \
  if constexpr (kMayTile) {             \
    if (tiles_) return tile_form_.call; \
  }                                     \
  return vector_form_.call
#else
#define LMKERN_FORM(call) return vector_form_.call
#endif

template <class S, class W, int N>
class StepProduct {
  using T = Accumulate<S>;
  static constexpr bool kMayTile =
      kHasTiles && sizeof(S) == sizeof(float) && sizeof(T) == sizeof(S);

 public:
  static constexpr std::int64_t kColumns = N * kLanes<T>;  // of a panel

  LMKERN_INLINE void place_weights(Scratch& scratch, std::int64_t depth, std::int64_t panels,
                                   bool tiles) {
    tiles_ = tiles;
    bias_ = scratch.take<T>(panels * kColumns);
    LMKERN_FORM(place_weights(scratch, depth, panels));
  }
  LMKERN_INLINE void place_operands(Scratch& scratch, std::int64_t rows) {
    LMKERN_FORM(place_operands(scratch, rows));
  }
  // A panel from a matrix whose rows are columns here: `counts[j]` rows from rows[j] on
  // make vector j.
  LMKERN_INLINE void pack_rows(std::int64_t panel, const S* const (&rows)[N],
                               const std::int64_t (&counts)[N], std::int64_t stride) {
    LMKERN_FORM(pack_rows(panel, rows, counts, stride));
  }
  // A panel from a matrix that has the columns, `count` of them, side by side.
  LMKERN_INLINE void pack_columns(std::int64_t panel, const S* from, std::int64_t count,
                                  std::int64_t stride) {
    LMKERN_FORM(pack_columns(panel, from, count, stride));
  }
  LMKERN_INLINE void set_bias(std::int64_t panel, int j, Vec<T> bias) {
    store(bias_ + panel * kColumns + j * kLanes<T>, bias);
  }
  // Before the first set_operand of these rows.
  LMKERN_INLINE void clear_padding(Range rows) {
#ifdef __AMX_BF16__
    if (kMayTile && tiles_) tile_form_.clear_padding(rows);
#endif
    (void)rows;
  }
  LMKERN_INLINE void set_operand(int slot, std::int64_t row, std::int64_t k, Vec<T> v,
                                 std::int64_t n) {
    LMKERN_FORM(set_operand(slot, row, k, v, n));
  }
  // nonzero: false where the operand is known to be zero.
  LMKERN_INLINE void multiply(int slot, Range rows, std::int64_t panel, bool nonzero,
                              T* out) const {
    LMKERN_FORM(multiply(slot, rows, panel, nonzero, bias_ + panel * kColumns, out));
  }

 private:
  bool tiles_;
  T* bias_;  // [panels][N vectors]
  VectorProduct<S, W, N> vector_form_;
#ifdef __AMX_BF16__
  TileProduct<N> tile_form_;
#endif
};
#undef LMKERN_FORM

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
