// lmkern._C: the CPU kernels. Called only by the op implementations in python/lmkern/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/pool_tensor.h"
#include "bindings/tensor_caster.h"
#include "core/parallel.h"
#include "cpu/isa.h"

namespace py = pybind11;
using lmkern::TensorView;

namespace {

// Runs a kernel without the GIL: views hold copies of shape and strides, and the caller's tensors
// stay alive for the length of the call.
template <class Result, class Args>
Result call(Result (*op)(const Args&), const Args& args) {
  py::gil_scoped_release released;
  return op(args);
}

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

// EmbeddingBags, member by member.
using Bags = std::tuple<TensorView, TensorView, TensorView, bool, int, std::int64_t>;

lmkern::EmbeddingBags embedding_bags(const Bags& bags) {
  const auto& [indices, offsets, weights, include_last_offset, mode, padding_idx] = bags;
  return {indices,    offsets, weights, include_last_offset, static_cast<lmkern::BagMode>(mode),
          padding_idx};
}

// TokenPosition, member by member.
using TokenPositionRows = std::tuple<TensorView, TensorView, TensorView, TensorView, std::int64_t,
                                     std::int64_t, TensorView, TensorView, double>;

lmkern::TokenPosition token_position(const TokenPositionRows& members) {
  return std::apply([](const auto&... member) { return lmkern::TokenPosition{member...}; },
                    members);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  py::register_exception_translator([](std::exception_ptr e) {
    try {
      if (e) std::rethrow_exception(e);
    } catch (const lmkern::TypeError& error) {
      py::set_error(PyExc_TypeError, error.what());
    }
  });

  // The first 18 arguments are RecurrentOptions in their order.
  m.def("recurrent_forward",
        [](int cell, bool reverse, std::int64_t batch, TensorView w_hh, TensorView b_hh,
           TensorView w_hr, TensorView peephole, TensorView norm_hh, TensorView norm_c_weight,
           TensorView norm_c_bias, double eps, TensorView h_mask, TensorView zoneout_h,
           TensorView zoneout_c, double zoneout_h_rate, double zoneout_c_rate, TensorView reset,
           TensorView batch_sizes, TensorView gates, TensorView h0, TensorView c0,
           TensorView first_hh, TensorView y, TensorView h_n, TensorView c_n, TensorView cells,
           TensorView hidden, TensorView hh, TensorView unprojected, bool save, TensorView packed,
           bool packed_ready) {
          call(lmkern::recurrent_forward,
               {{static_cast<lmkern::RecurrentCell>(cell), reverse, batch, w_hh, b_hh, w_hr,
                 peephole, norm_hh, norm_c_weight, norm_c_bias, eps, h_mask, zoneout_h, zoneout_c,
                 zoneout_h_rate, zoneout_c_rate, reset, batch_sizes},
                gates,
                h0,
                c0,
                first_hh,
                y,
                h_n,
                c_n,
                cells,
                hidden,
                hh,
                unprojected,
                save,
                packed,
                packed_ready});
        });
  m.def("recurrent_backward",
        [](int cell, bool reverse, std::int64_t batch, TensorView w_hh, TensorView b_hh,
           TensorView w_hr, TensorView peephole, TensorView norm_hh, TensorView norm_c_weight,
           TensorView norm_c_bias, double eps, TensorView h_mask, TensorView zoneout_h,
           TensorView zoneout_c, double zoneout_h_rate, double zoneout_c_rate, TensorView reset,
           TensorView batch_sizes, TensorView d_y, TensorView d_h_n, TensorView d_c_n,
           TensorView d_cells, TensorView h0, TensorView c0, TensorView y, TensorView gates,
           TensorView cells, TensorView hidden, TensorView hh, TensorView d_gates, TensorView d_hh,
           TensorView d_h, TensorView d_normed, TensorView d_c_normed, TensorView c_now,
           TensorView d_h0, TensorView d_c0, bool recompute) {
          call(lmkern::recurrent_backward,
               {{static_cast<lmkern::RecurrentCell>(cell), reverse, batch, w_hh, b_hh, w_hr,
                 peephole, norm_hh, norm_c_weight, norm_c_bias, eps, h_mask, zoneout_h, zoneout_c,
                 zoneout_h_rate, zoneout_c_rate, reset, batch_sizes},
                d_y,
                d_h_n,
                d_c_n,
                d_cells,
                h0,
                c0,
                y,
                gates,
                cells,
                hidden,
                hh,
                d_gates,
                d_hh,
                d_h,
                d_normed,
                d_c_normed,
                c_now,
                d_h0,
                d_c0,
                recompute});
        });

  m.def("recurrent_step", [](int cell, TensorView from_x, TensorView from_h, TensorView x,
                             TensorView w_ih, TensorView w_hh, TensorView b_ih, TensorView b_hh,
                             TensorView h, TensorView c, TensorView h_next, TensorView y,
                             TensorView c_next, TensorView gates, TensorView cells,
                             TensorView hidden) {
    call(lmkern::recurrent_step, {static_cast<lmkern::RecurrentCell>(cell), from_x, from_h, x, w_ih,
                                  w_hh, b_ih, b_hh, h, c, h_next, y, c_next, gates, cells, hidden});
  });

  m.def("recurrent_step_backward",
        [](int cell, TensorView d_h, TensorView d_y, TensorView d_c, TensorView gates,
           TensorView hidden, TensorView h, TensorView c, TensorView d_gates, TensorView d_hh,
           TensorView d_h_prev, TensorView d_c_prev, TensorView d_b_ih, TensorView d_b_hh) {
          call(lmkern::recurrent_step_backward,
               {static_cast<lmkern::RecurrentCell>(cell), d_h, d_y, d_c, gates, hidden, h, c,
                d_gates, d_hh, d_h_prev, d_c_prev, d_b_ih, d_b_hh});
        });

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

  m.def("embedding_forward", [](TensorView weight, TensorView indices, TensorView out,
                                double max_norm, double norm_type) {
    call(lmkern::embedding_forward, {weight, indices, out, max_norm, norm_type});
  });
  m.def("embedding_renorm",
        [](TensorView weight, TensorView ids, double max_norm, double norm_type) {
          call(lmkern::embedding_renorm, {weight, ids, max_norm, norm_type});
        });
  m.def("embedding_buckets",
        [](TensorView indices, std::int64_t num_embeddings, std::int64_t padding_idx,
           TensorView ids, TensorView starts, TensorView order) {
          return call(lmkern::embedding_buckets,
                      {indices, num_embeddings, padding_idx, ids, starts, order});
        });
  m.def("embedding_backward",
        [](TensorView d_out, TensorView ids, TensorView starts, TensorView order, TensorView stale,
           TensorView d_weight, bool sparse, bool scale_grad_by_freq, double scale) {
          call(lmkern::embedding_backward,
               {d_out, ids, starts, order, stale, d_weight, sparse, scale_grad_by_freq, scale});
        });

  m.def("embedding_clear", [](TensorView d_weight) { call(lmkern::embedding_clear, {d_weight}); });
  m.def("embedding_is_clear", [](TensorView d_weight, TensorView written, std::int64_t samples) {
    return call(lmkern::embedding_is_clear, {d_weight, written, samples});
  });

  m.def("embedding_bag_forward",
        [](const Bags& bags, TensorView weight, TensorView out, TensorView winners) {
          call(lmkern::embedding_bag_forward, {embedding_bags(bags), weight, out, winners});
        });
  m.def("embedding_bag_backward", [](const Bags& bags, TensorView d_out, TensorView winners,
                                     TensorView ids, TensorView starts, TensorView order,
                                     TensorView stale, TensorView d_weight, bool sparse,
                                     bool scale_grad_by_freq) {
    call(lmkern::embedding_bag_backward, {embedding_bags(bags), d_out, winners, ids, starts, order,
                                          stale, d_weight, sparse, scale_grad_by_freq});
  });
  m.def("embedding_bag_weights_backward", [](const Bags& bags, TensorView d_out, TensorView winners,
                                             TensorView weight, TensorView d_per_sample_weights) {
    call(lmkern::embedding_bag_weights_backward,
         {embedding_bags(bags), d_out, winners, weight, d_per_sample_weights});
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

  // The first 7 arguments are OptimizerTable.
  m.def("embedding_sgd",
        [](TensorView weight, TensorView rows, TensorView gradient, double gradient_scale,
           TensorView touched, double decay, double step_size) {
          call(lmkern::embedding_sgd,
               {{weight, rows, gradient, gradient_scale, touched, decay, step_size}});
        });
  m.def("embedding_adagrad", [](TensorView weight, TensorView rows, TensorView gradient,
                                double gradient_scale, TensorView touched, double decay,
                                double step_size, TensorView sum, double weight_decay, double eps) {
    call(lmkern::embedding_adagrad,
         {{weight, rows, gradient, gradient_scale, touched, decay, step_size},
          sum,
          weight_decay,
          eps});
  });
  m.def("embedding_adam",
        [](TensorView weight, TensorView rows, TensorView gradient, double gradient_scale,
           TensorView touched, double decay, double step_size, TensorView exp_avg,
           TensorView exp_avg_sq, double beta1, double beta2, double eps) {
          call(lmkern::embedding_adam,
               {{weight, rows, gradient, gradient_scale, touched, decay, step_size},
                exp_avg,
                exp_avg_sq,
                beta1,
                beta2,
                eps});
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

  m.def("token_position_forward",
        [](const TokenPositionRows& rows, TensorView weight, TensorView bias, double eps,
           double dropout_p, std::int64_t seed, TensorView out, TensorView statistics) {
          call(lmkern::token_position_forward,
               {token_position(rows), weight, bias, eps, dropout_p, seed, out, statistics});
        });
  m.def("token_position_backward", [](const TokenPositionRows& rows, TensorView d_out,
                                      TensorView statistics, TensorView weight, double dropout_p,
                                      std::int64_t seed, TensorView d_sum, TensorView d_position,
                                      TensorView d_weight, TensorView d_bias) {
    call(lmkern::token_position_backward, {token_position(rows), d_out, statistics, weight,
                                           dropout_p, seed, d_sum, d_position, d_weight, d_bias});
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
