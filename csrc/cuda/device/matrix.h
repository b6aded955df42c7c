// Tensor cores: fragments from shared memory, and their products.
//
// Lanes 0-31 are 8 groups g = lane / 4 of 4 threads t = lane % 4. Fragments (PTX 9.7.14.5.8):
//   A [16, 16]  a0: (g, 2t..)  a1: (g + 8, 2t..)  a2: (g, 2t + 8..)  a3: (g + 8, 2t + 8..)
//   B [16, 8]   b0: (2t.., g)  b1: (2t + 8.., g)                     two neighbours along k each
//   C [16, 8]   c0, c1: (g, 2t), (g, 2t + 1)      c2, c3: the same in row g + 8
//   tf32        A [16, 8]: a0 (g, t)  a1 (g + 8, t)  a2 (g, t + 4)  a3 (g + 8, t + 4)
//               B [8, 8]:  b0 (t, g)  b1 (t + 4, g)  one value each
#pragma once
#include "cuda/device/convert.h"
#include "cuda/device/thread.h"

namespace lmkern::cuda {

#if defined(LMKERN_SIMT)
namespace detail {
struct LoadMatrixOperand {
  const void* row;
  std::uint32_t* out;
  int count;
  bool transposed;
  static void combine(void* const (&operands)[32], std::uint32_t mask);
};
enum class MatrixType { kBFloat16, kFloat16, kTf32 };
struct MmaOperand {
  MatrixType type;
  float* d;
  const std::uint32_t *a, *b;
  static void combine(void* const (&operands)[32], std::uint32_t mask);
};
template <class S>
inline constexpr MatrixType kMatrixType =
    sizeof(S) == 4 ? MatrixType::kTf32
                   : (kIsBFloat16<S> ? MatrixType::kBFloat16 : MatrixType::kFloat16);
}  // namespace detail
#endif

// PTX 9.7.14.5.15, ldmatrix: kCount (1, 2 or 4) matrices of 8 rows of 16 bytes; lane 8 m + r gives
// the address of row r of matrix m. Each lane gets of matrix m, in out[m], row g, columns 2t, 2t + 1.
template <int kCount>
LMKERN_DEVICE void load_matrix(std::uint32_t (&out)[kCount], const void* row LMKERN_AND_SITE) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#if defined(LMKERN_SIMT)
  if (lane_index() < 8 * kCount) {
    simt::check_aligned(row, 16, site);
    simt::check_read(row, 16, site);
  }
  detail::LoadMatrixOperand operand{row, out, kCount, false};
  simt::collective("ldmatrix", kAllLanes, detail::LoadMatrixOperand::combine, &operand, site);
#else
  if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(out[0])
                 : "r"(shared_address(row))
                 : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// The same, each matrix transposed: each lane gets rows 2t, 2t + 1 of column g.
template <int kCount>
LMKERN_DEVICE void load_matrix_transposed(std::uint32_t (&out)[kCount],
                                          const void* row LMKERN_AND_SITE) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#if defined(LMKERN_SIMT)
  if (lane_index() < 8 * kCount) {
    simt::check_aligned(row, 16, site);
    simt::check_read(row, 16, site);
  }
  detail::LoadMatrixOperand operand{row, out, kCount, true};
  simt::collective("ldmatrix.trans", kAllLanes, detail::LoadMatrixOperand::combine, &operand, site);
#else
  if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(out[0])
                 : "r"(shared_address(row))
                 : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// PTX 9.7.14.5.14, mma: d += A B in float32; S = bfloat16 or float16, k = 16.
template <class S>
LMKERN_DEVICE void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4],
                               const std::uint32_t (&b)[2] LMKERN_AND_SITE) {
  static_assert(sizeof(S) == 2);
#if defined(LMKERN_SIMT)
  detail::MmaOperand operand{detail::kMatrixType<S>, d, a, b};
  simt::collective("mma", kAllLanes, detail::MmaOperand::combine, &operand, site);
#else
  if constexpr (kIsBFloat16<S>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The same for tf32, k = 8: operands are floats of which 10 bits of the mantissa count (to_tf32).
LMKERN_DEVICE void mma_16x8x8_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                                   const std::uint32_t (&b)[2] LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  detail::MmaOperand operand{detail::MatrixType::kTf32, d, a, b};
  simt::collective("mma", kAllLanes, detail::MmaOperand::combine, &operand, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace lmkern::cuda
