"""The README, docs/ and the code agree: commands parse, links lead somewhere, numbers match."""

import importlib
import json
import re
import shlex
import statistics
import subprocess
import sys

import pytest
from parsers import COMMAND_LINES, parser_of

import masks
import utils
from patterns import offsets
from report import comparison, differences, overview, results, table
from training.command_line import parse_args, resolve_settings
from training.settings import RECIPES, strong_lr


def name_of(document):
    """Its path in the repository."""
    return str(document.relative_to(utils.REPOSITORY))


README, EXPERIMENTS = utils.REPOSITORY / "README.md", utils.REPOSITORY / "experiments" / "README.md"
PAGES = sorted(utils.REPOSITORY.glob("docs/*.md"))
DOCUMENTS = {path: path.read_text(encoding="utf-8") for path in [README, EXPERIMENTS, *PAGES]}
TRAINING, SWEEPS, SLURM, BENCHMARKS, DEVELOPMENT = (
    DOCUMENTS[utils.REPOSITORY / "docs" / f"{name}.md"]
    for name in ("training", "sweeps", "slurm", "benchmarks", "development")
)
SCRIPTS = {"main", "run_experiments", "plot_result", "eval", "benchmark", "masks"}
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


def blocks_of(text, language):
    """The contents of the code blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands():
    """Every command line in the documents: in blocks of bash, and `python ...` in the text."""
    found = set()
    for text in DOCUMENTS.values():
        for block in blocks_of(text, "bash"):
            found |= {line.strip() for line in block.replace("\\\n", " ").splitlines()}
        found |= set(re.findall(r"`(python [\w/]+\.py[^`\n]*)`", text))
    return {line for line in found if line and not line.startswith("#")}


COMMANDS = sorted(commands())
OF_SCRIPTS = [line for line in COMMANDS if line.startswith(("python ", "torchrun "))]


def rows_of(text, header):
    """The cells of each row of the first table whose header begins so."""
    table = text.split(f"\n{header}", 1)[1].split("\n\n")[0]
    lines = [line for line in table.splitlines()[1:] if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not set(row[0]) <= {"-", ":"}]


# --------------------------------------------------------------------------------------------------
# Commands


def test_all_scripts_are_shown():
    shown = {line.split()[1] for line in OF_SCRIPTS if line.startswith("python ")}
    assert {f"{script}.py" for script in SCRIPTS} <= shown


@pytest.mark.parametrize("command", OF_SCRIPTS)
def test_commands_are_understood(command):
    words = shlex.split(command, comments=True)
    position = next(index for index, word in enumerate(words) if word.endswith(".py"))
    script, arguments = words[position], words[position + 1 :]
    assert (utils.REPOSITORY / script).exists()
    if script.removesuffix(".py") not in SCRIPTS:
        assert not arguments
        return

    module = script.removesuffix(".py")
    args = importlib.import_module(COMMAND_LINES.get(module, module)).parse_args(arguments)
    if script == "run_experiments.py":
        importlib.import_module("main").parse_args(args.main_options)


def test_other_commands_are_known():
    """A command of another kind needs a check of its own here."""
    others = [line for line in COMMANDS if line not in OF_SCRIPTS]
    kinds = (
        *("make ", "pip install -r requirements", "python3 -m venv ", "bash experiments/gpu.sh"),
        *("bash experiments/study.sh", "git clone ", "echo "),
    )
    assert [line for line in others if not line.removeprefix("SMALL=1 ").startswith(kinds)] == []


def test_the_parts_of_the_study_exist():
    script = (utils.REPOSITORY / "experiments" / "study.sh").read_text(encoding="utf-8")
    parts = re.search(r"^PARTS=\((.*)\)$", script, flags=re.MULTILINE)[1].split()
    used = {line.split()[2] for line in COMMANDS if re.match(r"bash experiments/study.sh \w", line)}
    assert used
    assert used <= set(parts)
    assert [
        row[0].strip("`") for row in rows_of(DOCUMENTS[EXPERIMENTS], "| part | data |")
    ] == parts


def test_make_targets_exist():
    targets = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    assert {"demo", "test", "test-lowest", "faults", "lint", "format"} <= targets
    for target in targets:
        command = ["make", "--dry-run", target]
        done = subprocess.run(command, cwd=utils.REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_demo_of_the_makefile_is_understood():
    makefile = (utils.REPOSITORY / "Makefile").read_text().replace("\\\n", " ")
    command = re.search(r"run_experiments\.py (.*)", makefile)[1]
    command = command.replace("$(DEMO_DIR)", "experiments/demo")
    args = importlib.import_module("run_experiments").parse_args(shlex.split(command))
    importlib.import_module("main").parse_args(args.main_options)


PYTHON_BLOCKS = [
    pytest.param(block, id=f"{name_of(document)}-{number}")
    for document, text in DOCUMENTS.items()
    for number, block in enumerate(blocks_of(text, "python"))
]


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_examples_run(block):
    """An example that adds to PATTERNS has its names; what it adds is gone afterwards."""
    patterns = dict(masks.PATTERNS)
    exec(block, {"PATTERNS": patterns, "Pattern": masks.Pattern})
    for name, pattern in patterns.items():
        mask = offsets.neighborhoods(pattern.offsets, 2, 12, 13)
        assert mask[6 * 13 + 6].sum() == pattern.num_neighbors(2), name


# --------------------------------------------------------------------------------------------------
# Links and files


@each_document
def test_links_and_pictures_exist(document):
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", DOCUMENTS[document])
    assert links
    for target, anchor in links:
        if target.startswith("http"):
            continue
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors_of(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


def anchors_of(text):
    """The anchors that GitHub gives to the headings of a Markdown text."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_contents_of_a_page_are_complete(page):
    headings = re.findall(r"^## (.*)$", DOCUMENTS[page], flags=re.MULTILINE)
    contents = re.findall(r"^\* \[(.*)\]\(#.*\)$", DOCUMENTS[page], flags=re.MULTILINE)
    assert contents in (headings, [])
    assert contents or len(headings) <= 3


