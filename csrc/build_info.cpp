// Python module dass_ops._build_info: what this package was compiled for. It links no libtorch, so that it can be imported,
// and can explain, where the extension itself cannot be loaded.

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What dass_ops was compiled for; see dass_ops.build_info().";
  m.attr("torch") = DASS_OPS_TORCH;
  m.attr("cuda") = DASS_OPS_CUDA;
  m.attr("cuda_architectures") = DASS_OPS_CUDA_ARCHITECTURES;
  m.attr("no_cuda") = DASS_OPS_NO_CUDA;
  m.attr("emulated") = DASS_OPS_EMULATED[0] == '1';
  m.attr("machine") = DASS_OPS_MACHINE;
  m.attr("flags") = DASS_OPS_FLAGS;
  m.attr("compiler") = __VERSION__;
}
