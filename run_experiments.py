"""Run the comparison: full attention and each mask type at each expansion step, over several seeds.

    python run_experiments.py --gpus 8 --expansion_steps '[1, 2, 3]' --seeds '[0, 1]' -- --epochs 50

The runs are spread over the GPUs. Each one is its own `main.py` process, which gets the options
after `--`. Finished runs are skipped and unfinished ones resumed, so running the same command again
does only what is missing. The sweep ends with the table of results.
"""

from __future__ import annotations

import argparse
import json
import sys

import masks
import utils
from patterns.spec import parse_layers
from pipeline import identity
from report import differences, logs, results, table
from sweep import gpus, launch, slurm
from sweep.plan import (
    DONE,
    FAILED,
    Job,
    PlannedRun,
    choose_masks,
    data_dir_of,
    last_lines,
    make_plan,
)
from sweep.status import Status
from training.settings import MASK_FLAGS
from utils import json_list, number_type

MAIN_SCRIPT = utils.REPOSITORY / "main.py"
LOG_LINES_PER_FAILURE = 5

# Options of main.py that the sweep sets for each run.
SWEPT = (
    *(f"--{name}" for name in MASK_FLAGS),
    "--num_registers",
    "--seed",
    "--dataset",
    "--output_dir",
    "--dataset_name",
    "--run_name",
    "--dry_run",
)


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv[:split])
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; options of main.py go after a lone --"
        )

    args.main_options = argv[split + 1 :]
    for option in args.main_options:
        if option.split("=")[0] in SWEPT:
            parser.error(f"{option} is not allowed after --: the sweep sets it for each run")
    if args.dataset_name is not None:
        utils.check_folder_name("--dataset_name", args.dataset_name)
    slurm.check_arguments(parser, args)
    return args


def layer_lists(text: str) -> list[tuple[int, ...]]:
    """An argparse type: a JSON list of lists of layers -> the same, without repetitions."""
    try:
        choices = json.loads(text)
        if not choices or not all(isinstance(layers, list) for layers in choices):
            raise ValueError
        return list(dict.fromkeys(map(parse_layers, choices)))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"expected a JSON list of lists like '[[], [3, 7, 11]]', got {text!r}"
        ) from None


def make_parser() -> utils.ArgumentParser:
    parser = utils.ArgumentParser(
        description="Sweep main.py over mask types, expansion steps and seeds.",
        usage="%(prog)s [options] [-- options of main.py]",
        epilog="Options of main.py go after a lone --: run_experiments.py --gpus 2 -- --epochs 20",
    )
    at_least_0 = number_type(int, minimum=0, maximum=10_000)
    at_least_1 = number_type(int, minimum=1, maximum=10_000)
    above_0 = number_type(float, above=0)
    types = json_list(str, masks.MASK_TYPES)
    edges = json_list(str, masks.EDGES)

    def add(name: str, help: str, **kwargs) -> None:
        group.add_argument(name, help=help, **kwargs)

    group = parser.add_argument_group("what to run")
    studied = list(masks.STUDIED)
    add("--mask_types", "patterns to run", type=types, default=studied, metavar="JSON")
    steps_help = "expansion steps of each pattern that has one"
    add("--expansion_steps", steps_help, type=json_list(int), default=[1, 2, 3], metavar="JSON")
    dilations_help = "distances between neighbors, for each pattern that can be dilated"
    add("--dilations", dilations_help, type=json_list(int), default=[1], metavar="JSON")
    edges_help = "what happens at the border, for each pattern that meets it"
    add("--edges", edges_help, type=edges, default=["truncate"], metavar="JSON")
    draws_help = "which random masks are drawn"
    add("--mask_seeds", draws_help, type=json_list(int), default=[0], metavar="JSON")
    add("--mask_files", "masks in files, as well", type=json_list(str), default=[], metavar="JSON")
    layers_help = "layers of full attention, a list for each choice: [[], [3, 7, 11]]"
    add("--global_layers", layers_help, type=layer_lists, default=[()], metavar="JSON")
    registers_help = "numbers of registers"
    add("--num_registers", registers_help, type=json_list(int), default=[0], metavar="JSON")
    same_help = "also train masks that are one and the same on the grid under another name"
    add("--same_masks", same_help, action="store_true")
    add("--seeds", "seeds of each pattern", type=json_list(int), default=[0], metavar="JSON")
    add("--dataset", "as in main.py", default="cifar10")
    output_help = "root of all run folders"
    add("--output_dir", output_help, type=utils.home_path, default="experiments", metavar="DIR")
    add("--dataset_name", "folder of the dataset's runs (default: as in main.py)", metavar="NAME")
    add("--dry_run", "print the plan and stop", action="store_true")

    group = parser.add_argument_group("where to run")
    launcher_help = "this machine, or a Slurm cluster"
    add("--launcher", launcher_help, choices=("local", "slurm"), default="local")
    add("--gpus", "GPUs to use; 0 is the CPU (default: all)", type=at_least_0, metavar="N")
    sharing_help = "runs that share a GPU, or the CPU"
    add("--runs_per_gpu", sharing_help, type=at_least_1, default=1, metavar="N")
    parallel_help = "GPUs per run, with one process each; on the CPU, processes per run"
    add("--gpus_per_run", parallel_help, type=at_least_1, default=1, metavar="K")

    group = parser.add_argument_group("when a run fails")
    add("--retries", "restarts of a failed run", type=at_least_0, default=0, metavar="N")
    timeout_help = "stop a run after this long (default: never)"
    add("--timeout_minutes", timeout_help, type=above_0, metavar="M")

    slurm.add_arguments(parser)
    return parser


