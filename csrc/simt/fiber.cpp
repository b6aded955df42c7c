#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define LMKERN_ASAN(...) __VA_ARGS__
#else
#define LMKERN_ASAN(...)
#endif

// Saves the callee-saved registers on this stack, and goes on where `to` was saved.
// void lmkern_simt_switch(void** from, void* to)
extern "C" void lmkern_simt_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl lmkern_simt_switch
.hidden lmkern_simt_switch
.type lmkern_simt_switch,@function
lmkern_simt_switch:
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
.size lmkern_simt_switch,.-lmkern_simt_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl lmkern_simt_switch
.hidden lmkern_simt_switch
.type lmkern_simt_switch,%function
lmkern_simt_switch:
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
.size lmkern_simt_switch,.-lmkern_simt_switch
)");
#else
#error "the emulator switches stacks on x86-64 and aarch64 only"
#endif

namespace lmkern::simt {
namespace {

thread_local Fiber* starting = nullptr;

std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

void enter(Fiber* fiber) {
  LMKERN_ASAN(
      __sanitizer_finish_switch_fiber(nullptr, &fiber->caller_stack_, &fiber->caller_stack_bytes_);)
  fiber->entry_(fiber->argument_);
  __builtin_trap();  // entry does not return
}

extern "C" void lmkern_simt_enter() { enter(starting); }

Fiber::Fiber() {
  const std::size_t guard = page_bytes();
  void* const memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, guard, PROT_NONE);
  stack_ = static_cast<char*>(memory) + guard;
}

Fiber::~Fiber() {
  LMKERN_ASAN(__asan_unpoison_memory_region(stack_, kStackBytes);)
  munmap(static_cast<char*>(stack_) - page_bytes(), page_bytes() + kStackBytes);
}

void Fiber::start(void (*entry)(void*), void* argument) {
  LMKERN_ASAN(__asan_unpoison_memory_region(stack_, kStackBytes);)
  entry_ = entry;
  argument_ = argument;
  fake_stack_ = nullptr;
  auto** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + kStackBytes);
#if defined(__x86_64__)
  // The return address lies where a call leaves it: 8 below a multiple of 16.
  top -= 2;
  *top = reinterpret_cast<void*>(&lmkern_simt_enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
#else
  top -= 20;
  for (int i = 0; i < 20; ++i) top[i] = nullptr;
  top[11] = reinterpret_cast<void*>(&lmkern_simt_enter);  // x30
#endif
  saved_ = top;
}

void Fiber::resume() {
  starting = this;
  LMKERN_ASAN(void* mine = nullptr; __sanitizer_start_switch_fiber(&mine, stack_, kStackBytes);)
  lmkern_simt_switch(&caller_, saved_);
  LMKERN_ASAN(__sanitizer_finish_switch_fiber(mine, nullptr, nullptr);)
}

void Fiber::suspend() {
  LMKERN_ASAN(__sanitizer_start_switch_fiber(&fake_stack_, caller_stack_, caller_stack_bytes_);)
  lmkern_simt_switch(&saved_, caller_);
  LMKERN_ASAN(__sanitizer_finish_switch_fiber(fake_stack_, &caller_stack_, &caller_stack_bytes_);)
}

}  // namespace lmkern::simt
