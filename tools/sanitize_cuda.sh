#!/bin/sh
# Runs CUDA kernels on the CPU under a sanitizer:  tools/sanitize_cuda.sh address|thread
#
# address: reads and writes past the end of arrays and of shared memory. thread: races between CUDA
# threads, each a fiber of its own to ThreadSanitizer, by the lines of both. Further arguments go to
# pytest. Needs g++, and pytest in PYTHON's environment.
set -eu

sanitizer=${1:?usage: tools/sanitize_cuda.sh address|thread}
shift
case $sanitizer in
  address) library=libasan.so ;;
  thread) library=libtsan.so ;;
  *) echo "unknown sanitizer: $sanitizer (address or thread)" >&2; exit 2 ;;
esac

cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
cxx=${CXX:-g++}
export MINIDL_CUDA_ON_CPU=$sanitizer MINIDL_NO_NATIVE=1 OPENBLAS_NUM_THREADS=1
export ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=halt_on_error=1
# Python itself is not built with the sanitizer, so its library must be loaded first; libstdc++ goes
# along because the sanitizer looks for the real __cxa_throw when it starts.
preload="$("$cxx" -print-file-name=$library) $("$cxx" -print-file-name=libstdc++.so.6)"
tests='test_ladder or test_matmul or softmax or quantization or normalisation'
exec env LD_PRELOAD="$preload" "$python" -m pytest -q -p no:cacheprovider tests/cuda \
  -k "sanitizers or (test_kernels and ($tests))" "$@"
