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

bool is_floating(const TensorView& view) { return view.dtype != DType::kBool; }

DType accumulate(const AttentionProblem& p) {
  return p.q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Sequence boundaries: from 0 to `rows`, never falling.
void check_boundaries(const Check& check, const char* name, const TensorView& cu,
                      std::int64_t rows) {
  const auto* const at = cu.ptr<const std::int64_t>();
  bool rising = at[0] == 0 && at[cu.shape[0] - 1] == rows;
  for (std::int64_t i = 1; i < cu.shape[0]; ++i) rising &= at[i - 1] <= at[i];
  if (!rising) check.fail(std::string(name) + " must rise from 0 to " + std::to_string(rows));
}

void check_problem(const Check& check, const AttentionProblem& p) {
  check.floating("query", p.q);
  check.dims("query", p.q, 4, "[B, H, L, D]");
  check.dims("key", p.k, 4, "[B, H_kv, S, D]");
  check.dims("value", p.v, 4, "[B, H_kv, S, Dv]");
  check.dtype("key", p.k, p.q.dtype);
  check.dtype("value", p.v, p.q.dtype);
  const auto B = p.q.shape[0], H = p.q.shape[1], L = p.q.shape[2], D = p.q.shape[3];
  const auto H_kv = p.k.shape[1], S = p.k.shape[2];
  check.shape("key", p.k, {B, H_kv, S, D}, "[B, H_kv, S, D]");
  check.shape("value", p.v, {B, H_kv, S, p.v.shape[3]}, "[B, H_kv, S, Dv]");
  if (H_kv == 0 ? H != 0 : H % H_kv != 0)
    check.fail("query's heads must be a multiple of key's, got " + std::to_string(H) + " and " +
               std::to_string(H_kv));
  check.last_contiguous("query", p.q);
  check.last_contiguous("key", p.k);
  check.last_contiguous("value", p.v);
  if (p.mask.defined()) {
    check.shape("attn_mask", p.mask, {B, H, L, S}, "[B, H, L, S]");
    check.dtype("attn_mask", p.mask, is_floating(p.mask) ? p.q.dtype : DType::kBool);
    if (is_floating(p.mask)) check_no_nan(check, p.mask);
  }
  constexpr std::int64_t kFarthest = std::int64_t{1} << 30;  // positions are 32-bit lanes
  for (const std::int64_t side : {p.window_left, p.window_right})
    if (side < -1 || side > kFarthest)
      check.fail("window must be -1 or a distance up to 2^30, got " + std::to_string(side));
  if (!(p.softcap >= 0) || std::isinf(p.softcap)) check.fail("softcap must not be negative");
  if (!(p.dropout_p >= 0 && p.dropout_p <= 1)) check.fail("dropout_p must be in [0, 1]");
  check.optional("sinks", p.sinks, accumulate(p), {H}, "[H]");
  if (p.key_lengths.defined()) {
    check.tensor("key_lengths", p.key_lengths, DType::kInt64, {B}, "[B]");
    for (std::int64_t b = 0; b < B; ++b) {
      const auto length = p.key_lengths.ptr<const std::int64_t>()[b];
      if (length < 0 || length > S)
        check.fail("key_lengths must be between 0 and S = " + std::to_string(S) + ", got " +
                   std::to_string(length));
    }
  }
  std::int64_t sequences = B;
  if (p.cu_q.defined()) {
    check.dims("cu_seqlens", p.cu_q, 1, "[n + 1]");
    sequences = p.cu_q.shape[0] - 1;
    if (sequences < 0) check.fail("cu_seqlens must be [n + 1], got []");
    check.tensor("cu_seqlens", p.cu_q, DType::kInt64, {sequences + 1}, "[n + 1]");
    check.tensor("cu_seqlens", p.cu_k, DType::kInt64, {sequences + 1}, "[n + 1]");
    if (B != 1 || p.mask.defined() || p.key_lengths.defined())
      check.fail("cu_seqlens excludes attn_mask and key_lengths, and batches");
    check_boundaries(check, "cu_seqlens", p.cu_q, L);
    check_boundaries(check, "cu_seqlens", p.cu_k, S);
  }
  check.optional("alibi_slopes", p.alibi_slopes, accumulate(p), {sequences, H}, "[B, H]");
}

void check_output(const Check& check, const char* name, const TensorView& view, const TensorView& q,
                  std::initializer_list<std::int64_t> shape, const char* symbolic) {
  check.dtype(name, view, q.dtype);
  check.shape(name, view, shape, symbolic);
  check.last_contiguous(name, view);
}

void check_lse(const Check& check, const AttentionProblem& p, const TensorView& lse) {
  check.tensor("lse", lse, accumulate(p), {p.q.shape[0], p.q.shape[1], p.q.shape[2]}, "[B, H, L]");
}

}  // namespace

