"""The runs of a sweep, and how far each one is.

Progress is read from the run folders alone, so several sweeps can share them.
"""

from __future__ import annotations

import itertools
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

import utils
from masks import MAX_PATCHES, MaskSpec
from pipeline import identity, sizes
from pipeline.layout import Layout
from runtime import locks
from training.run_record import peek
from training.settings import DEFAULTS, default_run_name, fraction

GRAD_ACCUMULATION = "--grad_accumulation"
COMPILE = "--compile"

# Field of a mask -> the flag that lists its values. The last one varies fastest.
SWEPT_BY_MASK = {
    "dilation": "dilations",
    "edge": "edges",
    "mask_seed": "mask_seeds",
    "global_layers": "global_layers",
    "expansion_step": "expansion_steps",
}

# States of a job.
WAITING = "waiting"
RUNNING = "running"
ELSEWHERE = "elsewhere"  # another process is writing to the run folder
DONE = "done"
FAILED = "failed"


@dataclass(frozen=True)
class PlannedRun:
    mask: MaskSpec
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # for main.py
    data: dict | None = field(default=None, compare=False)  # as returned by identity.describe

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / utils.LOG

    def is_finished(self) -> bool:
        """Whether this very command has finished, on this data.

        Anything beyond that is left to main.py, which compares more.
        """
        if not (self.folder / utils.SUMMARY).exists():
            return False

        if self.data is not None:
            is_known = identity.is_known(peek(self.folder, "data"))
            if not is_known or self.differs_in_data():
                return False

        command = peek(self.folder, "provenance").get("command")
        arguments = tuple(command[1:]) if isinstance(command, list) else ()
        planned, added = arguments[: len(self.arguments)], arguments[len(self.arguments) :]
        # The sweep itself adds options after a run has run out of memory.
        return planned == self.arguments and added[:1] in ((), (GRAD_ACCUMULATION,))

    def differs_in_data(self) -> list[str]:
        """How the data of the run in the folder differs from ours; [] if there is no run."""
        found = peek(self.folder, "data")
        if self.data is None or not found:
            return []
        return identity.differences(found, self.data)

    def is_being_written(self) -> bool:
        """Whether a process holds the folder's lock. False without locks, which main.py reports."""
        if not (self.folder / utils.LOCK).exists():
            return False
        try:
            with locks.acquire(self.folder / utils.LOCK, timeout=0):
                return False
        except locks.NoLocksError:
            return False
        except Timeout:
            return True

    def micro_batches_asked_for(self) -> int | None:
        """Micro-batches per step, if the options after `--` set it."""
        value = value_of(GRAD_ACCUMULATION, self.arguments)
        return int(value) if value and value.isdecimal() else None

    def micro_batches(self) -> int:
        """Micro-batches per step to start with: as asked for, else as in the unfinished run."""
        found = peek(self.folder, "settings").get("grad_accumulation")
        number = self.micro_batches_asked_for() or found
        return number if isinstance(number, int) else 1


@dataclass(eq=False)
class Job:
    """A planned run and its progress."""

    run: PlannedRun
    state: str = WAITING
    note: str = ""  # what to tell the user about the state
    num_retries: int = 0
    micro_batches: int | None = None  # per step, once the run has run out of memory

    @property
    def is_over(self) -> bool:
        return self.state in (DONE, FAILED)

    def arguments(self) -> list[str]:
        """Arguments for main.py, with smaller micro-batches once the run has run out of memory."""
        number = self.micro_batches or self.run.micro_batches()
        if number == (self.run.micro_batches_asked_for() or 1):
            return [*self.run.arguments]

        changed = [GRAD_ACCUMULATION, str(number)]
        # Gradients can't accumulate in the memory of a CUDA graph.
        if value_of(COMPILE, self.run.arguments) == "reduce-overhead":
            changed += [COMPILE, "default"]
        return [*self.run.arguments, *changed]


def choose_masks(args) -> tuple[list[MaskSpec], dict[MaskSpec, MaskSpec]]:
    """Every mask type with everything that it can be combined with -> (masks, same_as).

    Of masks that are one and the same on the grid of patches, `full` is trained if it is among
    them, as all others are compared with it, else the first. `same_as` maps the others to that one;
    with --same_masks it is empty.
    """
    with utils.usage_errors():
        asked_for = asked_masks(args)
        grid = grid_of(args)
        if args.same_masks or grid is None:
            return asked_for, {}

        chosen, same_as = {}, {}
        for mask in sorted(asked_for, key=lambda mask: mask != MaskSpec()):
            first = chosen.setdefault(mask.identity(*grid), mask)
            if first != mask:
                same_as[mask] = first
    return list(chosen.values()), same_as


