// exp, log, tanh, sigmoid, erf and the tail of the normal distribution of a vector.
//
// Max error in ULP over the whole range, denormal results excepted where noted;
// tests/test_vec_math.py holds us to it. Infinities and NaN give what <cmath> gives.
// Polynomials: csrc/cpu/vec_fit.py.
//
//             float  double   method
//   exp         1.5     1.5   2^n e^r, |r| <= ln2/2; results below the normals are exact to 1 ULP
//   exp_normal  1.5     1.5   the same in fewer steps, for |x| <= kExpNormalMax
//   log         1.5     1.5   n ln2 + atanh series, after fdlibm's e_log.c; denormal arguments too
//   tanh        3       3     expm1(2x) / (expm1(2x) + 2), so small x keep their relative accuracy
//   sigmoid     2.5     2.5   1 / (1 + e^-|x|), mirrored through e^x for x < 0
//   erf         2.5     2.5   x P(x^2) up to 1, then 1 - e^(-x^2) t Q(t), t = 1 / (1 + x/2)
//   normal_tail 6.5     8.5   e^(-x^2/2) t Q(t), t = 1 / (1 + k x), for 0 <= x <= kNormalMax;
//                             times 1 + x^2/4, since x^2 is rounded in the exponent
#pragma once
#include "cpu/vec.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

template <class T>
struct MathTables;

template <>
struct MathTables<float> {
  static constexpr unsigned kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kExpMax = 89.0f, kExpMin = -104.0f;
  static constexpr float kTanhMax = 9.1f, kErfMax = 4.0f;
  static constexpr float kExpNormalMax = 87.0f, kNormalMax = 12.8f;
  static constexpr float kMinNormal = 0x1p-126f, kDenormalScale = 0x1p24f, kDenormalShift = 24;
  static constexpr float kExp[] = {0.5000000014f,   0.1666666668f,   0.0416664642f,
                                   0.008333310845f, 0.001393373072f, 0.0001989108046f};
  static constexpr float kErfHead[] = {1.128379166f,    -0.3761262667f,  0.1128359472f,
                                       -0.02685421201f, 0.005189087423f, -0.0008016864287f,
                                       7.875875063e-5f};
  static constexpr float kErfTail[] = {0.2826198898f,     0.2741515745f, 0.2976126923f,
                                       -0.0001439088707f, 0.4365275881f, -0.3857676313f,
                                       0.09489634377f};
  static constexpr float kNormalScale = 0.3f;
  static constexpr float kNormal[] = {
      0.1196875092f,   0.1195556571f, 0.1103703932f,  0.07776156658f, 0.09795600784f,
      -0.08272380355f, 0.1956739385f, -0.2310623746f, 0.1136159316f,  -0.02083482758f};
  static constexpr float kLog[] = {0.6666666655f, 0.4000012221f, 0.2855077863f, 0.2333161447f};
};

