// What a kernel is told: plain structs of pointers, sizes and strides (in elements). No torch here, so that the same structs
// serve the CPU, CUDA and the host emulation of CUDA. Shapes and dtypes: schema.cpp.
#pragma once

#include <cstdint>

namespace dass {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };

// (batch, directions, channels, length), length contiguous. A direction stride of 0 is a tensor shared by the directions.
struct Sequence {
  void* data = nullptr;
  int64_t batch = 0, direction = 0, channel = 0;
};

// B or C: (batch, directions, groups, state, length) with length contiguous and io dtype, or constant along batch and length:
// (directions, channels, state) contiguous and of state dtype.
struct Projection {
  void* data = nullptr;
  int64_t batch = 0, direction = 0, group = 0, state = 0;
  int64_t groups = 1;
  bool constant = false;
};

struct ScanSizes {
  int64_t batch = 0, directions = 0, channels = 0, length = 0, state = 0;
  int64_t chunk = 0, chunks = 0;  // steps between two saved states; 0: none are saved
  uint64_t reverse = 0;           // bit k: direction k walks from the end
  bool shared = false;            // u has one direction for several of delta: outputs are summed
  bool delta_softplus = false;
  Dtype io = Dtype::float32;
  Dtype out = Dtype::float32;     // of out and of its gradient: io or the state dtype

  constexpr bool reversed(int64_t direction) const { return (reverse >> direction) & 1; }
  constexpr int64_t outputs() const { return shared ? 1 : directions; }
};

// Pointers without strides are contiguous, of state dtype, and may be null where the schema says `Tensor?`.
struct ScanForward {
  ScanSizes sizes;
  Sequence u, delta, z;
  Projection B, C;
  const void *A = nullptr, *D = nullptr, *delta_bias = nullptr, *initial_state = nullptr;
  void* out = nullptr;  // (batch, outputs, channels, length) contiguous, of dtype sizes.out
  void *last_state = nullptr, *boundary_states = nullptr;
};

struct ScanBackward {
  ScanSizes sizes;
  Sequence d_out, u, delta, z;
  Projection B, C;
  const void *A = nullptr, *D = nullptr, *delta_bias = nullptr, *initial_state = nullptr;
  const void *d_last_state = nullptr, *boundary_states = nullptr;
  void *d_u = nullptr, *d_delta = nullptr, *d_z = nullptr;                     // contiguous, io dtype
  void *d_B = nullptr, *d_C = nullptr;                                         // contiguous, dtype of B and C
  void *d_A = nullptr, *d_D = nullptr, *d_delta_bias = nullptr, *d_initial_state = nullptr;
};

struct Ss2dSizes {
  int64_t batch = 0, channels = 0, height = 0, width = 0, state = 0, rank = 0;
  int64_t chunk = 0, chunks = 0;
  Dtype io = Dtype::float32;
  Dtype out = Dtype::float32;
  bool channels_last = false;  // x, y and their gradients: (batch, H*W, channels) contiguous; only where a backend asks for it

  constexpr int64_t length() const { return height * width; }
  constexpr int64_t rows() const { return rank + 2 * state; }
};

// x and d_y: (batch, channels, H*W), the map contiguous. x_dbl: (batch, 4, rows, H*W), the map contiguous.
struct Map {
  void* data = nullptr;
  int64_t batch = 0, channel = 0;
};
struct LowRank {
  void* data = nullptr;
  int64_t batch = 0, direction = 0, row = 0;
};

struct Ss2dForward {
  Ss2dSizes sizes;
  Map x;
  LowRank x_dbl;
  const void *dt_weight = nullptr, *dt_bias = nullptr, *A_logs = nullptr, *Ds = nullptr;
  void *y = nullptr, *boundary_states = nullptr;  // y: (batch, channels, H*W) contiguous, of dtype sizes.out
};

struct Ss2dBackward {
  Ss2dSizes sizes;
  Map d_y, x;
  LowRank x_dbl;
  const void *dt_weight = nullptr, *dt_bias = nullptr, *A_logs = nullptr, *Ds = nullptr, *boundary_states = nullptr;
  void *d_x = nullptr, *d_x_dbl = nullptr;  // contiguous, io dtype
  void *d_dt_weight = nullptr, *d_dt_bias = nullptr, *d_A_logs = nullptr, *d_Ds = nullptr;
};

}  // namespace dass
