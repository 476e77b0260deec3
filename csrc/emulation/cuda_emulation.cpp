// The scheduler of the fibers and the switch between them.
#include "cuda_emulation.h"

#include <sys/mman.h>

#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define DASS_SANITIZE_ADDRESS 1
#else
#define DASS_SANITIZE_ADDRESS 0
#endif

// dass_switch_fiber(&here, there): keeps the registers that a call preserves on this stack, stores the stack pointer in
// `here`, and goes on where the stack `there` was left. ucontext does the same with two system calls, a hundred times slower.
extern "C" void dass_switch_fiber(void** here, void* there);
#if defined(__x86_64__)
asm(R"(
.text
.hidden dass_switch_fiber
.globl dass_switch_fiber
.type dass_switch_fiber, @function
dass_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dass_switch_fiber, .-dass_switch_fiber
)");
#elif defined(__aarch64__)
asm(R"(
.text
.hidden dass_switch_fiber
.globl dass_switch_fiber
.type dass_switch_fiber, %function
dass_switch_fiber:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size dass_switch_fiber, .-dass_switch_fiber
)");
#else
#error "The emulation switches fibers in assembly, for x86-64 and AArch64. Build with DASS_OPS_EMULATED=0."
#endif

namespace emulation {

__thread Thread* thread = nullptr;
__thread char* shared = nullptr;
__thread Grid* grid = nullptr;

namespace {

constexpr size_t kStack = 256 << 10, kGuard = 16 << 10;  // reserved; only the pages that are touched exist

struct Stacks {  // kept from launch to launch
  char* memory = nullptr;
  size_t count = 0;

  char* top(size_t fiber) const { return memory + (fiber + 1) * kStack; }

