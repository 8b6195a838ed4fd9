// cuda_on_cpu.h: compiles CUDA kernels with g++ and runs them on a CPU, for tests and for learning.
//
// Every CUDA thread is a fiber. It runs until it comes to a place where threads meet (a barrier, a
// shuffle, a tensor-core instruction); there it leaves a pointer to its operands at a Gate and lets
// others run. The last one to arrive sees everybody's operands, does the work for all, and opens
// the gate. That one mechanism, `meet`, is behind every barrier, shuffle and tensor-core product.
//
// What would go wrong on a GPU should go wrong here:
// * between two meetings the threads run one after another, in an order shuffled by a seed, so that
//   a missing barrier gives a wrong result for some seed; blocks are shuffled too;
// * shared memory is filled with NaN before each block;
// * an asynchronous copy happens only when it is waited for;
// * threads that meet at different lines, or wait for some that have returned, are an error;
// * AddressSanitizer sees shared arrays; under ThreadSanitizer each fiber is a thread of its own,
//   and only barriers synchronise: it names the two lines of a race;
// * in a build with -DCUDA_ON_CPU_WATCH, watch.h sees every access to memory.
//
// Blocks run one at a time, so a static variable is exactly a __shared__ one. (It lies in a section
// of its own, to be filled with NaN: declare it in the kernel itself, not in a template.)
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fiber.h"

// CUDA's words ------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static __attribute__((section("shared_memory")))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
inline uint3 threadIdx, blockIdx, blockDim, gridDim;

struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ThreadSanitizer ---------------------------------------------------------------------------------

#if defined(__SANITIZE_THREAD__) && !defined(CUDA_ON_CPU_WATCH)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* what);
void __tsan_release(void* what);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#define TSAN(...) __VA_ARGS__
#else
#define TSAN(...)
#endif

#ifdef __SANITIZE_ADDRESS__
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
}
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif

// The machine -------------------------------------------------------------------------------------

namespace cuda_on_cpu {

constexpr int warp_size = 32;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t stack_bytes = 256 << 10;
#else
constexpr size_t stack_bytes = 64 << 10;
#endif

// A line of a kernel: `Here here = {}` as the last parameter of a function is its caller's.
struct Here {
  const char* file;
  int line;
  Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
  bool operator!=(const Here& other) const { return file != other.file || line != other.line; }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

struct Gate {  // where the threads of a warp or of a block meet
  const char* what = "";
  Here here;
  int expected = 0, arrived = 0;
  unsigned opened = 0;  // how often
  std::vector<void*> operands;
  TSAN(char round[2];)
};

struct Copy {  // an asynchronous one: from global to shared memory, and zeros after `valid` bytes
  char* to;
  const char* from;
  int bytes, valid;
  Here here;
};

struct Thread {
  Context context;
  int rank;
  uint3 index;
  Gate* gate;     // that it waits at, or null
  unsigned seen;  // gate->opened when it came there
  bool done;
  int quiet;                   // how many functions of this machinery it is inside of
  std::vector<Copy> copies;    // issued and not waited for
  std::vector<size_t> groups;  // committed: where each ends in `copies`
  TSAN(void* fiber;)
  ASAN(void* fake_stack; const char* stack;)
};

struct Launch {  // what the kernel is called with
  void (*call)(void* kernel, void** arguments);
  void* kernel;
  void** arguments;
};

struct Machine {  // runs one block after another
  std::vector<Thread> threads;
  std::vector<Gate> warps;
  Gate block;
  Context scheduler;
  char* stacks = nullptr;
  std::vector<unsigned char> memory;  // dynamic shared memory, and some to align it
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  Thread* running = nullptr;
  bool inside = false;  // whether a thread runs now, and not the scheduler
  Launch launch;
  std::string error;
  uint64_t random = 1;
  TSAN(void* fiber; char fork, join;)
  ASAN(void* fake_stack; const void* stack; size_t stack_size;)
};
inline Machine machine;
inline unsigned seed = 1;  // of the order of threads and blocks; 0: as they are numbered

inline Thread& self() { return *machine.running; }

// What watch.h is told, where it watches.
#ifdef CUDA_ON_CPU_WATCH
#define WATCH(...) __VA_ARGS__
void watch_block();
void watch_barrier(const char* what, Here here);
void watch_warp_barrier(int warp);
void watch_issue(const Copy& copy);
void watch_copy(const Copy& copy);
void watch_matrix_row(const void* row, Here here);
#else
#define WATCH(...)
#endif

struct Quiet {  // while this lives, nobody is to look at what this machinery does in a thread
  Quiet() {
    TSAN(AnnotateIgnoreReadsBegin("", 0); AnnotateIgnoreWritesBegin("", 0);)
    WATCH(++self().quiet;)
  }
  ~Quiet() {
    TSAN(AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0);)
    WATCH(--self().quiet;)
  }
};

inline int lane() { return self().rank % warp_size; }

inline void yield() {
  TSAN(__tsan_switch_to_fiber(machine.fiber, 1);)  // 1: a switch does not synchronise
  ASAN(__sanitizer_start_switch_fiber(&self().fake_stack, machine.stack, machine.stack_size);)
  switch_context(self().context, machine.scheduler);
  ASAN(__sanitizer_finish_switch_fiber(self().fake_stack, &machine.stack, &machine.stack_size);)
}

inline void resume(Thread& thread) {
  machine.running = &thread;
  threadIdx = thread.index;
  TSAN(__tsan_switch_to_fiber(thread.fiber, 1);)
  ASAN(__sanitizer_start_switch_fiber(&machine.fake_stack, thread.stack, stack_bytes);)
  WATCH(machine.inside = true;)
  switch_context(machine.scheduler, thread.context);
  WATCH(machine.inside = false;)
  ASAN(__sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);)
}

