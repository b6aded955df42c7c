#include "ops/embedding_bag.h"

#include "bindings/bags.h"
#include "bindings/bind.h"
#if defined(LMKERN_CUDA_MODULE)
#include "cuda/kernels.h"
#endif

namespace lmkern {
void bind_embedding_bag(pybind11::module_& m) {
  m.def("embedding_bag_forward",
        [](const Bags& bags, TensorView weight, TensorView out, TensorView winners) {
          call(embedding_bag_forward, {embedding_bags(bags), weight, out, winners});
        });
#if defined(LMKERN_CUDA_MODULE)
  m.def("embedding_bag_sorted_backward",
        [](const Bags& bags, TensorView d_out, TensorView winners, TensorView kept, TensorView rows,
           TensorView order, TensorView d_weight, TensorView workspace, bool scale_grad_by_freq) {
          call(embedding_bag_sorted_backward, {embedding_bags(bags), d_out, winners, kept, rows,
                                               order, d_weight, workspace, scale_grad_by_freq});
        });
  m.def("embedding_bag_sorted_workspace", cuda::embedding_bag_sorted_workspace);
#else
  m.def("embedding_bag_backward",
        [](const Bags& bags, TensorView d_out, TensorView winners, TensorView ids,
           TensorView starts, TensorView order, TensorView stale, TensorView d_weight, bool sparse,
           bool scale_grad_by_freq) {
          call(embedding_bag_backward, {embedding_bags(bags), d_out, winners, ids, starts, order,
                                        stale, d_weight, sparse, scale_grad_by_freq});
        });
#endif
  m.def("embedding_bag_weights_backward",
        [](const Bags& bags, TensorView d_out, TensorView winners, TensorView kept,
           TensorView weight, TensorView d_per_sample_weights) {
          call(embedding_bag_weights_backward,
               {embedding_bags(bags), d_out, winners, kept, weight, d_per_sample_weights});
        });
}

}  // namespace lmkern
