// Float32 matrix products of full float32 accuracy on Intel AMX, whose tiles multiply bfloat16.
//
// Split     x = hi + mid + lo, three bfloat16 values, without error. hi is x rounded to its leading
//           8 bits, so |x - hi| <= 2^-8 |x|; mid is that residual rounded; what is then left has at
//           most 7 bits. Which way a tie goes is immaterial: away from zero, which is cheapest.
// Product   x y = hi lo' + hi mid' + mid mid' + mid hi' + lo hi' + hi hi', in this order, in the
//           float accumulators of TDPBF16PS. Left out are mid lo', lo mid' and lo lo': at most
//           2^-24 |x y|, the rounding error of one float product.
// Sum       a tile product adds its 32 terms from zero before it adds them to the accumulator, so
//           there are 6 roundings at the accumulator's size for 32 k, where a chain of FMAs has 32.
// Range     AMX takes denormals for zero, which costs parts below 2^-126 and results of that size,
//           and an overflow would meet its opposite in another of the six products. `in_range` says
//           when neither matters; outside of it the caller must use a float32 product.
//
// One plane, hi alone, is the product of numbers rounded to bfloat16, exact where they were bfloat16
// before (`Planes` = 1; the rest of this file says what holds for three).
//
// Layout of A, "planes": three bfloat16 matrices (hi, mid, lo), row-major, a plane apart. A product
// reads whole tiles: rows up to a multiple of 16, of any content, and columns up to a multiple of
// 32, which must be zero. Row strides that are odd multiples of 32 (`plane_stride`) spread a tile
// over the sets of the L1 cache.
//
// Layout of B, "panel": N tiles of 16 columns,
// [k-block of 32][plane][tile][16 pairs of k][16 columns][2],
// zero beyond the given columns and depth.
//
// Numerics: an element's value depends on its row, its column and k only, never on what else is
// multiplied with them; k ascends in blocks of 32.
#pragma once
#ifdef __AMX_BF16__
#include "cpu/vec.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE::amx {

inline constexpr int kPlanes = 3;
inline constexpr int kTile = 16;                           // rows and columns of a tile
inline constexpr int kDepth = 32;                          // k of a tile
inline constexpr std::int64_t kTileSize = kTile * kDepth;  // bfloat16 elements, 1 KiB
using Half = std::uint16_t;                                // the bits of a bfloat16

// A compile-time value that lambdas can receive.
template <int I>
struct Index {
  static constexpr int value = I;
};

LMKERN_INLINE std::int64_t blocks_of(std::int64_t depth) { return (depth + kDepth - 1) / kDepth; }
// The row stride of planes with this many columns.
LMKERN_INLINE std::int64_t plane_stride(std::int64_t depth) {
  return (blocks_of(depth) | 1) * kDepth;
}
// Elements of one k-block of a panel of N tiles.
template <int N, int Planes = kPlanes>
inline constexpr std::int64_t kPanelBlock = Planes * N * kTileSize;

// ---- split ------------------------------------------------------------------------------------

// The largest |x| of all that it was shown, as a bit pattern:
// that of Inf or NaN is above any number.
struct Magnitude {
  Words bits{};
  LMKERN_INLINE void see(Vec<float> v) { bits = max(bits, (Words)v & 0x7fffffffu); }
  LMKERN_INLINE float largest() const {
    std::uint32_t all = 0;
    for (int i = 0; i < kLanes<float>; ++i) all = bits[i] > all ? bits[i] : all;
    float value;
    __builtin_memcpy(&value, &all, sizeof value);
    return value;
  }
};

// Whether the product of matrices with these largest magnitudes is as good as in float32. What is
// lost of an element to denormals is below 2^-126, so with a largest element of 2^-100 it is below
// the rounding error of that one.
LMKERN_INLINE bool in_range(float a, float b, std::int64_t depth) {
  constexpr float kLeast = 0x1p-100f, kMost = 0x1p126f;
  if (!(a < kMost && b < kMost)) return false;  // a NaN fails too
  const double product = static_cast<double>(a) * b;
  if (product == 0) return true;
  return a >= kLeast && b >= kLeast && product >= kLeast &&
         product * static_cast<double>(depth) < kMost;
}