void attention_forward(const AttentionForwardArgs& a) {
  const Check check("scaled_dot_product_attention");
  const AttentionProblem& p = a.problem;
  check_problem(check, p);
  check_output(check, "out", a.out, p.q, {p.q.shape[0], p.q.shape[1], p.q.shape[2], p.v.shape[3]},
               "[B, H, L, Dv]");
  check_lse(check, p, a.lse);
  cpu::kernels().attention_forward(a);
}

void attention_backward(const AttentionBackwardArgs& a) {
  const Check check("scaled_dot_product_attention_backward");
  const AttentionProblem& p = a.problem;
  check_problem(check, p);
  const auto B = p.q.shape[0], H = p.q.shape[1], L = p.q.shape[2], D = p.q.shape[3];
  const auto H_kv = p.k.shape[1], S = p.k.shape[2], Dv = p.v.shape[3];
  check_output(check, "out", a.out, p.q, {B, H, L, Dv}, "[B, H, L, Dv]");
  check_lse(check, p, a.lse);
  check_output(check, "d_out", a.d_out, p.q, {B, H, L, Dv}, "[B, H, L, Dv]");
  check.optional("d_lse", a.d_lse, accumulate(p), {B, H, L}, "[B, H, L]");
  check_output(check, "d_q", a.d_q, p.q, {B, H, L, D}, "[B, H, L, D]");
  check_output(check, "d_k", a.d_k, p.q, {B, H_kv, S, D}, "[B, H_kv, S, D]");
  check_output(check, "d_v", a.d_v, p.q, {B, H_kv, S, Dv}, "[B, H_kv, S, Dv]");
  check.optional("d_distance", a.d_distance, accumulate(p), {B, H, L}, "[B, H, L]");
  if (a.d_mask.defined()) {
    if (!p.mask.defined() || !is_floating(p.mask)) check.fail("d_mask wants a floating attn_mask");
    const std::int64_t whole[] = {B, H, L, S};
    check.dims("d_mask", a.d_mask, 4, "[1 or B, 1 or H, 1 or L, 1 or S]");
    for (int i = 0; i < 4; ++i)
      if (a.d_mask.shape[i] != 1 && a.d_mask.shape[i] != whole[i])
        check.fail("d_mask must be [1 or B, 1 or H, 1 or L, 1 or S], got " +
                   shape_string(a.d_mask));
    check.dtype("d_mask", a.d_mask, accumulate(p));
    check.contiguous("d_mask", a.d_mask);
  }
  cpu::kernels().attention_backward(a);
}

void attention_weights(const AttentionWeightsArgs& a) {
  const Check check("attention_weights");
  const AttentionProblem& p = a.problem;
  check_problem(check, p);
  check_lse(check, p, a.lse);
  if (p.cu_q.defined()) check.fail("cu_seqlens must be absent");
  check.dims("weights", a.weights, 4, "[B, H or 1, L, S]");
  const std::int64_t heads = a.weights.shape[1] == 1 ? 1 : p.q.shape[1];
  check.tensor("weights", a.weights, p.q.dtype, {p.q.shape[0], heads, p.q.shape[2], p.k.shape[2]},
               "[B, H or 1, L, S]");
  cpu::kernels().attention_weights(a);
}

}  // namespace lmkern
