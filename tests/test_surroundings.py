"""What surrounds a run and must not change or end it: terminals, variables, signals before the training, locks."""

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
    *("--dataset", "digits", "--model", "vit_micro", "--depth", "1", "--img_size", "8", "--patch_size", "4"),
    *("--device", "cpu", "--epochs", "1", "--batch_size", "256"),
]


def script(*arguments, before="", **environment):
    """A script as a shell would call it -> the finished process."""
    command = f"{before} exec {sys.executable} {' '.join(arguments)}"
    environment = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", command], capture_output=True, cwd=utils.REPOSITORY, env=environment)


# --------------------------------------------------------------------------------------------------
# Terminals


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_output_changes_nothing_but_what_is_seen(redirection):
    done = script("run_experiments.py", "--gpus", "0", "--dry_run", "--dataset", "digits", redirection)
    assert done.returncode == 0
    assert b"Traceback" not in done.stdout + done.stderr
    done = script("plot_result.py", "--results_path", "nowhere", redirection)
    assert done.returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_an_error_or_a_warning_that_cannot_be_written_changes_no_exit_code():
    done = script("plot_result.py", "--results_path", "nowhere", "2>/dev/full")
    assert done.returncode == 2
    done = script("-c", "'import utils; utils.run_cli(lambda: utils.warn(chr(97)) or 0)'", "2>/dev/full")
    assert done.returncode == 0


def test_characters_that_an_encoding_lacks_are_escaped():
    program = "'import utils; utils.run_cli(lambda: print(chr(0xe9), chr(0xdce9), chr(0x4e2d)) or 0)'"
    done = script("-c", program, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"\\xe9 \\udce9 \\u4e2d\n")
    done = script("-c", program, PYTHONIOENCODING="utf-8")
    assert done.stdout.decode() == "é \\udce9 中\n"


def test_names_that_are_no_text_can_be_written(tmp_path):
    utils.write_text(tmp_path / "a.md", "caf\udce9")
    utils.write_json(tmp_path / "a.json", {"name": "caf\udce9"})
    assert (tmp_path / "a.md").read_text() == "caf\\udce9"
    assert utils.read_json(tmp_path / "a.json") == {"name": "caf\udce9"}


def test_results_are_written_before_they_are_printed(tmp_path, monkeypatch):
    def fail(rows):
        raise OSError("no terminal")

    monkeypatch.setattr(benchmark, "format_rows", fail)
    output = tmp_path / "report.json"
    with pytest.raises(OSError, match="no terminal"):
        benchmark.main(
            ["--grids", "[4]", "--rounds", "3", "--backends", '["dense"]', "--device", "cpu", "--output", str(output)]
        )
    assert json.loads(output.read_text())["rows"]


@pytest.mark.parametrize(
    ("message", "shown"), [("No CUDA runtime is found, using CUDA_HOME='/usr/local'", False), ("something else", True)]
)
def test_a_line_of_torch_about_a_gpu_that_is_not_there_is_not_shown(message, shown):
    hardware.pick_device("cpu")
    logger = logging.getLogger("torch.utils.cpp_extension")
    record = logger.makeRecord(logger.name, logging.WARNING, "", 0, message, (), None)
    assert bool(logger.filter(record)) is shown


