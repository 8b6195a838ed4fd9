// All kernels for one instruction set. CMakeLists.txt compiles this file once for each, with
// MINIDL_ISA = baseline, avx2, avx512; dispatch.cpp picks one when the module is loaded.
#include "conv.h"
#include "conv_weight.h"
#include "gemm.h"
#include "pool.h"

#define MINIDL_TEXT_OF(x) #x
#define MINIDL_TEXT(x) MINIDL_TEXT_OF(x)

namespace minidl::MINIDL_ISA {

template <class T>
constexpr KernelsFor<T> kernels_for{
    matmul<T>, conv2d<T>, conv2d_input<T>, conv2d_weight<T>, max_pool2d<T>, max_pool2d_input<T>,
};

extern const Ladder ladder;                       // kernels_ladder.cpp
extern const Narrow narrow;                       // kernels_narrow.cpp
extern const RecurrentKernels recurrent_kernels;  // kernels_recurrent.cpp
extern const Training training;                   // kernels_training.cpp
extern const WarpKernels warp_kernels;            // kernels_warp.cpp
extern const Winograd winograd_kernels;           // kernels_winograd.cpp
extern const Kernels kernels;
const Kernels kernels{
    MINIDL_TEXT(MINIDL_ISA), kernels_for<float>, kernels_for<double>, &ladder, &training, &narrow,
    &winograd_kernels,       &recurrent_kernels, &warp_kernels};

}  // namespace minidl::MINIDL_ISA
