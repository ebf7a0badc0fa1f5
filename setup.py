"""Builds kvcached.vmm_ops, the C++ core. Needs a C++17 compiler and pybind11; no torch, no CUDA.

It also puts the start-up file ``kvcached.pth`` beside the package, which old versions of SGLang
need (``kvcached.engines.sglang.finder``), in wheels and in editable installs.
"""

from pathlib import Path
from shutil import copyfile

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
except ImportError as error:
    raise SystemExit(
        "kvcached: building vmm_ops by hand needs pybind11 in this environment "
        "(pip install setuptools pybind11), or use 'pip install -e .', which brings its own"
    ) from error

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
STARTUP = ROOT / "src" / "kvcached.pth"
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.hpp"))


class BuildWithStartup(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            copyfile(STARTUP, Path(self.build_lib) / STARTUP.name)

    def get_outputs(self, include_bytecode=1):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / STARTUP.name)]


class EditableWithStartup(editable_wheel):
    """An editable install consists of a wheel with a path in it; the start-up file joins that."""

    def _select_strategy(self, *args, **kwargs):
        strategy = super()._select_strategy(*args, **kwargs)

        class WithStartup(type(strategy)):
            def __call__(self, wheel, files, mapping):
                super().__call__(wheel, files, mapping)
                wheel.writestr(STARTUP.name, STARTUP.read_text())

        strategy.__class__ = WithStartup
        return strategy


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
    cmdclass={
        "build_ext": build_ext,
        "build_py": BuildWithStartup,
        "editable_wheel": EditableWithStartup,
    },
)
