// Winograd convolution for one instruction set.
#include "winograd.h"

namespace minidl::MINIDL_ISA {

extern const Winograd winograd_kernels;
const Winograd winograd_kernels{conv2d_winograd, conv2d_input_winograd, conv2d_weight_winograd};

}  // namespace minidl::MINIDL_ISA
