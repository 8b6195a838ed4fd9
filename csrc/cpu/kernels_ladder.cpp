// The lower rungs of the ladder, and the measuring loops, for one instruction set.
#include "ladder.h"
#include "peak.h"

namespace minidl::MINIDL_ISA {

template <class T>
constexpr LadderFor<T> ladder_for{
    matmul_naive<T>, matmul_reordered<T>, matmul_tiled<T>, conv2d_naive<T>, multiply_add_loop<T>,
    triad<T>,        kPeakChunks,
};

extern const Ladder ladder;
const Ladder ladder{ladder_for<float>, ladder_for<double>};

}  // namespace minidl::MINIDL_ISA
