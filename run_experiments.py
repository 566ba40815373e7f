"""Run the comparison: full attention and each mask type at each expansion step, over seeds, spread over GPUs.

    python run_experiments.py --gpus 8 --expansion_steps '[1, 2, 3]' --seeds '[0, 1, 2]' -- --epochs 50

Each run is a `main.py` of its own; options after `--` go to every one. Finished runs are skipped and unfinished ones
resumed, so that the same command, run again, does what is missing. Ends with the table of results.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import launch
import masks
import results
import utils
from utils import json_list, number_type

MAIN_SCRIPT = utils.REPOSITORY / "main.py"
SWEPT = ("--mask_type", "--expansion_step", "--seed", "--dataset", "--output_dir", "--run_name", "--dry_run")


@dataclass(frozen=True)
class PlannedRun:
    mask_type: str
    expansion_step: int | None  # None for full
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # of main.py

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name} seed {self.seed}"


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = utils.ArgumentParser(
        description="Sweep main.py over mask types, expansion steps and seeds.",
        usage="%(prog)s [options] [-- options of main.py]",
        epilog="Options of main.py go after a lone --, for example: run_experiments.py --gpus 2 -- --epochs 20",
    )
    at_least_1 = number_type(int, minimum=1)
    types = list(masks.MASK_TYPES)
    parser.add_argument(
        "--gpus",
        type=number_type(int, minimum=0),
        metavar="N",
        help="GPUs to use; 0 = the CPU (default: all there are)",
    )
    parser.add_argument(
        "--runs_per_gpu", type=at_least_1, default=1, metavar="N", help="runs that share a GPU, or the CPU"
    )
    parser.add_argument(
        "--mask_types", type=json_list(str, types), default=types, metavar="JSON", help="patterns to run"
    )
    parser.add_argument(
        "--expansion_steps", type=json_list(int), default=[1, 2, 3], metavar="JSON", help="reaches to run"
    )
    parser.add_argument("--seeds", type=json_list(int), default=[0], metavar="JSON", help="seeds to run each with")
    parser.add_argument("--dataset", default="cifar10", help="as in main.py")
    parser.add_argument("--output_dir", default="experiments", metavar="DIR", help="root of all run folders")
    parser.add_argument("--dry_run", action="store_true", help="list the plan and stop")
    args, unknown = parser.parse_known_args(argv[:split])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; options of main.py go after a lone --")
    args.main_options = argv[split + 1 :]
    for option in args.main_options:
        if option.split("=")[0] in SWEPT:
            parser.error(f"{option} cannot be given after --: the sweep sets it for each run")
    return args


def make_plan(args, on_gpu: bool) -> list[PlannedRun]:
    """`full` once, every other mask type at each step; seeds outermost, so that one whole comparison is there early."""
    patterns = [
        (mask_type, step)
        for mask_type in args.mask_types
        for step in ([None] if mask_type == "full" else args.expansion_steps)
    ]
    device = [] if "--device" in args.main_options else ["--device", "cuda" if on_gpu else "cpu"]
    plan = []
    for seed in args.seeds:
        for mask_type, step in patterns:
            swept = {"mask_type": mask_type, "expansion_step": step, "seed": seed, "dataset": args.dataset}
            swept["output_dir"] = args.output_dir
            arguments = [text for key, value in swept.items() if value is not None for text in (f"--{key}", str(value))]
            name = utils.default_run_name(mask_type, step)
            folder = utils.run_folder(args.output_dir, args.dataset, name, seed)
            plan.append(PlannedRun(mask_type, step, seed, folder, (*arguments, *device, *args.main_options)))
    return plan


def is_finished(run: PlannedRun) -> bool:
    """Whether this very command has finished. Another one's result is left to main.py, which compares settings."""
    if not (run.folder / utils.SUMMARY).exists():
        return False
    try:
        command = utils.read_json(run.folder / utils.CONFIG)["provenance"]["command"]
    except (utils.UserError, KeyError, TypeError):
        return False
    return command[1:] == list(run.arguments)


