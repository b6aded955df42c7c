#include "ops/token_position.h"

#include "core/backend.h"
#include "core/check.h"
#include "ops/indices.h"

namespace lmkern {
namespace {

DType wide(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

void check_table(const Check& check, const char* name, const TensorView& table,
                 const TensorView& token, const char* symbolic) {
  check.dtype(name, table, token.dtype);
  check.dims(name, table, 2, symbolic);
  if (table.shape[1] != token.shape[1])
    check.fail(std::string(name) + " must be " + symbolic +
               " with D = " + std::to_string(token.shape[1]) + ", got " + shape_string(table));
  check.last_contiguous(name, table);
}

void check_count(const Check& check, const char* name, const TensorView& indices,
                 std::int64_t count, const char* symbolic) {
  if (indices.numel() != count)
    check.fail(std::string(name) + " must have " + symbolic + " = " + std::to_string(count) +
               " elements, got " + shape_string(indices));
}

void check_length(const Check& check, std::int64_t length, std::int64_t rows) {
  if (length < 1 ? rows > 0 : rows % length != 0)
    check.fail("length must divide N = " + std::to_string(rows) + ", got " +
               std::to_string(length));
}

void check_rows(const Check& check, const TokenPosition& r) {
  check.floating("token", r.token);
  check.dims("token", r.token, 2, "[V, D]");
  check.last_contiguous("token", r.token);
  check_indices(check, r.input, r.token.shape[0]);
  const std::int64_t rows = r.input.numel();
  check_length(check, r.length, rows);
  if (r.position.defined()) {
    check_table(check, "position", r.position, r.token, "[P, D]");
    const std::int64_t most = r.position.shape[0];
    if (r.positions.defined()) {
      check_count(check, "positions", r.positions, r.length, "L");
      check_indices(check, r.positions, most, "positions", "P");
    } else if (rows > 0 && (r.offset < 0 || r.offset > most - r.length)) {
      check.fail_index("positions " + std::to_string(r.offset) + " to " +
                       std::to_string(r.offset + r.length - 1) +
                       " are out of range for P = " + std::to_string(most));
    }
  } else if (r.positions.defined()) {
    check.fail("positions need a position table");
  }
  if (r.segment.defined()) {
    check_table(check, "segment", r.segment, r.token, "[S, D]");
    check_count(check, "segments", r.segments, rows, "N");
    check_indices(check, r.segments, r.segment.shape[0], "segments", "S");
  }
}

void check_norm(const Check& check, const TensorView& statistics, DType dtype, std::int64_t rows) {
  if (!statistics.defined()) return;
  check.dims("statistics", statistics, 2, "[2 or 1, N]");
  const std::int64_t kinds = statistics.shape[0] == 1 ? 1 : 2;
  check.tensor("statistics", statistics, wide(dtype), {kinds, rows}, "[2 or 1, N]");
}

void check_parameter(const Check& check, const char* name, const TensorView& p, DType dtype,
                     std::int64_t width, const TensorView& statistics) {
  if (!p.defined()) return;
  if (!statistics.defined()) check.fail(std::string(name) + " needs a norm");
  check.tensor(name, p, p.dtype == wide(dtype) ? p.dtype : dtype, {width}, "[D]");
}

void check_dropout(const Check& check, double p, const TensorView& seed) {
  if (!(p >= 0 && p <= 1)) check.fail("dropout_p must be in [0, 1], got " + std::to_string(p));
  if (p > 0) check.tensor("seed", seed, DType::kInt64, {}, "[]");
}

void check_workspace(const Check& check, const TokenPositionBackwardArgs& a) {
#if defined(LMKERN_CUDA_MODULE)
  const int sums = a.d_position.defined() + a.d_weight.defined() + a.d_bias.defined();
  const std::int64_t bytes = cuda::token_position_workspace(
      a.d_out.shape[0], a.rows.length, a.d_out.shape[1], sums, a.d_out.dtype == DType::kFloat64);
  check.tensor("workspace", a.workspace, DType::kUInt8, {bytes}, "[token_position_workspace]");
#else
  if (a.workspace.defined()) check.fail("workspace must be absent");
#endif
}

}  // namespace

void token_position_forward(const TokenPositionForwardArgs& a) {
  const Check check("token_position_embedding");
  check_rows(check, a.rows);
  const DType dtype = a.rows.token.dtype;
  const std::int64_t rows = a.rows.input.numel(), width = a.rows.token.shape[1];
  check_norm(check, a.statistics, dtype, rows);
  check_parameter(check, "weight", a.weight, dtype, width, a.statistics);
  check_parameter(check, "bias", a.bias, dtype, width, a.statistics);
  check_dropout(check, a.dropout_p, a.seed);
  check.tensor("out", a.out, dtype, {rows, width}, "[N, D]");
  backend::kernels().token_position_forward(a);
}

void token_position_backward(const TokenPositionBackwardArgs& a) {
  const Check check("token_position_backward");
  check.floating("d_out", a.d_out);
  check.dims("d_out", a.d_out, 2, "[N, D]");
  check.contiguous("d_out", a.d_out);
  const DType dtype = a.d_out.dtype;
  const std::int64_t rows = a.d_out.shape[0], width = a.d_out.shape[1];
  if (a.statistics.defined()) {
    check_rows(check, a.rows);
    check.dtype("token", a.rows.token, dtype);
    if (a.rows.input.numel() != rows || a.rows.token.shape[1] != width)
      check.fail("d_out must be [N, D] = [" + std::to_string(a.rows.input.numel()) + ", " +
                 std::to_string(a.rows.token.shape[1]) + "], got " + shape_string(a.d_out));
  } else {
    check_length(check, a.rows.length, rows);
  }
  check_norm(check, a.statistics, dtype, rows);
  check_parameter(check, "weight", a.weight, dtype, width, a.statistics);
  check_dropout(check, a.dropout_p, a.seed);
  check.optional("d_sum", a.d_sum, dtype, {rows, width}, "[N, D]");
  check.optional("d_position", a.d_position, dtype, {a.rows.length, width}, "[L, D]");
  check_parameter(check, "d_weight", a.d_weight, wide(dtype), width, a.statistics);
  check_parameter(check, "d_bias", a.d_bias, wide(dtype), width, a.statistics);
  check_workspace(check, a);
  backend::kernels().token_position_backward(a);
}

}  // namespace lmkern