// hi, mid, lo of each lane, as floats of which the lower half is zero.
struct Parts {
  Words plane[kPlanes];
};
LMKERN_INLINE Words nearest(Vec<float> v) { return ((Words)v + 0x8000u) & 0xffff0000u; }
LMKERN_INLINE Parts split(Vec<float> v) {
  const Words hi = nearest(v);
  const Vec<float> rest = v - (Vec<float>)hi;
  const Words mid = nearest(rest);
  // Of a denormal rest, bits are left below those of a bfloat16.
  return {{hi, mid, (Words)(rest - (Vec<float>)mid) & 0xffff0000u}};
}

// One vector into the planes at `to`.
template <int Planes = kPlanes>
LMKERN_INLINE void store_planes(Vec<float> v, Half* to, std::int64_t plane) {
  const Parts parts = split(v);
  LMKERN_UNROLL
  for (int p = 0; p < Planes; ++p) {
    const HalfWords half = __builtin_convertvector(parts.plane[p] >> 16, HalfWords);
    __builtin_memcpy(to + p * plane, &half, sizeof half);
  }
}

// The first n lanes only.
LMKERN_INLINE void store_planes_n(Vec<float> v, std::int64_t n, Half* to, std::int64_t plane) {
  if (n == kTile) return store_planes(v, to, plane);
  alignas(64) Half whole[kPlanes][kTile];
  store_planes(v, whole[0], kTile);
  for (int p = 0; p < kPlanes; ++p)
    for (std::int64_t i = 0; i < n; ++i) to[p * plane + i] = whole[p][i];
}

// ---- A: planes --------------------------------------------------------------------------------

// planes[r][k] = from[r][k], for a row-major `from`; columns up to a multiple of 32 become zero.
template <int Planes = kPlanes, class S = float>
LMKERN_INLINE void planes_from_rows(const S* from, std::int64_t stride, std::int64_t rows,
                                    std::int64_t depth, Half* to, std::int64_t to_stride,
                                    std::int64_t plane, Magnitude& seen) {
  const std::int64_t padded = blocks_of(depth) * kDepth;
  for (std::int64_t r = 0; r < rows; ++r) {
    const S* row = from + r * stride;
    Half* to_row = to + r * to_stride;
    for (std::int64_t k = 0; k < padded; k += kTile) {
      const std::int64_t n = depth - k;
      __builtin_prefetch(row + k + 4 * stride);  // short pieces of far rows: none is foreseen
      const Vec<float> v = n >= kTile ? load(row + k) : load_n(row + k, n > 0 ? n : 0);
      seen.see(v);
      store_planes<Planes>(v, to_row + k, plane);
    }
  }
}

// planes[r][k] = from[k][r]: the transpose of a row-major `from`.
// Rows up to a multiple of 16 become zero too.
template <int Planes = kPlanes, class S = float>
LMKERN_INLINE void planes_from_columns(const S* from, std::int64_t stride, std::int64_t rows,
                                       std::int64_t depth, Half* to, std::int64_t to_stride,
                                       std::int64_t plane, Magnitude& seen) {
  const std::int64_t padded = blocks_of(depth) * kDepth;
  for (std::int64_t k = 0; k < padded; k += kTile) {
    for (std::int64_t r = 0; r < rows; r += kTile) {
      const std::int64_t n = rows - r < kTile ? rows - r : kTile;
      Vec<float> square[kTile];
      LMKERN_UNROLL
      for (int i = 0; i < kTile; ++i) {
        square[i] = k + i < depth ? load_n(from + (k + i) * stride + r, n) : Vec<float>{};
        seen.see(square[i]);
      }
      transpose<float>(square);
      LMKERN_UNROLL
      for (int i = 0; i < kTile; ++i)
        store_planes<Planes>(square[i], to + (r + i) * to_stride + k, plane);
    }
  }
}

// ---- B: panels --------------------------------------------------------------------------------

