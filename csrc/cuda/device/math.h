// The functions of the cells (csrc/cells), for one value.
#pragma once
#include <cmath>

#include "cuda/device/base.h"

namespace lmkern::cuda {

// tanh at most 2 ULP from the exact value, sigmoid at most 4, where that is a normal number: below
// 2^-126 (float), 2^-1022 (double) sigmoid may be 0. (CUDA's own functions, without fast math.)
struct DeviceMath {
  static LMKERN_HOST_DEVICE float tanh(float x) { return ::tanhf(x); }
  static LMKERN_HOST_DEVICE double tanh(double x) { return ::tanh(x); }
  static LMKERN_HOST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
  static LMKERN_HOST_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
};

// For what is then rounded to 16 bits: at most 2^-16 of the exact value from it (256 ULP), where that is larger
// than 2^-125.
struct FastMath {
  static LMKERN_HOST_DEVICE float tanh(float x) {
    const float magnitude = ::fabsf(x), e = exponential(-2.0f * magnitude), x2 = x * x;
    const float large = ::copysignf(quotient(1.0f - e, 1.0f + e), x);
    return magnitude < 0.2f ? x - x * x2 * (1.0f / 3.0f - 2.0f / 15.0f * x2) : large;
  }
  static LMKERN_HOST_DEVICE float sigmoid(float x) {
    return quotient(1.0f, 1.0f + exponential(-x));
  }

 private:
#if defined(__CUDA_ARCH__)
  static LMKERN_HOST_DEVICE float exponential(float x) { return __expf(x); }
  static LMKERN_HOST_DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
#else
  static LMKERN_HOST_DEVICE float exponential(float x) { return ::expf(x); }
  static LMKERN_HOST_DEVICE float quotient(float a, float b) { return a / b; }
#endif
};

LMKERN_DEVICE float square_root(float x) { return ::sqrtf(x); }
LMKERN_DEVICE double square_root(double x) { return ::sqrt(x); }

// a b + c, rounded once.
LMKERN_DEVICE float multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
LMKERN_DEVICE double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }

}  // namespace lmkern::cuda