# --------------------------------------------------------------------------------------------------
# Variables


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"WORLD_SIZE": "4", "RANK": "0"},
            "the environment has RANK=0 WORLD_SIZE=4, as for one of several processes, but no LOCAL_RANK",
        ),
        ({"RANK": ""}, "RANK is '' in the environment, expected a whole number"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many' in the environment"),
        ({"RANK": "3"}, "has RANK=3, as for one of several processes, but no LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "but no MASTER_ADDR; unset it, or start"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
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


def test_a_script_that_imports_them_does_not_fail_by_them():
    done = script("main.py", "--help", RANK="x")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_one_process_needs_no_torchrun(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.read_environment() == (0, 0, 1)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,foo,1", ["0"]),
        ("0,,1", ["0"]),
        ("1, 0", ["1", "0"]),
        ("0,1,-1,2", ["0", "1"]),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,1", ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "1"]),
        ("MIG-GPU-ab/1/0", ["MIG-GPU-ab/1/0"]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_are_read_from_the_variable_as_cuda_reads_it(monkeypatch, capsys, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.to_use(None) == expected
    warned = "CUDA stops at" in capsys.readouterr().err
    assert warned == (visible in ("0,foo,1", "0,,1"))


# The first is Slurm's, where it gives a job no GPU. Of one that is there twice, CUDA takes none at all.
@pytest.mark.parametrize("visible", ["NoDevFiles", "foo,0", "0,0", "1,0,1,foo"])
def test_a_variable_that_names_no_gpu_is_an_error_and_not_the_cpu(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for number in (None, 2):
        with pytest.raises(utils.UsageError, match=rf"'{visible}', which names no GPU.*--gpus 0"):
            gpus.to_use(number)
    assert gpus.to_use(0) == []


def test_a_number_beyond_the_gpus_there_are_ends_the_list(monkeypatch, capsys):
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


def test_slices_of_a_gpu_are_used_by_their_names(nvidia_smi):
    assert gpus.to_use(None) == ["MIG-a", "MIG-b", "1"]
    assert gpus.responds("MIG-b")
    assert not gpus.responds("MIG-c")
    assert gpus.make_slots(gpus.to_use(None), 1) == ["MIG-a", "MIG-b", "1"]
    with pytest.raises(utils.UsageError, match=r"--gpus_per_run 2, but MIG-a is a slice of a GPU.*--gpus_per_run 1"):
        gpus.make_slots(gpus.to_use(None), 1, 2)


def test_a_slice_has_not_the_rate_of_the_whole_card(monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert hardware.peak_flops(torch.device("cuda"), "bf16") == peak


@pytest.mark.parametrize("visible", [None, "1,0"])
def test_the_order_of_gpus_is_set_only_where_their_numbers_are_ours(tmp_path, monkeypatch, visible):
    started = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(gpus, "responds", lambda gpu: True)
    monkeypatch.setattr(launch.subprocess, "Popen", lambda command, env, **kwargs: started.append(env))
    job = plan.Job(plan.PlannedRun(MaskSpec(), 0, tmp_path, ()))
    pool = launch.Pool([job], ["0"], launch.Rules(tmp_path / "main.py"), lambda: None, lambda: None)
    pool._start(job, "0")
    assert started[0].get("CUDA_DEVICE_ORDER") == (None if visible else "PCI_BUS_ID")


def test_running_out_of_memory_with_cuda_graphs_goes_on_without_them(tmp_path):
    asked = ("--epochs", "3", "--compile", "reduce-overhead")
    job = plan.Job(plan.PlannedRun(MaskSpec(), 0, tmp_path, asked))
    assert job.arguments() == list(asked)
    job.micro_batches = 2
    assert job.arguments() == [*asked, "--grad_accumulation", "2", "--compile", "default"]
    settings = main.resolve_settings(main.parse_args([*job.arguments(), "--device", "cpu"]))
    assert (settings["compile"], settings["grad_accumulation"]) == ("default", 2)
    utils.write_json(tmp_path / utils.CONFIG, {"provenance": {"command": ["main.py", *job.arguments()]}})
    (tmp_path / utils.SUMMARY).touch()
    assert job.run.is_finished()
    run_folder.refuse_other(tmp_path, "settings", {"compile": "reduce-overhead"}, {"compile": "default"})


def raise_error(message):
    def fail(*args, **kwargs):
        raise RuntimeError(message)

    return fail


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", 77, "--grad_accumulation 2"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with", 1, "nvidia-smi -c DEFAULT"),
    ],
)
def test_what_cuda_says_of_memory_and_of_taken_gpus(tmp_path, monkeypatch, run_script, message, code, words):
    monkeypatch.setattr(main, "load_dataset", raise_error(message))
    found, _, error = run_script(main.main, *RUN, "--output_dir", str(tmp_path))
    assert found == code
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        ("CUDA error: out of memory\nCompile with", 77, "--grad_accumulation 2"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with", 1, "nvidia-smi -c DEFAULT"),
    ],
    ids=["memory", "taken"],
)
def test_a_gpu_that_cannot_be_had_is_said_before_anything_is_tried_on_it(
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
    if code == 1:  # said by every script
        found, _, error = run_script(benchmark.main, "--device", "cuda")
        assert found == code
        assert words in error


# --------------------------------------------------------------------------------------------------
# Signals and threads


@pytest.mark.parametrize("place", ["load_dataset", "choose_backend"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_stop_before_the_training_is_answered_at_once(tmp_path, monkeypatch, run_script, place, number, code):
    def be_slow(*args, **kwargs):
        os.kill(os.getpid(), number)
        for _ in range(200):
            try:
                time.sleep(0.05)
            except Exception:  # as whoever tries a compiler, or a damaged image
                pytest.fail("swallowed")
        pytest.fail("went on")

    monkeypatch.setattr(main, place, be_slow)
    start = time.monotonic()
    found, output, _ = run_script(main.main, *RUN, "--mask_type", "2d_cardinal", "--output_dir", str(tmp_path))
    assert time.monotonic() - start < 5
    assert found == code
    assert "before the training; the same command starts again" in output


def test_a_stop_within_a_long_call_of_torch_is_answered_as_well(tmp_path):
    """Python calls no signal handler before such a call returns."""
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import pathlib, torch, main, utils\n"
        "def be_slow(*args, **kwargs):\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'measures').touch()\n"
        "    x = torch.ones(16_384, 16_384)\n    x @ x\n"  # half a minute on one core
        "main.choose_backend = be_slow\nutils.run_cli(main.main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(runner), *RUN, "--mask_type", "2d_cardinal", "--output_dir", str(tmp_path / "out")],
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
    assert output.splitlines()[-1] == "stopped (SIGTERM) before the training; the same command starts again"


def test_a_signal_while_images_are_read_ends_a_real_process(tmp_path):
    from PIL import Image

    large = tmp_path / "large.png"
    Image.effect_noise((3000, 3000), 50).save(large, compress_level=1)
    for split in ("train", "test"):
        folder = tmp_path / "data" / split / "a"
        folder.mkdir(parents=True)
        for index in range(120):
            os.link(large, folder / f"{index}.png")
    command = [sys.executable, "main.py", *RUN, "--dataset", "imagefolder", "--data_dir", str(tmp_path / "data")]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "out")], cwd=utils.REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: reads_images(process.pid))
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert time.monotonic() - start < 10  # two seconds on a quiet machine
    assert "stopped (SIGTERM) before the training" in output


def reads_images(pid):
    """Whether the process has one of the test's images open."""
    folder = f"/proc/{pid}/fd"
    try:
        return any(os.readlink(f"{folder}/{number}").endswith(".png") for number in os.listdir(folder))
    except OSError:
        return False


def test_no_process_waits_for_another_that_is_stopped_before_the_training(tmp_path):
    """The first one measures backends, the second waits for what it finds."""
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import pathlib, time, main, utils\nfrom runtime import distributed\n"
        "def be_slow(*args, **kwargs):\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'measures').touch()\n"
        "    while True:\n        time.sleep(0.05)\n"
        "main.choose_backend = be_slow\nutils.run_cli(main.main, distributed.leave)\n"
    )
    command = [sys.executable, "sweep/torchrun.py", "--standalone", "--nproc_per_node", "2", str(runner)]
    process = subprocess.Popen(
        [*command, *RUN, "--mask_type", "2d_cardinal", "--output_dir", str(tmp_path / "out")],
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
    """As tuners start them; Python has no signals there."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main.main([*RUN, "--output_dir", str(tmp_path)])))
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


def test_a_run_folder_without_locks_is_refused_in_one_line(no_locks, tmp_path, run_script):
    code, _, error = run_script(main.main, *RUN, "--output_dir", str(tmp_path))
    assert code == 1
    assert "without file locks (Function not implemented)" in error or "without file locks ([Errno 38]" in error
    assert "choose another --output_dir" in error
    assert len(error.splitlines()) == 1


def test_filelocks_own_refusal_is_understood(monkeypatch, tmp_path):
    def refuse(self, timeout=None):
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    with pytest.raises(locks.NoLocksError, match="does not appear to support flock"):
        locks.acquire(tmp_path / "lock")


def test_measuring_goes_on_without_locks(no_locks, tmp_path, monkeypatch, capsys):
    import masks

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_measure", lambda plan, candidates, *args: dict.fromkeys(candidates, 1.0))
    compiled = attention.compile_mask(masks.build_attention_mask("2d_cardinal", 1, 3, 4))
    chosen = attention.choose_backend(compiled, 2, 2, 8, torch.float32, torch.device("cpu"), num_calls=1)
    assert chosen.timings == {"dense": 1.0}
    assert capsys.readouterr().err.count("without file locks, going on without") == 1
