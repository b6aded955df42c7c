// Golden tests of matrix.h.
#include "cuda/device/barrier.h"
#include "cuda/device/matrix.h"
#include "cuda/golden_case.h"
#include "cuda/golden_format.h"

namespace lmkern::cuda {
namespace {

// Row r of matrix m lies where only this says, so that a row taken from its neighbour shows.
LMKERN_HOST_DEVICE int place_of_row(int m, int r) { return (5 * (8 * m + r) + 3) % 32; }

// registers: 32, spills: 0
template <int kCount, bool kTransposed>
LMKERN_KERNEL(32, 1)
loads(std::uint32_t* out) {
  auto* const s = shared_memory<std::uint16_t>();
  const int lane = lane_index();
  for (int c = 0; c < 8; ++c)
    s[8 * place_of_row(lane / 8, lane % 8) + c] = static_cast<std::uint16_t>(1000 * lane + c);
  warp_barrier();
  // Only the first 8 kCount lanes' addresses count.
  const int row = lane % (8 * kCount);
  std::uint32_t registers[kCount];
  const void* const address = s + 8 * place_of_row(row / 8, row % 8);
  if constexpr (kTransposed)
    load_matrix_transposed(registers, address);
  else
    load_matrix(registers, address);
  for (int i = 0; i < kCount; ++i) out[kCount * lane + i] = registers[i];
}

// PTX 9.7.14.5.15: register m of lane l has, of row l / 4 of matrix m, columns 2 (l % 4) in its low half
// and the next in its high half; .trans: of column l / 4, rows 2 (l % 4) and the next.
template <int kCount, bool kTransposed>
std::string run_loads() {
  DeviceBuffer<std::uint32_t> out(32 * kCount);
  launch<loads<kCount, kTransposed>>({.threads = 32, .shared_bytes = 32 * 16}, Stream{},
                                     out.data());
  std::vector<std::uint16_t> expected, got;
  for (std::uint32_t word : out.values())
    for (int shift : {0, 16}) got.push_back(static_cast<std::uint16_t>(word >> shift));
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < kCount; ++m)
      for (int half = 0; half < 2; ++half) {
        const int major = lane / 4, minor = lane % 4 * 2 + half;
        const int row = kTransposed ? minor : major, column = kTransposed ? major : minor;
        expected.push_back(static_cast<std::uint16_t>(1000 * (8 * m + row) + column));
      }
  return first_difference(expected, got, [](int i) {
    return "lane " + std::to_string(i / (2 * kCount)) + ", register " +
           std::to_string(i / 2 % kCount) + (i % 2 == 0 ? ", low half" : ", high half");
  });
}

// registers: 32, spills: 0
template <class S>
LMKERN_KERNEL(32, 1)
product(const std::uint32_t* a, const std::uint32_t* b, float* d) {
  const int lane = lane_index();
  const std::uint32_t mine_a[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
  const std::uint32_t mine_b[2] = {b[2 * lane], b[2 * lane + 1]};
  float mine_d[4] = {d[4 * lane], d[4 * lane + 1], d[4 * lane + 2], d[4 * lane + 3]};
  if constexpr (sizeof(S) == 2)
    mma_16x8x16<S>(mine_d, mine_a, mine_b);
  else
    mma_16x8x8_tf32(mine_d, mine_a, mine_b);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = mine_d[i];
}

// A matrix by (row, column).
using Matrix = std::function<int(int, int)>;

// Element x, as the operand's register has it.
template <class S>
std::uint32_t operand(int x) {
  if constexpr (sizeof(S) == 4) {
    const auto value = static_cast<float>(x);
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
  } else {
    return encoded(kIsBFloat16<S> ? kBFloat16Format : kFloat16Format, x);
  }
}

// D = A B + C with fragments laid out by PTX 9.7.14.5.7 (.tf32) and 9.7.14.5.8 (.bf16, .f16).
template <class S>
std::string multiply(const char* what, const Matrix& a, const Matrix& b, const Matrix& c) {
  constexpr int kDepth = sizeof(S) == 4 ? 8 : 16;
  std::vector<std::uint32_t> fragments_a, fragments_b;
  std::vector<float> fragments_c, expected;
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, thread = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i == 1 || i == 3 ? 8 : 0);
      if (sizeof(S) == 4) {
        fragments_a.push_back(operand<S>(a(row, thread + (i >= 2 ? 4 : 0))));
      } else {
        const int k = 2 * thread + (i >= 2 ? 8 : 0);
        fragments_a.push_back(operand<S>(a(row, k)) | operand<S>(a(row, k + 1)) << 16);
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (sizeof(S) == 4) {
        fragments_b.push_back(operand<S>(b(thread + 4 * i, group)));
      } else {
        const int k = 2 * thread + 8 * i;
        fragments_b.push_back(operand<S>(b(k, group)) | operand<S>(b(k + 1, group)) << 16);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i >= 2 ? 8 : 0), column = 2 * thread + i % 2;
      int sum = c(row, column);
      fragments_c.push_back(static_cast<float>(sum));
      for (int k = 0; k < kDepth; ++k) sum += a(row, k) * b(k, column);
      expected.push_back(static_cast<float>(sum));
    }
  }
  DeviceBuffer<std::uint32_t> in_a(fragments_a), in_b(fragments_b);
  DeviceBuffer<float> d(fragments_c);
  launch<product<S>>({.threads = 32}, Stream{}, static_cast<const std::uint32_t*>(in_a.data()),
                     static_cast<const std::uint32_t*>(in_b.data()), d.data());
  return first_difference(expected, d.values(), [&](int i) {
    return std::string(what) + ", lane " + std::to_string(i / 4) + ", register " +
           std::to_string(i % 4);
  });
}