inline std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

[[noreturn]] inline void fail(const std::string& message) {
  machine.error = message + ", in thread " + text(threadIdx) + " of block " + text(blockIdx);
  for (;;) yield();  // the machine stops at the first error and never comes back here
}

// Wait at the gate until all who are expected are there; the last one runs combine(operands).
template <class T, class Combine>
void meet(Gate& gate, int slot, int expected, const char* what, Here here, T& mine,
          Combine combine) {
  [[maybe_unused]] Quiet quiet;
  if (gate.arrived == 0) {
    gate.what = what;
    gate.here = here;
    gate.expected = expected;
  }
  if (std::strcmp(gate.what, what) || gate.here != here || gate.expected != expected)
    fail(std::string("threads diverge: ") + what + " at " + here.text() + " while others wait at " +
         gate.what + " at " + gate.here.text());
  gate.operands[slot] = &mine;
  if (++gate.arrived == expected) {
    combine(reinterpret_cast<T**>(gate.operands.data()));
    gate.arrived = 0;
    ++gate.opened;
    std::fill(gate.operands.begin(), gate.operands.end(), nullptr);
  } else {
    self().gate = &gate;
    self().seen = gate.opened;
    while (gate.opened == self().seen) yield();
    self().gate = nullptr;
  }
}

// The same for those lanes of a warp that `mask` names. (Two parts of a warp that meet apart at the
// same time would be reported as divergence: no kernel here does so.)
template <class T, class Combine>
void meet_warp(unsigned mask, const char* what, Here here, T& mine, Combine combine) {
  [[maybe_unused]] Quiet quiet;
  int warp = self().rank / warp_size;
  int lanes = int(machine.threads.size()) - warp * warp_size;
  if (lanes < warp_size) mask &= (1u << lanes) - 1;
  if (!(mask >> lane() & 1))
    fail(std::string(what) + " at " + here.text() + ": the mask leaves out the calling lane");
  meet(machine.warps[warp], lane(), __builtin_popcount(mask), what, here, mine, combine);
}

// After a barrier everyone sees what everyone wrote before it. Two objects to synchronise on, in
// turn: with one alone, a thread that runs ahead to the next barrier would seem to be ordered
// before one that is still leaving this.
template <class Meet>
void synchronise([[maybe_unused]] Gate& gate, Meet meet_there) {
  TSAN(char* round; {
    Quiet quiet;
    round = &gate.round[gate.opened & 1];
  })
  TSAN(__tsan_release(round);)
  meet_there();
  TSAN(__tsan_acquire(round);)
}

// Running -----------------------------------------------------------------------------------------

inline uint64_t draw() {  // xorshift64* (Vigna 2016)
  uint64_t& x = machine.random;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  return x * 0x2545F4914F6CDD1Dull >> 32;
}

template <class T>
void shuffle(std::vector<T>& order) {
  if (seed == 0) return;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
}

inline void run_thread() {  // what a fiber does, for ever: its part of one block after another
  ASAN(__sanitizer_finish_switch_fiber(nullptr, &machine.stack, &machine.stack_size);)
  for (;;) {
    TSAN(__tsan_acquire(&machine.fork);)
    machine.launch.call(machine.launch.kernel, machine.launch.arguments);
    self().done = true;
    TSAN(__tsan_release(&machine.join);)
    yield();
  }
}

