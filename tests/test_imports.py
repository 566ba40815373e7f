"""Imports are absolute and point downwards: no cycles, and nothing imports a script."""

import ast
import graphlib
import subprocess
import sys

import pytest

import utils

# From the bottom to the top. A name stands for a module, or for those modules of a folder that have
# no entry of their own.
LAYERS = [
    {"utils"},
    {"runtime"},
    {"patterns"},
    {"masks"},
    {"attention"},
    {"models"},
    {"interop"},
    {"pipeline"},
    {"data"},
    {"training"},
    {"report", "sweep", "benchmarks"},
    {"analysis"},
    {
        *("main", "run_experiments", "plot_result", "eval", "benchmark"),
        *("experiments", "docs", "examples"),
    },
]
SCRIPTS = LAYERS[-1]
# masks.py is also a script, and only then imports its command line, which can draw.
COMMAND_LINE_IMPORTS = {("masks", "report.mask_command_line")}


def modules():
    """Name -> path of every module that is not a test."""
    found = {}
    for absolute in utils.REPOSITORY.rglob("*.py"):
        path = absolute.relative_to(utils.REPOSITORY)
        if path.parts[0] == "tests" or path.parts[0].startswith("."):
            continue
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


def imports_of(path, known):
    """Our own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((utils.REPOSITORY / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & known.keys()


@pytest.fixture(scope="module")
def graph():
    known = modules()
    arrows = {name: imports_of(path, known) - {name} for name, path in known.items()}
    for name, other in COMMAND_LINE_IMPORTS:
        arrows[name].remove(other)  # raises KeyError if the exception is no longer needed
    return arrows


def layer_of(name):
    for label in (name, name.partition(".")[0]):
        for height, layer in enumerate(LAYERS):
            if label in layer:
                return height
    pytest.fail(f"{name} is in no layer; add it to LAYERS")


def test_there_are_no_cycles(graph):
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert {"utils", "main", "attention.diagonal"} <= set(order)


def test_all_arrows_point_downwards(graph):
    upwards = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if layer_of(other) > layer_of(name)
    ]
    assert upwards == []


def test_nothing_imports_a_script(graph):
    importing = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        # The scripts in experiments/ may call other scripts.
        if other in SCRIPTS and not name.startswith("experiments")
    ]
    assert importing == []


def test_the_top_shows_what_people_run_and_the_files_that_hold_the_idea():
    command = ["git", "ls-files"]
    done = subprocess.run(command, cwd=utils.REPOSITORY, capture_output=True, text=True)
    files = done.stdout.split()
    if not files:
        pytest.skip("not a git checkout")

    code = {name for name in files if "/" not in name and name.endswith(".py")}
    folders = {name.partition("/")[0] for name in files if "/" in name}
    assert len(code) <= 12
    assert len(folders - {".ci", "tests", "docs", "examples", "experiments"}) <= 10


@pytest.mark.parametrize(
    "module",
    ["masks", "run_experiments", "plot_result", "report.results", "report.charts", "sweep.plan"],
)
def test_what_needs_no_tensors_starts_without_torch(module):
    assert loaded_by(module) & {"torch", "matplotlib"} == set()


@pytest.mark.parametrize("module", ["main", "eval", "models"])
def test_what_needs_tensors_starts_without_torchs_compiler(module):
    """Loading the compiler takes as long as loading all the rest of torch."""
    assert loaded_by(module) & {"torch._dynamo", "torchvision", "matplotlib", "sklearn"} == set()


def loaded_by(module):
    """The names of all modules that importing one has loaded."""
    command = [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"]
    done = subprocess.run(command, cwd=utils.REPOSITORY, capture_output=True, text=True, check=True)
    return set(done.stdout.split())
