// The CPU kernels and what they share that is not arithmetic. No ATen here, and nothing that an instruction set's translation
// unit could instantiate for others: see README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "arguments.h"

namespace dass::cpu {

// Runs run(context, 0) .. run(context, count - 1) on torch's intra-op threads, each exactly once; the calling thread alone where
// it is already one of them. Which thread runs a task is left open: tasks write to places of their own, and sums over tasks are
// taken afterwards in a fixed order, so that results do not depend on the number of threads. Tasks are begun in order: one may wait for
// what an earlier one sets.
void parallel_tasks(int64_t count, void (*run)(void* context, int64_t task), void* context);
// Runs run(context, begin, end) for ranges that together are 0 .. count, none shorter than `least` but for the last. For work on
// consecutive memory, as torch's element-wise operators share it out: each thread begins with a share of its own, where it may find
// what it wrote before, and takes from others' when that is done.
void parallel_ranges(int64_t count, int64_t least, void (*run)(void* context, int64_t begin, int64_t end), void* context);
int64_t thread_count();
void set_flag(int32_t* flag);
bool is_set(const int32_t* flag);
void wait_for(const int32_t* flag);
int32_t count_up(int32_t* counter);  // the new count; whoever sees it sees what was written before each of the counts

namespace {  // a lambda is a type of its translation unit
template <typename Task>
inline void parallel(int64_t count, Task task) {
  parallel_tasks(count, [](void* context, int64_t i) { (*static_cast<Task*>(context))(i); }, &task);
}
template <typename Task>
inline void parallel_in_ranges(int64_t count, int64_t least, Task task) {
  const auto run = [](void* context, int64_t begin, int64_t end) { (*static_cast<Task*>(context))(begin, end); };
  parallel_ranges(count, least, run, &task);
}
}  // namespace

// Memory for the length of an operator: aligned to 64 bytes, uninitialised, on huge pages where it is large. Up to 64 MB of it are
// kept for the next operator. Of no bytes: null.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* floats() const { return static_cast<float*>(data_); }

 private:
  size_t bytes_ = 0;
  void* data_;
};

// The calling thread's scratch memory, aligned to 64 bytes, valid until its next call; what exceeds a few MB is given back when
// the operator ends.
void* thread_scratch(size_t bytes);

// Asks for huge pages behind memory that is about to be written for the first time: page faults, one per 4 KB, otherwise take
// longer than the arithmetic.
void advise_huge_pages(void* data, size_t bytes);

// One instruction set's kernels for float32, bfloat16 and float16. Each returns false, having done nothing, where the arguments
// are not for it: the kernels for any size then do the work.
struct Kernels {
  const char* name;
  bool (*scan_forward)(const ScanForward&);
  bool (*scan_backward)(const ScanBackward&);
  bool (*ss2d_forward)(const Ss2dForward&);
  bool (*ss2d_backward)(const Ss2dBackward&);
  void (*elementary)(int function, const float* x, float* y, int64_t n);  // for tests; see elementary_functions
};

constexpr const char* elementary_functions[] = {"exp", "softplus", "sigmoid", "slope", "bfloat16", "float16", "decay", "near_slope"};

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

// Those of the best instruction set that the processor has, or of DASS_OPS_CPU=avx512|avx2|scalar.
const Kernels& kernels();

// Any sizes, any dtype: scan_any.cpp, ss2d_any.cpp.
void scan_forward_any(const ScanForward& arguments);
void scan_backward_any(const ScanBackward& arguments);
void ss2d_forward_any(const Ss2dForward& arguments);
void ss2d_backward_any(const Ss2dBackward& arguments);

}  // namespace dass::cpu
