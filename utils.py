"""What every script shares: errors, command lines, files written whole, run folders. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent

# The files of a run folder, <output_dir>/<dataset_name>/<run_name>/seed_<n>/. SUMMARY is written last: its presence
# means done.
CONFIG, METRICS, SUMMARY, MASK_PICTURE, LOG = (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "attention_mask.png",
    "log.txt",
)
CHECKPOINT, PREVIOUS_CHECKPOINT = "last.pt", "previous.pt"
LOCK = ".lock"  # held while a process writes to the folder; the system frees that of a dead one


# ---------------------------------------------------------------------------------------------------------------------
# Errors and command lines


# Exit codes beside 0 done, 1 failure, 130 interrupted; a sweep and a scheduler act on them.
EXIT_USAGE = 2
EXIT_AGAIN = 75  # asked to stop: all is saved, the same command goes on
EXIT_BUSY = 76  # another process is writing to the run folder
EXIT_OUT_OF_MEMORY = 77


class UserError(Exception):
    """Something that the user can fix. The message says what was received, what was expected and what to do."""

    exit_code = 1


class UsageError(UserError):
    """The command line asks for something that cannot be."""

    exit_code = EXIT_USAGE


class BusyError(UserError):
    """Another process is writing to the run folder."""

    exit_code = EXIT_BUSY


class OutOfMemoryError(UserError):
    exit_code = EXIT_OUT_OF_MEMORY


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the ValueError of a function that was handed the user's own values into a UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviated flags, errors on one line, and --debug for `run_cli`."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="show errors with their traceback")

    def parse_known_args(self, args=None, namespace=None):
        for argument in sys.argv[1:] if args is None else args:
            flag, _, value = argument.partition("=")
            if flag.startswith("--") and value == "--":  # which argparse takes for a list of nothing
                self.error(f"argument {flag}: expected a value, got '--'")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run_cli(main: Callable[[], int], leave: Callable[[int], None] = sys.exit) -> None:
    """Run a script's main() and exit: 0 done, 1 failure, 2 usage, 130 interrupted; errors as one line on stderr.

    With `--debug` among the arguments the traceback comes before it.
    """
    program = Path(sys.argv[0]).name
    make_output_safe()
    try:
        code = main()
    except BrokenPipeError:  # the reader of our output has gone (`... | head`): nothing is left to say
        drop_output()
        code = 1
    except (UserError, OSError, KeyboardInterrupt) as error:  # OSError: a disk that is full, a folder without access
        if "--debug" in sys.argv:
            traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
        code = 130 if interrupted else getattr(error, "exit_code", 1)
        said = "interrupted" if interrupted else f"error: {' '.join(str(error).split()) or type(error).__name__}"
        say(f"{program}: {said}")
    leave(code)


def make_output_safe() -> None:
    """Let no output fail: what a terminal's encoding lacks is escaped, and a closed stream swallows all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Discard further output: the reader closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def says_no_memory(error: BaseException) -> bool:
    """Whether an error, of whatever type, is about memory that could not be had, on a GPU or on the CPU."""
    words = ("out of memory", "not enough memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def warn(message: str) -> None:
    """On one line, whatever the names in it."""
    say(f"{Path(sys.argv[0]).name}: warning: {' '.join(message.splitlines())}")


def say(line: str) -> None:
    """On stderr. That it cannot be written there (a full disk, a reader that has gone) changes nothing else."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def number_type(
    kind: type,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
):
    """An argparse type: an int or a finite float with `minimum <= value <= maximum`, `above < value < below`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected {'an integer' if kind is int else 'a number'}, got {text!r}"
            ) from None
        limits = [
            (minimum is None or value >= minimum, f"at least {minimum}"),
            (maximum is None or value <= maximum, f"at most {maximum}"),
            (above is None or value > above, f"above {above}"),
            (below is None or value < below, f"below {below}"),
            (value == value and abs(value) != float("inf"), "finite"),
        ]
        for valid, words in limits:
            if not valid:
                raise argparse.ArgumentTypeError(f"must be {words}, got {text}")
        return value

    return parse


def home_path(text: str) -> str:
    """An argparse type: a path, whose `~` is the user's home; shells leave it alone in `--output_dir=~/runs`."""
    return os.path.expanduser(text)


def json_list(kind: type, choices: Sequence | None = None):
    """An argparse type: a JSON list, not empty, without repetitions, of strings among `choices` or of integers >= 0."""

    def parse(text: str) -> list:
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, list) or not values or any(type(value) is not kind for value in values):
            example = json.dumps(list(choices[:2]) if choices else [1, 2, 3])
            raise argparse.ArgumentTypeError(f"expected a JSON list like '{example}', got {text!r}")
        for value in values:
            if choices is not None and value not in choices:
                raise argparse.ArgumentTypeError(f"unknown {value!r}; expected some of {', '.join(choices)}")
            if kind is int and value < 0:
                raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
        return list(dict.fromkeys(values))

    return parse


# ---------------------------------------------------------------------------------------------------------------------
# Files: never half-written


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to; what was written takes the name `path` at the end, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of a write that failed; the system does not say of which file
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # bytes of file names that are no text


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError if it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, found {type(value).__name__}")
    return value


def check_sections(path: Path, value: dict, required: dict[str, dict], optional: dict[str, dict] | None = None) -> None:
    """Raise UserError unless the object of `path` has these sections, with these keys of these types.

    Keys of `optional`, in the same sections, may be missing or null.
    """
    for section, keys in required.items():
        if not isinstance(value.get(section), dict):
            raise UserError(f"{path} has no section {section!r}; it is damaged, or of something else")
        for key, kind in keys.items():
            if not isinstance(value[section].get(key, ...), kind):
                raise UserError(f"{path}: {section}.{key} is {value[section].get(key, 'missing')!r}")
        for key, kind in (optional or {}).get(section, {}).items():
            if not isinstance(value[section].get(key), (kind, type(None))):
                raise UserError(f"{path}: {section}.{key} is {value[section][key]!r}")


def read_json_lines(path: Path) -> list[dict]:
    """One JSON object a line. A half-written last line is skipped with a warning; elsewhere it is a UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            rows.append(row)
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: {error}") from error
            warn(f"{path}: skipped the half-written last line {number}")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Run folders


def check_folder_name(flag: str, name: str) -> None:
    if Path(name).name != name or name in ("", ".."):
        raise UsageError(f"{flag} must be a plain folder name, got {name!r}")


def run_folder(output_dir: str, dataset_name: str, run_name: str, seed: int) -> Path:
    return Path(output_dir) / dataset_name / run_name / f"seed_{seed}"
