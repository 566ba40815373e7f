"""What a sweep is to run, and how far each run is. That is read from its folder alone, so that sweeps can share one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

import utils
from masks import MaskSpec
from pipeline import identity
from runtime import locks
from training.run_record import peek

GRAD_ACCUMULATION, COMPILE = "--grad_accumulation", "--compile"
WAITING, RUNNING, ELSEWHERE, DONE, FAILED = "waiting", "running", "elsewhere", "done", "failed"


@dataclass(frozen=True)
class PlannedRun:
    mask: MaskSpec
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # of main.py
    data: dict | None = field(default=None, compare=False)  # of an image folder, as identity.describe has it

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / utils.LOG

    def is_finished(self) -> bool:
        """Whether this very command has finished, on this data. All else is left to main.py, which compares more."""
        if not (self.folder / utils.SUMMARY).exists():
            return False
        if self.data is not None and (not identity.is_known(peek(self.folder, "data")) or self.differs_in_data()):
            return False
        command = peek(self.folder, "provenance").get("command")
        arguments = tuple(command[1:]) if isinstance(command, list) else ()
        added = arguments[len(self.arguments) :]  # after it had run out of memory
        return arguments[: len(self.arguments)] == self.arguments and added[:1] in ((), (GRAD_ACCUMULATION,))

    def differs_in_data(self) -> list[str]:
        """What tells the data of the folder's run from ours; [] where there is no run."""
        found = peek(self.folder, "data")
        return identity.differences(found, self.data) if self.data is not None and found else []

    def is_being_written(self) -> bool:
        """Whether some process holds the folder's lock; where there are none main.py says so."""
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
        """Of each step, by the options after `--`."""
        value = value_of(GRAD_ACCUMULATION, self.arguments)
        return int(value) if value and value.isdecimal() else None

    def micro_batches(self) -> int:
        """Of each step, to begin with: as asked for, else as the run had it when it was left."""
        number = self.micro_batches_asked_for() or peek(self.folder, "settings").get("grad_accumulation")
        return number if isinstance(number, int) else 1


@dataclass(eq=False)
class Job:
    """A run on its way."""

    run: PlannedRun
    state: str = WAITING
    note: str = ""  # what there is to say of the state
    num_retries: int = 0
    micro_batches: int | None = None  # a step, after it ran out of memory

    @property
    def is_over(self) -> bool:
        return self.state in (DONE, FAILED)

    def arguments(self) -> list[str]:
        """Of main.py; with smaller micro-batches than planned once memory ran out."""
        number = self.micro_batches or self.run.micro_batches()
        if number == (self.run.micro_batches_asked_for() or 1):
            return [*self.run.arguments]
        changed = [GRAD_ACCUMULATION, str(number)]
        # Gradients cannot add up in the memory of a CUDA graph.
        if value_of(COMPILE, self.run.arguments) == "reduce-overhead":
            changed += [COMPILE, "default"]
        return [*self.run.arguments, *changed]


def make_plan(args, device: str) -> list[PlannedRun]:
    """`full` once, every other mask type at each step; seeds outermost, so that one whole comparison is there early.

    Raises UsageError if an image folder cannot be read, or a run of other data lies where one is planned.
    """
    data_dir = data_dir_of(args)
    try:
        data = identity.describe(args.dataset, data_dir)
    except utils.UserError as error:
        raise utils.UsageError(str(error)) from error
    masks = dict.fromkeys(MaskSpec(mask_type, step) for mask_type in args.mask_types for step in args.expansion_steps)
    on_device = [] if "--device" in args.main_options else ["--device", device]
    plan = []
    for seed in args.seeds:
        for mask in masks:  # full but once, as it has no step
            swept = {**vars(mask), "seed": seed, "dataset": args.dataset}
            swept |= {"output_dir": args.output_dir, "dataset_name": args.dataset_name}
            given = [(key, str(value)) for key, value in swept.items() if value is not None]
            arguments = [word for key, value in given for word in as_words(key, value)]
            where = (args.output_dir, args.dataset, data_dir, args.dataset_name)
            folder = identity.find_run_folder(*where, mask.run_name, seed, data)
            run = PlannedRun(mask, seed, folder, (*arguments, *on_device, *args.main_options), data)
            identity.refuse_other_data(folder, run.differs_in_data())
            plan.append(run)
    return plan


def data_dir_of(args) -> str:
    return utils.home_path(value_of("--data_dir", args.main_options) or identity.DATA_DIR)


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """What an option is given on a command line, the last time; None where it is not there."""
    value = None
    for position, word in enumerate(arguments):
        name, is_one_word, value_in_it = word.partition("=")
        if name == option:
            value = value_in_it if is_one_word else "".join(arguments[position + 1 : position + 2])
    return value


def as_words(key: str, value: str) -> list[str]:
    """A flag and its value; of a leading dash, as one word, or it would be taken for a flag itself."""
    return [f"--{key}={value}"] if value.startswith("-") else [f"--{key}", value]


def last_lines(log: Path, number: int = 1) -> list[str]:
    """The last lines of a log that say something; not those in which srun repeats an exit code."""
    try:
        lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    lines = [line for line in lines if not (line.startswith("srun: error: ") and "Exited with exit code" in line)]
    return lines[-number:] or ["the log is empty"]
