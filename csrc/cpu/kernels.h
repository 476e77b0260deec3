// The CPU kernels and what they share that is not arithmetic. No ATen here.
#pragma once

#include <cstdint>
#include <functional>

#include "arguments.h"

namespace dass::cpu {

// Runs task(0) .. task(count - 1) on torch's intra-op threads, each exactly once; the calling thread alone where it is already
// one of them. Which thread runs a task is left open: tasks write to places of their own, and sums over tasks are taken
// afterwards in a fixed order, so that results do not depend on the number of threads.
void parallel_tasks(int64_t count, const std::function<void(int64_t)>& task);

// Any sizes, any dtype; scan_any.cpp, ss2d_any.cpp.
void scan_forward_any(const ScanForward& arguments);
void scan_backward_any(const ScanBackward& arguments);
void ss2d_forward_any(const Ss2dForward& arguments);
void ss2d_backward_any(const Ss2dBackward& arguments);

}  // namespace dass::cpu
