"""The sweep on a Slurm cluster: a job array with a task a run, followed from here or from any other shell.

A task is `launch.Pool` with a single job, so that retries, time-outs and running out of memory are as on one machine.
When Slurm warns it (SIGUSR1: preemption, the time limit), the run saves and the task puts itself back in the queue.
What was submitted is written to `<output_dir>/slurm`; the rest is read from the run folders and from `squeue`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import utils
from runtime import locks
from runtime.stopping import PARENT
from sweep import gpus, launch
from sweep.plan import DONE, FAILED, RUNNING, WAITING, Job, PlannedRun
from utils import number_type

SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_UNTIL_LOST = 30.0  # without a trace in the queue; files of other nodes may take a while to be seen
SECONDS_OF_WARNING = 180  # before the time limit; more than launch.GRACE_SECONDS, that it may queue itself again
JOBS = "jobs.jsonl"  # what was submitted: one line per job
SECONDS_TO_FOLLOW = 60  # of the other nodes' processes of a run, after the first have ended
ARGUMENTS = {  # flag of run_experiments.py: its default, as argparse has it
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
        group.add_argument(f"--{name}", default=ARGUMENTS[name], **kwargs)

    at_least_1 = number_type(int, minimum=1)
    add("nodes", type=at_least_1, metavar="N", help="machines of a run, with --gpus_per_run GPUs of each")
    add("slurm_partition", metavar="NAME", help="where to submit to (default: the cluster's default)")
    time_help = "limit of a job; a run that needs longer is saved, queued again and resumed"
    add("slurm_time", type=number_type(int, minimum=5), metavar="MINUTES", help=time_help)
    add("slurm_array_parallelism", type=at_least_1, metavar="N", help="runs at a time")
    add("slurm_cpus_per_task", type=at_least_1, metavar="N", help="CPU cores of a run, on each node")
    add("slurm_setup", action="append", metavar="LINE", help="shell line to run before each run; may be repeated")
    options_help = 'further options of sbatch, as in {"account": "vision", "mem": "32G"}'
    add("slurm_options", type=json_object, metavar="JSON", help=options_help)
    attach_help = "submit nothing, follow what has been submitted for this plan"
    group.add_argument("--attach", action="store_true", help=attach_help)


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object like {{"account": "vision"}}, got {text!r}')
    return value


def check_arguments(parser: utils.ArgumentParser, args) -> None:
    """No flag is given that would be without effect."""
    if args.launcher != "slurm":
        idle = [f"--{name}" for name, default in ARGUMENTS.items() if getattr(args, name) != default]
        if idle or args.attach:
            parser.error(f"{(idle or ['--attach'])[0]} needs --launcher slurm")
    elif args.gpus or args.runs_per_gpu > 1:
        parser.error(
            "--launcher slurm gives each run --gpus_per_run GPUs of its own, --slurm_array_parallelism runs at a time; "
            "leave out --gpus (or give --gpus 0, for the CPU) and --runs_per_gpu"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Here: submit and follow


def run_jobs(
    jobs: list[Job], rules: launch.Rules, args, on_change: Callable[[], None], on_poll: Callable[[], None]
) -> bool:
    """Submit what is neither finished nor submitted, then follow all. True if that was left before the end."""
    root = Path(args.output_dir) / "slurm"
    try:
        if not args.attach:
            submitit = import_submitit()
            root.mkdir(parents=True, exist_ok=True)
            with locks.acquire(root / utils.LOCK):
                submitted, queue = read_submitted(root), ask_queue()
                missing = [job for job in jobs if submitted.get(name_of(job.run, root)) not in queue]
                if missing:
                    rules = RulesOnNodes(**vars(rules), nodes=args.nodes, cpus=args.slurm_cpus_per_task)
                    submit(submitit, [job.run for job in missing], rules, args, root)
        follow(jobs, root, on_change, on_poll)
    except KeyboardInterrupt:
        ids = {job_id.split("_")[0] for job_id in job_ids(jobs, root).values() if job_id}
        if ids:
            print(f"\nleft; the jobs go on without this: {', '.join(sorted(ids))}. Follow them again with --attach,")
            print(f"cancel them with: scancel {' '.join(sorted(ids))}")
        else:
            print("\nleft before anything was submitted that is known here; squeue --me shows what there is")
        return True
    return False


def import_submitit():
    try:
        import submitit
    except ImportError:
        raise utils.UserError("--launcher slurm needs submitit; pip install -r requirements-slurm.txt") from None
    return submitit


def submit(submitit, runs: list[PlannedRun], rules: launch.Rules, args, root: Path) -> None:
    """Submit a job array, one task per run, and write down which is which."""
    # A warning that comes before the task listens must not end it: what a signal has ended is not queued again.
    deaf = 'sh -c \'trap "" USR1; exec "$0" "$@"\''
    executor = submitit.SlurmExecutor(folder=root, python=f"{deaf} {shlex.quote(sys.executable)}")
    resources = {"gpus_per_node": rules.gpus_per_run} if args.gpus is None else {}
    if args.slurm_partition is not None:
        resources["partition"] = args.slurm_partition
    executor.update_parameters(
        job_name="local-attention-vits",
        time=args.slurm_time,
        nodes=args.nodes,
        ntasks_per_node=1,
        srun_args=["--nodes=1", "--ntasks=1", "--relative=0"],  # one task looks after the run, on all nodes
        array_parallelism=args.slurm_array_parallelism,
        cpus_per_task=args.slurm_cpus_per_task,
        setup=[f"export PYTHONPATH={shlex.quote(str(utils.REPOSITORY))}:$PYTHONPATH", *args.slurm_setup],
        stderr_to_stdout=True,
        # submitit would send SIGUSR2, which kills main.py: Slurm signals all processes of a job.
        additional_parameters={"signal": f"USR1@{SECONDS_OF_WARNING}", "requeue": True, **args.slurm_options},
        **resources,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # it repeats what sbatch says, and so do we
            tasks = [Task(run, rules, root, args.gpus is None, args.slurm_time) for run in runs]
            submitted = [executor.submit(task) for task in tasks]
    except submitit.core.utils.FailedJobError as error:
        raise utils.UserError(f"sbatch refused the jobs: {last_words(str(error))}") from None
    new = [{"run": name_of(run, root), "job": job.job_id} for run, job in zip(runs, submitted, strict=True)]
    utils.write_json_lines(root / JOBS, [*read_rows(root), *new])


def last_words(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it does not say why")


def name_of(run: PlannedRun, root: Path) -> str:
    return str(run.folder.relative_to(root.parent))


def read_submitted(root: Path) -> dict[str, str]:
    """The id of each run's latest job."""
    return {row["run"]: row["job"] for row in read_rows(root)}


