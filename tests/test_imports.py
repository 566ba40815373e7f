"""Imports are absolute and point downwards: no circle, nothing imports a script."""

import ast
import graphlib
import subprocess

import pytest

import utils

# From the bottom to the top. A name stands for a module, or for all modules of a folder that are not named themselves.
LAYERS = [
    {"utils"},
    {"runtime"},
    {"masks"},
    {"attention"},
    {"models"},
    {"pipeline"},
    {"data"},
    {"training"},
    {"report", "sweep", "benchmarks"},
    {"main", "run_experiments", "plot_result", "eval", "benchmark", "experiments", "docs"},
]
SCRIPTS = LAYERS[-1]
# masks.py is a script as well: its command line draws, and imports what it draws with where it does.
OF_A_COMMAND_LINE = {("masks", "report.figures"), ("masks", "report.mask_pictures")}


def modules():
    """Name -> path of every module that is no test."""
    paths = [path.relative_to(utils.REPOSITORY) for path in utils.REPOSITORY.rglob("*.py")]
    paths = [path for path in paths if path.parts[0] != "tests" and not path.parts[0].startswith(".")]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports_of(path, known):
    """The modules of ours that a file imports, wherever in it."""
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
    assert all(other in arrows[name] for name, other in OF_A_COMMAND_LINE)
    return {
        name: {other for other in others if (name, other) not in OF_A_COMMAND_LINE} for name, others in arrows.items()
    }


def layer_of(name):
    for label in (name, name.partition(".")[0]):
        for height, layer in enumerate(LAYERS):
            if label in layer:
                return height
    pytest.fail(f"{name} is in no layer: give it one")


def test_there_is_no_circle(graph):
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
    modules_alone = [
        name for name in graph if not name.startswith("experiments")
    ]  # where scripts that call scripts lie
    assert [f"{name} imports {other}" for name in modules_alone for other in graph[name] if other in SCRIPTS] == []


def test_the_top_shows_what_people_run_and_the_files_that_hold_the_idea():
    files = subprocess.run(["git", "ls-files"], cwd=utils.REPOSITORY, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("this is no git checkout")
    code = {name for name in files if "/" not in name and name.endswith(".py")}
    folders = {name.partition("/")[0] for name in files if "/" in name} - {".ci", "tests", "docs", "experiments"}
    assert len(code) <= 12
    assert len(folders) <= 8