def test_the_readme_is_short_and_links_to_every_page():
    assert len(DOCUMENTS[README].encode()) <= 13_000
    assert {"attention", "benchmarks", "training"} <= {page.stem for page in PAGES}
    for page in PAGES:
        assert f"]({name_of(page)})" in DOCUMENTS[README]


@each_document
def test_prose_is_wrapped_at_100_columns(document):
    prose = re.sub(r"^```.*?^```$", "", DOCUMENTS[document], flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in lines if len(line) > 100] == []


def test_the_file_tree_is_complete():
    tree, named, folder = DEVELOPMENT.split("## Layout")[1].split("```")[1], set(), ""
    for indent, name in re.findall(r"^( *)([\w/]+(?:\.py|/))", tree, flags=re.MULTILINE):
        if name.endswith("/"):
            folder = name
        else:
            named.add(folder + name if indent else name)

    inside = [path.relative_to(utils.REPOSITORY) for path in utils.REPOSITORY.glob("[!.]*/*.py")]
    inside = [path for path in inside if path.parts[0] != "tests"]
    at_the_top = {path.name for path in utils.REPOSITORY.glob("*.py")}
    assert named == at_the_top | {str(path) for path in inside if path.stem != "__init__"}


def test_the_readme_maps_every_script_and_folder():
    tree = DOCUMENTS[README].split("## Files")[1].split("```")[1]
    named = set(re.findall(r"^([\w.]+(?:\.py|/))", tree, flags=re.MULTILINE))
    at_the_top = {path.name for path in utils.REPOSITORY.glob("*.py")}
    folders = {f"{path.parent.name}/" for path in utils.REPOSITORY.glob("[!.]*/__init__.py")}
    assert at_the_top | folders <= named


# --------------------------------------------------------------------------------------------------
# Flags, defaults, formats


def test_the_table_of_patterns_is_that_of_the_code():
    rows = rows_of(DOCUMENTS[README], "| `--mask_type` |")
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(masks.MASK_TYPES)


def test_the_table_of_flags_is_what_the_script_makes_of_the_parser(monkeypatch):
    monkeypatch.syspath_prepend(utils.REPOSITORY / "docs")
    flags = importlib.import_module("flags")
    made = flags.make_tables(flags.build_parser())
    assert flags.tables_in(TRAINING) == made, "run `python docs/flags.py`"


def test_the_table_of_all_patterns_is_what_the_script_makes_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(utils.REPOSITORY / "docs")
    flags = importlib.import_module("flags")
    page = flags.PATTERNS_PAGE.read_text(encoding="utf-8")
    written = page.split(flags.PATTERNS_START)[1].split(flags.PATTERNS_END)[0].strip()
    assert written == flags.make_pattern_table(), "run `python docs/flags.py`"


def test_the_table_of_flags_names_every_flag_once():
    table = TRAINING.split("<!-- flags")[1].split("<!-- end")[0]
    named = re.findall(r"`(--\w+)`", "".join(re.findall(r"^\| (`--[^|]*) \|", table, flags=re.M)))
    actions = [action for action in parser_of("main")._actions if action.dest != "help"]
    assert sorted(named) == sorted(f"--{action.dest}" for action in actions)