def asked_masks(args) -> list[MaskSpec]:
    """Each mask once: a type without a step, such as `full`, has one at all of the steps.

    Raises ValueError for a value that none of the mask types makes use of.
    """
    lists = {name: getattr(args, plural) for name, plural in SWEPT_BY_MASK.items()}
    masks = {}
    for mask_type in args.mask_types:
        for values in itertools.product(*lists.values()):
            masks[MaskSpec(mask_type, **dict(zip(lists, values, strict=True)))] = None
    for file, layers in itertools.product(args.mask_files, args.global_layers):
        masks[MaskSpec("file", mask_file=file, global_layers=layers).with_hash()] = None

    for name, values in lists.items():
        used = {getattr(mask, name) for mask in masks}
        unused = [value for value in values if value not in used]
        if name != "expansion_step" and unused:
            flag = SWEPT_BY_MASK[name]
            raise ValueError(f"--{flag} {unused[0]} has no effect on any of the mask types")
    return list(masks)


def grid_of(args) -> tuple[int, int] | None:
    """Rows and columns of patches; None if main.py is going to refuse the sizes."""
    given = {}
    for flag in ("img_size", "patch_size"):
        value = value_of(f"--{flag}", args.main_options)
        given[flag] = str(DEFAULTS[flag]) if value is None else value
    try:
        sides = sizes.sides_of(sizes.parse(given["img_size"]))
        patch_size = int(given["patch_size"])
    except (ArgumentTypeError, ValueError):
        return None
    if patch_size < 1 or min(sides) < patch_size:
        return None

    height, width = (side // patch_size for side in sides)
    return (height, width) if height * width <= MAX_PATCHES else None


def make_plan(args, device: str, masks: list[MaskSpec]) -> list[PlannedRun]:
    """One run for each mask, number of registers and seed.

    The seeds are the outer loop, so that one complete comparison is there early. Raises UsageError
    if an image folder can't be read, or a planned run's folder has a run with other data.
    """
    data_dir = data_dir_of(args)
    try:
        data = identity.describe(args.dataset, data_dir, layout_of(args))
    except utils.UserError as error:
        raise utils.UsageError(str(error)) from error

    on_device = [] if "--device" in args.main_options else ["--device", device]
    plan = []
    for seed in args.seeds:
        for num_registers, mask in itertools.product(args.num_registers, masks):
            settings = {
                **mask.to_flags(),
                "num_registers": num_registers or None,
                "seed": seed,
                "dataset": args.dataset,
                "output_dir": args.output_dir,
                "dataset_name": args.dataset_name,
            }
            arguments = []
            for key, value in settings.items():
                if value is not None:
                    arguments += as_words(key, str(value))

            where = (args.output_dir, args.dataset, data_dir, args.dataset_name)
            run_name = default_run_name(mask, num_registers)
            folder = identity.find_run_folder(*where, run_name, seed, data)
            run = PlannedRun(mask, seed, folder, (*arguments, *on_device, *args.main_options), data)
            identity.refuse_other(folder, "data", run.differs_in_data())
            plan.append(run)
    return plan


def data_dir_of(args) -> str:
    return utils.home_path(value_of("--data_dir", args.main_options) or identity.DATA_DIR)


def layout_of(args) -> Layout:
    """How main.py will read an image folder."""
    try:
        share = fraction(value_of("--split_folder", args.main_options) or "0")
    except ArgumentTypeError as error:
        raise utils.UsageError(f"--split_folder: {error}") from error
    labels = value_of("--labels", args.main_options)
    return Layout(share, labels and utils.home_path(labels))


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The last value of an option on a command line, or None if the option is not there."""
    value = None
    for position, word in enumerate(arguments):
        name, equals_sign, value_in_word = word.partition("=")
        if name == option:
            next_word = "".join(arguments[position + 1 : position + 2])
            value = value_in_word if equals_sign else next_word
    return value


def as_words(key: str, value: str) -> list[str]:
    """A flag and its value, joined if the value starts with a dash and would pass for a flag."""
    if value.startswith("-"):
        return [f"--{key}={value}"]
    return [f"--{key}", value]


def last_lines(log: Path, number: int = 1) -> list[str]:
    """The last meaningful lines of a log, without those in which srun repeats an exit code."""

    def is_meaningful(line: str) -> bool:
        repeats_code = line.startswith("srun: error: ") and "Exited with exit code" in line
        return bool(line) and not repeats_code

    try:
        lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines()]
    except OSError:
        lines = []
    lines = [line for line in lines if is_meaningful(line)]
    return lines[-number:] or ["the log is empty"]
