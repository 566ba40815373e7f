"""The sweep on a Slurm cluster: a job array with one task per run, followed from any shell.

What a task does is in slurm_task.py. The submitted jobs are listed in `<output_dir>/slurm`;
everything else is read from the run folders and from `squeue`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import utils
from runtime import locks
from sweep import launch
from sweep.plan import DONE, FAILED, RUNNING, WAITING, Job, PlannedRun
from sweep.slurm_task import SECONDS_OF_WARNING, RulesOnNodes, Task, half_time, last_line
from utils import number_type

JOBS = "jobs.jsonl"  # the submitted jobs, one per line

SECONDS_BETWEEN_LOOKS = 5.0
# A job that is not in the queue counts as lost after this. Files from other nodes may show up late.
SECONDS_UNTIL_LOST = 30.0

# Defaults of the flags, as parsed.
DEFAULTS = {
    "nodes": 1,
    "slurm_partition": None,
    "slurm_time": 240,
    "slurm_array_parallelism": 16,
    "slurm_cpus_per_task": 4,
    "slurm_setup": [],
    "slurm_options": {},
}


def add_arguments(parser: utils.ArgumentParser) -> None:
    group = parser.add_argument_group("with --launcher slurm")

    def add(name: str, **kwargs) -> None:
        group.add_argument(f"--{name}", default=DEFAULTS[name], **kwargs)

    at_least_1 = number_type(int, minimum=1)
    at_least_5 = number_type(int, minimum=5)
    nodes_help = "machines per run, with --gpus_per_run GPUs on each"
    add("nodes", type=at_least_1, metavar="N", help=nodes_help)
    partition_help = "partition to submit to (default: the cluster's default)"
    add("slurm_partition", metavar="NAME", help=partition_help)
    time_help = "time limit of a job; a run that needs longer saves, is requeued and resumes"
    add("slurm_time", type=at_least_5, metavar="MINUTES", help=time_help)
    add("slurm_array_parallelism", type=at_least_1, metavar="N", help="runs at a time")
    add("slurm_cpus_per_task", type=at_least_1, metavar="N", help="CPU cores per run, on each node")
    setup_help = "shell line to execute before each run; may be repeated"
    add("slurm_setup", action="append", metavar="LINE", help=setup_help)
    options_help = 'further sbatch options, such as {"account": "vision", "mem": "32G"}'
    add("slurm_options", type=json_object, metavar="JSON", help=options_help)
    attach_help = "submit nothing, only follow the jobs submitted earlier for this plan"
    group.add_argument("--attach", action="store_true", help=attach_help)


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        example = '{"account": "vision"}'
        raise argparse.ArgumentTypeError(f"expected a JSON object like {example}, got {text!r}")
    return value


def check_arguments(parser: utils.ArgumentParser, args) -> None:
    """Refuse flags that would have no effect."""
    if args.launcher != "slurm":
        given = [name for name, default in DEFAULTS.items() if getattr(args, name) != default]
        if args.attach:
            given.append("attach")
        if given:
            parser.error(f"--{given[0]} needs --launcher slurm")
    elif taken := args.slurm_options.keys() & {"time", "signal", "requeue"}:
        parser.error(
            f"--slurm_options cannot set {min(taken)!r}, on which saving in time depends; "
            "the time limit is --slurm_time"
        )
    elif args.gpus or args.runs_per_gpu > 1:
        parser.error(
            "--launcher slurm gives each run its own --gpus_per_run GPUs, with "
            "--slurm_array_parallelism runs at a time; leave out --gpus (or set --gpus 0 to run on "
            "the CPU) and --runs_per_gpu"
        )


# --------------------------------------------------------------------------------------------------
# On this machine: submit and follow


def run_jobs(
    jobs: list[Job],
    rules: launch.Rules,
    args,
    on_change: Callable[[], None],
    on_poll: Callable[[], None],
) -> bool:
    """Submit all jobs that are neither finished nor in the queue, then follow all of them.

    Returns True if the user stopped following before the end.
    """
    root = Path(args.output_dir) / "slurm"
    try:
        if not args.attach:
            submit_missing(jobs, rules, args, root)
        follow(jobs, root, on_change, on_poll)
    except KeyboardInterrupt:
        say_how_to_go_on(jobs, root)
        return True
    return False


def submit_missing(jobs: list[Job], rules: launch.Rules, args, root: Path) -> None:
    submitit = import_submitit()
    root.mkdir(parents=True, exist_ok=True)
    with locks.acquire(root / utils.LOCK):
        submitted = read_submitted(root)
        queue = ask_queue()
        missing = [job.run for job in jobs if submitted.get(name_of(job.run, root)) not in queue]
        if missing:
            nodes, cpus = args.nodes, args.slurm_cpus_per_task
            rules = RulesOnNodes(**vars(rules), nodes=nodes, cpus=cpus)
            submit(submitit, missing, rules, args, root)


def say_how_to_go_on(jobs: list[Job], root: Path) -> None:
    ids = {job_id.split("_")[0] for job_id in job_ids(jobs, root).values() if job_id}
    if ids:
        print(f"\nno longer following; the jobs go on by themselves: {', '.join(sorted(ids))}.")
        print("Follow them again with --attach,")
        print(f"or cancel them with: scancel {' '.join(sorted(ids))}")
    else:
        print("\ninterrupted before any job was recorded here; squeue --me shows what is queued")


def import_submitit():
    try:
        import submitit
    except ImportError:
        raise utils.UserError(
            "--launcher slurm needs submitit; pip install -r requirements-slurm.txt"
        ) from None
    return submitit


def submit(submitit, runs: list[PlannedRun], rules: launch.Rules, args, root: Path) -> None:
    """Submit a job array with one task per run, and record the job of each run."""
    python_path = f"export PYTHONPATH={shlex.quote(str(utils.REPOSITORY))}:$PYTHONPATH"
    # submitit would choose SIGUSR2, which kills main.py: Slurm signals all processes of a job.
    warning = f"USR1@{SECONDS_OF_WARNING}"

    executor = submitit.SlurmExecutor(folder=root, python=shlex.quote(sys.executable))
    resources = {"gpus_per_node": rules.gpus_per_run} if args.gpus is None else {}
    if args.slurm_partition is not None:
        resources["partition"] = args.slurm_partition
    executor.update_parameters(
        job_name="local-attention-vits",
        time=args.slurm_time,
        nodes=args.nodes,
        ntasks_per_node=1,
        # A single task looks after the run on all nodes.
        srun_args=["--nodes=1", "--ntasks=1", "--relative=0"],
        array_parallelism=args.slurm_array_parallelism,
        cpus_per_task=args.slurm_cpus_per_task,
        setup=[python_path, requeue_if_warned(args.slurm_time), *args.slurm_setup],
        stderr_to_stdout=True,
        additional_parameters={"signal": warning, "requeue": True, **args.slurm_options},
        **resources,
    )

    tasks = [Task(run, rules, root, args.gpus is None, args.slurm_time) for run in runs]
    try:
        # submitit prints sbatch's error, which is also in ours.
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():
            submitted = [executor.submit(task) for task in tasks]
    except submitit.core.utils.FailedJobError as error:
        raise utils.UserError(f"sbatch refused the jobs: {last_line(str(error))}") from None

    rows = read_rows(root)
    for run, job in zip(runs, submitted, strict=True):
        rows.append({"run": name_of(run, root), "job": job.job_id})
    utils.write_json_lines(root / JOBS, rows)


def requeue_if_warned(minutes: int) -> str:
    """Lines of the batch script, for a warning that comes before the task listens and so ends it.

    srun then exits with 128 + SIGUSR1. As in `Task.has_wasted_its_time`, a job that has taken half
    of its time until then is not requeued, or it could be requeued over and over again.
    """
    return f"""requeue_if_warned() {{
    [ $? -eq {128 + signal.SIGUSR1} ] || return
    if [ $SECONDS -lt {half_time(minutes):.0f} ]; then
        # As squeue writes it: SLURM_JOB_ID alone may stand for a whole array.
        job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
        scontrol requeue "$job${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
    else
        echo "stopped before the run had begun; raise --slurm_time"
    fi
}}
trap requeue_if_warned EXIT"""


def name_of(run: PlannedRun, root: Path) -> str:
    return str(run.folder.relative_to(root.parent))


def read_submitted(root: Path) -> dict[str, str]:
    """The id of each run's latest job, by the name of the run."""
    return {row["run"]: row["job"] for row in read_rows(root)}