inline void make_threads(size_t count) {
  if (machine.threads.size() == count) return;
  TSAN(for (Thread& thread : machine.threads) __tsan_destroy_fiber(thread.fiber);)
  if (machine.stacks) munmap(machine.stacks, machine.threads.size() * stack_bytes);
  machine.threads.clear();
  machine.threads.resize(count);
  machine.stacks = static_cast<char*>(mmap(nullptr, count * stack_bytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = machine.threads[i];
    thread.rank = int(i);
    char* stack = machine.stacks + i * stack_bytes;
    mprotect(stack, 4096, PROT_NONE);  // a stack that overflows stops at once
    make_context(thread.context, stack, stack_bytes, run_thread);
    ASAN(thread.stack = stack;)
    TSAN(thread.fiber = __tsan_create_fiber(0);)
    TSAN(__tsan_set_fiber_name(thread.fiber, ("CUDA thread " + std::to_string(i)).c_str());)
  }
  machine.block.operands.assign(count, nullptr);
  machine.warps.assign((count + warp_size - 1) / warp_size, Gate());
  for (Gate& warp : machine.warps) warp.operands.assign(warp_size, nullptr);
}

extern "C" {  // where the linker puts the section's ends; null without any __shared__ variable
extern char __start_shared_memory[] __attribute__((weak, visibility("hidden")));
extern char __stop_shared_memory[] __attribute__((weak, visibility("hidden")));
}

__attribute__((no_sanitize("address", "thread"))) inline void fill_with_nan(volatile char* from,
                                                                            volatile char* to) {
  for (; from < to; ++from) *from = char(0xff);
}

inline void run_block(uint3 index) {
  TSAN(Quiet quiet;)
  blockIdx = index;
  fill_with_nan(__start_shared_memory, __stop_shared_memory);
  fill_with_nan(reinterpret_cast<char*>(machine.dynamic),
                reinterpret_cast<char*>(machine.dynamic + machine.dynamic_bytes));
  WATCH(watch_block();)
  std::vector<Thread*> waiting;
  for (Thread& thread : machine.threads) {
    thread.done = false;
    thread.quiet = 0;
    thread.gate = nullptr;
    thread.copies.clear();
    thread.groups.clear();
    waiting.push_back(&thread);
  }
  TSAN(machine.fiber = __tsan_get_current_fiber(); __tsan_release(&machine.fork);)
  while (!waiting.empty()) {
    shuffle(waiting);
    bool progress = false;
    for (Thread* thread : waiting) {
      if (thread->gate && thread->gate->opened == thread->seen) continue;
      progress = true;
      resume(*thread);
      if (!machine.error.empty()) return;
    }
    if (!progress) {
      Gate& gate = *waiting.front()->gate;
      machine.error = "deadlock: " + std::to_string(waiting.size()) + " of " +
                      std::to_string(machine.threads.size()) + " threads of block " + text(index) +
                      " wait at " + gate.what + " at " + gate.here.text() +
                      ", the others have returned";
      return;
    }
    size_t left = 0;
    for (Thread* thread : waiting)
      if (!thread->done) waiting[left++] = thread;
    waiting.resize(left);
  }
  TSAN(__tsan_acquire(&machine.join);)
  WATCH(watch_barrier("the end", Here("", 0));)
}

inline const char* run_grid(const unsigned* grid, const unsigned* block, size_t dynamic_bytes,
                            Launch launch) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
  static std::string error;
  error.clear();
  if (threads < 1 || threads > 1024)
    error = "a block has 1 to 1024 threads, not " + std::to_string(threads);
  if (uint64_t(grid[0]) * grid[1] * grid[2] == 0) error = "a grid has at least one block";
  if (grid[1] > 65535 || grid[2] > 65535)
    error = "a grid has at most 65535 blocks in y and z, got " + text({grid[0], grid[1], grid[2]});
  if (dynamic_bytes > 227 << 10)
    error = "a block has at most 227 KB of shared memory, not " + std::to_string(dynamic_bytes);
  if (!error.empty()) return error.c_str();

  make_threads(threads);
  for (Thread& thread : machine.threads) {
    unsigned i = thread.rank;
    thread.index = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
  }
  machine.memory.resize(dynamic_bytes + 128);
  machine.dynamic = machine.memory.data();
  machine.dynamic += -reinterpret_cast<uintptr_t>(machine.dynamic) % 128;
  machine.dynamic_bytes = dynamic_bytes;
  machine.launch = launch;
  machine.random = seed * 0x9E3779B97F4A7C15ull + 1;
  machine.error.clear();
  blockDim = {block[0], block[1], block[2]};
  gridDim = {grid[0], grid[1], grid[2]};

  std::vector<unsigned> order(grid[0] * grid[1] * grid[2]);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  shuffle(order);
  for (unsigned i : order) {
    run_block({i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]});
    if (machine.error.empty()) continue;
    error = machine.error;
    for (Gate& warp : machine.warps) warp.arrived = 0;
    machine.block.arrived = 0;
    make_threads(0);  // the fibers stand somewhere inside the kernel: begin with new ones
    return error.c_str();
  }
  return nullptr;
}

// Kernels as functions that Python can call -------------------------------------------------------

