"""A run and its surroundings: terminals, environment variables, signals, threads, file locks."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from processes import wait_for

import attention
import benchmark
import main
import utils
from attention import choice
from masks import MaskSpec
from runtime import distributed, hardware, locks
from sweep import gpus, launch, plan
from training import run_folder

RUN = [
    *("--dataset", "digits", "--img_size", "8", "--patch_size", "4"),
    *("--model", "vit_micro", "--depth", "1", "--device", "cpu"),
    *("--epochs", "1", "--batch_size", "256"),
]


def script(*arguments, **environment):
    """The finished process of a script, called through a shell."""
    return subprocess.run(
        ["bash", "-c", f"exec {sys.executable} {' '.join(arguments)}"],
        capture_output=True,
        cwd=utils.REPOSITORY,
        env={**os.environ, **environment},
    )


# --------------------------------------------------------------------------------------------------
# Terminals


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_output_changes_nothing_else(redirection):
    arguments = ["--gpus", "0", "--dry_run", "--dataset", "digits"]
    done = script("run_experiments.py", *arguments, redirection)
    assert done.returncode == 0
    assert b"Traceback" not in done.stdout + done.stderr
    done = script("plot_result.py", "--results_path", "nowhere", redirection)
    assert done.returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_an_error_or_a_warning_that_cannot_be_written_changes_no_exit_code():
    done = script("plot_result.py", "--results_path", "nowhere", "2>/dev/full")
    assert done.returncode == 2
    program = "'import utils; utils.run_cli(lambda: utils.warn(chr(97)) or 0)'"
    done = script("-c", program, "2>/dev/full")
    assert done.returncode == 0


def test_characters_missing_from_an_encoding_are_escaped():
    output = "print(chr(0xe9), chr(0xdce9), chr(0x4e2d))"
    program = f"'import utils; utils.run_cli(lambda: {output} or 0)'"
    done = script("-c", program, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"\\xe9 \\udce9 \\u4e2d\n")
    done = script("-c", program, PYTHONIOENCODING="utf-8")
    assert done.stdout.decode() == "é \\udce9 中\n"


def test_names_that_are_not_valid_text_can_be_written(tmp_path):
    utils.write_text(tmp_path / "a.md", "caf\udce9")
    utils.write_json(tmp_path / "a.json", {"name": "caf\udce9"})
    assert (tmp_path / "a.md").read_text() == "caf\\udce9"
    assert utils.read_json(tmp_path / "a.json") == {"name": "caf\udce9"}


def test_results_are_written_before_they_are_printed(tmp_path, monkeypatch):
    def fail(rows):
        raise OSError("no terminal")

    monkeypatch.setattr(benchmark, "format_rows", fail)
    output = tmp_path / "report.json"
    options = ["--grids", "[4]", "--rounds", "3", "--backends", '["dense"]', "--device", "cpu"]
    with pytest.raises(OSError, match="no terminal"):
        benchmark.main([*options, "--output", str(output)])
    assert json.loads(output.read_text())["rows"]


@pytest.mark.parametrize(
    ("message", "shown"),
    [("No CUDA runtime is found, using CUDA_HOME='/usr/local'", False), ("something else", True)],
)
def test_torch_does_not_log_that_there_is_no_gpu(message, shown):
    hardware.pick_device("cpu")
    logger = logging.getLogger("torch.utils.cpp_extension")
    record = logger.makeRecord(logger.name, logging.WARNING, "", 0, message, (), None)
    assert bool(logger.filter(record)) is shown


# --------------------------------------------------------------------------------------------------
# Environment variables

MEETING_PLACE = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"WORLD_SIZE": "4", "RANK": "0"},
            "the environment has RANK=0 WORLD_SIZE=4, as for one of several processes, "
            "but no LOCAL_RANK",
        ),
        ({"RANK": ""}, "RANK is '' in the environment, expected a whole number"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many' in the environment"),
        ({"RANK": "3"}, "has RANK=3, as for one of several processes, but no LOCAL_RANK"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
            "but no MASTER_ADDR; unset it, or start",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", **MEETING_PLACE},
            "RANK is 2 in the environment, but WORLD_SIZE is only 2",
        ),
    ],
)
def test_stray_variables_of_torchrun_are_named(monkeypatch, run_script, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, error = run_script(main.main, *RUN)
    assert code == 2
    assert words in error
    assert len(error.splitlines()) == 1


def test_an_import_does_not_fail_because_of_stray_variables():
    done = script("main.py", "--help", RANK="x")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_one_process_needs_no_torchrun(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.read_environment() == (0, 0, 1)


UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,foo,1", ["0"]),
        ("0,,1", ["0"]),
        ("1, 0", ["1", "0"]),
        ("0,1,-1,2", ["0", "1"]),
        (f"{UUID},1", [UUID, "1"]),
        ("MIG-GPU-ab/1/0", ["MIG-GPU-ab/1/0"]),
        ("", []),
        ("-1", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(monkeypatch, capsys, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.to_use(None) == expected
    warned = "CUDA stops at" in capsys.readouterr().err
    assert warned == (visible in ("0,foo,1", "0,,1"))


# The first is what Slurm sets for a job without GPUs. If a GPU is there twice, CUDA uses none.
@pytest.mark.parametrize("visible", ["NoDevFiles", "foo,0", "0,0", "1,0,1,foo"])
def test_a_variable_that_names_no_gpu_is_an_error_instead_of_the_cpu(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for number in (None, 2):
        with pytest.raises(utils.UsageError, match=rf"'{visible}', which names no GPU.*--gpus 0"):
            gpus.to_use(number)
    assert gpus.to_use(0) == []


def test_an_index_beyond_the_last_gpu_ends_the_list(monkeypatch, capsys):
    monkeypatch.setattr(gpus, "_list_gpus", lambda: {"0": [], "1": []})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,9,1")
    assert gpus.to_use(None) == ["0"]
    assert "CUDA stops at '9'" in capsys.readouterr().err


LISTING = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
  MIG 1g.10gb     Device  0: (UUID: MIG-a)
  MIG 1g.10gb     Device  1: (UUID: MIG-b)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && echo '{LISTING}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_slices_of_a_gpu_are_used_by_their_uuids(nvidia_smi):
    assert gpus.to_use(None) == ["MIG-a", "MIG-b", "1"]
    assert gpus.responds("MIG-b")
    assert not gpus.responds("MIG-c")
    assert gpus.make_slots(gpus.to_use(None), 1) == ["MIG-a", "MIG-b", "1"]
    words = r"--gpus_per_run 2, but MIG-a is a slice of a GPU.*--gpus_per_run 1"
    with pytest.raises(utils.UsageError, match=words):
        gpus.make_slots(gpus.to_use(None), 1, 2)


def test_a_slice_does_not_have_the_peak_rate_of_the_whole_card(monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert hardware.peak_flops(torch.device("cuda"), "bf16") == peak
        assert hardware.peak_flops(torch.device("cuda"), "tf32") == (peak and peak / 2)
        assert hardware.peak_flops(torch.device("cuda"), "fp32") is None


def test_tf32_is_a_mode_of_cuda():
    assert hardware.resolve_precision("tf32", torch.device("cuda")) == "tf32"
    with pytest.raises(utils.UsageError, match="got device cpu; use fp32"):
        hardware.resolve_precision("tf32", torch.device("cpu"))

    before = torch.get_float32_matmul_precision()
    try:
        hardware.set_precision("tf32")
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.is_autocast_enabled("cpu")
        hardware.set_precision("fp32")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("visible", [None, "1,0"])
def test_the_order_of_gpus_is_set_only_if_their_numbers_are_ours(tmp_path, monkeypatch, visible):
    started = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(gpus, "responds", lambda gpu: True)

    def start(command, env, **kwargs):
        started.append(env)

    monkeypatch.setattr(launch.subprocess, "Popen", start)
    job = plan.Job(plan.PlannedRun(MaskSpec(), 0, tmp_path, ()))
    rules = launch.Rules(tmp_path / "main.py")
    pool = launch.Pool([job], ["0"], rules, lambda: None, lambda: None)
    pool._start(job, "0")
    assert started[0].get("CUDA_DEVICE_ORDER") == (None if visible else "PCI_BUS_ID")


def test_a_run_out_of_memory_with_cuda_graphs_goes_on_without_them(tmp_path):
    asked = ("--epochs", "3", "--compile", "reduce-overhead")
    job = plan.Job(plan.PlannedRun(MaskSpec(), 0, tmp_path, asked))
    assert job.arguments() == list(asked)
    job.micro_batches = 2
    assert job.arguments() == [*asked, "--grad_accumulation", "2", "--compile", "default"]
    settings = main.resolve_settings(main.parse_args([*job.arguments(), "--device", "cpu"]))
    machine = settings.machine
    assert (machine.compile, machine.grad_accumulation) == ("default", 2)
    config = {"provenance": {"command": ["main.py", *job.arguments()]}}
    utils.write_json(tmp_path / utils.CONFIG, config)
    (tmp_path / utils.SUMMARY).touch()
    assert job.run.is_finished()
    with_graphs = settings.changed(compile="reduce-overhead").to_dict()
    run_folder.refuse_other_settings(tmp_path, with_graphs, settings)


def raise_error(message):
    def fail(*args, **kwargs):
        raise RuntimeError(message)

    return fail


NO_CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
NO_MEMORY = "CUDA error: out of memory\nCompile with"
TAKEN = "CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with"


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [(NO_CUBLAS, 77, "--grad_accumulation 2"), (TAKEN, 1, "nvidia-smi -c DEFAULT")],
)
def test_cuda_errors_about_memory_and_taken_gpus_say_what_to_do(
    tmp_path, monkeypatch, run_script, message, code, words
):
    monkeypatch.setattr(main, "load_dataset", raise_error(message))
    found, _, error = run_script(main.main, *RUN, "--output_dir", str(tmp_path))
    assert found == code
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("message", "code", "words"),
    [(NO_MEMORY, 77, "--grad_accumulation 2"), (TAKEN, 1, "nvidia-smi -c DEFAULT")],
    ids=["memory", "taken"],
)
def test_an_unavailable_gpu_is_reported_before_anything_is_tried_on_it(
    monkeypatch, run_script, message, code, words, world_size
):
    monkeypatch.setattr(distributed, "WORLD_SIZE", world_size)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: world_size)
    monkeypatch.setattr(torch.cuda, "set_device", raise_error(message))
    monkeypatch.setattr(torch, "zeros", raise_error(message))
    found, _, error = run_script(main.main, "--device", "cuda", "--compile", "default")
    assert found == code
    assert words in error
    assert len(error.splitlines()) == 1
    if code == 1:  # every script reports it
        found, _, error = run_script(benchmark.main, "--device", "cuda")
        assert found == code
        assert words in error


# --------------------------------------------------------------------------------------------------
# Signals and threads


@pytest.mark.parametrize("place", ["load_dataset", "choose_backends"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_request_to_stop_before_the_training_is_met_at_once(
    tmp_path, monkeypatch, run_script, place, number, code
):
    def be_slow(*args, **kwargs):
        os.kill(os.getpid(), number)
        for _ in range(200):
            try:
                time.sleep(0.05)
            except Exception:  # as in code that tries a compiler, or reads a damaged image
                pytest.fail("swallowed")
        pytest.fail("went on")

    monkeypatch.setattr(main, place, be_slow)
    start = time.monotonic()
    options = ["--mask_type", "2d_cardinal", "--output_dir", str(tmp_path)]
    found, output, _ = run_script(main.main, *RUN, *options)
    assert time.monotonic() - start < 5
    assert found == code
    assert "before the training; the same command starts again" in output


def test_a_request_to_stop_during_a_long_call_into_torch_is_met_as_well(tmp_path):
    """Python runs no signal handler until such a call returns."""
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import pathlib, torch, main, utils\n"
        "def be_slow(*args, **kwargs):\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'measures').touch()\n"
        # Half a minute on one core.
        "    x = torch.ones(16_384, 16_384)\n    x @ x\n"
        "main.choose_backends = be_slow\nutils.run_cli(main.main)\n"
    )
    options = ["--mask_type", "2d_cardinal", "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, str(runner), *RUN, *options],
        cwd=utils.REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(utils.REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for((tmp_path / "measures").exists)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75
    assert time.monotonic() - start < 5  # two seconds on a quiet machine
    last_line = output.splitlines()[-1]
    assert last_line == "stopped (SIGTERM) before the training; the same command starts again"


def test_a_signal_ends_a_real_process_that_is_reading_images(tmp_path):
    from PIL import Image

    large = tmp_path / "large.png"
    Image.effect_noise((3000, 3000), 50).save(large, compress_level=1)
    for split in ("train", "test"):
        folder = tmp_path / "data" / split / "a"
        folder.mkdir(parents=True)
        for index in range(120):
            os.link(large, folder / f"{index}.png")
    folders = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "main.py", *RUN, "--dataset", "imagefolder", *folders],
        cwd=utils.REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: reads_images(process.pid))
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert time.monotonic() - start < 10  # two seconds on a quiet machine
    assert "stopped (SIGTERM) before the training" in output


def reads_images(pid):
    """Whether the process has one of the images open."""
    folder = f"/proc/{pid}/fd"
    try:
        files = [os.readlink(f"{folder}/{number}") for number in os.listdir(folder)]
        return any(file.endswith(".png") for file in files)
    except OSError:
        return False


def test_no_rank_waits_for_another_that_is_stopped_before_the_training(tmp_path):
    """Rank 0 measures backends, and rank 1 waits for the result."""
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import pathlib, time, main, utils\nfrom runtime import distributed\n"
        "def be_slow(*args, **kwargs):\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'measures').touch()\n"
        "    while True:\n        time.sleep(0.05)\n"
        "main.choose_backends = be_slow\nutils.run_cli(main.main, distributed.leave)\n"
    )
    torchrun = ["sweep/torchrun.py", "--standalone", "--nproc_per_node", "2", str(runner)]
    options = ["--mask_type", "2d_cardinal", "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, *torchrun, *RUN, *options],
        cwd=utils.REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(utils.REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for((tmp_path / "measures").exists)
        process.send_signal(signal.SIGTERM)
        output, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 75, error
    assert "stopped (SIGTERM) before the training" in output
    assert "error" not in error


def test_a_run_in_a_thread(tmp_path):
    """As a tuner may start it. Python has no signals there."""
    codes = []

    def run():
        codes.append(main.main([*RUN, "--output_dir", str(tmp_path)]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0]


# --------------------------------------------------------------------------------------------------
# File systems without locks


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)


def test_a_run_folder_without_locks_is_refused_with_one_line(no_locks, tmp_path, run_script):
    code, _, error = run_script(main.main, *RUN, "--output_dir", str(tmp_path))
    assert code == 1
    reason = error.partition("without file locks (")[2]
    assert reason.startswith(("Function not implemented)", "[Errno 38]"))
    assert "choose another --output_dir" in error
    assert len(error.splitlines()) == 1


def test_an_error_of_filelock_itself_is_understood(monkeypatch, tmp_path):
    def refuse(self, timeout=None):
        raise NotImplementedError(
            "FileSystem does not appear to support flock; use SoftFileLock instead"
        )

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    with pytest.raises(locks.NoLocksError, match="does not appear to support flock"):
        locks.acquire(tmp_path / "lock")


def test_measuring_goes_on_without_locks(no_locks, tmp_path, monkeypatch, capsys):
    import masks

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def measure(plan, candidates, *args):
        return dict.fromkeys(candidates, 1.0)

    monkeypatch.setattr(choice, "_measure", measure)
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 4)
    compiled = attention.compile_mask(mask, backend="measure")
    cpu = torch.device("cpu")
    chosen = attention.choose_backend(compiled, 2, 2, 8, torch.float32, cpu, num_calls=1)
    assert chosen.timings["dense"] == 1.0
    assert capsys.readouterr().err.count("without file locks, going on without") == 1
