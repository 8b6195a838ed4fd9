#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace minidl {

namespace baseline {
extern const Kernels kernels;
}
#if MINIDL_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512vnni {  // only products of bytes have an instruction of their own there
extern const Narrow narrow;
}
#endif

namespace {

struct Variant {
  const Kernels* kernels;
  bool supported;
};

std::vector<Variant> variants() {  // the best first
  std::vector<Variant> all;
#if MINIDL_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  static const Kernels with_vnni = [] {
    Kernels k = avx512::kernels;
    k.isa = "avx512vnni";
    k.narrow = &avx512vnni::narrow;
    return k;
  }();
  all.push_back({&with_vnni, avx512 && __builtin_cpu_supports("avx512vnni")});
  all.push_back({&avx512::kernels, avx512});
  all.push_back({&avx2::kernels, avx2});
#endif
  all.push_back({&baseline::kernels, true});
  return all;
}

const Kernels& choose() {
  const char* wish = std::getenv("MINIDL_ISA");
  if (!wish || !*wish) {
    for (const Variant& v : variants()) {
      if (v.supported) return *v.kernels;
    }
  }
  for (const Variant& v : variants()) {
    if (wish && std::string(wish) == v.kernels->isa) {
      if (v.supported) return *v.kernels;
      break;
    }
  }
  std::string message = "MINIDL_ISA=" + std::string(wish) + ": this machine can run";
  for (const std::string& isa : supported_isas()) message += " " + isa;
  throw std::invalid_argument(message + "; unset MINIDL_ISA to let minidl choose");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Variant& v : variants()) {
    if (v.supported) names.push_back(v.kernels->isa);
  }
  return names;
}

}  // namespace minidl
