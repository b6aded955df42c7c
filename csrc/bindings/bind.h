// How ops are bound, in both modules alike: the arguments of a Python function are the members of the
// op's Args in their order, flat.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/tensor_caster.h"
#if defined(LMKERN_CUDA_MODULE)
#include "cuda/stream.h"
#endif

namespace lmkern {

// Runs an op without the GIL: views hold copies of shape and strides, and the caller's tensors stay
// alive for the length of the call.
template <class Result, class Args>
Result call(Result (*op)(const Args&), const Args& args) {
#if defined(LMKERN_CUDA_MODULE)
  const cuda::CallScope scope;  // its arguments' device and torch's current stream there
#endif
  pybind11::gil_scoped_release released;
  return op(args);
}

// C++ exceptions that pybind11 does not know.
inline void bind_errors() {
  pybind11::register_exception_translator([](std::exception_ptr e) {
    try {
      if (e) std::rethrow_exception(e);
    } catch (const TypeError& error) {
      pybind11::set_error(PyExc_TypeError, error.what());
    }
  });
}

void bind_recurrent(pybind11::module_& m);
void bind_embedding(pybind11::module_& m);
void bind_embedding_bag(pybind11::module_& m);
void bind_embedding_optimizer(pybind11::module_& m);
void bind_token_position(pybind11::module_& m);

}  // namespace lmkern
