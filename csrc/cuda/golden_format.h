// Narrow floating-point formats by their definition (IEEE 754), for what golden tests expect.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

namespace lmkern::cuda {

// A sign, `exponent` bits, `mantissa` bits.
struct Format {
  int exponent, mantissa;
  int bias() const { return (1 << (exponent - 1)) - 1; }
};
inline constexpr Format kBFloat16Format{8, 7}, kFloat16Format{5, 10};

inline double decoded(const Format& f, std::uint32_t bits) {
  const std::uint32_t fraction = bits & ((1u << f.mantissa) - 1);
  const int exponent = static_cast<int>(bits >> f.mantissa & ((1u << f.exponent) - 1));
  const double sign = bits >> (f.exponent + f.mantissa) & 1 ? -1.0 : 1.0;
  if (exponent == (1 << f.exponent) - 1)
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - f.bias() - f.mantissa);
  return sign * std::ldexp(fraction + (1u << f.mantissa), exponent - f.bias() - f.mantissa);
}

// Rounded to nearest, ties to even. No NaN.
inline std::uint32_t encoded(const Format& f, double value) {
  const std::uint32_t sign = std::signbit(value) ? 1u << (f.exponent + f.mantissa) : 0;
  const double size = std::fabs(value);
  const int least = 1 - f.bias();
  const std::uint32_t infinity = ((1u << f.exponent) - 1) << f.mantissa;
  if (std::isinf(size)) return sign | infinity;
  int exponent = size == 0 ? least : std::ilogb(size);
  if (exponent < least) exponent = least;
  // In units of the last place; 2^(mantissa + 1) of them are the next exponent's first.
  auto units = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(size, f.mantissa - exponent)));
  // The leading bit of a normal number adds one to the exponent's field.
  const std::uint32_t bits = (static_cast<std::uint32_t>(exponent - least) << f.mantissa) + units;
  return sign | (exponent > f.bias() || bits > infinity ? infinity : bits);
}

}  // namespace lmkern::cuda
