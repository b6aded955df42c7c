#include "ops/attention.h"

#include <cmath>

#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/isa.h"

namespace lmkern {
namespace {

// NaN: all exponent bits set and something in the mantissa.
bool is_nan(bfloat16 x) { return (x.bits & 0x7fff) > 0x7f80; }
bool is_nan(float16 x) { return (x.bits & 0x7fff) > 0x7c00; }
template <class S>
bool is_nan(S x) {
  return std::isnan(x);
}

void check_no_nan(const Check& check, const TensorView& mask) {
  dispatch_float_types(mask.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    std::int64_t extent[4];  // broadcast dimensions are read once
    for (int i = 0; i < 4; ++i) extent[i] = mask.strides[i] == 0 ? 1 : mask.shape[i];
    if (mask.numel() == 0) return;
    for (std::int64_t b = 0; b < extent[0]; ++b)
      for (std::int64_t h = 0; h < extent[1]; ++h)
        for (std::int64_t l = 0; l < extent[2]; ++l) {
          const S* row =
              mask.ptr<const S>() + b * mask.strides[0] + h * mask.strides[1] + l * mask.strides[2];
          bool nan = false;
          for (std::int64_t s = 0; s < extent[3]; ++s) nan |= is_nan(row[s * mask.strides[3]]);
          if (nan) check.fail("attn_mask must not contain NaN");
        }
  });
}

struct Heads {
  const TensorView &q, &k, &v, &mask;
};

void check_inputs(const Check& check, const Heads& a) {
  check.floating("query", a.q);
  check.dims("query", a.q, 4, "[B, H, L, D]");
  check.dims("key", a.k, 4, "[B, H_kv, S, D]");
  check.dims("value", a.v, 4, "[B, H_kv, S, Dv]");
  check.dtype("key", a.k, a.q.dtype);
  check.dtype("value", a.v, a.q.dtype);
  const auto B = a.q.shape[0], H = a.q.shape[1], L = a.q.shape[2], D = a.q.shape[3];
  const auto H_kv = a.k.shape[1], S = a.k.shape[2];
  check.shape("key", a.k, {B, H_kv, S, D}, "[B, H_kv, S, D]");
  check.shape("value", a.v, {B, H_kv, S, a.v.shape[3]}, "[B, H_kv, S, Dv]");
  if (H_kv == 0 ? H != 0 : H % H_kv != 0)
    check.fail("query's heads must be a multiple of key's, got " + std::to_string(H) + " and " +
               std::to_string(H_kv));
  check.last_contiguous("query", a.q);
  check.last_contiguous("key", a.k);
  check.last_contiguous("value", a.v);
  if (!a.mask.defined()) return;
  check.shape("attn_mask", a.mask, {B, H, L, S}, "[B, H, L, S]");
  if (a.mask.dtype == DType::kBool) {
    check.dtype("attn_mask", a.mask, DType::kBool);
  } else {
    check.dtype("attn_mask", a.mask, a.q.dtype);
    check_no_nan(check, a.mask);
  }
}

void check_output(const Check& check, const char* name, const TensorView& view, const TensorView& q,
                  std::initializer_list<std::int64_t> shape, const char* symbolic) {
  check.dtype(name, view, q.dtype);
  check.shape(name, view, shape, symbolic);
  check.last_contiguous(name, view);
}

void check_results(const Check& check, const Heads& a, const TensorView& out,
                   const TensorView& lse) {
  const auto B = a.q.shape[0], H = a.q.shape[1], L = a.q.shape[2];
  check_output(check, "out", out, a.q, {B, H, L, a.v.shape[3]}, "[B, H, L, Dv]");
  check.tensor("lse", lse, a.q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32,
               {B, H, L}, "[B, H, L]");
}

}  // namespace

void attention_forward(const AttentionForwardArgs& a) {
  const Check check("scaled_dot_product_attention");
  const Heads heads{a.q, a.k, a.v, a.mask};
  check_inputs(check, heads);
  check_results(check, heads, a.out, a.lse);
  cpu::kernels().attention_forward(a);
}

void attention_backward(const AttentionBackwardArgs& a) {
  const Check check("scaled_dot_product_attention_backward");
  const Heads heads{a.q, a.k, a.v, a.mask};
  check_inputs(check, heads);
  check_results(check, heads, a.out, a.lse);
  const auto B = a.q.shape[0], H = a.q.shape[1], L = a.q.shape[2], D = a.q.shape[3];
  const auto H_kv = a.k.shape[1], S = a.k.shape[2], Dv = a.v.shape[3];
  check_output(check, "d_out", a.d_out, a.q, {B, H, L, Dv}, "[B, H, L, Dv]");
  check_output(check, "d_q", a.d_q, a.q, {B, H, L, D}, "[B, H, L, D]");
  check_output(check, "d_k", a.d_k, a.q, {B, H_kv, S, D}, "[B, H_kv, S, D]");
  check_output(check, "d_v", a.d_v, a.q, {B, H_kv, S, Dv}, "[B, H_kv, S, Dv]");
  cpu::kernels().attention_backward(a);
}

}  // namespace lmkern