  void reserve(size_t wanted) {
    if (wanted <= count) return;
    release();
    void* got = mmap(nullptr, wanted * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(got);
    count = wanted;
    for (size_t i = 0; i < count; ++i) mprotect(memory + i * kStack, kGuard, PROT_NONE);
  }
  void release() {
    if (!memory) return;
#if DASS_SANITIZE_ADDRESS
    __asan_unpoison_memory_region(memory, count * kStack);  // whoever gets these addresses next does not know of fibers
#endif
    munmap(memory, count * kStack);
    memory = nullptr;
    count = 0;
  }
  ~Stacks() { release(); }
};

struct Scheduler {
  std::vector<Thread> threads;
  std::vector<void*> stack_pointers;
  void* main_stack_pointer = nullptr;
  Body body{};
  std::exception_ptr failure;
#if DASS_SANITIZE_ADDRESS
  std::vector<void*> fake_stacks;
  void* main_fake_stack = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
#endif
};

thread_local Stacks stacks;
thread_local Scheduler* scheduler = nullptr;

void leave_fiber(bool for_good) {
  auto& s = *scheduler;
  const size_t me = thread - s.threads.data();
#if DASS_SANITIZE_ADDRESS
  __sanitizer_start_switch_fiber(for_good ? nullptr : &s.fake_stacks[me], s.main_bottom, s.main_size);
#endif
  dass_switch_fiber(&s.stack_pointers[me], s.main_stack_pointer);
#if DASS_SANITIZE_ADDRESS
  __sanitizer_finish_switch_fiber(s.fake_stacks[me], nullptr, nullptr);
#endif
  (void)for_good;
}

void enter_fiber(size_t fiber) {
  auto& s = *scheduler;
  thread = &s.threads[fiber];
#if DASS_SANITIZE_ADDRESS
  __sanitizer_start_switch_fiber(&s.main_fake_stack, stacks.top(fiber) - kStack + kGuard, kStack - kGuard);
#endif
  dass_switch_fiber(&s.main_stack_pointer, s.stack_pointers[fiber]);
#if DASS_SANITIZE_ADDRESS
  __sanitizer_finish_switch_fiber(s.main_fake_stack, nullptr, nullptr);
#endif
}

[[noreturn]] void fiber_main() {
  auto& s = *scheduler;
#if DASS_SANITIZE_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, &s.main_bottom, &s.main_size);
#endif
  try {
    s.body.call(s.body.object);
  } catch (...) {
    s.failure = std::current_exception();
  }
  thread->wait = Wait::finished;
  leave_fiber(true);
  std::abort();  // nobody enters a finished fiber
}

void prepare_fiber(size_t fiber) {
#if DASS_SANITIZE_ADDRESS
  __asan_unpoison_memory_region(stacks.top(fiber) - kStack + kGuard, kStack - kGuard);  // what a fiber that never returned left
#endif
  void** top = reinterpret_cast<void**>(stacks.top(fiber));
#if defined(__x86_64__)
  top -= 2;  // at its first instruction a function finds the stack 8 bytes off a multiple of 16
  top[1] = nullptr;
  top[0] = reinterpret_cast<void*>(&fiber_main);
  top -= 6;
  for (int i = 0; i < 6; ++i) top[i] = nullptr;
#else
  top -= 20;
  for (int i = 0; i < 20; ++i) top[i] = nullptr;
  top[11] = reinterpret_cast<void*>(&fiber_main);  // x30
#endif
  scheduler->stack_pointers[fiber] = top;
}

const char* name(Wait wait) {
  switch (wait) {
    case Wait::shuffle_up: return "__shfl_up_sync";
    case Wait::shuffle_down: return "__shfl_down_sync";
    case Wait::shuffle_xor: return "__shfl_xor_sync";
    case Wait::shuffle_index: return "__shfl_sync";
    case Wait::multiply: return "mma.sync";
    case Wait::warp: return "__syncwarp";
    case Wait::block: return "__syncthreads";
    case Wait::finished: return "the end of the kernel";
    default: return "nothing";
  }
}

[[noreturn]] void diverged(const char* what, size_t one, size_t other) {
  const auto& threads = scheduler->threads;
  const auto text = [&](size_t i) { return "thread " + std::to_string(i) + " at " + name(threads[i].wait); };
  const dim3 block = grid->index;
  throw std::runtime_error(std::string("CUDA emulation: divergent ") + what + " in block (" + std::to_string(block.x) + ", " +
                           std::to_string(block.y) + ", " + std::to_string(block.z) + "): " + text(one) + ", " + text(other) +
                           ".");
}

// Runs one warp until all its threads wait for the block or are finished.
void run_warp(size_t first, bool reverse) {
  auto& threads = scheduler->threads;
  for (;;) {
    for (size_t i = 0; i < kWarp; ++i) {
      const size_t fiber = first + (reverse ? kWarp - 1 - i : i);
      if (threads[fiber].wait == Wait::nothing) enter_fiber(fiber);
      if (scheduler->failure) std::rethrow_exception(scheduler->failure);
    }
    const Wait wait = threads[first].wait;
    for (size_t i = 1; i < kWarp; ++i)
      if (threads[first + i].wait != wait) diverged("warp", first, first + i);
    if (wait == Wait::block || wait == Wait::finished) return;
    for (size_t i = 0; i < kWarp; ++i) threads[first + i].wait = Wait::nothing;
  }
}

void run_block(bool reverse) {
  auto& threads = scheduler->threads;
  const size_t count = threads.size();
  for (size_t i = 0; i < count; ++i) {
    threads[i].wait = Wait::nothing;
    threads[i].turn = 0;
    prepare_fiber(i);
  }
  for (;;) {
    for (size_t first = 0; first < count; first += kWarp) run_warp(reverse ? count - kWarp - first : first, reverse);
    for (size_t i = kWarp; i < count; i += kWarp)
      if (threads[i].wait != threads[0].wait) diverged("block", 0, i);
    if (threads[0].wait == Wait::finished) return;
    for (auto& t : threads) t.wait = Wait::nothing;
  }
}

}  // namespace

void park(Wait wait) {
  thread->wait = wait;
  leave_fiber(false);
}

void run_grid(dim3 size, dim3 block, size_t shared_bytes, Body body) {
  const size_t count = size_t(block.x) * block.y * block.z;
  if (count == 0 || count > 1024 || count % kWarp || size_t(size.x) * size.y * size.z == 0)
    throw std::runtime_error("CUDA emulation: " + std::to_string(count) +
                             " threads a block; expected whole warps, 1024 threads at most, and a grid that is not empty.");
  if (shared_bytes > (227 << 10))
    throw std::runtime_error("CUDA emulation: " + std::to_string(shared_bytes) + " bytes of shared memory a block; no GPU has them.");
  const char* order = std::getenv("DASS_OPS_EMULATION_ORDER");
  const bool reverse = order && std::strcmp(order, "reverse") == 0;
  stacks.reserve(count);
  Scheduler own;
  own.threads.resize(count);
  own.stack_pointers.resize(count);
#if DASS_SANITIZE_ADDRESS
  own.fake_stacks.resize(count);
#endif
  own.body = body;
  size_t i = 0;
  for (unsigned z = 0; z < block.z; ++z)
    for (unsigned y = 0; y < block.y; ++y)
      for (unsigned x = 0; x < block.x; ++x) own.threads[i++].index = dim3(x, y, z);
  struct Restore {  // also when a kernel fails
    Scheduler* outer = scheduler;
    char* memory = nullptr;
    ~Restore() {
      std::free(memory);
      scheduler = outer;
      thread = nullptr;
      shared = nullptr;
      grid = nullptr;
    }
  } restore;
  if (posix_memalign(reinterpret_cast<void**>(&restore.memory), 128, shared_bytes ? shared_bytes : 1)) throw std::bad_alloc();
  scheduler = &own;
  shared = restore.memory;
  Grid running{size, block, {}};
  grid = &running;
  for (unsigned z = 0; z < size.z; ++z)
    for (unsigned y = 0; y < size.y; ++y)
      for (unsigned x = 0; x < size.x; ++x) {
        running.index = dim3(x, y, z);
        std::memset(shared, 0xff, shared_bytes);  // NaN in every floating type
        run_block(reverse);
      }
}

}  // namespace emulation