// Tile t, column c of the panel is the row-major row rows[t] + c * stride, for c < columns[t] (at
// most 16): B = W^T of W [columns, depth]. `to` receives blocks_of(depth) blocks.
template <int N, int Planes = kPlanes>
LMKERN_INLINE void pack_panel_from_rows(const float* const (&rows)[N],
                                        const std::int64_t (&columns)[N], std::int64_t stride,
                                        std::int64_t depth, Half* to, Magnitude& seen) {
  alignas(64) Half planes[Planes][kTile][kDepth] = {};
  for (std::int64_t k = 0; k < depth; k += kDepth, to += kPanelBlock<N, Planes>) {
    const std::int64_t n = depth - k < kDepth ? depth - k : kDepth;
    for (int t = 0; t < N; ++t) {
      planes_from_rows<Planes>(rows[t] + k, stride, columns[t], n, planes[0][0], kDepth, kTileSize,
                               seen);
      if (columns[t] < kTile)
        for (int p = 0; p < Planes; ++p)
          __builtin_memset(planes[p][columns[t]], 0, (kTile - columns[t]) * sizeof planes[p][0]);
      for (int p = 0; p < Planes; ++p) {  // a pair of k is one lane
        Vec<float> square[kTile];
        LMKERN_UNROLL
        for (int i = 0; i < kTile; ++i)
          square[i] = load(reinterpret_cast<const float*>(planes[p][i]));
        transpose<float>(square);
        float* const tile = reinterpret_cast<float*>(to + (p * N + t) * kTileSize);
        LMKERN_UNROLL
        for (int i = 0; i < kTile; ++i) store(tile + i * kTile, square[i]);
      }
    }
  }
}

// The panel's columns are `columns` (at most 16 N) neighbouring ones
// of the row-major `from` [depth, ...].
template <int N, int Planes = kPlanes>
LMKERN_INLINE void pack_panel_from_columns(const float* from, std::int64_t columns,
                                           std::int64_t stride, std::int64_t depth, Half* to,
                                           Magnitude& seen) {
  for (std::int64_t k = 0; k < depth; k += kDepth, to += kPanelBlock<N, Planes>) {
    for (int t = 0; t < N; ++t) {
      const std::int64_t left = columns - t * kTile;
      const std::int64_t n = left < 0 ? 0 : left < kTile ? left : kTile;
      const float* at = from + k * stride + t * kTile;
      for (int pair = 0; pair < kTile; ++pair, at += 2 * stride) {
        const std::int64_t rows = depth - k - 2 * pair;
        const Vec<float> even = load_n(at, rows > 0 ? n : 0);
        const Vec<float> odd = load_n(at + stride, rows > 1 ? n : 0);
        seen.see(even);
        seen.see(odd);
        const Parts first = split(even), second = split(odd);
        LMKERN_UNROLL
        for (int p = 0; p < Planes; ++p) {
          const Words both = first.plane[p] >> 16 | second.plane[p];
          __builtin_memcpy(to + (p * N + t) * kTileSize + pair * kDepth, &both, sizeof both);
        }
      }
    }
  }
}

// ---- tiles ------------------------------------------------------------------------------------

// Tile registers of this thread, all of 16 rows x 64 bytes, for the life of this object. One for
// each thread of a parallel region; without it a tile instruction is illegal.
class TileRegisters {
 public:
  LMKERN_INLINE explicit TileRegisters(bool use = true) : use_(use) {
    if (!use) return;
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  LMKERN_INLINE ~TileRegisters() {
    if (use_) asm volatile("tilerelease");
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  const bool use_;
};

namespace detail {

template <int T>
LMKERN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T, class S>
LMKERN_INLINE void tile_load(const S* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride * sizeof(S)), "i"(T)
               : "memory");
}
template <int T>
LMKERN_INLINE void tile_store(float* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * sizeof(float)), "i"(T)
               : "memory");
}
template <int Acc, int A, int B>
LMKERN_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Acc), "i"(A), "i"(B));
}

