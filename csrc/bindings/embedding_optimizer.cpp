#include "ops/embedding_optimizer.h"

#include "bindings/bind.h"

namespace lmkern {
void bind_embedding_optimizer(pybind11::module_& m) {
  // The first 7 arguments are OptimizerTable.
  m.def("embedding_sgd", [](TensorView weight, TensorView rows, TensorView gradient,
                            double gradient_scale, TensorView touched, double decay,
                            double step_size) {
    call(embedding_sgd, {{weight, rows, gradient, gradient_scale, touched, decay, step_size}});
  });
  m.def("embedding_adagrad", [](TensorView weight, TensorView rows, TensorView gradient,
                                double gradient_scale, TensorView touched, double decay,
                                double step_size, TensorView sum, double weight_decay, double eps) {
    call(embedding_adagrad, {{weight, rows, gradient, gradient_scale, touched, decay, step_size},
                             sum,
                             weight_decay,
                             eps});
  });
  m.def("embedding_adam",
        [](TensorView weight, TensorView rows, TensorView gradient, double gradient_scale,
           TensorView touched, double decay, double step_size, TensorView exp_avg,
           TensorView exp_avg_sq, double beta1, double beta2, double eps) {
          call(embedding_adam, {{weight, rows, gradient, gradient_scale, touched, decay, step_size},
                                exp_avg,
                                exp_avg_sq,
                                beta1,
                                beta2,
                                eps});
        });
}

}  // namespace lmkern
