// What a cross entropy is made of: reductions of the logits over their classes, and their gradient.
//
// Math       s_j = z_j + bias_j, or softcap tanh((z_j + bias_j) / softcap); sums over j are over all classes
//            maximum = max_j s_j        sum   = sum_j e^(s_j - maximum)
//            picked  = s_y for a class y, or sum_j t_j w_j s_j for probabilities t
//            mass    = sum_j t_j w_j    total = sum_j w_j s_j
//            With lse = maximum + log sum, the weighted, smoothed loss of a class y (Szegedy et al.
//            2016, section 7) is (1 - eps) w_y (lse - picked) + eps / C (lse sum_j w_j - total)
// Gradient   d_z_j = (d_lse p_j + d_picked [j = y] + d_total w_j) (1 - (s_j / softcap)^2)
//            with p_j = e^((s_j - maximum) - log sum), and d_picked t_j w_j in place of
//            d_picked [j = y] for probabilities
// Shapes     logits, probabilities, d_logits [N, C, P]: C classes, N P positions; weight, bias [C];
//            target and all terms [N, P]
// Layout     P = 1: rows of classes are contiguous. P > 1: positions are. Other strides are free.
//            Terms, target, weight and bias are contiguous.
// Aliasing   d_logits may be logits.
// Numerics   exponentials and sums in float (double for float64), in an order that depends on C and
//            `first` alone; d_logits is rounded once. A position whose gradients are all 0 gets zeros,
//            whatever its logits. maximum and log sum stay apart, so that p and log p_y are as exact
//            for logits far from 0; a total, and picked of probabilities, lose lse's digits there.
// Errors     IndexError for a target outside of [0, classes) that is not ignore_index.
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

// A position's target: a class index, or probabilities of all classes.
struct CrossEntropyTarget {
  TensorView index;          // [N, P] int64
  TensorView probabilities;  // [N, C, P]
  TensorView weight;         // [C] Accumulate dtype; absent: ones
  TensorView bias;           // [C] Accumulate dtype; absent: zeros
  std::int64_t first;        // the logits are those of the classes first, first + 1, ...
  std::int64_t classes;      // ... of so many
  std::int64_t ignore_index;
  double softcap;  // 0: none
};

struct CrossEntropyForwardArgs {
  TensorView logits;
  CrossEntropyTarget target;
  // Accumulate dtype. Written if first = 0, continued otherwise; mass and total may be absent.
  TensorView maximum, sum, picked, mass, total;
};

struct CrossEntropyBackwardArgs {
  TensorView logits;
  CrossEntropyTarget target;
  TensorView maximum, log_sum, d_lse, d_picked, d_total;  // Accumulate dtype; d_total may be absent
  TensorView d_logits;                                    // out
};

void cross_entropy_forward(const CrossEntropyForwardArgs& args);
void cross_entropy_backward(const CrossEntropyBackwardArgs& args);

}  // namespace lmkern
