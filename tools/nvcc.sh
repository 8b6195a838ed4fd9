#!/bin/sh
# Compiles the CUDA kernels with nvcc, for an A100 and an H100; warnings and spills are errors.
#
# nvcc: $CUDACXX, or the one in the PATH, or the one that pip finds (nvidia-cuda-nvcc, put into
# build/nvcc-wheel). If there is none, says so and leaves it at that. PYTHON's environment must have
# cmake and ninja.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-python3}")
PATH=$(dirname "$python"):$PATH
build=$root/build/nvcc

nvcc=${CUDACXX:-$(command -v nvcc || true)}
if [ -z "$nvcc" ]; then
  wheel=$root/build/nvcc-wheel
  "$python" -m pip install --quiet --target "$wheel" --upgrade \
    nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime || true
  nvcc=$(find "$wheel" -name nvcc -type f 2>/dev/null | head -n 1)
fi
if [ -z "$nvcc" ]; then
  echo "no nvcc here, and none from the package index: the CUDA kernels were not compiled for a GPU"
  exit 0
fi

cmake -S "$root/csrc/cuda" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_CUDA_COMPILER="$nvcc"
cmake --build "$build"
