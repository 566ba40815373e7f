"""What all scripts share: errors, command lines, atomic files, run folders. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent

# The files of a run folder, <output_dir>/<dataset_name>/<run_name>/seed_<n>/.
CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"  # written last: if it is there, the run is done
MASK_PICTURE = "attention_mask.png"
LOG = "log.txt"
CHECKPOINT = "last.pt"
PREVIOUS_CHECKPOINT = "previous.pt"
LOCK = ".lock"  # held while a process writes to the folder; the system frees it when that dies


# --------------------------------------------------------------------------------------------------
# Errors and command lines


# Exit codes besides 0 (done), 1 (failure) and 130 (interrupted). Sweeps and schedulers act on them.
EXIT_USAGE = 2
EXIT_AGAIN = 75  # asked to stop, everything is saved: run the same command again to go on
EXIT_BUSY = 76  # another process is writing to the run folder
EXIT_OUT_OF_MEMORY = 77


class UserError(Exception):
    """Something that the user can fix.

    The message says what was received, what was expected, and what to do.
    """

    exit_code = 1


class UsageError(UserError):
    """The command line asks for something impossible."""

    exit_code = EXIT_USAGE


class BusyError(UserError):
    """Another process is writing to the run folder."""

    exit_code = EXIT_BUSY


class OutOfMemoryError(UserError):
    exit_code = EXIT_OUT_OF_MEMORY


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError about values from the command line into a UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text, if there is one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviated flags, and errors on one line.

    Adds the flag --debug, which `run_cli` reads.
    """

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="show errors with their traceback")

    def parse_known_args(self, args=None, namespace=None):
        for argument in sys.argv[1:] if args is None else args:
            flag, _, value = argument.partition("=")
            if flag.startswith("--") and value == "--":  # argparse would read an empty list
                self.error(f"argument {flag}: expected a value, got '--'")
        return super().parse_known_args(args, namespace)

    def refuse(self, args: argparse.Namespace, names: Sequence[str], reason: str) -> None:
        """Exit with a usage error if one of these flags is given, which would have no effect."""
        for name in names:
            if getattr(args, name) != self.get_default(name):
                self.error(f"{reason}; leave out --{name}")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run_cli(main: Callable[[], int], leave: Callable[[int], None] = sys.exit) -> None:
    """Run a script's main() and exit: 0 done, 1 failure, 2 usage error, 130 interrupted.

    Errors are printed as one line on stderr, with `--debug` after their traceback.
    """
    program = Path(sys.argv[0]).name
    make_output_safe()
    try:
        code = main()
    except BrokenPipeError:  # nobody reads our output any more, as in `... | head`
        drop_output()
        code = 1
    except KeyboardInterrupt:
        print_traceback_if_asked()
        say(f"{program}: interrupted")
        code = 130
    except (UserError, OSError) as error:  # OSError: a full disk, a folder without access
        print_traceback_if_asked()
        message = " ".join(str(error).split()) or type(error).__name__
        say(f"{program}: error: {message}")
        code = getattr(error, "exit_code", 1)
    leave(code)


def print_traceback_if_asked() -> None:
    if "--debug" in sys.argv:
        traceback.print_exc()


def make_output_safe() -> None:
    """Keep output from failing.

    Characters that the terminal's encoding lacks are escaped, and a closed stream drops everything.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - stays open until the exit
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Discard all further output, because the reader has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def says_no_memory(error: BaseException) -> bool:
    """Whether an error of any type is about running out of memory, on a GPU or on the CPU."""
    words = ("out of memory", "not enough memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def warn(message: str) -> None:
    """Print a warning on one line, even if a name in it has several."""
    say(f"{Path(sys.argv[0]).name}: warning: {' '.join(message.splitlines())}")


def say(line: str) -> None:
    """Print a line to stderr. If that fails (a full disk, a closed pipe), nothing else changes."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def number_type(
    kind: type,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
):
    """An argparse type: an int or a finite float within bounds.

    The bounds are `minimum <= value <= maximum` and `above < value < below`.
    """
    expected = "an integer" if kind is int else "a number"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

        bounds = [
            (minimum is None or value >= minimum, f"at least {minimum}"),
            (maximum is None or value <= maximum, f"at most {maximum}"),
            (above is None or value > above, f"above {above}"),
            (below is None or value < below, f"below {below}"),
            (value == value and abs(value) != float("inf"), "finite"),
        ]
        for is_met, words in bounds:
            if not is_met:
                raise argparse.ArgumentTypeError(f"must be {words}, got {text}")
        return value

    return parse


