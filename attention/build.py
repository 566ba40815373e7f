"""Build native.cpp with the machine's compiler, once per machine, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import utils
from runtime import locks

SOURCE = Path(__file__).with_name("native.cpp")
COMPILERS = ("g++", "c++", "clang++")  # the first that is there; CXX overrides
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
SECONDS_WORTH_A_LINE = 2.0


class BuildError(Exception):
    """There is no compiler, or it fails; the text says why."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, built if it is not in the user's cache yet. Raises BuildError."""
    compiler = find_compiler()
    variants = _variants()
    folder = utils.cache_folder()
    key = _key(compiler, variants)
    path = folder / f"native-{key}.so"

    library = _open(path)
    if library is not None:
        return library
    risk = "processes that start together each build the attention kernel"
    with locks.acquire_if_possible(path.with_suffix(".lock"), risk):
        library = _open(path)  # another process may have built it meanwhile
        if library is None:
            _build(compiler, variants, path)
            library = _open(path)
    if library is None:
        raise BuildError(f"{path} was built and cannot be loaded")
    return library


@functools.cache
def error() -> str | None:
    """Why the kernel cannot be built or loaded here; None if it works."""
    try:
        load()
        return None
    except (BuildError, OSError, utils.UserError) as reason:
        return utils.first_line(reason)


@functools.cache
def is_available() -> bool:
    """Whether the kernel works here; if not, one warning says why."""
    reason = error()
    if reason is not None:
        utils.warn(f"the native attention kernel cannot be used, a slower one runs: {reason}")
    return reason is None


def find_compiler() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    names = asked or ", ".join(COMPILERS)
    raise BuildError(f"no C++ compiler found ({names}); install one, such as g++")


@dataclass(frozen=True)
class Variant:
    """Flags to try."""

    compile: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


def _variants() -> list[Variant]:
    """The best first: compilers may lack OpenMP, or name this CPU differently."""
    is_arm, is_mac = platform.machine() in ("arm64", "aarch64"), sys.platform == "darwin"
    native = "-mcpu=native" if is_arm else "-march=native"
    openmp = ("-Xpreprocessor", "-fopenmp") if is_mac else ("-fopenmp",)
    # A missing symbol is to fail here, and not when the library is used.
    strict = () if is_mac else ("-Wl,-z,defs",)

    runtime = _openmp_runtime()
    with_runtime = (*strict, str(runtime) if runtime else "-fopenmp")
    return [
        Variant((native, *openmp), with_runtime),
        Variant((native,), strict),
        Variant(openmp, with_runtime),
        Variant((), strict),
    ]


def _openmp_runtime() -> Path | None:
    """The OpenMP runtime that torch has loaded, under whatever name its wheel gives it.

    The kernel is linked to it: a second runtime in the process would start as many threads again.
    Other packages may have brought runtimes of their own, which are not meant.
    """
    names = re.compile(r"lib(gomp|iomp5|omp)\b.*\.(so|dylib)")
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        loaded = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
    except OSError:  # macOS
        loaded = set((Path(torch.__file__).parent / "lib").iterdir())
    runtimes = [path for path in loaded if names.match(path.name)]

    packages = Path(torch.__file__).parents[1]
    of_torch, of_system = [], []
    for path in runtimes:
        if path.is_relative_to(packages / "torch") or path.is_relative_to(packages / "torch.libs"):
            of_torch.append(path)
        elif not path.is_relative_to(packages):
            of_system.append(path)
    return min(of_torch or of_system, default=None)


def _key(compiler: str, variants: list[Variant]) -> str:
    """Changes with everything that the library depends on; a home may be shared by machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    runtime = _openmp_runtime()
    flags = (FLAGS, [variant.compile for variant in variants], runtime and runtime.name)
    facts = (SOURCE.read_bytes(), compiler, version, flags, _cpu())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """The instructions that this CPU has, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    words = ("flags", "Features", "CPU part", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(words)}))


def _open(path: Path) -> ctypes.CDLL | None:
    """The library at a path, or None if there is none, or a damaged one.

    A truncated library could crash the process that loads it, so its checksum is compared first.
    """
    try:
        expected = path.with_suffix(".sha256").read_text()
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            return None
        return ctypes.CDLL(str(path))
    except (OSError, ValueError):
        return None


def _build(compiler: str, variants: list[Variant], path: Path) -> None:
    start = time.perf_counter()
    failures = []
    for variant in variants:
        # A folder on the same disk: the library appears under its name complete, or not at all.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            failure = _compile(compiler, variant, built)
            if failure is None:
                digest = hashlib.sha256(built.read_bytes()).hexdigest()
                os.replace(built, path)
                utils.write_text(path.with_suffix(".sha256"), digest)
                break
        failures.append(failure)
    else:
        raise BuildError(f"{compiler} cannot compile it: {failures[0]}")

    seconds = time.perf_counter() - start
    if seconds > SECONDS_WORTH_A_LINE:
        utils.say(f"built the attention kernel in {seconds:.0f} s; {path.parent} keeps it")


def _compile(compiler: str, variant: Variant, path: Path) -> str | None:
    """Compile and link to `path`; what failed, or None."""
    compiled = str(path.with_suffix(".o"))
    for command in (
        [compiler, *FLAGS, *variant.compile, "-c", str(SOURCE), "-o", compiled],
        [compiler, "-shared", compiled, *variant.link, "-o", str(path)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            return next((line for line in lines if "error" in line), *lines[:1] or ["no output"])
    return None
