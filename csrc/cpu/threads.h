// One small pool of threads for all kernels.
#pragma once

#include "types.h"

namespace minidl {

int get_num_threads();
void set_num_threads(int n);  // n >= 1; waits for a loop that is running
void stop_threads();          // joins the workers; the next loop starts them again

// Calls call(object, i) once for every i in [0, n), on the pool's threads and on the caller's.
// The first exception that a call throws is rethrown here, after all threads have stopped.
void run_parallel(Index n, void (*call)(void* object, Index i), void* object);

// parallel_for(n, f): f(i) for every i in [0, n), in any order, on any thread. For results that do
// not depend on the number of threads, let each i write its own part of the output.
template <class F>
void parallel_for(Index n, const F& f) {
  run_parallel(
      n, [](void* object, Index i) { (*static_cast<const F*>(object))(i); }, const_cast<F*>(&f));
}

}  // namespace minidl
