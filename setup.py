"""Builds minidl._native with CMake; everything else about the package is in pyproject.toml.

The library works on NumPy alone, so a machine without a C++ compiler installs it all the same: the
reason is printed, and written to minidl/_native_missing.txt, from where `minidl doctor` tells it.

    MINIDL_NO_NATIVE=1        do not build the kernels
    MINIDL_REQUIRE_NATIVE=1   fail if they cannot be built
    MINIDL_SANITIZE=address   or undefined, thread: build them with that sanitizer
    CMAKE_ARGS="-D..."        hand this to CMake as well
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
COMPILERS = ("c++", "g++", "clang++", "cl")


class BuildWithCMake(build_ext):
    """Compiles in build/native-…, which stays: the next build compiles only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        homes = {target, ROOT / "minidl"} if self.editable_mode or self.inplace else {target}
        for home in homes:
            (home / "_native_missing.txt").unlink(missing_ok=True)
            for stale in home.glob("_native.*" + sysconfig.get_config_var("EXT_SUFFIX")[-3:]):
                stale.unlink()
        reason = self.compile_native(target)
        if reason is None:
            return
        if os.environ.get("MINIDL_REQUIRE_NATIVE", "0") not in ("", "0"):
            raise SystemExit(f"minidl: {reason}")
        for home in homes:
            (home / "_native_missing.txt").write_text(reason + "\n", encoding="utf-8")
        line = "*" * 78
        print(
            f"{line}\nminidl: installing WITHOUT the C++ kernels, it will run on NumPy.\n{reason}"
            f"\n{line}",
            file=sys.stderr,
        )

    def compile_native(self, target: Path) -> str | None:
        """Builds the module into `target`; returns None, or the reason why there is none."""
        if os.environ.get("MINIDL_NO_NATIVE", "0") not in ("", "0"):
            return "MINIDL_NO_NATIVE was set when minidl was installed."
        compiler = os.environ.get("CXX")
        if not any(map(shutil.which, [compiler.split()[0]] if compiler else COMPILERS)):
            return (
                f"No C++ compiler was found ({compiler or ', '.join(COMPILERS)}). Install one "
                "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: "
                "xcode-select --install) and install minidl again."
            )
        cmake = shutil.which("cmake")
        if not cmake:
            return "CMake was not found: pip install cmake, and install minidl again."
        import pybind11

        python = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        build = ROOT / "build" / f"native-{python}"
        output = build / "lib"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DMINIDL_VERSION={self.distribution.get_version()}",
            f"-DMINIDL_SANITIZE={os.environ.get('MINIDL_SANITIZE', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        if ninja := shutil.which("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        failed = run(configure)
        if failed and (build / "CMakeCache.txt").exists():
            shutil.rmtree(build)  # perhaps left over from another CMake or compiler
            failed = run(configure)
        failed = failed or run([cmake, "--build", str(build), "--parallel"])
        if failed:
            return (
                "Compiling the C++ kernels failed; minidl/_native_missing.txt has the compiler's "
                f"words. Mend that and install minidl again.\n{failed}"
            )
        for library in output.glob("_native.*"):
            shutil.copy2(library, target)
        return None


def run(command: list[str]) -> str | None:
    """Runs and prints a build step; returns what it said if it failed."""
    print("+", " ".join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    return done.stdout if done.returncode else None


class BuildWithSources(build_py):
    """Ships csrc/ inside the package: CUDA kernels are compiled where they run."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                ROOT / "csrc", Path(self.build_lib) / "minidl" / "csrc", dirs_exist_ok=True
            )


setup(
    ext_modules=[Extension("minidl._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildWithCMake, "build_py": BuildWithSources},
)