def print_plan(plan: list[PlannedRun], slots: list[str]) -> None:
    """Print each run with its slot, as returned by gpus.make_slots; without slots, Slurm's."""
    num_left = 0
    for run in plan:
        if run.is_finished():
            where = "finished"
        else:
            where = place_of(num_left, slots)
            num_left += 1
        print(f"{where:<9} {run.name:<34} {' '.join(run.arguments)}")

    if num_left > len(slots) > 0:
        print(f"The first {len(slots)} start at once, the others as soon as a slot is free.")


def place_of(index: int, slots: list[str]) -> str:
    """Where the unfinished run number `index` is going to run, if all take equally long."""
    if not slots:
        return "Slurm"
    slot = slots[index % len(slots)]
    return f"GPU {slot}" if slot else "CPU"


def report(plan: list[PlannedRun], jobs: list[Job]) -> None:
    """Print the table of results, and the end of the log of each failed run.

    Raises UserError if not all runs are done.
    """
    # If a run isn't done, a summary in its folder is from another run, which main.py refuses.
    not_done = [job.run.folder for job in jobs if job.state != DONE]
    foreign = {folder for folder in not_done if (folder / utils.SUMMARY).exists()}
    folders = dict.fromkeys(run.folder for run in plan if run.folder not in foreign)
    runs = [run for run in map(logs.load_run, folders) if run is not None]
    if runs:
        print(f"\n{table.rows_as_table(results.group_by_pattern(runs))}")
    for note in differences.differing_settings(runs):
        utils.warn(note)

    failed = [job for job in jobs if job.state == FAILED]
    for job in failed:
        print(f"\n{job.run.name}: {job.note.split(': ')[0]}; {job.run.log} ends with:")
        for line in last_lines(job.run.log, LOG_LINES_PER_FAILURE):
            print(f"    {line}")

    left = [job.run.name for job in jobs if not job.is_over]
    if left:
        raise utils.UserError(
            f"no GPU is left that responds; {len(left)} of {len(plan)} runs left: "
            f"{', '.join(left)}. Fix the GPUs (nvidia-smi, dmesg), then run the same command again"
        )
    if failed:
        names = ", ".join(job.run.name for job in failed)
        raise utils.UserError(
            f"{len(failed)} of {len(plan)} runs failed: {names}; their logs say why"
        )


def say_which_masks_are_the_same(same_as: dict[masks.MaskSpec, masks.MaskSpec]) -> None:
    for mask, trained in same_as.items():
        print(
            f"{mask.label} is the same mask as {trained.label} on this grid: its result is that of "
            f"{trained.run_name} (--same_masks trains both)",
            flush=True,
        )


def say_where_earlier_runs_are(plan: list[PlannedRun], args) -> None:
    """Say so if runs stay in the folder that all image folders once shared."""
    usual = args.dataset_name or identity.default_dataset_name(args.dataset, data_dir_of(args))
    elsewhere = [run.folder for run in plan if run.folder.parents[1].name != usual]
    if not elsewhere:
        return

    folder = elsewhere[0].parents[1]
    text = f"{len(elsewhere)} of {len(plan)} runs were started in {folder} and stay there"
    if len(elsewhere) < len(plan):
        text += f"; --dataset_name {identity.IMAGE_FOLDER} puts the others next to them"
    print(text, flush=True)


def say_what_is_left(jobs: list[Job], num_runs: int) -> None:
    left = [job.run.name for job in jobs if job.state != DONE]
    print(f"\ninterrupted; {len(left)} of {num_runs} runs left: {', '.join(left)}")
    print("Run the same command again to go on where they stopped.")


def find_slots(args) -> list[str]:
    """The slots on this machine. For a dry run, the GPUs may be those of another machine."""
    try:
        found = gpus.to_use(args.gpus)
    except utils.UsageError:
        if not args.dry_run or args.gpus is None:
            raise
        found = [str(index) for index in range(args.gpus)]
    return gpus.make_slots(found, args.runs_per_gpu, args.gpus_per_run)


def main(argv=None) -> int:
    args = parse_args(argv)
    on_slurm = args.launcher == "slurm"
    slots = [] if on_slurm else find_slots(args)
    on_gpu = args.gpus != 0 if on_slurm else slots[0] != ""

    chosen, same_as = choose_masks(args)
    plan = make_plan(args, "cuda" if on_gpu else "cpu", chosen)
    say_which_masks_are_the_same(same_as)
    if args.dry_run:
        print_plan(plan, slots)
        return 0

    say_where_earlier_runs_are(plan, args)
    jobs = [Job(run) for run in plan if not run.is_finished()]
    num_finished = len(plan) - len(jobs)
    num_at_a_time = min(args.slurm_array_parallelism if on_slurm else len(slots), len(jobs))
    counts = f"{len(plan)} runs, {num_finished} finished before, {num_at_a_time} at a time"
    print(counts, flush=True)

    rules = launch.Rules(MAIN_SCRIPT, args.retries, args.timeout_minutes, args.gpus_per_run)
    status = Status(plan, jobs, None if on_slurm else len(slots))
    if on_slurm:
        stopped = slurm.run_jobs(jobs, rules, args, status.on_change, status.on_poll)
    else:
        pool = launch.Pool(jobs, slots, rules, status.on_change, status.on_poll)
        stopped = pool.run() is not None
        if stopped:
            say_what_is_left(jobs, len(plan))

    status.clear()
    if stopped:
        return 130
    report(plan, jobs)
    return 0


if __name__ == "__main__":
    utils.run_cli(main)
