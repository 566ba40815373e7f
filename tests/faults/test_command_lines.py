"""Command lines drawn at random: the right exit code, one line on stderr, no traceback, no result."""

import contextlib
import importlib
import io
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parsers import parser_of

import utils

SCRIPTS = ("main", "run_experiments", "eval", "plot_result", "benchmark", "pipeline", "training", "masks")
LEVELS = ("pipeline", "training")  # of benchmark.py, with flags of their own
# Flags that would start long work, or write where they please; their values are tested one by one elsewhere.
HARMLESS = {
    "main": ["--dry_run"],
    "run_experiments": ["--dry_run"],
    "eval": ["--checkpoint", "{folder}/none.pt"],
    "plot_result": ["--results_path", "{folder}/none"],
    "benchmark": ["--plot", "{folder}/none.json"],
    "masks": ["--grid", "3x4"],
    "pipeline": ["--level", "pipeline", "--workers", "-1"],
    "training": ["--level", "training", "--rounds", "0"],
}
NASTY = [
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "2.5",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "9" * 40,
        "0x10",
        "1_000",
        "٣",
        "½",
        "true",
        "None",
    ),
    *("[]", "[1, 2]", "[1, 1]", '["full"]', '["2d_cardinal", 3]', "{}", "[[1]]", "[-1]", '["\\ud800"]', "'", '"', "\\"),
    *(
        "--",
        "-x",
        "--help=3",
        "..",
        "../..",
        "/",
        "/dev/null",
        "/proc/self/mem",
        "~",
        "a b",
        "-leading",
        "ä/ß",
        "日本",
        "\x00",
    ),
    *(
        "x" * 300,
        "x/" * 3000,
        "*",
        "$HOME",
        "%s",
        "{}",
        "\n",
        "\t1",
        "cpu",
        "cuda",
        "full",
        "digits",
        "2d_cardinal",
        "vit_base",
    ),
]


def flags_of(script):
    """Its flags, with the values that they know."""
    parser = parser_of("benchmark", ["--level", script]) if script in LEVELS else parser_of(script)
    return {action.option_strings[0]: list(action.choices or []) for action in parser._actions}


def command_lines(script):
    """Some flags, each with nothing, a value that it knows, or a nasty one; now and then a stray word."""
    flags = {flag: choices for flag, choices in flags_of(script).items() if flag not in ("-h", "--debug")}

    def with_value(flag):
        values = st.sampled_from([*NASTY, *map(str, flags[flag])])
        return st.one_of(
            st.just([flag]), values.map(lambda value: [flag, value]), values.map(lambda v: [f"{flag}={v}"])
        )

    words = st.one_of(
        st.sampled_from(sorted(flags)).flatmap(with_value), st.sampled_from(NASTY).map(lambda word: [word])
    )
    return st.lists(words, max_size=4).map(lambda parts: [word for part in parts for word in part])


def call(script, arguments):
    """-> (exit code, stderr). Anything but SystemExit is a traceback in the user's face, and fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        utils.run_cli(lambda: importlib.import_module("benchmark" if script in LEVELS else script).main(arguments))
    return stop.value.code, err.getvalue()


@pytest.mark.parametrize("script", SCRIPTS)
def test_any_command_line_ends_well(script, tmp_path, monkeypatch, is_long, count):
    monkeypatch.chdir(tmp_path)
    harmless = [word.format(folder=tmp_path) for word in HARMLESS[script]]

    @settings(max_examples=400 if is_long else 15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(command_lines(script))
    def try_one(arguments):
        count("command lines tried")
        code, err = call(script, [*arguments, *harmless])
        assert code in (0, 1, 2), err
        assert "Traceback" not in err
        errors = [line for line in err.splitlines() if re.search(r"\berror:", line)]
        assert len(errors) == (1 if code else 0), err
        assert not list(tmp_path.rglob(utils.SUMMARY))

    try_one()
