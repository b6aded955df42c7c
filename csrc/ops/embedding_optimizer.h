// Optimizer steps on the rows of a table that a training step used.
//
// Math       for each row r that occurs in rows, g = gradient_scale * the sum over n with rows[n] = r
//            of gradient[n, :], and w, s, m, v row r of the weight and of the optimizer's state:
//              w <- f w - step_size u,  f = decay / touched[r],  touched[r] <- decay
//              sgd       u = g
//              adagrad   g <- g + weight_decay w,  s <- s + g^2,  u = g / (sqrt(s) + eps);
//                        a sum of shape [V] has one s for a row, to which the mean of g^2 is added
//              adam      m <- m + (1 - beta1) (g - m),  v <- beta2 v + (1 - beta2) g^2,
//                        u = m / (sqrt(v) + eps)
//            Decoupled weight decay would multiply every row by 1 - lr_t weight_decay in every step
//            t. Here a row owes these factors until it is touched: `decay` is their running
//            product, touched[r] what that was when row r was up to date, so that f is the product
//            of exactly the factors owed, whatever the schedule of lr. Without touched, f = decay.
//            Without rows, row r has gradient r and N = V. sgd without a gradient takes u = 0: it
//            only pays what is owed.
// Gradient   none.
// Shapes     weight [V, D]   rows [N] int64   gradient [N, D] of the weight's dtype
//            touched [V] float64   sum [V, D] or [V], exp_avg, exp_avg_sq [V, D] float32, or
//            float64 for a float64 weight
// Layout     contiguous, but weight may have any row stride.
// Aliasing   none.
// Numerics   float (double for float64) throughout, gradients of a row added in ascending n; f - 1 is
//            rounded, not f, so that a decay of 1e-9 a step is not lost. Each element has one chain
//            of operations: same bits for any thread count.
// Errors     IndexError for a row outside [0, V), naming row, position and V, before anything is
//            written.
// Source     torch.optim.SGD, Adagrad, SparseAdam, AdamW. Row-wise Adagrad: FBGEMM's
//            EXACT_ROWWISE_ADAGRAD; Mudigere et al. 2022 (arXiv:2104.05158), section 4.1.4.
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

// What all of them take.
struct OptimizerTable {
  TensorView weight;    // [V, D] in out
  TensorView rows;      // [N] in any order, or absent
  TensorView gradient;  // [N, D]
  double gradient_scale;
  TensorView touched;  // [V] in out, or absent
  double decay;
  double step_size;
};

struct EmbeddingSgdArgs {
  OptimizerTable table;  // gradient may be absent
};

struct EmbeddingAdagradArgs {
  OptimizerTable table;
  TensorView sum;  // [V, D] or [V] in out
  double weight_decay, eps;
};

struct EmbeddingAdamArgs {
  OptimizerTable table;
  TensorView exp_avg, exp_avg_sq;  // [V, D] in out
  double beta1, beta2, eps;
};

void embedding_sgd(const EmbeddingSgdArgs& args);
void embedding_adagrad(const EmbeddingAdagradArgs& args);
void embedding_adam(const EmbeddingAdamArgs& args);

}  // namespace lmkern
