// selective_scan as most calls are: dtypes that need no conversion, B and C that vary along the sequence, shapes that fit, tensors
// without wrappers or modes around them. It does in one step what dass_ops/functional.py does in many, each of which costs a short
// sequence more than its scan when Python is not in the caches; so it is a function of Python's own kind and no operator. Anything
// else is left to that file, which also knows what to say about it.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

#include "check_arguments.h"
#include "operators.h"

namespace dass {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

  std::pair<Tensor, Tensor> run(int64_t chunk) const {
    const int64_t batch = u.size(0), channels = u.size(1), length = u.size(2), state = A.size(1);
    const auto directions = static_cast<int64_t>(reverse.size());
    const int64_t share = channels / directions;
    std::optional<at::AutoDispatchBelowADInplaceOrView> unrecorded;
    if (!recorded) unrecorded.emplace();
    const auto sequence = [&](const Tensor& t) { return t.view({batch, directions, share, length}); };
    const auto split = [&](const OptionalTensor& t) { return t.has_value() ? OptionalTensor(t->view({directions, share})) : t; };
    const auto projection = [&](const Tensor& p) {
      if (p.dim() == 3) return p.unsqueeze(1).unsqueeze(1).expand({batch, directions, 1, state, length});
      return p.view({batch, directions, p.size(1) / directions, state, length});
    };
    const auto [out, last_state, boundary_states] = operators<Native>().scan_forward.call(
        sequence(u), sequence(delta), A.view({directions, share, state}), projection(B), projection(C), split(D),
        z.has_value() ? OptionalTensor(sequence(*z)) : z, split(delta_bias),
        initial_state.has_value() ? OptionalTensor(initial_state->view({batch, directions, share, state})) : initial_state,
        delta_softplus, reverse, recorded ? chunk : 0, u.scalar_type());
    return {out.view({batch, channels, length}), last_state.view({batch, channels, state})};
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
    result = scan.run(chunk);
  }
  THPObjectPtr out(THPVariable_Wrap(std::move(result.first))), last_state(THPVariable_Wrap(std::move(result.second)));
  if (!out || !last_state) return nullptr;
  return PyTuple_Pack(2, out.get(), last_state.get());
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"plain_scan", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_scan)), METH_FASTCALL, "See csrc/plain_scan.cpp."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The operators of dass_ops.", -1, methods};

}  // namespace
}  // namespace dass

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&dass::module); }
