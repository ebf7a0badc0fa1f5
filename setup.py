"""Builds kvcached.vmm_ops, the C++ core. Needs a C++17 compiler and pybind11; no torch, no CUDA."""

from pathlib import Path

from setuptools import setup

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
except ImportError as error:
    raise SystemExit(
        "kvcached: building vmm_ops by hand needs pybind11 in this environment "
        "(pip install setuptools pybind11), or use 'pip install -e .', which brings its own"
    ) from error

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.hpp"))

ParallelCompile("KVCACHED_BUILD_JOBS", default=2).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "kvcached.vmm_ops",
            SOURCES,
            depends=HEADERS,
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-fvisibility=hidden"],
            extra_link_args=["-ldl", "-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
