// What a training step does beside products and convolutions, for one instruction set.
#include "activation.h"
#include "average_pool.h"
#include "dropout.h"
#include "layout.h"
#include "norm.h"
#include "optimizer.h"
#include "pool.h"
#include "softmax.h"

namespace minidl::MINIDL_ISA {

template <class T>
constexpr TrainingFor<T> training_for{
    max_pool2d_gradient<T>,
    avg_pool2d<T>,
    avg_pool2d_input<T>,
    statistics<T>,
    standardize<T>,
    standardize_gradient<T>,
    scale_shift<T>,
    softmax<T>,
    softmax_gradient<T>,
    log_softmax<T>,
    log_softmax_gradient<T>,
    cross_entropy<T>,
    cross_entropy_gradient<T>,
    dropout<T>,
    in_order<T>,
    relu<T>,
    relu_gradient<T>,
    sgd<T>,
    adam<T>,
    rmsprop<T>,
};

extern const Training training;
const Training training{training_for<float>, training_for<double>};

}  // namespace minidl::MINIDL_ISA
