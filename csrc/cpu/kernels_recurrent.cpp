// Recurrent layers, for one instruction set.
#include "recurrent.h"

namespace minidl::MINIDL_ISA {

template <class T>
constexpr RecurrentFor<T> recurrent_for{recurrent<T>, recurrent_gradient<T>};

extern const RecurrentKernels recurrent_kernels;
const RecurrentKernels recurrent_kernels{recurrent_for<float>, recurrent_for<double>};

}  // namespace minidl::MINIDL_ISA
