// A warp's piece of a product: 16 rows of weights times up to 64 rows of a batch, from shared memory,
// accumulated in registers. The weights are the tensor cores' A operand and the batch is N, which is
// padded to 8 only, where M would be padded to 16.
//
// 16-bit types: mma m16n8k16. float: mma m16n8k8 on operands rounded to tf32 where the caller allows it,
// else FMA. double: FMA. All have the fragments of mma's C: a lane 2 x 2 values of each 16 x 8.
#pragma once
#include "cuda/device/math.h"
#include "cuda/device/matrix.h"
#include "cuda/device/vector.h"

namespace lmkern::cuda {

inline constexpr int kTileRows = 16, kTileColumns = 64, kTileDepth = 16;

template <class S>
struct WarpTile {
  using A = Accumulate<S>;
  // What is added to a row in shared memory, so that neighbouring rows lie in other banks, and rows
  // begin at multiples of 16 bytes.
  static constexpr int kPad = 16 / static_cast<int>(sizeof(S));
  static constexpr int kMostParts = kTileColumns / 8;

  A acc[kMostParts][4];

  LMKERN_DEVICE void clear() {
    LMKERN_UNROLL
    for (int j = 0; j < kMostParts; ++j) {
      LMKERN_UNROLL
      for (int i = 0; i < 4; ++i) acc[j][i] = A(0);
    }
  }

  // Of acc[j][i]: its row of the weights, and its row of the batch.
  static LMKERN_DEVICE int row(int i) { return lane_index() / 4 + i / 2 * 8; }
  static LMKERN_DEVICE int column(int j, int i) { return 8 * j + lane_index() % 4 * 2 + i % 2; }

  // What a product reads. w: [16][w_stride] or, transposed, [depth][w_stride] with the 16 rows along;
  // h: [columns rounded up to 8][h_stride], zeros beyond the last row. depth: a multiple of 16.
  struct Operands {
    const S *w, *h;
    int w_stride, h_stride, depth, columns;
    bool tf32;
  };

  // acc += w h^T.
  template <bool kTransposed>
  LMKERN_DEVICE void multiply(const Operands& o) {
    const int parts = (o.columns + 7) / 8;
    if (parts == 1)
      multiply_parts<kTransposed, 1>(o);
    else if (parts == 2)
      multiply_parts<kTransposed, 2>(o);
    else if (parts <= 4)
      multiply_parts<kTransposed, 4>(o);
    else
      multiply_parts<kTransposed, 8>(o);
  }

 private:
  // kParts: of 8 rows of the batch; those that do not exist repeat the last, and are not used.
  template <bool kTransposed, int kParts>
  LMKERN_DEVICE void multiply_parts(const Operands& o) {
    if constexpr (sizeof(S) == 4) {
      if (o.tf32) {
        add_chains<kParts>(o, [&](A(&sum)[kParts][4], int k) {
          multiply_tf32<kTransposed, kParts>(sum, o, k);
          multiply_tf32<kTransposed, kParts>(sum, o, k + 8);
        });
        return;
      }
    }
    add_chains<kParts>(o, [&](A(&sum)[kParts][4], int k) {
      if constexpr (sizeof(S) == 2)
        multiply_16_bit<kTransposed, kParts>(sum, o, k);
      else
        multiply_fma<kTransposed, kParts>(sum, o, k);
    });
  }

  // acc += what add(sum, k) adds up over the depth. Where there are few sums, two chains of them take turns,
  // so that one's latency hides the other's. Summed for themselves and then added: the rounding error of
  // a long depth grows with the number of calls, not of terms.
  template <int kParts, class Add>
  LMKERN_DEVICE void add_chains(const Operands& o, const Add& add) {
    if constexpr (kParts == kMostParts && sizeof(A) == 8) {  // registers for one of each sum
      for (int k = 0; k < o.depth; k += kTileDepth) add(acc, k);
      return;
    }
    constexpr int kChains = kParts <= 2 ? 2 : 1;
    A sums[kChains][kParts][4] = {};
    for (int k = 0; k < o.depth; k += kChains * kTileDepth) {
      add(sums[0], k);
      if (kChains > 1 && k + kTileDepth < o.depth) add(sums[kChains - 1], k + kTileDepth);
    }
    LMKERN_UNROLL
    for (int j = 0; j < kParts; ++j) {
      LMKERN_UNROLL
      for (int i = 0; i < 4; ++i) {
        LMKERN_UNROLL
        for (int chain = 0; chain < kChains; ++chain) acc[j][i] += sums[chain][j][i];
      }
    }
  }

