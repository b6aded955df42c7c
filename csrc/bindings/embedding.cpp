#include "ops/embedding.h"

#include "bindings/bind.h"
#if defined(LMKERN_CUDA_MODULE)
#include "cuda/kernels.h"
#endif

namespace lmkern {
void bind_embedding(pybind11::module_& m) {
  m.def("embedding_forward", [](TensorView weight, TensorView indices, TensorView out,
                                double max_norm, double norm_type) {
    call(embedding_forward, {weight, indices, out, max_norm, norm_type});
  });
  m.def("embedding_renorm",
        [](TensorView weight, TensorView ids, double max_norm, double norm_type) {
          call(embedding_renorm, {weight, ids, max_norm, norm_type});
        });
#if defined(LMKERN_CUDA_MODULE)
  m.def("embedding_keys", [](TensorView indices, std::int64_t num_embeddings,
                             std::int64_t padding_idx, TensorView covered, TensorView keys) {
    call(embedding_keys, {indices, num_embeddings, padding_idx, covered, keys});
  });
  m.def("embedding_sorted_backward",
        [](TensorView d_out, TensorView rows, TensorView order, TensorView d_weight,
           TensorView workspace, bool scale_grad_by_freq, double scale) {
          call(embedding_sorted_backward,
               {d_out, rows, order, d_weight, workspace, scale_grad_by_freq, scale});
        });
  m.def("embedding_sorted_workspace", cuda::embedding_sorted_workspace);
#else
  m.def("embedding_buckets", [](TensorView indices, std::int64_t num_embeddings,
                                std::int64_t padding_idx, TensorView ids, TensorView starts,
                                TensorView order) {
    return call(embedding_buckets, {indices, num_embeddings, padding_idx, ids, starts, order});
  });
  m.def("embedding_backward",
        [](TensorView d_out, TensorView ids, TensorView starts, TensorView order, TensorView stale,
           TensorView d_weight, bool sparse, bool scale_grad_by_freq, double scale) {
          call(embedding_backward,
               {d_out, ids, starts, order, stale, d_weight, sparse, scale_grad_by_freq, scale});
        });

  m.def("embedding_clear", [](TensorView d_weight) { call(embedding_clear, {d_weight}); });
  m.def("embedding_is_clear", [](TensorView d_weight, TensorView written, std::int64_t samples) {
    return call(embedding_is_clear, {d_weight, written, samples});
  });
#endif
}

}  // namespace lmkern