def home_path(text: str) -> str:
    """An argparse type: a path in which `~` is the user's home.

    Shells don't expand it in `--output_dir=~/runs`.
    """
    return os.path.expanduser(text)


def json_list(kind: type, choices: Sequence | None = None):
    """An argparse type: a JSON list of strings out of `choices`, or of integers >= 0.

    The list must not be empty; repetitions are dropped.
    """

    def parse(text: str) -> list:
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        is_list = isinstance(values, list) and len(values) > 0
        if not is_list or any(type(value) is not kind for value in values):
            example = json.dumps(list(choices[:2]) if choices else [1, 2, 3])
            raise argparse.ArgumentTypeError(f"expected a JSON list like '{example}', got {text!r}")

        for value in values:
            if choices is not None and value not in choices:
                raise argparse.ArgumentTypeError(
                    f"unknown {value!r}; expected some of {', '.join(choices)}"
                )
            if kind is int and value < 0:
                raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
        return list(dict.fromkeys(values))

    return parse


def parse_pair(text: str) -> tuple[int, int]:
    """An argparse type: `'7x10'` -> `(7, 10)`."""
    try:
        first, second = text.lower().split("x")
        return int(first), int(second)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two integers like 7x10, got {text!r}") from None


# --------------------------------------------------------------------------------------------------
# Files, never half-written


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` at the end: no file is half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # When a write fails, the system doesn't say in which file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        # Bytes in file names that are not valid text are escaped.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError if it is unreadable or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, found {type(value).__name__}")
    return value


def check_sections(
    path: Path,
    value: dict,
    required: dict[str, dict],
    optional: dict[str, dict] | None = None,
) -> None:
    """Raise UserError unless the object from `path` has these sections, with keys of these types.

    Keys in `optional`, which names the same sections, may be missing or null.
    """
    for name, keys in required.items():
        section = value.get(name)
        if not isinstance(section, dict):
            raise UserError(
                f"{path} has no section {name!r}; it is damaged, or another kind of file"
            )

        for key, kind in keys.items():
            if not isinstance(section.get(key, ...), kind):
                raise UserError(f"{path}: {name}.{key} is {section.get(key, 'missing')!r}")

        optional_keys = (optional or {}).get(name, {})
        for key, kind in optional_keys.items():
            if not isinstance(section.get(key), (kind, type(None))):
                raise UserError(f"{path}: {name}.{key} is {section[key]!r}")


def read_json_lines(path: Path) -> list[dict]:
    """The JSON objects in a file with one per line.

    A damaged last line is skipped with a warning, since its write may have been cut short. Raises
    UserError for any other.
    """
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


# --------------------------------------------------------------------------------------------------
# Run folders


def cache_folder() -> Path:
    """The user's cache folder, or a temporary one if that is not writable (in a container)."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own_temporary = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    for cache in (Path(user_cache), own_temporary):
        folder = cache / "local-attention-vits"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
                return folder

    raise UserError(
        f"can write neither to {user_cache} nor to {own_temporary}, for timings and compiled "
        "kernels; set XDG_CACHE_HOME to a folder that can be written"
    )


def check_folder_name(flag: str, name: str) -> None:
    if Path(name).name != name or name in ("", ".."):
        raise UsageError(f"{flag} must be a plain folder name, got {name!r}")


def run_folder(output_dir: str, dataset_name: str, run_name: str, seed: int) -> Path:
    return Path(output_dir) / dataset_name / run_name / f"seed_{seed}"