  template <int kParts>
  static LMKERN_DEVICE const S* batch_row(const Operands& o, int part, int row) {
    const int last = (o.columns - 1) / 8;
    return o.h + (8 * (part < last ? part : last) + row) * o.h_stride;
  }

  // f(j, b) for each part j: b its fragment at k. ldmatrix takes 8 rows of 16 bytes: kCore of k.
  template <int kParts, class F>
  static LMKERN_DEVICE void each_batch_fragment(const Operands& o, int k, const F& f) {
    constexpr int kCore = kPad;
    const int lane = lane_index(), at = k + lane / 8 % 2 * kCore;
    if constexpr (kParts == 1) {
      std::uint32_t b[2];
      load_matrix(b, batch_row<kParts>(o, 0, lane % 8) + at);
      f(0, b);
    } else {
      LMKERN_UNROLL
      for (int j = 0; j < kParts; j += 2) {
        std::uint32_t b[4];
        load_matrix(b, batch_row<kParts>(o, j + lane / 16, lane % 8) + at);
        const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        f(j, first);
        f(j + 1, second);
      }
    }
  }

  template <bool kTransposed, int kParts>
  static LMKERN_DEVICE void multiply_16_bit(A (&sum)[kParts][4], const Operands& o, int k) {
    const int lane = lane_index();
    std::uint32_t a[4];
    if constexpr (kTransposed)
      load_matrix_transposed(a,
                             o.w + (k + lane / 16 * 8 + lane % 8) * o.w_stride + lane / 8 % 2 * 8);
    else
      load_matrix(a, o.w + lane % 16 * o.w_stride + k + lane / 16 * 8);
    each_batch_fragment<kParts>(
        o, k, [&](int j, const std::uint32_t (&b)[2]) { mma_16x8x16<S>(sum[j], a, b); });
  }

  // 8 of k. A row of 16 bytes of ldmatrix is 4 floats, and what a lane gets of it is one.
  template <bool kTransposed, int kParts>
  static LMKERN_DEVICE void multiply_tf32(A (&sum)[kParts][4], const Operands& o, int k) {
    const int lane = lane_index();
    std::uint32_t a[4];
    if constexpr (kTransposed) {
      LMKERN_UNROLL
      for (int i = 0; i < 4; ++i)
        a[i] = to_tf32(o.w[(k + lane % 4 + i / 2 * 4) * o.w_stride + lane / 4 + i % 2 * 8]);
    } else {
      load_matrix(a, o.w + lane % 16 * o.w_stride + k + lane / 16 * 4);
      LMKERN_UNROLL
      for (int i = 0; i < 4; ++i) a[i] = rounded(a[i]);
    }
    each_batch_fragment<kParts>(o, k, [&](int j, const std::uint32_t (&b)[2]) {
      const std::uint32_t both[2] = {rounded(b[0]), rounded(b[1])};
      mma_16x8x8_tf32(sum[j], a, both);
    });
  }
  static LMKERN_DEVICE std::uint32_t rounded(std::uint32_t bits) {
    return to_tf32(detail::bits_as<float>(bits));
  }

  template <bool kTransposed, int kParts>
  static LMKERN_DEVICE void multiply_fma(A (&sum)[kParts][4], const Operands& o, int first) {
    constexpr int kWide = kPad;  // of a vector
    using V = Vector<S, kWide>;
    LMKERN_UNROLL
    for (int k = first; k < first + kTileDepth; k += kWide) {
      V weights[2];
      LMKERN_UNROLL
      for (int i = 0; i < 2; ++i) {
        if constexpr (kTransposed) {
          LMKERN_UNROLL
          for (int n = 0; n < kWide; ++n) weights[i].at[n] = o.w[(k + n) * o.w_stride + row(2 * i)];
        } else {
          weights[i] = load_vector<V>(o.w + row(2 * i) * o.w_stride + k);
        }
      }
      LMKERN_UNROLL
      for (int j = 0; j < kParts; ++j) {
        LMKERN_UNROLL
        for (int c = 0; c < 2; ++c) {
          const V values = load_vector<V>(batch_row<kParts>(o, j, column(0, c)) + k);
          LMKERN_UNROLL
          for (int i = 0; i < 2; ++i) {
            LMKERN_UNROLL
            for (int n = 0; n < kWide; ++n)
              sum[j][2 * i + c] = multiply_add(weights[i].at[n], values.at[n], sum[j][2 * i + c]);
          }
        }
      }
    }
  }
};

}  // namespace lmkern::cuda
