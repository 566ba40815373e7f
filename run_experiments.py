"""Run the comparison: full attention and each mask type at each expansion step, over seeds, spread over GPUs.

    python run_experiments.py --gpus 8 --expansion_steps '[1, 2, 3]' --seeds '[0, 1, 2]' -- --epochs 50

Each run is a `main.py` of its own; options after `--` go to every one. Finished runs are skipped and unfinished ones
resumed, so that the same command, run again, does what is missing. Ends with the table of results.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import masks
import utils
from pipeline import identity
from report import results
from sweep import gpus, launch, slurm
from sweep.plan import DONE, FAILED, RUNNING, Job, PlannedRun, data_dir_of, last_lines, make_plan
from utils import json_list, number_type

MAIN_SCRIPT = utils.REPOSITORY / "main.py"
LOG_LINES_OF_A_FAILURE = 5
SWEPT = (
    *("--mask_type", "--expansion_step", "--seed", "--dataset", "--output_dir", "--dataset_name", "--run_name"),
    "--dry_run",
)


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = utils.ArgumentParser(
        description="Sweep main.py over mask types, expansion steps and seeds.",
        usage="%(prog)s [options] [-- options of main.py]",
        epilog="Options of main.py go after a lone --, for example: run_experiments.py --gpus 2 -- --epochs 20",
    )
    at_least_1, at_least_0 = (number_type(int, minimum=least, maximum=10_000) for least in (1, 0))
    types = list(masks.MASK_TYPES)
    add = parser.add_argument_group("what is run").add_argument
    add("--mask_types", type=json_list(str, types), default=types, metavar="JSON", help="patterns to run")
    add("--expansion_steps", type=json_list(int), default=[1, 2, 3], metavar="JSON", help="reaches to run")
    add("--seeds", type=json_list(int), default=[0], metavar="JSON", help="seeds to run each with")
    add("--dataset", default="cifar10", help="as in main.py")
    root_help = "root of all run folders"
    add("--output_dir", type=utils.home_path, default="experiments", metavar="DIR", help=root_help)
    add("--dataset_name", metavar="NAME", help="folder of the dataset's runs (default: as in main.py)")
    add("--dry_run", action="store_true", help="list the plan and stop")

    add = parser.add_argument_group("where").add_argument
    add("--launcher", choices=("local", "slurm"), default="local", help="this machine, or a Slurm cluster")
    add("--gpus", type=at_least_0, metavar="N", help="GPUs to use; 0 = the CPU (default: all there are)")
    add("--runs_per_gpu", type=at_least_1, default=1, metavar="N", help="runs that share a GPU, or the CPU")
    gpus_help = "GPUs of one run, one process each; on the CPU: processes"
    add("--gpus_per_run", type=at_least_1, default=1, metavar="K", help=gpus_help)

    add = parser.add_argument_group("when a run fails").add_argument
    add("--retries", type=at_least_0, default=0, metavar="N", help="times that a failed run is started again")
    above_0 = number_type(float, above=0)
    add("--timeout_minutes", type=above_0, metavar="M", help="a run is stopped after so long (default: never)")
    slurm.add_arguments(parser)
    args, unknown = parser.parse_known_args(argv[:split])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; options of main.py go after a lone --")
    args.main_options = argv[split + 1 :]
    for option in args.main_options:
        if option.split("=")[0] in SWEPT:
            parser.error(f"{option} cannot be given after --: the sweep sets it for each run")
    if args.dataset_name is not None:
        utils.check_folder_name("--dataset_name", args.dataset_name)
    slurm.check_arguments(parser, args)
    return args


def print_plan(plan: list[PlannedRun], slots: list[str]) -> None:
    """`slots` as of gpus.make_slots; none = Slurm's."""
    turn = 0
    for run in plan:
        if run.is_finished():
            where = "finished"
        else:
            where = "Slurm" if not slots else f"GPU {slot}" if (slot := slots[turn % len(slots)]) else "CPU"
            turn += 1
        print(f"{where:<9} {run.name:<34} {' '.join(run.arguments)}")
    if turn > len(slots) > 0:
        print(f"The first {len(slots)} start at once; after that each takes the first slot that is free.")


class Progress:
    """One live line on a terminal; elsewhere a line whenever there is something new to say of a run."""

    def __init__(self, num_runs: int, jobs: list[Job]):
        self.num_runs, self.jobs = num_runs, jobs
        self.live, self.told = sys.stdout.isatty(), {}

    def on_change(self) -> None:
        for job in self.jobs:
            if job.note and self.told.get(job.run) != job.note:
                self.told[job.run] = job.note
                self.clear()
                print(f"{job.run.name}: {job.note}", flush=True)

    def on_poll(self) -> None:
        if not self.live:
            return
        num_failed = sum(job.state == FAILED for job in self.jobs)
        num_left = sum(not job.is_over for job in self.jobs)
        text = f"{self.num_runs - num_left - num_failed}/{self.num_runs} done, {num_failed} failed"
        for job in self.jobs:
            if job.state == RUNNING:
                text += f" | {job.run.name}{describe_last_epoch(job.run.folder)}"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{text[:width]}", end="", flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\033[K", end="")


