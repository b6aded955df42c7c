// Golden tests of convert.h and math.h.
#include <algorithm>

#include "cuda/device/convert.h"
#include "cuda/device/math.h"
#include "cuda/device/thread.h"
#include "cuda/golden_case.h"
#include "cuda/golden_format.h"

namespace lmkern::cuda {
namespace {

constexpr int kThreads = 64, kBlocks = 4;
constexpr Grid kGrid{.x = kBlocks, .threads = kThreads};

LMKERN_DEVICE int first() { return block_x() * kThreads + thread_index(); }
LMKERN_DEVICE int stride() { return kBlocks * kThreads; }

// registers: 32, spills: 0
template <class S>
LMKERN_KERNEL(kThreads, 1)
widen(const S* in, float* out, int count) {
  for (int i = first(); i < count; i += stride()) out[i] = to_accumulate(in[i]);
}

// registers: 32, spills: 0
template <class S>
LMKERN_KERNEL(kThreads, 1)
narrow(const float* in, S* out, int count) {
  for (int i = first(); i < count; i += stride()) out[i] = from_accumulate<S>(in[i]);
}

// All patterns.
template <class S>
std::string run_widen(const Format& format) {
  std::vector<S> all;
  std::vector<float> expected;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    all.push_back(S{static_cast<std::uint16_t>(bits)});
    expected.push_back(static_cast<float>(decoded(format, bits)));
  }
  DeviceBuffer<S> in(all);
  DeviceBuffer<float> out(all.size());
  launch<widen<S>>(kGrid, Stream{}, static_cast<const S*>(in.data()), out.data(), 65536);
  return first_difference(expected, out.values(),
                          [](int i) { return "pattern " + std::to_string(i); });
}

// All values; all ties, and the floats next to them; infinities and NaN.
template <class S>
std::string run_narrow(const Format& format) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::uint32_t infinity = ((1u << format.exponent) - 1) << format.mantissa;
  std::vector<float> values;
  for (std::uint32_t bits = 0; bits < infinity; ++bits) {
    const double value = decoded(format, bits);
    const double step =
        bits + 1 < infinity ? decoded(format, bits + 1) - value : value - decoded(format, bits - 1);
    const auto tie = static_cast<float>(value + step / 2);
    for (float v : {static_cast<float>(value), tie, std::nextafter(tie, 0.0f),
                    std::nextafter(tie, kInfinity)})
      values.insert(values.end(), {v, -v});
  }
  for (float v :
       {kInfinity, -kInfinity, std::numeric_limits<float>::max(), std::numeric_limits<float>::min(),
        std::numeric_limits<float>::denorm_min(), std::numeric_limits<float>::quiet_NaN()})
    values.push_back(v);
  const int count = static_cast<int>(values.size());
  DeviceBuffer<float> in(values);
  DeviceBuffer<S> out(values.size());
  launch<narrow<S>>(kGrid, Stream{}, static_cast<const float*>(in.data()), out.data(), count);
  const std::vector<S> got = out.values();
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint32_t bits = got[i].bits;
    const std::string place = "of " + shown(values[i]);
    if (std::isnan(values[i])) {
      if (!std::isnan(decoded(format, bits))) return place + ": expected NaN, got " + shown(bits);
    } else if (bits != encoded(format, values[i])) {
      return difference(place + ", bits", encoded(format, values[i]), bits);
    }
  }
  return "";
}

enum class Function { kTanh, kSigmoid };

// registers: 32, spills: 0
template <Function kFunction, class Math, class T>
LMKERN_KERNEL(kThreads, 1)
apply(const T* in, T* out, int count) {
  for (int i = first(); i < count; i += stride())
    out[i] = kFunction == Function::kTanh ? Math::tanh(in[i]) : Math::sigmoid(in[i]);
}

// Distance from the exact result in units of its last place.
template <class T>
double ulps(T got, long double exact) {
  if (std::isnan(exact) || std::isnan(got)) return std::isnan(exact) && std::isnan(got) ? 0 : 1e30;
  const int exponent = exact == 0
                           ? std::numeric_limits<T>::min_exponent - 1
                           : std::max(std::ilogb(exact), std::numeric_limits<T>::min_exponent - 1);
  const long double unit = std::ldexp(1.0L, exponent - (std::numeric_limits<T>::digits - 1));
  return static_cast<double>(std::fabs((static_cast<long double>(got) - exact) / unit));
}

// Against the bounds of math.h.
template <Function kFunction, class Math, class T>
std::string run_math(double bound) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  std::vector<T> values{T(0), -T(0), kInfinity, -kInfinity, std::numeric_limits<T>::quiet_NaN()};
  for (int i = 0; i <= 4000; ++i) values.push_back(static_cast<T>(i - 2000) / T(23));  // +-87
  for (int i = 1; i <= 1000; ++i) values.push_back(static_cast<T>(i - 500) / T(477));  // +-1
  for (int i = -120; i < 0; ++i)
    for (T sign : {T(1), T(-1)}) values.push_back(sign * std::ldexp(T(1.3), i));
  DeviceBuffer<T> in(values), out(values.size());
  launch<apply<kFunction, Math, T>>(kGrid, Stream{}, static_cast<const T*>(in.data()), out.data(),
                                    static_cast<int>(values.size()));
  const std::vector<T> got = out.values();
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto x = static_cast<long double>(values[i]);
    const long double exact = kFunction == Function::kTanh ? std::tanh(x) : 1 / (1 + std::exp(-x));
    if (const double distance = ulps(got[i], exact); !(distance <= bound))
      return "of " + shown(values[i]) + ": expected " + shown(static_cast<double>(exact)) +
             ", got " + shown(got[i]) + ", " + shown(distance) + " ULP away";
  }
  return "";
}

}  // namespace

std::vector<GoldenCase> convert_goldens() {
  return {
      {"to_accumulate.bfloat16", [] { return run_widen<bfloat16>(kBFloat16Format); }},
      {"to_accumulate.float16", [] { return run_widen<float16>(kFloat16Format); }},
      {"from_accumulate.bfloat16", [] { return run_narrow<bfloat16>(kBFloat16Format); }},
      {"from_accumulate.float16", [] { return run_narrow<float16>(kFloat16Format); }},
      {"tanh.float", [] { return run_math<Function::kTanh, DeviceMath, float>(2); }},
      {"tanh.double", [] { return run_math<Function::kTanh, DeviceMath, double>(2); }},
      {"sigmoid.float", [] { return run_math<Function::kSigmoid, DeviceMath, float>(4); }},
      {"sigmoid.double", [] { return run_math<Function::kSigmoid, DeviceMath, double>(4); }},
      {"tanh.fast", [] { return run_math<Function::kTanh, FastMath, float>(256); }},
      {"sigmoid.fast", [] { return run_math<Function::kSigmoid, FastMath, float>(256); }},
  };
}

}  // namespace lmkern::cuda
