// Which instruction set runs.
#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace minidl {

// The best one this processor has, or the one that the environment variable MINIDL_ISA names.
// Throws std::invalid_argument if that one is unknown or not to be had here.
const Kernels& kernels();

std::vector<std::string> supported_isas();  // on this processor, the best first

}  // namespace minidl