@pytest.mark.parametrize(
    ("text", "header"),
    [(SWEEPS, "| flag of `run_experiments.py` |"), (SLURM, "| flag |")],
    ids=["sweeps", "slurm"],
)
def test_the_defaults_of_the_sweep_are_those_of_its_parser(text, header):
    """Values are in backticks; words stand for a default that is decided later, or empty."""
    parser = parser_of("run_experiments")
    for name, default, _ in rows_of(text, header):
        given = parser.get_default(name.strip("`-"))
        if default.startswith("`"):
            assert str(given) == default.strip("`"), name
        else:
            assert given in (None, False, [], [()], list(masks.STUDIED)), name


def test_every_flag_of_the_sweep_has_a_row():
    named = [row[0].strip("`-") for row in rows_of(SWEEPS, "| flag of `run_experiments.py` |")]
    named += [row[0].strip("`-") for row in rows_of(SLURM, "| flag |")]
    actions = {action.dest for action in parser_of("run_experiments")._actions}
    assert sorted(named) == sorted(actions - {"help", "debug"})


def test_defaults_in_the_text_are_those_of_the_parser():
    """`--flag` (value), as in: every `--checkpoint_every_minutes` (10)."""
    parser, found = parser_of("main"), []
    for text in DOCUMENTS.values():
        found += re.findall(r"`--(\w+)` \(([\d.]+)\)", text)
    assert found
    for name, value in found:
        assert float(parser.get_default(name)) == float(value), name


def test_the_recipes_are_those_of_the_table():
    rows = rows_of(TRAINING, "| flag | `--recipe plain` |")
    rows = [(name.strip("`-"), *values) for name, *values in rows]
    assert {name for name, *_ in rows} == set(RECIPES["plain"]) == set(RECIPES["strong"])
    for column, recipe in enumerate(("plain", "strong"), start=1):
        settings = resolve_settings(parse_args(["--recipe", recipe, "--device", "cpu"])).to_dict()
        for row in rows:
            assert row[column].strip(" `") == str(settings[row[0]]), row[0]

    given = ["--recipe", "strong", "--lr", "0.5", "--mix", "0", "--batch_size", "512"]
    settings = resolve_settings(parse_args([*given, "--device", "cpu"]))
    augmentation = settings.augmentation
    assert (settings.optimization.lr, augmentation.mix, augmentation.policy) == (0.5, 0.0, "rand")
    assert [strong_lr(size) for size in (64, 128, 256, 512)] == [0.0005, 0.001, 0.001, 0.002]


def test_the_exit_codes_are_those_of_the_code():
    codes = [int(row[0]) for row in rows_of(SWEEPS, "| code |")]
    ours = {utils.EXIT_USAGE, utils.EXIT_AGAIN, utils.EXIT_BUSY, utils.EXIT_OUT_OF_MEMORY}
    assert sorted(codes) == sorted({0, 1, 130} | ours)


def test_the_sample_line_has_the_keys_of_a_run(tmp_path):
    sample = json.loads(blocks_of(SWEEPS, "json")[0])
    run = "--dataset digits --model vit_micro --depth 1 --img_size 8 --patch_size 4 --epochs 2"
    command = [sys.executable, "main.py", *run.split(), "--device", "cpu"]
    subprocess.run(
        [*command, "--output_dir", tmp_path], cwd=utils.REPOSITORY, check=True, capture_output=True
    )
    folder = tmp_path / "digits" / "full" / "seed_0"
    _, row = utils.read_json_lines(folder / utils.METRICS)
    assert list(sample) == list(row)

    explained = re.findall(r"`(\w+)`", "".join(row[0] for row in rows_of(SWEEPS, "| key |")))
    assert sorted(explained) == sorted(row)
    described = re.findall(r"`([\w.]+)`", "".join(row[0] for row in rows_of(SWEEPS, "| file |")))
    written = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert set(described) == written | {utils.LOG}  # which the sweep writes


# --------------------------------------------------------------------------------------------------
# Measured numbers, against the logs and reports that they are from


@pytest.fixture
def result_tables(monkeypatch):
    monkeypatch.syspath_prepend(utils.REPOSITORY / "docs")
    return importlib.import_module("result_tables")


@pytest.mark.parametrize("document", [README, EXPERIMENTS], ids=name_of)
def test_the_tables_of_results_are_those_of_the_logs(document, result_tables):
    text = DOCUMENTS[document]
    assert len(result_tables.TABLE.findall(text)) == text.count("\n| mask ")
    assert result_tables.fill_tables(text) == text, "run python docs/result_tables.py"


