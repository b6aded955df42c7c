// A stack that can be switched to, and away from.
#pragma once
#include <cstddef>

namespace lmkern::simt {

class Fiber {
 public:
  static constexpr std::size_t kStackBytes = 128 * 1024;

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(argument), which must not return.
  void start(void (*entry)(void*), void* argument);
  // Runs the fiber until it suspends.
  void resume();
  // Back to where the fiber was resumed. Called on the fiber.
  void suspend();

  bool holds(const void* address) const {
    return address >= stack_ && address < static_cast<const char*>(stack_) + kStackBytes;
  }

 private:
  void* stack_;                 // above a guard page
  void* saved_ = nullptr;       // the fiber's stack pointer, while it does not run
  void* caller_ = nullptr;      // the resumer's
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  const void* caller_stack_ = nullptr;
  std::size_t caller_stack_bytes_ = 0;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  friend void enter(Fiber*);
};

}  // namespace lmkern::simt
