// Threads, memory and the choice of the instruction set.

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace dass::cpu {
namespace {

constexpr size_t huge_page = size_t{2} << 20, kept_scratch = size_t{8} << 20;

void* allocate(size_t bytes) {
  // From half a huge page on a whole one: strided walks through 4-KB pages miss the translation buffers.
  const size_t alignment = bytes >= huge_page / 2 ? huge_page : 64;
  void* data = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment + (bytes == 0 ? alignment : 0));
  if (data == nullptr) throw std::bad_alloc();
  advise_huge_pages(data, (bytes + alignment - 1) / alignment * alignment);
  return data;
}

struct Scratch {
  void* data = nullptr;
  size_t bytes = 0;

  void* at_least(size_t wanted) {
    if (wanted > bytes) {
      release();
      data = allocate(wanted);
      bytes = wanted;
    }
    return data;
  }
  void release() {
    std::free(data);
    data = nullptr;
    bytes = 0;
  }
  ~Scratch() { release(); }
};
thread_local Scratch scratch;

// Buffers given back, for the next operator: fresh pages cost more than most of what is computed in them.
class Pool {
 public:
  void* take(size_t bytes, size_t& capacity) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = 0; i < count_; ++i)
        if (kept_[i].bytes >= bytes && kept_[i].bytes <= 2 * bytes + huge_page) {
          const Kept found = kept_[i];
          kept_[i] = kept_[--count_];
          total_ -= found.bytes;
          capacity = found.bytes;
          return found.data;
        }
    }
    capacity = bytes;
    return allocate(bytes);
  }
  void give(void* data, size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (count_ < most && total_ + bytes <= most_bytes) {
        kept_[count_++] = {data, bytes};
        total_ += bytes;
        return;
      }
    }
    std::free(data);
  }

 private:
  struct Kept {
    void* data;
    size_t bytes;
  };
  static constexpr size_t most = 8, most_bytes = size_t{64} << 20;
  std::mutex mutex_;
  Kept kept_[most];
  size_t count_ = 0, total_ = 0;
};
Pool& pool() {
  static Pool* const the = new Pool;  // never destroyed: operators may run while the process ends
  return *the;
}

// What is left of a thread's share of some units of work: it takes half of that from the front, others from the back.
class alignas(64) Share {
 public:
  void set(uint64_t begin, uint64_t end) { left_.store(begin << 32 | end, std::memory_order_relaxed); }
  bool take(bool own, int64_t& begin, int64_t& end) {
    uint64_t left = left_.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t first = left >> 32, last = left & UINT32_MAX, taken = (last - first + 1) / 2;
      if (first == last) return false;
      begin = own ? first : last - taken;
      end = begin + taken;
      const uint64_t rest = own ? (first + taken) << 32 | last : first << 32 | (last - taken);
      if (left_.compare_exchange_weak(left, rest, std::memory_order_relaxed)) return true;
    }
  }

 private:
  std::atomic<uint64_t> left_{0};
};

const Kernels* choose() {
  const char* wanted = std::getenv("DASS_OPS_CPU");
  const auto is_wanted = [&](const char* name) { return wanted == nullptr || *wanted == 0 || std::strcmp(wanted, name) == 0; };
  std::string here = "scalar";
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && is_wanted("avx512")) return &kernels_avx512;
  if (avx2 && is_wanted("avx2")) return &kernels_avx2;
  here = avx512 ? "avx512, avx2, scalar" : avx2 ? "avx2, scalar" : "scalar";
#endif
  if (is_wanted("scalar")) return &kernels_scalar;
  TORCH_CHECK(false, "DASS_OPS_CPU is '", wanted, "'; expected one of the instruction sets that run here: ", here,
              ". Unset it to take the best.");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

int64_t thread_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void parallel_tasks(int64_t count, void (*run)(void*, int64_t), void* context) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) run(context, i);
    if (scratch.bytes > kept_scratch) scratch.release();
  });
}

void parallel_ranges(int64_t count, int64_t least, void (*run)(void*, int64_t, int64_t), void* context) {
  const int64_t units = (count + least - 1) / least, threads = std::min<int64_t>(at::get_num_threads(), units);
  if (threads <= 1) return count == 0 ? void() : run(context, 0, count);
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) shares[i].set(units * i / threads, units * (i + 1) / threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    int64_t begin, end;
    for (int64_t i = 0; i < threads; ++i)
      while (shares[(first + i) % threads].take(i == 0, begin, end)) run(context, begin * least, std::min(end * least, count));
    if (scratch.bytes > kept_scratch) scratch.release();
  });
}

void set_flag(int32_t* flag) { __atomic_store_n(flag, 1, __ATOMIC_RELEASE); }
bool is_set(const int32_t* flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE) != 0; }
void wait_for(const int32_t* flag) {
  for (int64_t tries = 0; !is_set(flag); ++tries)
    if (tries > 1000) std::this_thread::yield();  // more threads than processors, perhaps
}
int32_t count_up(int32_t* counter) { return __atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL); }

Buffer::Buffer(size_t bytes) : data_(bytes == 0 ? nullptr : pool().take(bytes, bytes_)) {}
Buffer::~Buffer() {
  if (data_ != nullptr) pool().give(data_, bytes_);
}

void* thread_scratch(size_t bytes) { return scratch.at_least(bytes); }

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge_page * huge_page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure is harmless
#endif
}

}  // namespace dass::cpu
