// selective_scan and ss2d as most calls are: dtypes that need no conversion, B and C that vary along the sequence, shapes that fit,
// tensors without wrappers or modes around them. In one step is done what dass_ops/functional.py does in many, each of which costs a
// short sequence more than its scan when Python is not in the caches; so it is a function of Python's own kind and no operator. Anything
// else is left to that file, which also knows what to say about it.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <ATen/PythonTorchFunctionTLS.h>

#include <cstdlib>
#include <cstring>

#include "check_arguments.h"
#include "dispatch.h"

namespace dass {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What selective_scan is given.
struct PlainScan {
  Tensor u, delta, A, B, C;
  OptionalTensor D, z, delta_bias, initial_state;
  bool delta_softplus = false;
  c10::List<bool> reverse;
  bool recorded = false;

  // Whether everything fits together; notes whether gradients will be wanted.
  bool fits() {
    const auto io = u.scalar_type();
    const bool known = io == at::kFloat || io == at::kBFloat16 || io == at::kHalf || io == at::kDouble;
    const auto directions = static_cast<int64_t>(reverse.size());
    if (!known || directions == 0 || u.dim() != 3 || A.dim() != 2 || u.size(1) % directions != 0) return false;
    const int64_t batch = u.size(0), channels = u.size(1), length = u.size(2), state = A.size(1);
    const auto is = [&](const Tensor& t, at::IntArrayRef shape, at::ScalarType type) {
      recorded |= t.requires_grad();
      return t.sizes() == shape && t.scalar_type() == type && t.device() == u.device();
    };
    const auto absent_or = [&](const OptionalTensor& t, at::IntArrayRef shape, at::ScalarType type) {
      return !t.has_value() || is(*t, shape, type);
    };
    const auto projection = [&](const Tensor& p) {
      if (p.dim() == 3) return is(p, {batch, state, length}, io);
      const int64_t groups = p.dim() == 4 ? p.size(1) : 0;
      return groups != 0 && groups % directions == 0 && channels % groups == 0 && is(p, {batch, groups, state, length}, io);
    };
    const auto parameter = state_dtype(io);
    recorded = false;
    const bool all = is(u, u.sizes(), io) && is(delta, u.sizes(), io) && is(A, {channels, state}, parameter) && projection(B) &&
                     projection(C) && absent_or(D, {channels}, parameter) && absent_or(z, u.sizes(), io) &&
                     absent_or(delta_bias, {channels}, parameter) && absent_or(initial_state, {batch, channels, state}, parameter);
    recorded &= at::GradMode::is_enabled();
    return all;
  }

};

using Shaped = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

// The operator's layout: directions have an axis of their own.
struct Shapes {
  int64_t batch, channels, length, state, directions, share;

  explicit Shapes(const PlainScan& scan)
      : batch(scan.u.size(0)),
        channels(scan.u.size(1)),
        length(scan.u.size(2)),
        state(scan.A.size(1)),
        directions(static_cast<int64_t>(scan.reverse.size())),
        share(channels / directions) {}

  Tensor sequence(const Tensor& t) const { return t.view({batch, directions, share, length}); }
  OptionalTensor sequence(const OptionalTensor& t) const { return t.has_value() ? OptionalTensor(sequence(*t)) : t; }
  OptionalTensor parameter(const OptionalTensor& t) const {
    return t.has_value() ? OptionalTensor(t->view({directions, share})) : t;
  }
  Tensor states(const Tensor& t) const { return t.view({batch, directions, share, state}); }
  OptionalTensor states(const OptionalTensor& t) const { return t.has_value() ? OptionalTensor(states(*t)) : t; }
  Tensor projection(const Tensor& p) const {
    if (p.dim() == 3) return p.unsqueeze(1).unsqueeze(1).expand({batch, directions, 1, state, length});
    return p.view({batch, directions, p.size(1) / directions, state, length});
  }
  // A gradient in that layout as one of `p`, which all directions may share.
  Tensor gradient_of_projection(const Tensor& gradient, const Tensor& p) const {
    return p.dim() == 3 && directions > 1 ? gradient.sum({1, 2}) : gradient.view(p.sizes());
  }
  Shaped of(const PlainScan& s) const {
    return {sequence(s.u), sequence(s.delta), s.A.view({directions, share, state}), projection(s.B), projection(s.C),
            parameter(s.D), sequence(s.z), parameter(s.delta_bias), states(s.initial_state)};
  }
};

// (out, last_state, boundary_states), below autograd.
std::tuple<Tensor, Tensor, Tensor> run(const PlainScan& scan, int64_t chunk) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Shapes shapes(scan);
  const auto [out, last_state, boundary_states] = std::apply(
      [&](const auto&... inputs) {
        return operators<Native>().scan_forward.call(inputs..., scan.delta_softplus, scan.reverse, chunk, scan.u.scalar_type());
      },
      shapes.of(scan));
  return {out.view({shapes.batch, shapes.channels, shapes.length}), last_state.view({shapes.batch, shapes.channels, shapes.state}),
          boundary_states};
}

