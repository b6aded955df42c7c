// Lookup in a table of 8 or 4 bits an element, and sums and means of bags of its rows.
//
// Math       row(v)[d] = q[v, d] scale[v] + minimum[v],  q in 0 .. 2^bits - 1
//            out[n, :] = row(indices[n]);  bags as in embedding_bag.h, of these rows.
// Gradient   none: inference only.
// Shapes     indices [...] int32 or int64   out [..., D], for bags [B, D]
//            table [V, ceil(D bits / 8) + 8] bytes: a row of q (of 4 bits two a byte, the even d in the
//            lower half), then its scale and its minimum, float32 each. With 8 bits it is the layout of
//            torch.ops.quantized.embedding_bag_byte_prepack.
// Layout     contiguous, but the table may have any row stride. out in any of the four dtypes.
// Aliasing   none.
// Numerics   one multiply-add in float (double for double) an element, rounded once to out's dtype.
//            With scale = (max - min) / (2^bits - 1) and q rounded to nearest, an element is off by at
//            most scale / 2, and that rounding. Scale and minimum are float32, not float16 as in
//            torch's table of 4 bits: 8 bytes are 1 % of a row of 768 at 8 bits, float16 would round
//            the minimum by up to 2^-11 of it, which may be many scales, and end at 65504.
// Errors     IndexError as in embedding.h, before anything is written.
// Source     Guan et al. 2019, Post-training 4-bit quantization on embedding tables (row-wise affine).
#pragma once
#include "core/tensor_view.h"
#include "ops/embedding_bag.h"

namespace lmkern {

struct QuantizedTable {
  TensorView rows;     // [V, ceil(D bits / 8) + 8] uint8
  std::int64_t width;  // D
  int bits;            // 8 or 4

  std::int64_t packed() const { return (width * bits + 7) / 8; }  // bytes of a row's q
};

struct QuantizedEmbeddingArgs {
  QuantizedTable table;
  TensorView indices;  // [...]
  TensorView out;      // [..., D] out
};

struct QuantizedEmbeddingBagArgs {
  QuantizedTable table;
  EmbeddingBags bags;  // sum or mean; per_sample_weights of out's dtype
  TensorView out;      // [B, D] out
};

void quantized_embedding(const QuantizedEmbeddingArgs& args);
void quantized_embedding_bag(const QuantizedEmbeddingBagArgs& args);

}  // namespace lmkern
