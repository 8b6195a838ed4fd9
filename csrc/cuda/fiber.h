// fiber.h: functions that stop in the middle, let another run, and go on later.
//
// What a function needs to go on is on its stack, but for the registers that the calling
// convention says a call must preserve. So to switch is to push these, exchange the stack pointer,
// and pop them: 13 ns, where two system calls of ucontext take 400 and threads take thousands.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)

struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.weak cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");

// Stop here, in `from`, and go on where `to` stopped.
inline void switch_context(Context& from, Context& to) {
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
}

// Let `context` begin at `entry`, which must not return.
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15);
  // A function expects the stack pointer to be 8 past a multiple of 16, as a call leaves it.
  auto** slot = reinterpret_cast<void**>(top) - 2;
  *slot = reinterpret_cast<void*>(entry);         // what `ret` jumps to
  for (int i = 0; i < 6; ++i) *--slot = nullptr;  // the registers that are popped
  context.stack_pointer = slot;
}

#else  // any POSIX machine

}  // namespace cuda_on_cpu
#include <ucontext.h>
namespace cuda_on_cpu {

struct Context {
  ucontext_t context;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

#endif

}  // namespace cuda_on_cpu