def read_rows(root: Path) -> list[dict]:
    rows = utils.read_json_lines(root / JOBS) if (root / JOBS).exists() else []
    for row in rows:
        if not (isinstance(row.get("run"), str) and isinstance(row.get("job"), str)):
            raise utils.UserError(f'{root / JOBS} should have lines of a "run" and its "job", found {row}; move it')
    return rows


def job_ids(jobs: list[Job], root: Path) -> dict[Job, str | None]:
    submitted = read_submitted(root)
    return {job: submitted.get(name_of(job.run, root)) for job in jobs}


def ask_queue() -> dict[str, tuple[str, str]]:
    """Of each job of this user that has not ended: id -> (state, node or reason). Raises UserError if Slurm is mute."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%R"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise utils.UserError("--launcher slurm needs Slurm's commands, and there is no squeue here") from None
    except subprocess.TimeoutExpired:
        raise utils.UserError("squeue has not answered for a minute; is slurmctld up?") from None
    if done.returncode != 0:
        raise utils.UserError(f"squeue failed: {last_words(done.stderr)}")
    rows = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {job_id: (state, where) for job_id, state, where in rows}


def follow(jobs: list[Job], root: Path, on_change: Callable[[], None], on_poll: Callable[[], None]) -> None:
    """Keep the jobs' states up to date until all are over."""
    ids = job_ids(jobs, root)
    seen_at = dict.fromkeys(jobs, time.monotonic())
    unknown = [job.run.name for job in jobs if ids[job] is None]
    if unknown:
        raise utils.UserError(
            f"nothing has been submitted for {len(unknown)} of the runs ({unknown[0]}, ...); run without --attach"
        )
    while not all(job.is_over for job in jobs):
        try:
            queue = ask_queue()
        except utils.UserError as error:  # a restart of slurmctld is nothing to give up for
            utils.warn(f"{error}; trying again")
            queue = None
        for job in jobs if queue is not None else []:
            if not job.is_over:
                if ids[job] in queue:
                    seen_at[job] = time.monotonic()
                job.state, job.note = look(job, ids[job], queue, root, time.monotonic() - seen_at[job])
        on_change()
        on_poll()
        if not all(job.is_over for job in jobs):
            time.sleep(SECONDS_BETWEEN_LOOKS)