def print_plan(plan: list[PlannedRun], slots: list[str]) -> None:
    turn = 0
    for run in plan:
        if is_finished(run):
            where = "finished"
        else:
            gpu = slots[turn % len(slots)]
            where, turn = f"GPU {gpu}" if gpu else "CPU", turn + 1
        print(f"{where:<9} {run.name:<34} {' '.join(run.arguments)}")
    if turn > len(slots):
        print(f"The first {len(slots)} start at once; after that each takes the first slot that is free.")


class Progress:
    """One live line on a terminal; elsewhere a line whenever a run starts or ends."""

    def __init__(self, plan: list[PlannedRun], jobs: dict[PlannedRun, launch.Job]):
        self.plan, self.jobs = plan, jobs
        self.live, self.told = sys.stdout.isatty(), {}

    def on_change(self) -> None:
        for run, job in self.jobs.items():
            status = self._status(job)
            if status is not None and self.told.get(run) != status:
                self.told[run] = status
                self._clear()
                print(f"{run.name}: {status}", flush=True)

    def _status(self, job: launch.Job) -> str | None:
        if job.gpu is None:
            return None
        if job.exit_code is None:
            return f"started on {'GPU ' + job.gpu if job.gpu else 'the CPU'}, log in {job.log}"
        if job.exit_code == 0:
            return "finished"
        return f"FAILED with exit code {job.exit_code}: {last_line(job.log)}"

    def on_poll(self) -> None:
        if not self.live:
            return
        running = [run for run, job in self.jobs.items() if job.gpu is not None and job.exit_code is None]
        num_failed = sum(job.failed for job in self.jobs.values())
        num_left = sum(job.exit_code is None for job in self.jobs.values())
        text = f"{len(self.plan) - num_left - num_failed}/{len(self.plan)} done, {num_failed} failed"
        for run in running:
            text += f" | {run.name}{describe_last_epoch(run.folder)}"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{text[:width]}", end="", flush=True)

    def _clear(self) -> None:
        if self.live:
            print("\r\033[K", end="")


def describe_last_epoch(folder: Path) -> str:
    try:
        row = json.loads((folder / utils.METRICS).read_text().splitlines()[-1])
        return f": epoch {row['epoch']}, {row['eval_accuracy']:.1f}%"
    except (OSError, ValueError, KeyError, IndexError):
        return ""  # no epoch yet


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "the log is empty"


def report(plan: list[PlannedRun]) -> None:
    runs = [run for run in map(results.load_run, dict.fromkeys(run.folder for run in plan)) if run is not None]
    if runs:
        print(f"\n{results.format_table(results.group_by_pattern(runs))}")
    for note in results.differing_settings(runs):
        utils.warn(note)


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        gpus = launch.gpu_ids(args.gpus)
    except utils.UsageError:
        if not args.dry_run:
            raise
        gpus = [str(index) for index in range(args.gpus)]  # a plan may be made for another machine
    slots = launch.make_slots(gpus, args.runs_per_gpu)
    plan = make_plan(args, on_gpu=bool(gpus))
    if args.dry_run:
        print_plan(plan, slots)
        return 0
    jobs = {
        run: launch.Job(run.name, [sys.executable, str(MAIN_SCRIPT), *run.arguments], run.folder / utils.LOG)
        for run in plan
        if not is_finished(run)
    }
    print(
        f"{len(plan)} runs, {len(plan) - len(jobs)} finished before, {min(len(slots), len(jobs))} at a time", flush=True
    )
    progress = Progress(plan, jobs)
    try:
        launch.run_jobs(list(jobs.values()), slots, progress.on_change, progress.on_poll)
    except KeyboardInterrupt:
        left = [run.name for run, job in jobs.items() if job.exit_code is None]
        print(f"\ninterrupted; {len(left)} of {len(plan)} runs left: {', '.join(left)}")
        print("Run the same command again to go on where they stopped.")
        return 130
    report(plan)
    failed = [run.name for run, job in jobs.items() if job.failed]
    if failed:
        raise utils.UserError(f"{len(failed)} of {len(plan)} runs failed: {', '.join(failed)}; their logs say why")
    return 0


if __name__ == "__main__":
    utils.run_cli(main)