def describe_last_epoch(folder: Path) -> str:
    try:
        row = json.loads((folder / utils.METRICS).read_text().splitlines()[-1])
        return f": epoch {row['epoch']}, {row['eval_accuracy']:.1f}%"
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return ""  # no epoch yet, or no file of ours


def report(plan: list[PlannedRun], jobs: list[Job]) -> None:
    """The table, and how the logs of failed runs end. Raises UserError if there are runs that are not done."""
    # Where a run has not been done, a summary is another's, which main.py refuses or has yet to compare.
    foreign = {job.run.folder for job in jobs if job.state != DONE and (job.run.folder / utils.SUMMARY).exists()}
    folders = [folder for folder in dict.fromkeys(run.folder for run in plan) if folder not in foreign]
    runs = [run for run in map(results.load_run, folders) if run is not None]
    if runs:
        print(f"\n{results.format_table(results.group_by_pattern(runs))}")
    for note in results.differing_settings(runs):
        utils.warn(note)
    failed = [job for job in jobs if job.state == FAILED]
    for job in failed:
        print(f"\n{job.run.name}: {job.note.split(': ')[0]}; {job.run.log} ends:")
        print("\n".join(f"    {line}" for line in last_lines(job.run.log, LOG_LINES_OF_A_FAILURE)))
    left = [job.run.name for job in jobs if not job.is_over]
    if left:
        raise utils.UserError(
            f"no GPU is left that answers; {len(left)} of {len(plan)} runs left: {', '.join(left)}. Fix the GPUs "
            "(nvidia-smi, dmesg), then run the same command again"
        )
    if failed:
        names = ", ".join(job.run.name for job in failed)
        raise utils.UserError(f"{len(failed)} of {len(plan)} runs failed: {names}; their logs say why")


def say_where_earlier_runs_lie(plan: list[PlannedRun], args) -> None:
    usual = args.dataset_name or identity.default_dataset_name(args.dataset, data_dir_of(args))
    elsewhere = [run.folder for run in plan if run.folder.parents[1].name != usual]
    if elsewhere:
        text = f"{len(elsewhere)} of {len(plan)} runs were begun in {elsewhere[0].parents[1]}, and stay there"
        remedy = f"; --dataset_name {identity.IMAGE_FOLDER} puts the others beside them"
        print(text + remedy * (len(elsewhere) < len(plan)), flush=True)


def say_what_is_left(jobs: list[Job], num_runs: int) -> None:
    left = [job.run.name for job in jobs if job.state != DONE]
    print(f"\ninterrupted; {len(left)} of {num_runs} runs left: {', '.join(left)}")
    print("Run the same command again to go on where they stopped.")


def main(argv=None) -> int:
    args = parse_args(argv)
    rules = launch.Rules(MAIN_SCRIPT, args.retries, args.timeout_minutes, args.gpus_per_run)
    on_slurm, slots = args.launcher == "slurm", []
    if not on_slurm:
        try:
            found = gpus.to_use(args.gpus)
        except utils.UsageError:
            if not args.dry_run or args.gpus is None:
                raise
            found = [str(index) for index in range(args.gpus or 0)]  # a plan may be made for another machine
        slots = gpus.make_slots(found, args.runs_per_gpu, args.gpus_per_run)
    plan = make_plan(args, "cuda" if (args.gpus != 0 if on_slurm else slots[0]) else "cpu")
    if args.dry_run:
        print_plan(plan, slots)
        return 0
    say_where_earlier_runs_lie(plan, args)
    jobs = [Job(run) for run in plan if not run.is_finished()]
    at_a_time = min(args.slurm_array_parallelism if on_slurm else len(slots), len(jobs))
    print(f"{len(plan)} runs, {len(plan) - len(jobs)} finished before, {at_a_time} at a time", flush=True)
    progress = Progress(len(plan), jobs)
    if on_slurm:
        stopped = slurm.run_jobs(jobs, rules, args, progress.on_change, progress.on_poll)
    else:
        stopped = launch.Pool(jobs, slots, rules, progress.on_change, progress.on_poll).run() is not None
        if stopped:
            say_what_is_left(jobs, len(plan))
    progress.clear()
    if stopped:
        return 130
    report(plan, jobs)
    return 0


if __name__ == "__main__":
    utils.run_cli(main)