def look(job: Job, job_id: str, queue: dict, root: Path, seconds_unseen: float) -> tuple[str, str]:
    """(state, note) of a submitted job, from its run folder, what its task wrote at its end, and the queue."""
    if job.run.is_finished():
        return DONE, "finished"
    state, where = queue.get(job_id, (None, ""))
    if state == "PENDING" and "held" in where.lower():
        return WAITING, f"is held in Slurm as {job_id} {where}; scontrol release {job_id} lets it go on"
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
    return FAILED, f"FAILED: job {job_id} left Slurm's queue unfinished (cancelled?); {log} may say why"


# ---------------------------------------------------------------------------------------------------------------------
# There: a task of the array


@dataclass(frozen=True)
class RulesOnNodes(launch.Rules):
    """Of a run on several nodes: srun starts a torchrun on each, and they meet at this one, the first."""

    nodes: int = 1
    cpus: int = 1  # of each node

    def starter(self) -> list[str]:
        if self.nodes == 1:
            return super().starter()
        with socket.socket() as server:
            server.bind(("", 0))
            port = str(server.getsockname()[1])
        each_once = [f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1"]
        # The step shares the nodes with the task that starts it, which Slurm would otherwise keep apart.
        share = ["--overlap", f"--cpus-per-task={self.cpus}", "--cpu-bind=none", "--mpi=none"]
        ends = [f"--wait={SECONDS_TO_FOLLOW}", "--kill-on-bad-exit=0"]
        others = f"--export=ALL,{PARENT}="  # its process number means nothing on other nodes; Slurm ends them with it
        meeting = ["--nnodes", str(self.nodes), "--master_addr", socket.gethostname(), "--master_port", port]
        return ["srun", "--quiet", *each_once, *share, *ends, others, *self.torchrun(*meeting)]


@dataclass(frozen=True)
class Task:
    """What submitit calls on the node."""

    run: PlannedRun
    rules: RulesOnNodes
    root: Path
    on_gpu: bool
    minutes: int  # the time limit

    def __call__(self) -> None:
        signals, started_at = [], time.time()
        for number in launch.STOP_SIGNALS:  # while no pool listens
            signal.signal(number, lambda number, frame: signals.append(number))
        job, outcome = Job(self.run), self.root / f"{own_id()}.json"
        outcome.unlink(missing_ok=True)  # of the job before it was queued again
        try:
            found = gpus.to_use(self.rules.gpus_per_run) if self.on_gpu else []
            slots = gpus.make_slots(found, 1, self.rules.gpus_per_run)
            pool = launch.Pool([job], slots, self.rules, lambda: print(job.note, flush=True), lambda: None)
            pool.signals = signals
            stopped_by = pool.run()
            if stopped_by in (signal.SIGUSR1, signal.SIGTERM) and not job.is_over and not is_cancelled():
                if self.has_wasted_its_time(started_at):
                    raise utils.UserError(f"nothing could be saved within {self.minutes} minutes; raise --slurm_time")
                requeue()
            elif not job.is_over:
                name = "without a GPU that answers" if stopped_by is None else f"by {signal.Signals(stopped_by).name}"
                job.state, job.note = FAILED, f"FAILED: stopped {name}, unfinished; submit it again to go on"
        except (utils.UserError, OSError) as error:
            job.state, job.note = FAILED, f"FAILED: {utils.first_line(error)}"
        if job.state == FAILED:
            utils.write_json(outcome, {"note": job.note})

    def has_wasted_its_time(self, started_at: float) -> bool:
        """Whether most of the time limit has gone by and nothing was saved: so it would go again, without end."""
        last = self.run.folder / utils.CHECKPOINT
        saved = last.exists() and last.stat().st_mtime > started_at
        return not saved and time.time() - started_at > 60 * self.minutes / 2 - SECONDS_OF_WARNING / 2


def is_cancelled() -> bool:
    """Whether Slurm is ending this job for good, and not pushing it aside for another."""
    command = ["squeue", "--noheader", "--jobs", own_id(), "--format=%T"]
    state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return state in ("CANCELLED", "COMPLETING")


def own_id() -> str:
    """Of this job, as squeue writes it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def requeue() -> None:
    """Put this job back in the queue, which ends this process. Raises UserError if Slurm does not want that."""
    print("back into the queue", flush=True)
    done = subprocess.run(["scontrol", "requeue", own_id()], capture_output=True, text=True)
    if done.returncode != 0:
        raise utils.UserError(f"saved, but Slurm did not queue it again: {last_words(done.stderr)}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(120)
    sys.exit("Slurm has queued this job again and not ended it")
