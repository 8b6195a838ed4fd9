// Recurrent layers, and the attention between their steps, for one instruction set.
#include "attention.h"
#include "recurrent.h"

namespace minidl::MINIDL_ISA {

template <class T>
constexpr RecurrentFor<T> recurrent_for{recurrent<T>, recurrent_gradient<T>};

template <class T>
constexpr AttentionFor<T> attention_for{additive_scores<T>, additive_scores_gradient<T>};

extern const RecurrentKernels recurrent_kernels;
const RecurrentKernels recurrent_kernels{recurrent_for<float>, recurrent_for<double>,
                                         attention_for<float>, attention_for<double>};

}  // namespace minidl::MINIDL_ISA
