#!/usr/bin/env bash
# Compiles all kernels for 64-bit ARM, warnings as errors. It links nothing and runs nothing.
#
# The compiler is Clang, as the package ziglang brings it (pip install ziglang): it has the headers
# of every target inside, so nothing is installed by root. CMake is left out, for it tries to link
# first, and then Zig would compile the C and C++ libraries for ARM, which takes minutes. So the
# flags stand here again; they are those of CMakeLists.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} OUT=build/arm64
export ZIG_GLOBAL_CACHE_DIR=$PWD/$OUT/zig ZIG_LOCAL_CACHE_DIR=$PWD/$OUT/zig
mkdir -p "$OUT"

compile() {
    echo "$1"
    "$PYTHON" -m ziglang c++ -target aarch64-linux-gnu -std=c++17 -O3 -DNDEBUG -fPIC \
        -Wall -Wextra -Werror -Wno-psabi -ffp-contract=fast -DMINIDL_ISA=baseline -DMINIDL_X86=0 \
        -c "$1" -o "$OUT/$(basename "$1").o"
}
export -f compile
printf '%s\0' csrc/cpu/*.cpp | grep -zv -e /bind_ -e /module.cpp |
    xargs -0 -n 1 -P "$(nproc)" bash -c 'compile "$1"' compile
