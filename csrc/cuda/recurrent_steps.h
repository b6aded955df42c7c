// The per-step path of the recurrent layers: a few launches a step, any size, all options.
#pragma once
#include "cuda/recurrent_unit.h"
#include "cuda/slice_product.h"

namespace lmkern::cuda {

// What a pass keeps in the workspace between the launches.
template <class S>
struct StepWorkspace {
  using A = Accumulate<S>;
  A *h, *c;      // [B, P], [B, H]: what is carried, forward h and c, backward their gradients
  A* product;    // [B, max(G H, P)]: of the operand with W_hh, or with W_hr
  A* through;    // [B, H]: backward, dL/d(o * tanh c)
  S* operand;    // [B, stride of the depth]
  S* projected;  // [B, stride]: forward o * tanh(c), backward dL/dh before the projection
  std::int64_t bytes = 0;

  StepWorkspace(void* memory, int batch, int hidden, int width, int gates, bool backward,
                bool projects) {
    const auto take = [&]<class T>(T*& pointer, std::int64_t elements) {
      pointer = reinterpret_cast<T*>(static_cast<char*>(memory) + bytes);
      bytes += (elements * static_cast<std::int64_t>(sizeof(T)) + 15) / 16 * 16;
    };
    const std::int64_t B = batch, wide = std::int64_t{gates} * hidden;
    const auto stride = [](std::int64_t depth) {
      return SliceShape<S>{0, static_cast<int>(depth), 0}.operand_stride();
    };
    take(h, B * width);
    take(c, B * hidden);
    take(product, B * (wide > width ? wide : width));
    take(through, backward ? B * hidden : 0);
    take(operand, B * stride(backward ? wide : width));
    take(projected, projects ? B * stride(backward ? width : hidden) : 0);
  }
};

template <class S>
void recurrent_forward_steps(const RecurrentForwardArgs& args);
template <class S>
void recurrent_backward_steps(const RecurrentBackwardArgs& args);

}  // namespace lmkern::cuda