// One node for the whole call: a node for every view would cost a short sequence more than its gradient.
struct RecordedScan : torch::autograd::Function<RecordedScan> {
  static variable_list forward(AutogradContext* context, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                               const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                               const OptionalTensor& initial_state, bool delta_softplus, const c10::List<bool>& reverse,
                               int64_t chunk) {
    const auto [out, last_state, boundary_states] =
        run({u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse}, chunk);
    const auto given = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
    context->save_for_backward(
        {u, delta, A, B, C, given(D), given(z), given(delta_bias), given(initial_state), boundary_states});
    context->saved_data["delta_softplus"] = delta_softplus;
    context->saved_data["reverse"] = reverse;
    context->saved_data["chunk"] = chunk;
    context->set_materialize_grads(false);
    return {out, last_state};
  }

  static variable_list backward(AutogradContext* context, const variable_list& d_outputs) {
    variable_list result(12);
    if (!d_outputs[0].defined() && !d_outputs[1].defined()) return result;
    const auto saved = context->get_saved_variables();
    const auto& options = context->saved_data;
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    const PlainScan scan{saved[0],           saved[1],           saved[2],           saved[3],
                         saved[4],           optional(saved[5]), optional(saved[6]), optional(saved[7]),
                         optional(saved[8]), options.at("delta_softplus").toBool(), options.at("reverse").toBoolList()};
    // Nothing is recorded of a backward, unless its own derivative is wanted (which then is an error that says so); every view here
    // would otherwise pass through autograd again.
    std::optional<at::AutoDispatchBelowADInplaceOrView> unrecorded;
    if (!at::GradMode::is_enabled()) unrecorded.emplace();
    const Shapes shapes(scan);
    const Tensor d_out = d_outputs[0].defined() ? d_outputs[0] : at::zeros_like(scan.u);
    const auto gradients = std::apply(
        [&](const auto&... inputs) {
          return operators<Native>().scan_backward.call(shapes.sequence(d_out), shapes.states(optional(d_outputs[1])), inputs...,
                                                        saved[9], scan.delta_softplus, scan.reverse, options.at("chunk").toInt());
        },
        shapes.of(scan));
    size_t i = 0;
    std::apply([&](const auto&... each) { ((result[i] = each, ++i), ...); }, gradients);
    for (i = 0; i < 9; ++i) {
      if (!saved[i].defined())
        result[i] = Tensor();  // the kernels return an empty one
      else
        result[i] = i == 3 || i == 4 ? shapes.gradient_of_projection(result[i], saved[i]) : result[i].view(saved[i].sizes());
    }
    return result;
  }
};

std::pair<Tensor, Tensor> result_of(const PlainScan& s, int64_t chunk) {
  if (s.recorded) {
    auto outputs = RecordedScan::apply(s.u, s.delta, s.A, s.B, s.C, s.D, s.z, s.delta_bias, s.initial_state, s.delta_softplus,
                                       s.reverse, chunk);
    return {std::move(outputs[0]), std::move(outputs[1])};
  }
  auto outputs = run(s, 0);
  return {std::move(std::get<0>(outputs)), std::move(std::get<1>(outputs))};
}

// What ss2d is given.
struct PlainMap {
  Tensor x, x_dbl, dt_weight, dt_bias, A_logs, Ds;
  bool recorded = false;

  bool fits() {
    const auto io = x.scalar_type(), parameter = state_dtype(io);
    const bool known = io == at::kFloat || io == at::kBFloat16 || io == at::kHalf || io == at::kDouble;
    if (!known || x.dim() != 4 || dt_weight.dim() != 3 || A_logs.dim() != 2) return false;
    const int64_t channels = x.size(1), rank = dt_weight.size(2), state = A_logs.size(1);
    recorded = x.requires_grad();
    const auto is = [&](const Tensor& t, at::IntArrayRef shape, at::ScalarType type) {
      recorded |= t.requires_grad();
      return t.sizes() == shape && t.scalar_type() == type && t.device() == x.device();
    };
    const bool all = is(x_dbl, {x.size(0), 4, rank + 2 * state, x.size(2), x.size(3)}, io) &&
                     is(dt_weight, {4, channels, rank}, parameter) && is(dt_bias, {4, channels}, parameter) &&
                     is(A_logs, {4 * channels, state}, parameter) && is(Ds, {4 * channels}, parameter);
    recorded &= at::GradMode::is_enabled();
    return all;
  }

  Tensor run(int64_t chunk) const {
    std::optional<at::AutoDispatchBelowADInplaceOrView> unrecorded;
    if (!recorded) unrecorded.emplace();
    return std::get<0>(operators<Native>().ss2d_forward.call(x, x_dbl, dt_weight, dt_bias, A_logs, Ds, recorded ? chunk : 0,
                                                             x.scalar_type()));
  }
};