template <int... I, class F>
LMKERN_INLINE void unroll(std::integer_sequence<int, I...>, const F& f) {
  (f(Index<I>{}), ...);
}
// f(Index<0>{}), ..., f(Index<N - 1>{}): tile registers are named by literals.
template <int N, class F>
LMKERN_INLINE void unroll(const F& f) {
  unroll(std::make_integer_sequence<int, N>{}, f);
}
#define LMKERN_EACH(i) [&](auto i) __attribute__((always_inline))

// The products of planes, in the order of their addition: from one to the next only one operand
// changes, and those with one plane of B are neighbours. Of a single plane there is one.
template <int Planes>
inline constexpr int kProducts = Planes * (Planes + 1) / 2;
template <int Planes>
inline constexpr int kPlaneOfA[] = {0, 0, 1, 1, 2, 0};
template <>
inline constexpr int kPlaneOfA<1>[] = {0};
template <int Planes>
inline constexpr int kPlaneOfB[] = {2, 1, 1, 0, 0, 0};
template <>
inline constexpr int kPlaneOfB<1>[] = {0};

// acc += A B for R x C tiles, in registers 0 .. R C - 1: the same sums in either form.
template <int R, int C, int Planes>
LMKERN_INLINE void multiply_block(std::int64_t k_blocks, const Half* a, std::int64_t a_stride,
                                  std::int64_t a_plane, const Half* b, std::int64_t b_block,
                                  std::int64_t b_plane) {
  for (std::int64_t k = 0; k < k_blocks; ++k, a += kDepth, b += b_block) {
    if constexpr (R == 1) {
      // The planes of A stay, each tile of B is read once.
      unroll<Planes>(
          LMKERN_EACH(p) { tile_load<4 + decltype(p)::value>(a + p.value * a_plane, a_stride); });
      unroll<Planes>(LMKERN_EACH(q) {
        constexpr int plane = Planes - 1 - decltype(q)::value;
        unroll<C>(LMKERN_EACH(c) {
          constexpr int acc = decltype(c)::value;
          tile_load<7>(b + plane * b_plane + acc * kTileSize, kDepth);
          unroll<kProducts<Planes>>(LMKERN_EACH(i) {
            constexpr int at = decltype(i)::value;
            if constexpr (kPlaneOfB<Planes>[at] == plane)
              tile_multiply<acc, 4 + kPlaneOfA<Planes>[at], 7>();
          });
        });
      });
    } else {
      static_assert(R == 2 && C <= 2);
      unroll<kProducts<Planes>>(LMKERN_EACH(i) {
        constexpr int at = decltype(i)::value;
        if constexpr (at == 0 || kPlaneOfA<Planes>[at] != kPlaneOfA<Planes>[at - (at > 0)])
          unroll<R>(LMKERN_EACH(r) {
            tile_load<4 + decltype(r)::value>(
                a + kPlaneOfA<Planes>[at] * a_plane + r.value * kTile * a_stride, a_stride);
          });
        if constexpr (at == 0 || kPlaneOfB<Planes>[at] != kPlaneOfB<Planes>[at - (at > 0)])
          unroll<C>(LMKERN_EACH(c) {
            tile_load<6 + decltype(c)::value>(
                b + kPlaneOfB<Planes>[at] * b_plane + c.value * kTileSize, kDepth);
          });
        unroll<R>(LMKERN_EACH(r) {
          unroll<C>(LMKERN_EACH(c) {
            constexpr int row = decltype(r)::value, column = decltype(c)::value;
            tile_multiply<row * C + column, 4 + row, 6 + column>();
            if constexpr (C == 2) {  // what the next block of k will load, some lines at a time
              constexpr int kLines = 2 * R * kTile * Planes / (R * C * kProducts<Planes>);
              unroll<kLines>(LMKERN_EACH(l) {
                constexpr int line = ((at * R + row) * C + column) * kLines + decltype(l)::value;
                constexpr int plane = line / 64, i = line % 32;
                if constexpr (line % 64 < 32)
                  __builtin_prefetch(a + plane * a_plane + i * a_stride + kDepth);
                else
                  __builtin_prefetch(b + b_block + plane * b_plane + i * kDepth);
              });
            }
          });
        });
      });
    }
  }
}

}  // namespace detail