template <>
struct MathTables<double> {
  static constexpr unsigned kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kExpMax = 710.0, kExpMin = -746.0;
  static constexpr double kTanhMax = 19.1, kErfMax = 6.0;
  static constexpr double kExpNormalMax = 708.0, kNormalMax = 37.0;
  static constexpr double kMinNormal = 0x1p-1022, kDenormalScale = 0x1p54, kDenormalShift = 54;
  static constexpr double kExp[] = {0.5,
                                    0.1666666666666667103,
                                    0.04166666666666666978,
                                    0.00833333333332608312,
                                    0.001388888888888371117,
                                    0.0001984126987500227879,
                                    0.0000248015873256774619,
                                    2.755725517000088744e-6,
                                    2.755727347871858047e-7,
                                    2.510531272962210179e-8,
                                    2.09147553258932022e-9};
  static constexpr double kErfHead[] = {
      1.128379167095512574,     -0.3761263890318374806,     0.1128379167095487867,
      -0.02686617064507679325,  0.005223977624818014467,    -0.0008548326980833789905,
      0.0001205533111164271092, -0.00001492559526683118157, 1.646100048412136803e-6,
      -1.635031270105469501e-7, 1.465977527404743581e-8,    -1.137284885679167367e-9,
      5.957176147748911404e-11};
  static constexpr double kErfTail[] = {
      0.2820948114997663831, 0.2820939650835105072,  0.2468489984995906557,
      0.1761179732228447873, 0.08530412941611223877, -0.01352546805201284534,
      -0.017572865609212254, -0.1760632190020534468, 0.260657660149523664,
      -0.259025571257133948, -0.1417346770569407741, 1.728383502194655072,
      -4.055757967379487603, 5.20076725518653261,    -4.159441199858558244,
      2.09572865165866612,   -0.6162720348980566681, 0.08139670653044475017};
  static constexpr double kNormalScale = 0.2;
  static constexpr double kNormal[] = {
      0.07978845608474877831,   0.07978845577548968606,   0.0765969274743472669,
      0.07021365370889759467,   0.06102473608105166279,   0.04976301769368704981,
      0.03777226284357138462,   0.02451840955541648526,   0.02036477987132683257,
      -0.01299696373824099587,  0.06256655246167734572,   -0.1536603907365621819,
      0.3064472346286971342,    -0.5052944471337164868,   0.6577600415252883173,
      -0.6740157059640903793,   0.5275261592241740413,    -0.2984155506899851884,
      0.1122833876056687093,    -0.02313001002887222096,  0.0002913651504726897425,
      0.0009592376983769061379, -0.0001516090914244325249};
  static constexpr double kLog[] = {
      0.6666666666666666646, 0.4000000000000088324, 0.2857142857079978503, 0.222222223925810451,
      0.1818179554752113623, 0.1538624473762166661, 0.1326863836926682388, 0.1308803485092755383};
};

