"""Random command lines give the right exit code, one line on stderr, no traceback, no result."""

import contextlib
import importlib
import io
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parsers import parser_of

import utils

LEVELS = ("pipeline", "training")  # of benchmark.py, each with its own flags
SCRIPTS = ("main", "run_experiments", "eval", "plot_result", "benchmark", "masks", *LEVELS)
# Without these, flags could start long work, or write anywhere. Their values are tested elsewhere.
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
NUMBERS = [
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
]
LISTS = ["[]", "[1, 2]", "[1, 1]", '["full"]', '["2d_cardinal", 3]', "[[1]]", "[-1]", '["\\ud800"]']
PATHS = ["..", "../..", "/", "/dev/null", "/proc/self/mem", "~", "x/" * 3000, "ä/ß", "日本"]
NAMES = ["cpu", "cuda", "full", "digits", "2d_cardinal", "vit_base", "true", "None", "x" * 300]
ODD = ["", " ", "a b", "-leading", "-x", "--", "--help=3", "*", "$HOME", "%s", "{}", "'", '"', "\\"]
CONTROL = ["\x00", "\n", "\t1"]
NASTY = [*NUMBERS, *LISTS, *PATHS, *NAMES, *ODD, *CONTROL]


def flags_of(script):
    """The flags of a script, with their choices."""
    arguments = ("benchmark", ["--level", script]) if script in LEVELS else (script,)
    parser = parser_of(*arguments)
    return {action.option_strings[0]: list(action.choices or []) for action in parser._actions}


def command_lines(script):
    """Some flags, each with no value, a valid one or a nasty one, and now and then a stray word."""
    flags = flags_of(script)
    del flags["-h"], flags["--debug"]

    def with_value(flag):
        values = st.sampled_from([*NASTY, *map(str, flags[flag])])
        as_two_words = values.map(lambda value: [flag, value])
        as_one_word = values.map(lambda value: [f"{flag}={value}"])
        return st.one_of(st.just([flag]), as_two_words, as_one_word)

    flag_and_value = st.sampled_from(sorted(flags)).flatmap(with_value)
    stray_word = st.sampled_from(NASTY).map(lambda word: [word])
    words = st.one_of(flag_and_value, stray_word)
    return st.lists(words, max_size=4).map(lambda parts: [word for part in parts for word in part])


def call(script, arguments):
    """(exit code, stderr). An exception other than SystemExit fails the test."""
    module = importlib.import_module("benchmark" if script in LEVELS else script)
    err = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        utils.run_cli(lambda: module.main(arguments))
    return stop.value.code, err.getvalue()


@pytest.mark.parametrize("script", SCRIPTS)
def test_any_command_line_ends_well(script, tmp_path, monkeypatch, is_long, count):
    monkeypatch.chdir(tmp_path)
    harmless = [word.format(folder=tmp_path) for word in HARMLESS[script]]

    num_examples = 400 if is_long else 15
    no_checks = list(HealthCheck)

    @settings(max_examples=num_examples, deadline=None, suppress_health_check=no_checks)
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