def test_a_table_of_results_is_filled_from_its_report(result_tables):
    table = result_tables.TABLE.search(DOCUMENTS[README])[0]
    spoiled = re.sub(r"\d\.\d", "0.0", table)
    assert spoiled != table
    assert result_tables.fill_tables(spoiled) == table


REPORTS = sorted(utils.REPOSITORY.glob("experiments/logs/*/results.md"))


@pytest.mark.parametrize("report", REPORTS, ids=name_of)
def test_the_reports_are_what_the_logs_say(report):
    """The table of results.md, made anew from the logs beside it."""
    text = report.read_text(encoding="utf-8")
    command = re.search(r"^Rebuild with `python plot_result\.py (.*)`\.$", text, re.MULTILINE)[1]
    args = importlib.import_module("plot_result").parse_args(shlex.split(command))
    assert utils.REPOSITORY / args.results_path == report.parent

    runs = differences.load_comparable(report.parent, with_speed=not args.no_speed)
    rows = results.group_by_pattern(runs)
    assert table.format_table(comparison.study(rows)).strip() in text


def test_the_overviews_are_what_the_logs_say(monkeypatch):
    monkeypatch.syspath_prepend(utils.REPOSITORY / "experiments")
    module = importlib.import_module("overview")
    for name in module.STUDIES:
        written = utils.REPOSITORY / "experiments" / "logs" / f"{name}.md"
        studies = module.load(name)
        assert written.exists() == (len(studies) > 1), "run python experiments/overview.py"
        if len(studies) > 1:
            made = overview.format_differences(studies, module.names_of(name, studies))
            assert written.read_text(encoding="utf-8") == made


@pytest.mark.parametrize("text", [DOCUMENTS[README], BENCHMARKS], ids=["README", "benchmarks"])
def test_the_tables_of_speed_are_those_of_the_reports(text, monkeypatch):
    monkeypatch.syspath_prepend(utils.REPOSITORY / "docs")
    speed_tables = importlib.import_module("speed_tables")
    tables = len(speed_tables.TABLE.findall(text))
    assert tables == text.count("| pattern | step |") > 0
    assert speed_tables.fill_tables(text) == text, "run python docs/speed_tables.py"


def test_a_table_of_speed_is_filled_from_its_report(monkeypatch):
    monkeypatch.syspath_prepend(utils.REPOSITORY / "docs")
    speed_tables = importlib.import_module("speed_tables")
    table = next(speed_tables.TABLE.finditer(BENCHMARKS))[0]
    spoiled = re.sub(r"\d\.\d", "0.0", table)
    assert spoiled != table
    assert speed_tables.fill_tables(spoiled) == table


def test_the_gain_of_localize_is_that_of_the_report():
    report = utils.read_json(utils.REPOSITORY / "experiments/benchmark/interop_cpu.json")
    forward, both = [row["speedup"] for row in report["rows"] if row["model"] == "localized"]
    said = " ".join(DOCUMENTS[README].split())
    assert f"is {forward['median']:.2f} times as fast forward" in said
    assert f"and {both['median']:.2f} times forward and backward" in said

    said = " ".join(DOCUMENTS[utils.REPOSITORY / "docs" / "interop.md"].split())
    for measured in (forward, both):
        quartiles = f"{measured['q1']:.2f} to {measured['q3']:.2f}"
        assert re.search(rf"{measured['median']:.2f} times [^.]*\((quartiles )?{quartiles}\)", said)


def test_the_table_of_the_pipeline_is_that_of_the_report():
    report = utils.read_json(utils.REPOSITORY / "experiments/benchmark/pipeline_cpu.json")
    for name, *cells in rows_of(BENCHMARKS, "| images/s | at 32×32 |"):
        name = name.replace("half of the batches mixed", "mix")
        for size, cell in zip((32, 224), cells, strict=True):
            rates = report[f"images_per_second_at_{size}"]
            ours, theirs = rates[name], rates[f"PIL and DataLoader: {name}"]
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            rate, times = re.fullmatch(r"([\d,]+) \(([\d.]+)×\)", cell).groups()
            assert rate == f"{statistics.median(ours):,.0f}"
            assert abs(float(times) - ratio) <= 0.051


def test_the_table_of_training_is_that_of_the_report():
    report = utils.read_json(utils.REPOSITORY / "experiments/benchmark/training_cpu.json")
    measured = {row["name"]: row for row in report["rows"]}
    for flags, *cells in rows_of(BENCHMARKS, "| | images/s | times the bare model |"):
        _, recipe, _, precision = flags.strip("`").split()
        row = measured[f"this repository, {recipe}, {precision}"]
        rate = statistics.median(row["images_per_second"])
        assert cells == [f"{rate:.0f}", f"{row['of_bare']:.2f}", f"{row['of_usual']:.2f}"]