template <class T>
struct Name {  // what an argument must be: "float32", "int32", or with a * an array of these
  static std::string of() {
    if constexpr (std::is_pointer_v<T>)
      return Name<std::remove_cv_t<std::remove_pointer_t<T>>>::of() + "*";
    else if constexpr (std::is_same_v<T, _Float16>)
      return "float16";
    else if constexpr (std::is_floating_point_v<T>)
      return "float" + std::to_string(8 * sizeof(T));
    else if constexpr (std::is_same_v<T, bool>)
      return "bool";
    else
      return (std::is_unsigned_v<T> ? "uint" : "int") + std::to_string(8 * sizeof(T));
  }
};

template <class... P>
const char* signature(void (*)(P...)) {
  static std::string all;
  all.clear();
  ((all += (all.empty() ? "" : " ") + Name<P>::of()), ...);
  return all.c_str();
}

template <class... P, size_t... I>
Launch with_arguments(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  auto call = [](void* kernel, [[maybe_unused]] void** arguments) {
    auto values = [&] {
      Quiet quiet;
      return std::tuple<P...>(*static_cast<P*>(arguments[I])...);
    }();
    std::apply(reinterpret_cast<void (*)(P...)>(kernel), values);
  };
  return {call, reinterpret_cast<void*>(kernel), arguments};
}

template <class... P>
const char* launch(void (*kernel)(P...), const unsigned* grid, const unsigned* block,
                   size_t dynamic_bytes, void** arguments) {
  return run_grid(grid, block, dynamic_bytes,
                  with_arguments(kernel, arguments, std::index_sequence_for<P...>()));
}

#define CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default")))

// As cuLaunchKernel: an array of pointers to the arguments. Returns null, or what went wrong.
#define EXPORT_KERNEL(kernel)                                                                 \
  CUDA_ON_CPU_EXPORT const char* signature_of_##kernel() {                                    \
    return cuda_on_cpu::signature(kernel);                                                    \
  }                                                                                           \
  CUDA_ON_CPU_EXPORT const char* launch_##kernel(const unsigned* grid, const unsigned* block, \
                                                 size_t dynamic_bytes, void** arguments) {    \
    return cuda_on_cpu::launch(kernel, grid, block, dynamic_bytes, arguments);                \
  }

CUDA_ON_CPU_EXPORT inline __attribute__((used)) void cuda_on_cpu_seed(unsigned value) {
  seed = value;
}

}  // namespace cuda_on_cpu

// What kernels call -------------------------------------------------------------------------------

inline void __syncthreads(cuda_on_cpu::Here here = {}) {
  using namespace cuda_on_cpu;
  int nothing = 0;
  synchronise(machine.block, [&] {
    meet(machine.block, self().rank, int(machine.threads.size()), "__syncthreads", here, nothing,
         [&](int**) { WATCH(watch_barrier("__syncthreads", here);) });
  });
}

inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Here here = {}) {
  using namespace cuda_on_cpu;
  int nothing = 0, warp = self().rank / warp_size;
  synchronise(machine.warps[warp], [&] {
    meet_warp(mask, "__syncwarp", here, nothing, [&](int**) { WATCH(watch_warp_barrier(warp);) });
  });
}

namespace cuda_on_cpu {

template <class T>
struct Offer {  // of a lane to a shuffle
  T value;
  int source;
};

template <class T>
T exchange(unsigned mask, T value, int source, const char* what, Here here) {
  Offer<T> mine{value, source & (warp_size - 1)};
  meet_warp(mask, what, here, mine, [&](Offer<T>** offers) {
    T received[warp_size];
    for (int i = 0; i < warp_size; ++i) {
      if (!offers[i]) continue;
      if (!offers[offers[i]->source])
        fail(std::string(what) + " at " + here.text() + ": reads from a lane that is not there");
      received[i] = offers[offers[i]->source]->value;
    }
    for (int i = 0; i < warp_size; ++i)
      if (offers[i]) offers[i]->value = received[i];
  });
  return mine.value;
}

}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int = 32, cuda_on_cpu::Here here = {}) {
  return cuda_on_cpu::exchange(mask, value, source, "__shfl_sync", here);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32, cuda_on_cpu::Here here = {}) {
  return cuda_on_cpu::exchange(mask, value, cuda_on_cpu::lane() ^ bits, "__shfl_xor_sync", here);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int down, int = 32, cuda_on_cpu::Here here = {}) {
  int lane = cuda_on_cpu::lane();
  return cuda_on_cpu::exchange(mask, value, lane + down < 32 ? lane + down : lane,
                               "__shfl_down_sync", here);
}

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)(a)*b >> 64);
}
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
using std::fabs, std::fmax, std::fmaf, std::isfinite, std::isnan, std::sqrt, std::exp, std::log,
    std::tanh, std::floor;
template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

#ifdef CUDA_ON_CPU_WATCH
#include "watch.h"
#endif
