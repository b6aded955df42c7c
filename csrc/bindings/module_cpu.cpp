// lmkern._C: the CPU kernels. Called only by the op implementations in python/lmkern/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bags.h"
#include "bindings/bind.h"
#include "bindings/pool_tensor.h"
#include "core/parallel.h"
#include "cpu/isa.h"

namespace py = pybind11;
using lmkern::Bags;
using lmkern::call;
using lmkern::embedding_bags;
using lmkern::TensorView;

namespace {

lmkern::VecFunction vec_function(const std::string& name) {
  using F = lmkern::VecFunction;
  if (name == "exp") return F::kExp;
  if (name == "exp_nonpositive") return F::kExpNonpositive;
  if (name == "exp_normal") return F::kExpNormal;
  if (name == "log") return F::kLog;
  if (name == "tanh") return F::kTanh;
  if (name == "sigmoid") return F::kSigmoid;
  if (name == "erf") return F::kErf;
  if (name == "normal_tail") return F::kNormalTail;
  throw std::invalid_argument("vec_math: no function '" + name + "'");
}

lmkern::Activation activation(const std::string& name) {
  using A = lmkern::Activation;
  if (name == "gelu") return A::kGelu;
  if (name == "gelu_tanh") return A::kGeluTanh;
  if (name == "silu") return A::kSilu;
  throw std::invalid_argument("activation: no function '" + name + "'");
}

// AttentionProblem, member by member.
using Problem = std::tuple<TensorView, TensorView, TensorView, TensorView, TensorView, TensorView,
                           TensorView, TensorView, TensorView, double, double, std::int64_t,
                           std::int64_t, bool, double, std::int64_t>;

lmkern::AttentionProblem attention_problem(const Problem& members) {
  return std::apply([](const auto&... member) { return lmkern::AttentionProblem{member...}; },
                    members);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  lmkern::bind_errors();
  lmkern::bind_recurrent(m);
  lmkern::bind_embedding(m);
  lmkern::bind_embedding_bag(m);
  lmkern::bind_embedding_optimizer(m);
  lmkern::bind_token_position(m);
  m.def("attention_forward", [](const Problem& problem, TensorView out, TensorView lse) {
    call(lmkern::attention_forward, {attention_problem(problem), out, lse});
  });
  m.def("attention_backward", [](const Problem& problem, TensorView d_out, TensorView d_lse,
                                 TensorView out, TensorView lse, TensorView d_q, TensorView d_k,
                                 TensorView d_v, TensorView d_distance, TensorView d_mask) {
    call(lmkern::attention_backward,
         {attention_problem(problem), d_out, d_lse, out, lse, d_q, d_k, d_v, d_distance, d_mask});
  });
  m.def("attention_weights",
        [](const Problem& problem, TensorView lse, TensorView weights, bool only_keep) {
          call(lmkern::attention_weights, {attention_problem(problem), lse, weights, only_keep});
        });

  m.def("activation_forward",
        [](TensorView input, TensorView up, TensorView bias, const std::string& function,
           bool gated, bool gate_first, TensorView out) {
          call(lmkern::activation_forward,
               {{activation(function), gated, gate_first, input, up, bias}, out});
        });
  m.def("activation_backward", [](TensorView d_out, TensorView input, TensorView up,
                                  TensorView bias, const std::string& function, bool gated,
                                  bool gate_first, TensorView d_input, TensorView d_up,
                                  TensorView d_bias) {
    call(
        lmkern::activation_backward,
        {{activation(function), gated, gate_first, input, up, bias}, d_out, d_input, d_up, d_bias});
  });

  m.def("dropout", [](TensorView input, TensorView out, double p, std::int64_t seed) {
    call(lmkern::dropout, {input, out, p, seed});
  });

  m.def("cross_entropy_forward",
        [](TensorView logits, TensorView index, TensorView probabilities, TensorView weight,
           TensorView bias, std::int64_t first, std::int64_t classes, std::int64_t ignore_index,
           double softcap, TensorView maximum, TensorView sum, TensorView picked, TensorView mass,
           TensorView total) {
          call(lmkern::cross_entropy_forward,
               {logits,
                {index, probabilities, weight, bias, first, classes, ignore_index, softcap},
                maximum,
                sum,
                picked,
                mass,
                total});
        });
  m.def("cross_entropy_backward",
        [](TensorView logits, TensorView index, TensorView probabilities, TensorView weight,
           TensorView bias, std::int64_t first, std::int64_t classes, std::int64_t ignore_index,
           double softcap, TensorView maximum, TensorView log_sum, TensorView d_lse,
           TensorView d_picked, TensorView d_total, TensorView d_logits) {
          call(lmkern::cross_entropy_backward,
               {logits,
                {index, probabilities, weight, bias, first, classes, ignore_index, softcap},
                maximum,
                log_sum,
                d_lse,
                d_picked,
                d_total,
                d_logits});
        });

  m.def("norm_forward",
        [](std::int64_t width, TensorView input, TensorView residual, TensorView input_bias,
           TensorView weight, TensorView bias, double eps, double dropout_p, std::int64_t seed,
           TensorView sum, TensorView out, TensorView statistics) {
          call(lmkern::norm_forward, {width, input, residual, input_bias, weight, bias, eps,
                                      dropout_p, seed, sum, out, statistics});
        });
  m.def("norm_backward", [](std::int64_t width, TensorView d_out, TensorView d_sum, TensorView x,
                            TensorView statistics, TensorView weight, double dropout_p,
                            std::int64_t seed, TensorView d_x, TensorView d_input,
                            TensorView d_weight, TensorView d_bias, TensorView d_input_bias) {
    call(lmkern::norm_backward, {width, d_out, d_sum, x, statistics, weight, dropout_p, seed, d_x,
                                 d_input, d_weight, d_bias, d_input_bias});
  });

  m.def("quantized_embedding",
        [](TensorView table, std::int64_t width, int bits, TensorView indices, TensorView out) {
          call(lmkern::quantized_embedding, {{table, width, bits}, indices, out});
        });
  m.def("quantized_embedding_bag",
        [](TensorView table, std::int64_t width, int bits, const Bags& bags, TensorView out) {
          call(lmkern::quantized_embedding_bag, {{table, width, bits}, embedding_bags(bags), out});
        });

  m.def("rotary_embedding", [](TensorView q, TensorView k, TensorView cos, TensorView sin,
                               TensorView q_out, TensorView k_out, bool interleaved, bool inverse) {
    call(lmkern::rotary_embedding, {q, k, cos, sin, q_out, k_out, interleaved, inverse});
  });

  m.def("matmul", [](TensorView a, TensorView b, TensorView bias, TensorView out, bool transpose_a,
                     bool transpose_b, bool accumulate) {
    return call(lmkern::matmul, {a, b, bias, out, transpose_a, transpose_b, accumulate});
  });

  m.def("vec_math", [](const std::string& function, TensorView x, TensorView out) {
    call(lmkern::vec_math, {vec_function(function), x, out});
  });

  m.def("pool_empty", &lmkern::dlpack::pool_empty);
  m.def("pool_clear", &lmkern::pool_clear);
  m.def("pool_enable", &lmkern::pool_enable);
  m.def("pool_bytes", [] {
    const auto [used, kept, most_used] = lmkern::pool_bytes();
    return py::make_tuple(used, kept, most_used);
  });

  m.def("isa", [] { return lmkern::cpu::kernels().isa; });
  m.def("supported_isas", &lmkern::cpu::supported_isas);
  m.def("set_isa", &lmkern::cpu::set_isa, py::arg("name"));
  m.def("max_threads", &lmkern::max_threads);
  m.def("peak_flops", [](int threads, std::int64_t iterations) {
    py::gil_scoped_release released;
    return lmkern::cpu::kernels().peak_flops(threads, iterations);
  });
}