def read_rows(root: Path) -> list[dict]:
    rows = utils.read_json_lines(root / JOBS) if (root / JOBS).exists() else []
    for row in rows:
        if not (isinstance(row.get("run"), str) and isinstance(row.get("job"), str)):
            raise utils.UserError(
                f'each line of {root / JOBS} should have a "run" and its "job", found {row}; '
                "move the file away"
            )
    return rows


def job_ids(jobs: list[Job], root: Path) -> dict[Job, str | None]:
    submitted = read_submitted(root)
    return {job: submitted.get(name_of(job.run, root)) for job in jobs}


def ask_queue() -> dict[str, tuple[str, str]]:
    """(state, node or reason) of each unfinished job of this user, by id.

    Raises UserError if Slurm doesn't answer.
    """
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%R"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise utils.UserError(
            "--launcher slurm needs Slurm's commands, but there is no squeue here"
        ) from None
    except subprocess.TimeoutExpired:
        raise utils.UserError("squeue didn't answer within a minute; is slurmctld up?") from None
    if done.returncode != 0:
        raise utils.UserError(f"squeue failed: {last_line(done.stderr)}")

    rows = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {job_id: (state, where) for job_id, state, where in rows}


def follow(
    jobs: list[Job], root: Path, on_change: Callable[[], None], on_poll: Callable[[], None]
) -> None:
    """Keep the state of the jobs up to date until all are over."""
    ids = job_ids(jobs, root)
    seen_at = dict.fromkeys(jobs, time.monotonic())
    unknown = [job.run.name for job in jobs if ids[job] is None]
    if unknown:
        raise utils.UserError(
            f"nothing has been submitted for {len(unknown)} of the runs ({unknown[0]}, ...); "
            "run without --attach"
        )

    while not all(job.is_over for job in jobs):
        try:
            queue = ask_queue()
        except utils.UserError as error:  # slurmctld may just be restarting
            utils.warn(f"{error}; trying again")
        else:
            for job in jobs:
                if job.is_over:
                    continue
                if ids[job] in queue:
                    seen_at[job] = time.monotonic()
                seconds_unseen = time.monotonic() - seen_at[job]
                job.state, job.note = look(job, ids[job], queue, root, seconds_unseen)

        on_change()
        on_poll()
        if not all(job.is_over for job in jobs):
            time.sleep(SECONDS_BETWEEN_LOOKS)


def look(job: Job, job_id: str, queue: dict, root: Path, seconds_unseen: float) -> tuple[str, str]:
    """(state, note) of a submitted job, from its run folder, the queue, and its task's outcome."""
    if job.run.is_finished():
        return DONE, "finished"

    state, where = queue.get(job_id, (None, ""))
    if state == "PENDING" and "held" in where.lower():
        remedy = f"scontrol release {job_id} lets it go on"
        return WAITING, f"is held in Slurm as {job_id} {where}; {remedy}"
    if state == "PENDING":
        return WAITING, f"queued in Slurm as {job_id}"
    if state is not None:
        return RUNNING, f"started on {where} as {job_id}, log in {job.run.log}"

    outcome = root / f"{job_id}.json"
    if outcome.exists():
        return FAILED, utils.read_json(outcome)["note"]
    if seconds_unseen < SECONDS_UNTIL_LOST:
        return job.state, job.note

    log = root / f"{job_id}_0_log.out"
    text = f"job {job_id} left Slurm's queue unfinished (canceled?); {log} may say why"
    return FAILED, f"FAILED: {text}"