// Each element of A, B and C shows by itself; then all at once.
template <class S>
std::string run_products() {
  constexpr int kRow = kIsBFloat16<S> ? 16 : 100;  // bfloat16 has integers up to 256
  const Matrix none = [](int, int) { return 0; };
  const Matrix coded = [](int row, int column) { return kRow * row + column; };
  const Matrix identity = [](int row, int column) { return row == column ? 1 : 0; };
  const Matrix second = [](int row, int column) { return row == column + 8 ? 1 : 0; };
  const Matrix accumulated = [](int row, int column) { return 1000 * row + column; };
  const auto mixed = [](int seed) {
    return [seed](int row, int column) { return (row * 7 + column * 5 + seed) % 11 - 5; };
  };
  std::string wrong = multiply<S>("A, columns 0 to 7", coded, identity, none);
  if (wrong.empty() && sizeof(S) == 2)
    wrong = multiply<S>("A, columns 8 to 15", coded, second, none);
  if (wrong.empty()) wrong = multiply<S>("B", identity, coded, none);
  if (wrong.empty()) wrong = multiply<S>("C", none, none, accumulated);
  if (wrong.empty()) wrong = multiply<S>("A B + C", mixed(1), mixed(4), accumulated);
  return wrong;
}

constexpr int kRounded = 256;

// 16 values at a time go down the first column of A, times ones.
//
// registers: 32, spills: 0
LMKERN_KERNEL(32, 1)
round_to_tf32(const float* in, float* out) {
  const int group = lane_index() / 4, thread = lane_index() % 4;
  for (int i = 0; i < kRounded; i += 16) {
    const bool column = thread == 0;
    const std::uint32_t a[4] = {column ? to_tf32(in[i + group]) : 0,
                                column ? to_tf32(in[i + group + 8]) : 0, 0, 0};
    const std::uint32_t b[2] = {column ? to_tf32(1.0f) : 0, 0};
    float d[4] = {};
    mma_16x8x8_tf32(d, a, b);
    if (column) {
      out[i + group] = d[0];
      out[i + group + 8] = d[2];
    }
  }
}

// PTX 9.7.9.23, cvt.rna: to 10 bits of mantissa, ties away from zero. (The bits of a tf32 register are
// nobody's business: mma says what they mean.)
std::string run_tf32() {
  std::vector<float> values, expected;
  for (int i = 0; i < kRounded; ++i) {
    // Ties and their neighbours at several mantissas and exponents.
    const float tie =
        std::ldexp(1.0f + static_cast<float>(2 * i + 1) / 2048.0f, 8 * (i % 29) - 116);
    const float next = i % 3 == 0   ? tie
                       : i % 3 == 1 ? std::nextafter(tie, 0.0f)
                                    : std::nextafter(tie, 2 * tie);
    values.push_back(i % 2 == 0 ? next : -next);
  }
  values[0] = std::numeric_limits<float>::infinity();
  values[1] = -std::numeric_limits<float>::infinity();
  values[2] = std::numeric_limits<float>::quiet_NaN();
  values[3] = 0.0f;
  for (float v : values) {
    const double unit = v == 0 || !std::isfinite(v) ? 0 : std::ldexp(1.0, std::ilogb(v) - 10);
    expected.push_back(unit == 0 ? v : static_cast<float>(std::round(v / unit) * unit));
  }
  DeviceBuffer<float> in(values), out(kRounded);
  launch<round_to_tf32>({.threads = 32}, Stream{}, static_cast<const float*>(in.data()),
                        out.data());
  return first_difference(expected, out.values(), [&](int i) {
    return "of " + shown(values[static_cast<std::size_t>(i)]);
  });
}

}  // namespace

std::vector<GoldenCase> matrix_goldens() {
  return {
      {"ldmatrix.x1", run_loads<1, false>},      {"ldmatrix.x2", run_loads<2, false>},
      {"ldmatrix.x4", run_loads<4, false>},      {"ldmatrix.x1.trans", run_loads<1, true>},
      {"ldmatrix.x2.trans", run_loads<2, true>}, {"ldmatrix.x4.trans", run_loads<4, true>},
      {"mma.bfloat16", run_products<bfloat16>},  {"mma.float16", run_products<float16>},
      {"mma.tf32", run_products<float>},         {"to_tf32", run_tf32},
  };
}

}  // namespace lmkern::cuda
