// ldmatrix and mma, from the fragment layouts that cuda/device/matrix.h states.
#include "cuda/device/matrix.h"

namespace lmkern::cuda::detail {
namespace {

float element(MatrixType type, std::uint32_t word, int half) {
  if (type == MatrixType::kTf32) return bits_as<float>(word & ~0x1fffu);
  const auto bits = static_cast<std::uint16_t>(word >> (16 * half));
  return type == MatrixType::kBFloat16 ? to_accumulate(bfloat16{bits})
                                       : to_accumulate(float16{bits});
}

}  // namespace

void LoadMatrixOperand::combine(void* const (&operands)[32], std::uint32_t) {
  const auto operand = [&](int lane) { return static_cast<LoadMatrixOperand*>(operands[lane]); };
  const bool transposed = operand(0)->transposed;
  std::uint32_t result[32][4];
  for (int m = 0; m < operand(0)->count; ++m) {
    std::uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) __builtin_memcpy(matrix[r], operand(8 * m + r)->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const std::uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const std::uint32_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      result[lane][m] = low | high << 16;
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < operand(0)->count; ++m) operand(lane)->out[m] = result[lane][m];
}

void MmaOperand::combine(void* const (&operands)[32], std::uint32_t) {
  const auto operand = [&](int lane) { return static_cast<MmaOperand*>(operands[lane]); };
  const MatrixType type = operand(0)->type;
  const int depth = type == MatrixType::kTf32 ? 8 : 16;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const MmaOperand& mine = *operand(lane);
    if (type == MatrixType::kTf32) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = element(type, mine.a[i], 0);
      for (int i = 0; i < 2; ++i) b[t + i * 4][g] = element(type, mine.b[i], 0);
    } else {
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = element(type, mine.a[i], half);
        for (int i = 0; i < 2; ++i) b[2 * t + half + i * 8][g] = element(type, mine.b[i], half);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8, column = 2 * t + i % 2;
      double sum = operand(lane)->d[i];
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      operand(lane)->d[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace lmkern::cuda::detail
