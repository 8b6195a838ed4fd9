#!/bin/sh
# Runs the native module's tests under a sanitizer:  tools/sanitize.sh address|undefined|thread
#
# Builds minidl._native in build/<sanitizer>, apart from the installed one, next to links to the
# package's sources, so that nothing in the checkout changes. Needs g++ (or CXX), and in PYTHON's
# environment: cmake, ninja, pybind11, numpy, pytest, pytest-timeout, hypothesis. No root.
set -eu

sanitizer=${1:?usage: tools/sanitize.sh address|undefined|thread}
shift
case $sanitizer in
  address) library=libasan.so ;;
  undefined) library=libubsan.so ;;
  thread) library=libtsan.so ;;
  *) echo "unknown sanitizer: $sanitizer (address, undefined or thread)" >&2; exit 2 ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-python3}")
build=$root/build/$sanitizer
package=$build/package/minidl

rm -rf "$build/package"
mkdir -p "$package"
for file in "$root"/minidl/*; do
  case $file in
    *.so | */__pycache__) ;;
    *) ln -s "$file" "$package" ;;
  esac
done

PATH=$(dirname "$python"):$PATH
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DMINIDL_SANITIZE="$sanitizer" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$package" \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
cmake --build "$build"

# Python itself is not built with the sanitizer, so its library must be loaded first; what Python
# leaves allocated at its exit is no leak of ours. libstdc++ goes along because the sanitizer looks
# for the real __cxa_throw when it starts.
cxx=${CXX:-c++}
export LD_PRELOAD="$("$cxx" -print-file-name=$library) $("$cxx" -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1
export OPENBLAS_NUM_THREADS=1
export MINIDL_SANITIZE=$sanitizer  # a test looks whether it really runs the module built here
export PYTHONPATH=$build/package PYTHONDONTWRITEBYTECODE=1
cd "$build"
# --import-mode=append: tests/ is a package, and pytest would put the checkout, with its ordinary
# minidl, before PYTHONPATH.
exec "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q \
  --import-mode=append \
  "$root"/tests/test_native*.py "$@"
