// Scratch memory for the kernels: aligned, uninitialised, and kept by the thread for the next time.
//
// Kernels ask for the same few buffers again and again; the system would take the pages back at
// every free() and hand them out zeroed, and those page faults cost more than many a kernel.
// A buffer belongs to its scope, so kernels may nest and run on any number of threads at once.
#pragma once

#include <cstddef>

#include "types.h"

namespace minidl {

void* take_scratch(std::size_t bytes);  // throws std::bad_alloc
void give_back_scratch(void* memory) noexcept;

template <class T>
class Scratch {
 public:
  MINIDL_INLINE explicit Scratch(Index count)
      : data_(static_cast<T*>(take_scratch(static_cast<std::size_t>(count) * sizeof(T)))) {}
  MINIDL_INLINE ~Scratch() { give_back_scratch(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  MINIDL_INLINE T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace minidl
