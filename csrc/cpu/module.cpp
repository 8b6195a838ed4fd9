// minidl._native: the Python module. Each family of kernels has its face in a bind_*.cpp, where
// everything that a kernel takes for granted is checked: types, shapes, sizes. The kernels run
// without the GIL.
#include <limits>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "bind.h"
#include "threads.h"

namespace minidl {
namespace {

// ---- The system -------------------------------------------------------------------------------

void set_threads(int n) {
  if (n < 1) bad_value("set_num_threads: expected at least 1, got " + std::to_string(n));
  py::gil_scoped_release release;
  set_num_threads(n);
}

// glibc gives large blocks back to the system at every free(), and gets them again as zeroed pages,
// one page fault each: in a training step of the default CNN they take a fifth of the time. What is
// kept can be used again by any array, so the peak hardly grows (83 to 89 MiB there).
bool keep_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max()) &&
         mallopt(M_TOP_PAD, 64 << 20);
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "minidl's kernels in C++; csrc/README.md tells how they work.";
  m.attr("version") = MINIDL_VERSION;
  m.attr("sanitizer") = MINIDL_SANITIZE;  // the one it was built with, or ""

  bind_conv(m);
  bind_ladder(m);
  bind_matmul(m);
  bind_narrow(m);
  bind_pool(m);
  bind_recurrent(m);
  bind_training(m);
  bind_warp(m);

  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def("supported_isas", &supported_isas, "Those that this machine can run, the best first.");
  m.def("get_num_threads", &get_num_threads);
  m.def("set_num_threads", &set_threads, py::arg("n"));
  m.def("keep_memory", &keep_memory,
        "Let malloc keep large blocks instead of returning them; True where glibc can.");

  py::module_::import("atexit").attr("register")(py::cpp_function([] {
    py::gil_scoped_release release;
    stop_threads();
  }));
}

}  // namespace minidl
