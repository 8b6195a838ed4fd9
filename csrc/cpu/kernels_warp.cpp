// Affine warps, for one instruction set.
#include "warp.h"

namespace minidl::MINIDL_ISA {

template <class T>
constexpr WarpFor<T> warp_for{warp_affine<T>, warp_affine_input<T>};

extern const WarpKernels warp_kernels;
const WarpKernels warp_kernels{warp_for<float>, warp_for<double>};

}  // namespace minidl::MINIDL_ISA
