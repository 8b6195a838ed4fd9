// Products of bytes, and with weights that are packed beforehand, for one instruction set.
#include "bytes.h"
#include "conv_integer.h"
#include "int4.h"
#include "peak.h"
#include "weights.h"

namespace minidl::MINIDL_ISA {

template <class E>
constexpr NarrowFor<E> narrow_for{pack_weights<E>, linear<E>, linear_unpacked<E>};

template <class B>
constexpr BytesFor<B> bytes_for{quantize<B>, add<B>, max_pool<B>, mean<B>};

extern const Narrow narrow;
const Narrow narrow{
    packed_width,
    pack_bytes,
    matmul_integer,
    pack_conv,
    conv_integer,
    multiply_add_bytes_loop,
    narrow_for<float>,
    narrow_for<Half>,
    narrow_for<BFloat16>,
    narrow_for<std::int8_t>,
    bytes_for<std::int8_t>,
    bytes_for<std::uint8_t>,
    linear_int4,
};

}  // namespace minidl::MINIDL_ISA