// One product: out[rows][columns] = bias + A * panel, or, if `accumulate`, is increased by that.
// The sum is finished before it is added: what rounding errors a long one collects is avoided by
// cutting it, here at the latest from a few thousand k on.
struct Product {
  std::int64_t rows, columns, k_blocks;
  const Half* a;  // planes
  std::int64_t a_stride, a_plane;
  const Half* panel;
  const float* bias;  // 16 N floats, or null
  float* out;
  std::int64_t out_stride;
  bool accumulate;
};

namespace detail {

template <int N, int R, int C, int Planes>
LMKERN_INLINE void multiply_at(const Product& p, std::int64_t row, int tile) {
  const std::int64_t rows = p.rows - row, columns = p.columns - tile * kTile;
  float* const out = p.out + row * p.out_stride + tile * kTile;
  // Tiles that reach beyond the matrix, or are to be added to it, pass through a buffer.
  const bool direct = rows >= R * kTile && columns >= C * kTile && !p.accumulate;
  alignas(64) float buffer[R * kTile][C * kTile];
  float* const to = direct ? out : buffer[0];
  const std::int64_t stride = direct ? p.out_stride : C * kTile;
  unroll<R>(LMKERN_EACH(r) {
    unroll<C>(LMKERN_EACH(c) {
      constexpr int acc = decltype(r)::value * C + decltype(c)::value;
      if (p.bias != nullptr)  // the same row 16 times
        tile_load<acc>(p.bias + (tile + c.value) * kTile, 0);
      else
        tile_zero<acc>();
    });
  });
  multiply_block<R, C, Planes>(p.k_blocks, p.a + row * p.a_stride, p.a_stride, p.a_plane,
                               p.panel + tile * kTileSize, kPanelBlock<N, Planes>, N * kTileSize);
  unroll<R>(LMKERN_EACH(r) {
    unroll<C>(LMKERN_EACH(c) {
      tile_store<decltype(r)::value * C + decltype(c)::value>(
          to + r.value * kTile * stride + c.value * kTile, stride);
    });
  });
  if (direct) return;
  for (std::int64_t r = 0; r < rows && r < R * kTile; ++r)
    for (int c = 0; c < C; ++c) {
      const std::int64_t left = columns - c * kTile, n = left < 0 ? 0 : left < kTile ? left : kTile;
      float* const at = out + r * p.out_stride + c * kTile;
      const Vec<float> sum = load(buffer[r] + c * kTile);
      store_n(at, p.accumulate ? sum + load_n(at, n) : sum, n);
    }
}

}  // namespace detail

// Needs TileRegisters on this thread. Blocks of 2 x 2 tiles (14 tile loads for 24 products), and of
// 1 x N for a last row of tiles (15 loads at N = 4). The caller chooses a depth at which the panel
// and the rows of A fit into L2 together (12 KiB for each k-block of 64 rows and 64 columns).
template <int N, int Planes = kPlanes>
LMKERN_INLINE void multiply_tiles(const Product& p) {
  static_assert(N >= 1 && N <= 4);
  std::int64_t row = 0;
  for (; p.rows - row > kTile; row += 2 * kTile)
    detail::unroll<(N + 1) / 2>(LMKERN_EACH(c) {
      constexpr int tile = 2 * decltype(c)::value;
      detail::multiply_at<N, 2, (N - tile < 2 ? 1 : 2), Planes>(p, row, tile);
    });
  if (row < p.rows) detail::multiply_at<N, 1, N, Planes>(p, row, 0);
}
#undef LMKERN_EACH

// f with the number of tiles that cover these columns of a panel, as a template argument.
template <class F>
LMKERN_INLINE void with_tiles(std::int64_t columns, const F& f) {
  switch ((columns + kTile - 1) / kTile) {
    case 1: return f(Index<1>{});
    case 2: return f(Index<2>{});
    case 3: return f(Index<3>{});
    default: return f(Index<4>{});
  }
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE::amx
#endif  // __AMX_BF16__
