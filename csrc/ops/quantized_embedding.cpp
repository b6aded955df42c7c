#include "ops/quantized_embedding.h"

#include "core/check.h"
#include "cpu/isa.h"
#include "ops/indices.h"

namespace lmkern {
namespace {

void check_table(const Check& check, const QuantizedTable& table, const TensorView& out) {
  if (table.bits != 8 && table.bits != 4)
    check.fail("bits must be 8 or 4, got " + std::to_string(table.bits));
  check.dtype("weight", table.rows, DType::kUInt8);
  check.dims("weight", table.rows, 2, "[V, ceil(D bits / 8) + 8]");
  if (table.width < 1 || table.rows.shape[1] != table.packed() + 8)
    check.fail("weight must be [V, ceil(D bits / 8) + 8] with D = " + std::to_string(table.width) +
               ", got " + shape_string(table.rows));
  check.last_contiguous("weight", table.rows);
  check.floating("out", out);
  check.contiguous("out", out);
}

}  // namespace

void quantized_embedding(const QuantizedEmbeddingArgs& a) {
  const Check check("quantized_embedding");
  check_table(check, a.table, a.out);
  if (a.out.numel() != a.indices.numel() * a.table.width)
    check.fail("out must be [*input, D], got " + shape_string(a.out));
  check_indices(check, a.indices, a.table.rows.shape[0]);
  cpu::kernels().quantized_embedding(a);
}

void quantized_embedding_bag(const QuantizedEmbeddingBagArgs& a) {
  const Check check("quantized_embedding");
  check_table(check, a.table, a.out);
  if (a.bags.mode == BagMode::kMax) check.fail("mode must be 'sum' or 'mean', got 'max'");
  const std::int64_t count = check_bags(check, a.bags, a.out, a.table.rows.shape[0]);
  check.tensor("out", a.out, a.out.dtype, {count, a.table.width}, "[B, D]");
  cpu::kernels().quantized_embedding_bag(a);
}

}  // namespace lmkern
