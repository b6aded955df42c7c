#include "ops/embedding_bag.h"

#include "bindings/bags.h"
#include "bindings/bind.h"

namespace lmkern {
void bind_embedding_bag(pybind11::module_& m) {
  m.def("embedding_bag_forward",
        [](const Bags& bags, TensorView weight, TensorView out, TensorView winners) {
          call(embedding_bag_forward, {embedding_bags(bags), weight, out, winners});
        });
  m.def("embedding_bag_backward",
        [](const Bags& bags, TensorView d_out, TensorView winners, TensorView ids,
           TensorView starts, TensorView order, TensorView stale, TensorView d_weight, bool sparse,
           bool scale_grad_by_freq) {
          call(embedding_bag_backward, {embedding_bags(bags), d_out, winners, ids, starts, order,
                                        stale, d_weight, sparse, scale_grad_by_freq});
        });
  m.def("embedding_bag_weights_backward", [](const Bags& bags, TensorView d_out, TensorView winners,
                                             TensorView weight, TensorView d_per_sample_weights) {
    call(embedding_bag_weights_backward,
         {embedding_bags(bags), d_out, winners, weight, d_per_sample_weights});
  });
}

}  // namespace lmkern
