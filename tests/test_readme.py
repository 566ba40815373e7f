"""The README and the code say the same: its commands parse, its files exist, its defaults are the parsers'."""

import importlib
import re
import shlex
import subprocess

import pytest
from parsers import parser_of

import masks
import utils
from training.command_line import parse_args, resolve_settings
from training.settings import RECIPES, strong_lr

README = (utils.REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = sorted({line for line in LINES if line.startswith("python ")})


def test_there_are_commands():
    assert {"main", "run_experiments", "plot_result", "eval", "masks"} <= {shlex.split(c)[1][:-3] for c in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    _, script, *arguments = shlex.split(command, comments=True)
    args = importlib.import_module(script.removesuffix(".py")).parse_args(arguments)
    if script == "run_experiments.py":
        importlib.import_module("main").parse_args(args.main_options)


def test_make_targets_exist():
    targets = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in targets:
        done = subprocess.run(["make", "--dry-run", target], cwd=utils.REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_demo_of_the_makefile_is_understood():
    makefile = (utils.REPOSITORY / "Makefile").read_text().replace("\\\n", " ")
    command = re.search(r"run_experiments\.py (.*)", makefile)[1].replace("$(DEMO_DIR)", "experiments/demo")
    args = importlib.import_module("run_experiments").parse_args(shlex.split(command))
    importlib.import_module("main").parse_args(args.main_options)


def test_the_file_tree_is_complete():
    tree, named, folder = README.split("## Files")[1].split("```")[1], set(), ""
    for indent, name in re.findall(r"^( *)([\w/]+(?:\.py|/))", tree, flags=re.MULTILINE):
        if name.endswith("/"):
            folder = name
        else:
            named.add(folder + name if indent else name)
    paths = [path.relative_to(utils.REPOSITORY) for path in utils.REPOSITORY.glob("[!.]*/*.py")]
    paths = {str(path) for path in paths if path.parts[0] not in ("tests", "experiments") and path.stem != "__init__"}
    assert named == paths | {path.name for path in utils.REPOSITORY.glob("*.py")}


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert target.startswith("http") or (utils.REPOSITORY / target).exists(), target


def test_the_tables_of_patterns_and_flags_agree_with_the_code():
    for name in masks.MASK_TYPES:
        assert f"| `{name}` |" in README
    parser = parser_of("main")
    table = README.split("## Training")[1].split("| `--recipe plain` |")[0]
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \|", table, flags=re.MULTILINE)
    assert len(rows) >= 6
    for flags, defaults in rows:
        names = re.findall(r"`--(\w+)`", flags)
        values = [value.strip(" `") for value in defaults.split(",")]
        assert len(names) == len(values)
        for name, value in zip(names, values, strict=True):
            default = parser.get_default(name)
            assert str(default) == value or float(default) == float(value), name


def test_the_recipes_are_those_of_the_table():
    table = README.split("| `--recipe plain` |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `--(\w+)` \| ([^|]*) \| ([^|]*) \|$", table, flags=re.MULTILINE)
    assert {name for name, *_ in rows} == set(RECIPES["plain"]) == set(RECIPES["strong"])
    for column, recipe in enumerate(("plain", "strong"), start=1):
        settings = resolve_settings(parse_args(["--recipe", recipe, "--device", "cpu"])).to_dict()
        assert {row[0]: row[column].strip(" `") for row in rows} == {row[0]: str(settings[row[0]]) for row in rows}
    given = ["--recipe", "strong", "--lr", "0.5", "--mix", "0", "--batch_size", "512"]
    settings = resolve_settings(parse_args([*given, "--device", "cpu"]))
    assert (settings.optimization.lr, settings.augmentation.mix, settings.augmentation.policy) == (0.5, 0.0, "rand")
    assert [strong_lr(size) for size in (64, 128, 256, 512)] == [0.0005, 0.001, 0.001, 0.002]