template <class T, int N>
LMKERN_INLINE Vec<T> polynomial(Vec<T> x, const T (&coefficients)[N]) {
  Vec<T> sum = splat<T>(coefficients[N - 1]);
  LMKERN_UNROLL
  for (int i = N - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

template <class T>
struct VecMath {
  using V = Vec<T>;
  using I = IntVec<T>;
  using W = WordVec<T>;  // a NaN's bits may be anything, so all integer arithmetic is on these
  using C = MathTables<T>;

  // 2^n for n in the range of normal exponents.
  static LMKERN_INLINE V exp2_int(I n) { return (V)(((W)n + C::kBias) << C::kMantissa); }

  // x = n ln2 + r. Returns r and e^r - 1; n comes as an integer. |x| must be moderate.
  static LMKERN_INLINE V expm1_reduced(V x, I& n) {
    const V shifted = x * T(1.44269504088896340736) + C::kRound;
    const V n_value = shifted - C::kRound;
    n = (I)((W)shifted - (W)splat<T>(C::kRound));
    const V r = (x - n_value * C::kLn2High) - n_value * C::kLn2Low;
    return r + r * r * polynomial<T>(r, C::kExp);
  }

  static LMKERN_INLINE V exp(V x) {
    // Comparisons with NaN are false: it passes both clamps and reaches the result through r.
    V clamped = x > C::kExpMax ? splat<T>(C::kExpMax) : x;
    clamped = clamped < C::kExpMin ? splat<T>(C::kExpMin) : clamped;
    I n;
    const V mantissa = expm1_reduced(clamped, n) + T(1);
    const I half = n >> 1;  // in two factors, since 2^n alone overflows before e^x does
    return mantissa * exp2_int(half) * exp2_int((I)((W)n - (W)half));
  }

  // For x <= 0 only, with results below the normals flushed to zero: the softmax's exp, cheaper.
  static LMKERN_INLINE V exp_nonpositive(V x) {
    constexpr T lowest = T(C::kBias - 1) * T(-0.6931471805599453);
    const V clamped = x < lowest ? splat<T>(lowest) : x;
    I n;
    const V mantissa = expm1_reduced(clamped, n) + T(1);
    const V value = mantissa * exp2_int(n);
    return x < lowest ? V{} : value;
  }

  // For results that are normal and finite: |x| <= kExpNormalMax; cheaper still.
  static LMKERN_INLINE V exp_normal(V x) {
    const V shifted = x * T(1.44269504088896340736) + C::kRound;
    const V n = shifted - C::kRound;
    const V r = (x - n * C::kLn2High) - n * C::kLn2Low;
    const V mantissa = (polynomial<T>(r, C::kExp) * r + T(1)) * r + T(1);
    return (V)((W)mantissa + ((W)shifted << C::kMantissa));  // n is in the lowest bits
  }

  static LMKERN_INLINE V log(V x) {
    const auto denormal = x < C::kMinNormal;
    const V scaled = denormal ? x * C::kDenormalScale : x;
    // The exponent such that the mantissa lies in [sqrt(1/2), sqrt(2)).
    const W sqrt_half = (W)splat<T>(T(0.70710678118654752440));
    const I n = (I)((W)scaled - sqrt_half) >> C::kMantissa;  // keeps the sign
    const V mantissa = (V)((W)scaled - ((W)n << C::kMantissa));
    V n_value = (V)((W)n + (W)splat<T>(C::kRound)) - C::kRound;
    n_value = denormal ? n_value - T(C::kDenormalShift) : n_value;
    const V f = mantissa - T(1), s = f / (f + T(2)), z = s * s;
    const V half_square = T(0.5) * f * f;
    const V tail = s * (half_square + z * polynomial<T>(z, C::kLog));
    V result = n_value * C::kLn2High - ((half_square - (tail + n_value * C::kLn2Low)) - f);
    result = x == splat<T>(T(__builtin_inf())) ? x : result;
    result = x == V{} ? splat<T>(T(-__builtin_inf())) : result;
    result = x < V{} ? splat<T>(T(__builtin_nan(""))) : result;
    return x != x ? x : result;
  }

  static LMKERN_INLINE V tanh(V x) {
    const V magnitude = abs(x);
    const V clamped = magnitude > C::kTanhMax ? splat<T>(C::kTanhMax) : magnitude;
    I n;
    const V m = expm1_reduced(clamped * T(2), n);
    const V power = exp2_int(n);
    const V expm1 = power * m + (power - T(1));
    return copysign(divide(expm1, expm1 + T(2)), x);
  }

  static LMKERN_INLINE V sigmoid(V x) {
    const V e = exp_nonpositive(-abs(x));
    return divide(x < V{} ? e : splat<T>(T(1)), e + T(1));
  }

  // Φ(-x) for x >= 0, up to kNormalMax; also the density φ(x), from the same exponential.
  static LMKERN_INLINE V normal_tail(V x, V& density) {
    const V e = exp_normal(x * x * T(-0.5));
    const V t = divide(splat<T>(T(1)), x * C::kNormalScale + T(1));
    density = e * T(0.39894228040143267794);
    return e * (t * polynomial<T>(t, C::kNormal));
  }

  static LMKERN_INLINE V erf(V x) {
    const V magnitude = abs(x);
    const V clamped = magnitude > C::kErfMax ? splat<T>(C::kErfMax) : magnitude;
    const V square = clamped * clamped;
    const V t = T(1) / (clamped * T(0.5) + T(1));
    const V head = clamped * polynomial<T>(square, C::kErfHead);
    const V tail = T(1) - exp_nonpositive(-square) * (t * polynomial<T>(t, C::kErfTail));
    return copysign(clamped <= splat<T>(T(1)) ? head : tail, x);
  }

  static LMKERN_INLINE V abs(V x) { return (V)((I)x & ~sign_bit()); }

 private:
  static LMKERN_INLINE I sign_bit() { return (I)splat<T>(T(-0.0)); }
  static LMKERN_INLINE V copysign(V magnitude, V sign) {
    return (V)((I)magnitude | ((I)sign & sign_bit()));
  }
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
