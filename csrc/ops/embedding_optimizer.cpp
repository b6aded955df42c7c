#include "ops/embedding_optimizer.h"

#include "core/backend.h"
#include "core/check.h"

namespace lmkern {
namespace {

void check_rows(const Check& check, const TensorView& rows, std::int64_t extent) {
  check.dtype("rows", rows, DType::kInt64);
  check.dims("rows", rows, 1, "[N]");
  check.contiguous("rows", rows);
  const auto* const row = rows.ptr<const std::int64_t>();
  for (std::int64_t n = 0; kReadable && n < rows.shape[0]; ++n)
    if (row[n] < 0 || row[n] >= extent)
      check.fail_index("row " + std::to_string(row[n]) + " at position [" + std::to_string(n) +
                       "] is out of range for V = " + std::to_string(extent));
}

void check_table(const Check& check, const OptimizerTable& table, bool gradient_needed) {
  check.floating("weight", table.weight);
  check.dims("weight", table.weight, 2, "[V, D]");
  check.last_contiguous("weight", table.weight);
  const std::int64_t extent = table.weight.shape[0], width = table.weight.shape[1];
  if (extent > 1 && table.weight.strides[0] < width) check.fail("weight must not overlap itself");
  const bool some = table.rows.defined();
  if (some) check_rows(check, table.rows, extent);
  if (gradient_needed || table.gradient.defined())
    check.tensor("gradient", table.gradient, table.weight.dtype,
                 {some ? table.rows.shape[0] : extent, width}, some ? "[N, D]" : "[V, D]");
  check.optional("touched", table.touched, DType::kFloat64, {extent}, "[V]");
}

void check_state(const Check& check, const char* name, const TensorView& state,
                 const TensorView& weight) {
  check.tensor(name, state, weight.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32,
               {weight.shape[0], weight.shape[1]}, "[V, D]");
}

}  // namespace

void embedding_sgd(const EmbeddingSgdArgs& a) {
  const Check check("embedding_sgd");
  check_table(check, a.table, false);
  backend::kernels().embedding_sgd(a);
}

void embedding_adagrad(const EmbeddingAdagradArgs& a) {
  const Check check("embedding_adagrad");
  check_table(check, a.table, true);
  if (a.sum.ndim == 1)
    check.tensor("sum", a.sum,
                 a.table.weight.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32,
                 {a.table.weight.shape[0]}, "[V]");
  else
    check_state(check, "sum", a.sum, a.table.weight);
  backend::kernels().embedding_adagrad(a);
}

void embedding_adam(const EmbeddingAdamArgs& a) {
  const Check check("embedding_adam");
  check_table(check, a.table, true);
  check_state(check, "exp_avg", a.exp_avg, a.table.weight);
  check_state(check, "exp_avg_sq", a.exp_avg_sq, a.table.weight);
  backend::kernels().embedding_adam(a);
}

}  // namespace lmkern
