// Every operator of dass_ops, once. Backends implement these for a dispatch key (CPU, CUDA); backends that share a device with
// another one (Triton, emulated) register the same strings under a suffixed name from Python.
//
// Shapes
//   u                (batch, K | 1, D, L)   K directions; one direction for K > 1 of delta: u is shared, outputs are summed
//   delta            (batch, K, D, L)
//   A                (K, D, N)
//   B, C             (batch, K, G, N, L) with a G of its own that divides D, or constant: (1, K, D, N, 1)
//   D, delta_bias    (K, D)
//   z                (batch, K, D, L), only where u has K directions
//   initial_state    (batch, K, D, N)
//   reverse          K flags: the direction walks from L-1 down to 0
//   out              like u
//   last_state       (batch, K, D, N): the state after the last step in scan direction
//   boundary_states  (batch, K, D, ceil(L / chunk), N): the state that enters, in scan direction, the positions
//                    [j * chunk, (j + 1) * chunk); chunk == 0: (batch, K, D, 0, N), no backward will follow
//   x, y             (batch, D, H, W)
//   x_dbl            (batch, 4, R + 2N, H, W): R rows of low-rank delta, N of B, N of C, at their place in the map
//   dt_weight        (4, D, R)      dt_bias (4, D)      A_logs (4D, N)      Ds (4D)
//   ss2d boundaries  (batch, 4, D, ceil(HW / chunk), N), chunks counted along the order of each direction
// Dtypes
//   io     float32, bfloat16, float16 or float64: u delta z, B and C where they vary along L, x x_dbl; their gradients
//   state  float32, or float64 where io is float64: everything else, and their gradients
//   out_dtype and the incoming gradient of out: io or state
// Gradients of absent inputs are empty tensors.

#include <torch/library.h>

TORCH_LIBRARY(dass_ops, m) {
  m.def(
      "scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "Tensor? initial_state, *, bool delta_softplus, bool[] reverse, int chunk, ScalarType out_dtype) "
      "-> (Tensor out, Tensor last_state, Tensor boundary_states)");
  m.def(
      "scan_backward(Tensor d_out, Tensor? d_last_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor boundary_states, *, bool delta_softplus, "
      "bool[] reverse, int chunk) -> (Tensor d_u, Tensor d_delta, Tensor d_A, Tensor d_B, Tensor d_C, Tensor d_D, "
      "Tensor d_z, Tensor d_delta_bias, Tensor d_initial_state)");
  m.def(
      "ss2d_forward(Tensor x, Tensor x_dbl, Tensor dt_weight, Tensor dt_bias, Tensor A_logs, Tensor Ds, *, int chunk, "
      "ScalarType out_dtype) -> (Tensor y, Tensor boundary_states)");
  m.def(
      "ss2d_backward(Tensor d_y, Tensor x, Tensor x_dbl, Tensor dt_weight, Tensor dt_bias, Tensor A_logs, Tensor Ds, "
      "Tensor boundary_states, *, int chunk) -> (Tensor d_x, Tensor d_x_dbl, Tensor d_dt_weight, Tensor d_dt_bias, "
      "Tensor d_A_logs, Tensor d_Ds)");
}