// A tensor as such: no subclass, no wrapper of a transformation.
bool unwrap(PyObject* object, Tensor& tensor) {
  if (!THPVariable_CheckExact(object)) return false;
  tensor = THPVariable_Unpack(object);
  constexpr c10::DispatchKeySet wrappers({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                          c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize});
  return tensor.layout() == at::kStrided && !tensor.key_set().has_any(wrappers);
}
bool unwrap(PyObject* object, OptionalTensor& tensor) { return object == Py_None || unwrap(object, tensor.emplace()); }

bool unwrap(PyObject* object, bool& flag) {
  flag = object == Py_True;
  return PyBool_Check(object);
}

bool unwrap(PyObject* object, c10::List<bool>& flags) {
  bool flag = false;
  if (unwrap(object, flag)) {
    flags.push_back(flag);
    return true;
  }
  if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) return false;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
    if (!unwrap(PySequence_Fast_GET_ITEM(object, i), flag)) return false;
    flags.push_back(flag);
  }
  return true;
}

// Something that wants to see every operation: it sees them where they are done step by step.
bool watched() {
  constexpr c10::DispatchKeySet watchers({c10::DispatchKey::Python, c10::DispatchKey::PythonDispatcher,
                                          c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::Functionalize});
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(watchers) || at::impl::torch_function_mode_enabled();
}

// Whether the kernels of this extension run tensors of this device, asked for by `backend`, a name or None.
bool native(const Tensor& u, PyObject* backend) {
  const char* name = u.is_cpu() ? "cpu" : "cuda";
  const char* wanted = backend == Py_None ? std::getenv("DASS_OPS_BACKEND") : PyUnicode_Check(backend) ? PyUnicode_AsUTF8(backend) : "?";
  if (wanted != nullptr && *wanted != 0 && std::strcmp(wanted, name) != 0) return false;
  return u.is_cpu() || (u.is_cuda() && operators<Native>().scan_forward.hasKernelForDispatchKey(c10::DispatchKey::CUDA));
}

// plain_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, backend, chunks) -> (out,
// last_state), or None where the call is not plain. `chunks`, by device type: steps between the states that a backward needs, for
// one state a channel and for several.
PyObject* plain_scan(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 13, "plain_scan takes 13 arguments, got ", count, ".");
  PlainScan scan;
  const bool plain = !watched() && unwrap(arguments[0], scan.u) && unwrap(arguments[1], scan.delta) && unwrap(arguments[2], scan.A) &&
                     unwrap(arguments[3], scan.B) && unwrap(arguments[4], scan.C) && unwrap(arguments[5], scan.D) &&
                     unwrap(arguments[6], scan.z) && unwrap(arguments[7], scan.delta_bias) &&
                     unwrap(arguments[8], scan.initial_state) && unwrap(arguments[9], scan.delta_softplus) &&
                     unwrap(arguments[10], scan.reverse) && native(scan.u, arguments[11]) && scan.fits();
  if (!plain) Py_RETURN_NONE;
  int64_t chunk = 0;
  if (scan.recorded) {
    PyObject* const chunks = PyDict_GetItemString(arguments[12], scan.u.is_cpu() ? "cpu" : "cuda");
    chunk = PyLong_AsLongLong(PyTuple_GET_ITEM(chunks, scan.A.size(1) > 1));
  }
  std::pair<Tensor, Tensor> result;
  {
    const pybind11::gil_scoped_release unlocked;
    result = result_of(scan, chunk);
  }
  THPObjectPtr out(THPVariable_Wrap(std::move(result.first))), last_state(THPVariable_Wrap(std::move(result.second)));
  if (!out || !last_state) return nullptr;
  return PyTuple_Pack(2, out.get(), last_state.get());
  END_HANDLE_TH_ERRORS
}

// plain_map(x, x_dbl, dt_weight, dt_bias, A_logs, Ds, backend, chunks) -> y, or None where the call is not plain. `chunks`, by device
// type: steps between the states that a backward needs.
PyObject* plain_map(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 8, "plain_map takes 8 arguments, got ", count, ".");
  PlainMap map;
  const bool plain = !watched() && unwrap(arguments[0], map.x) && unwrap(arguments[1], map.x_dbl) &&
                     unwrap(arguments[2], map.dt_weight) && unwrap(arguments[3], map.dt_bias) && unwrap(arguments[4], map.A_logs) &&
                     unwrap(arguments[5], map.Ds) && native(map.x, arguments[6]) && map.fits();
  if (!plain) Py_RETURN_NONE;
  const int64_t chunk = map.recorded ? PyLong_AsLongLong(PyDict_GetItemString(arguments[7], map.x.is_cpu() ? "cpu" : "cuda")) : 0;
  Tensor y;
  {
    const pybind11::gil_scoped_release unlocked;
    y = map.run(chunk);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"plain_map", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_map)), METH_FASTCALL, "See csrc/plain_calls.cpp."},
    {"plain_scan", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_scan)), METH_FASTCALL, "See csrc/plain_calls.cpp."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The operators of dass_ops.", -1, methods};

}  // namespace
}  // namespace dass

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&dass::module); }
