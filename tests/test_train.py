"""The training loop: resuming, requests to stop, micro-batches, several processes, speed."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from processes import wait_for

import data
import main
import utils
from models import VisionTransformer
from runtime import distributed
from runtime.stopping import PARENT, StopRequest
from training import checkpoints, run_folder, trainer
from training.settings import Settings

DIGITS = [
    *("--dataset", "digits", "--model", "vit_micro", "--img_size", "8", "--patch_size", "2"),
    *("--device", "cpu", "--batch_size", "128", "--lr", "2e-3", "--epochs", "2", "--dropout", "0"),
]
STRONG = ["--policy", "rand", "--mix", "0.5", "--mix_off", "0.5", "--random_erasing", "0.3"]


def run(output, *arguments):
    return main.main([*DIGITS, "--output_dir", str(output), *arguments])


def folder_of(output, name="full"):
    return output / "digits" / name / "seed_0"


def is_measured(key):
    return any(word in key for word in ("seconds", "per_second", "memory"))


def rows_of(folder):
    """The rows of metrics.jsonl, without times and memory, which differ between equal runs."""
    rows = utils.read_json_lines(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not is_measured(key)} for row in rows]


def weights_of(folder):
    return checkpoints.load_checkpoint(folder / "last.pt")["model"]


def assert_same_run(folder, expected):
    """The same metrics and weights, to the last bit."""
    assert rows_of(folder) == rows_of(expected)
    weights = weights_of(folder)
    assert all(torch.equal(weights[name], weight) for name, weight in weights_of(expected).items())


def assert_close(folder, expected, tolerance=1e-4):
    """The same losses, up to the order of the arithmetic."""
    for row, other in zip(rows_of(folder), rows_of(expected), strict=True):
        for key in ("train_loss", "eval_loss"):
            assert row[key] == pytest.approx(other[key], rel=tolerance), key


def stop_after(monkeypatch, num_steps, number=signal.SIGTERM):
    """Send this process a signal at the end of the given training step."""
    train_step = trainer.Trainer.train_step
    num_done = 0

    def counted(self, *args):
        nonlocal num_done
        train_step(self, *args)
        num_done += 1
        if num_done == num_steps:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer.Trainer, "train_step", counted)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A finished run of one process, with mixing in its first epoch."""
    output = tmp_path_factory.mktemp("reference")
    assert run(output, *STRONG) == 0
    return folder_of(output)


OPTIONS_WITHOUT_EFFECT = ("--grad_accumulation 3", "--checkpoint_activations", "--log_every 5")


@pytest.mark.parametrize("option", OPTIONS_WITHOUT_EFFECT)
def test_options_without_effect_on_the_result(reference, tmp_path, option, capsys):
    assert run(tmp_path, *STRONG, *option.split()) == 0
    assert_close(folder_of(tmp_path), reference)
    if "--log_every" in option:
        assert "epoch 1/2, step 10/12: loss 2." in capsys.readouterr().out


OPTIONS_TO_RESUME = ("--ema 0.9", "--optimizer muon", "--drop_path 0.3", "--device_data_limit 0")


@pytest.mark.parametrize("option", OPTIONS_TO_RESUME)
def test_runs_with_these_options_learn_and_resume_exactly(tmp_path, monkeypatch, option):
    options = option.split()
    assert run(tmp_path / "whole", *options) == 0

    stop_after(monkeypatch, 17)  # in the second epoch
    assert run(tmp_path / "parts", *options) == utils.EXIT_AGAIN
    monkeypatch.undo()
    assert run(tmp_path / "parts", *options) == 0

    whole = folder_of(tmp_path / "whole")
    assert_same_run(folder_of(tmp_path / "parts"), whole)
    first, second = rows_of(whole)
    assert second["train_loss"] < first["train_loss"]


STOPS = [(step, signal.SIGTERM) for step in (1, 5, 11, 12, 13, 23, 24)]  # 12 steps per epoch
STOPS += [(5, signal.SIGUSR1), (5, signal.SIGINT)]


@pytest.mark.parametrize(("num_steps", "number"), STOPS)
def test_stopped_in_a_step_and_resumed_equals_uninterrupted(
    reference, tmp_path, monkeypatch, num_steps, number, capsys
):
    stop_after(monkeypatch, num_steps, number)
    code = 130 if number == signal.SIGINT else utils.EXIT_AGAIN
    assert run(tmp_path, *STRONG) == code
    assert "the same command goes on" in capsys.readouterr().out

    folder = folder_of(tmp_path)
    assert not (folder / "summary.json").exists()
    num_epochs = (num_steps - 1) // 12
    assert [row["epoch"] for row in rows_of(folder)] == list(range(1, num_epochs + 1))

    monkeypatch.undo()
    torch.manual_seed(99)  # the state of the generators must not matter
    assert run(tmp_path, *STRONG) == 0
    assert_same_run(folder, reference)


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_stopped_in_an_evaluation_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, ema):
    assert run(tmp_path / "whole", "--ema", ema) == 0

    eval_batches = data.eval_batches
    num_batches = 0

    def counted(*args):
        nonlocal num_batches
        for batch in eval_batches(*args):
            num_batches += 1
            if num_batches == 5:  # the second of the three in epoch 2
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(data, "eval_batches", counted)
    assert run(tmp_path / "parts", "--ema", ema) == utils.EXIT_AGAIN
    whole, parts = folder_of(tmp_path / "whole"), folder_of(tmp_path / "parts")
    assert len(rows_of(parts)) == 1

    assert run(tmp_path / "parts", "--ema", ema) == 0
    assert num_batches == 5 + 3
    assert_same_run(parts, whole)


def test_a_signal_during_the_last_save_does_not_stop_the_run(tmp_path, monkeypatch):
    save_checkpoint = trainer.save_checkpoint

    def signal_and_save(folder, state):
        if state["epoch"] == 3:  # both epochs are done
            os.kill(os.getpid(), signal.SIGTERM)
        save_checkpoint(folder, state)

    monkeypatch.setattr(trainer, "save_checkpoint", signal_and_save)
    assert run(tmp_path) == 0
    assert (folder_of(tmp_path) / "summary.json").exists()


def test_checkpoints_are_also_saved_within_an_epoch(tmp_path, monkeypatch):
    saved = []

    def note(folder, state):
        saved.append((state["epoch"], state["epoch_step"]))

    monkeypatch.setattr(trainer, "save_checkpoint", note)
    assert run(tmp_path, "--epochs", "1", "--checkpoint_every_minutes", "1e-9") == 0
    assert saved == [*((1, step) for step in range(1, 12)), (2, 0)]


def saves_of(monkeypatch, output, *arguments):
    """Where a run saves: (epoch, steps done in it)."""
    saved = []

    def note(folder, state):
        saved.append((state["epoch"], state["epoch_step"]))

    monkeypatch.setattr(trainer, "save_checkpoint", note)
    assert run(output, "--epochs", "4", *arguments) == 0
    return saved


def test_epochs_of_less_than_a_minute_are_not_all_saved(tmp_path, monkeypatch):
    """The first and the last one are."""
    assert saves_of(monkeypatch, tmp_path / "short") == [(2, 0), (5, 0)]
    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_SAVES", 1e-9)
    assert saves_of(monkeypatch, tmp_path / "no_more", "--checkpoint_every_minutes", "0") == [
        *((epoch, 0) for epoch in (2, 3, 4, 5)),
    ]


@pytest.mark.parametrize(
    ("place", "saved", "seconds_ago", "minutes", "is_due"),
    [
        ((1, 3), None, 61, 10, False),
        ((1, 3), None, 601, 10, True),
        ((2, 0), None, 1, 10, True),  # the first epoch
        ((3, 0), (2, 0), 59, 10, False),
        ((3, 0), (2, 0), 61, 10, True),
        ((3, 5), (2, 0), 59, 10, False),
        ((3, 5), (2, 0), 61, 10, True),  # epoch 2 was not saved
        ((3, 5), (3, 1), 61, 10, False),
        ((3, 5), (2, 0), 999, 0, False),  # never within an epoch
        ((3, 0), (2, 0), 61, 0, True),
        ((3, 0), (2, 0), 31, 0.5, True),
    ],
)
def test_when_a_save_is_due(place, saved, seconds_ago, minutes, is_due):
    settings = Settings.from_dict({"checkpoint_every_minutes": minutes})
    progress = SimpleNamespace(epoch=place[0], epoch_step=place[1])
    of_run = SimpleNamespace(settings=settings, progress=progress, saved=saved)
    of_run.saved_at = time.monotonic() - seconds_ago
    assert trainer.Trainer.is_save_due(of_run) is is_due


def test_killed_after_epochs_that_were_not_saved_and_resumed(tmp_path, monkeypatch, capsys):
    assert run(tmp_path / "whole", "--epochs", "4") == 0
    finish_epoch = trainer.Trainer.finish_epoch

    def fail(self):
        if self.progress.epoch == 3:
            raise RuntimeError("killed")
        return finish_epoch(self)

    monkeypatch.setattr(trainer.Trainer, "finish_epoch", fail)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "parts", "--epochs", "4")
    monkeypatch.undo()
    parts = folder_of(tmp_path / "parts")
    assert len(rows_of(parts)) == 2

    assert run(tmp_path / "parts", "--epochs", "4") == 0
    assert "resuming in epoch 2 after step 12" in capsys.readouterr().out
    assert_same_run(parts, folder_of(tmp_path / "whole"))


def test_a_checkpoint_holds_the_average_and_the_model_is_rebuilt_from_it(tmp_path):
    run(tmp_path, "--ema", "0.9")
    folder = folder_of(tmp_path)
    state = checkpoints.load_checkpoint(folder / "last.pt")
    assert not torch.equal(state["average"]["head.weight"], state["model"]["head.weight"])

    rebuilt = checkpoints.rebuild_model(state)
    assert torch.equal(rebuilt.head.weight, state["average"]["head.weight"])


def test_muon_and_drop_path_are_in_the_checkpoint(tmp_path):
    run(tmp_path, "--optimizer", "muon", "--drop_path", "0.2", "--epochs", "1")
    state = checkpoints.load_checkpoint(folder_of(tmp_path) / "last.pt")
    assert len(state["optimizers"]) == len(state["schedulers"]) == 2
    assert state["model_config"]["drop_path"] == 0.2

    blocks = checkpoints.rebuild_model(state).blocks
    survival = [getattr(block.drop_path, "survival", torch.ones(())).item() for block in blocks]
    assert survival == pytest.approx([1, 1 - 0.2 / 3, 1 - 0.4 / 3, 0.8])


def test_stochastic_depth_skips_whole_images():
    torch.manual_seed(0)
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**size, dropout=0.0, drop_path=0.5)
    images = torch.randn(1, 3, 8, 8).expand(64, -1, -1, -1)  # 64 times the same one

    def distinct_outputs():
        return {tuple(row.tolist()) for row in model(images).detach()}

    model.train()
    assert len(distinct_outputs()) == 4  # with and without each of the last block's two branches
    model.eval()
    assert len(distinct_outputs()) == 1


def test_a_second_writer_is_refused(tmp_path):
    refused = pytest.raises(utils.BusyError, match="another process is writing")
    with run_folder.only_writer(folder_of(tmp_path)), refused as caught:
        run(tmp_path)
    assert caught.value.exit_code == utils.EXIT_BUSY
    assert run(tmp_path, "--epochs", "1") == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_the_error_for_running_out_of_memory_says_what_to_do(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(trainer.Trainer, "train_step", fail)
    with pytest.raises(utils.OutOfMemoryError, match="--grad_accumulation 2") as caught:
        run(tmp_path)
    assert caught.value.exit_code == utils.EXIT_OUT_OF_MEMORY


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_after_a_damaged_checkpoint_the_run_resumes_from_the_previous_one(
    reference, tmp_path, monkeypatch, damage, capsys
):
    stop_after(monkeypatch, 17)
    assert run(tmp_path, *STRONG) == utils.EXIT_AGAIN
    monkeypatch.undo()

    last = folder_of(tmp_path) / "last.pt"
    content = last.read_bytes()
    damaged = {"truncated": content[:-1000], "empty": b"", "garbage": b"x" * 5000}
    last.write_bytes(damaged[damage])
    assert run(tmp_path, *STRONG) == 0

    captured = capsys.readouterr()
    assert "set aside as last.pt.damaged" in captured.err
    assert "resuming in epoch 2 after step 12" in captured.out
    assert rows_of(folder_of(tmp_path)) == rows_of(reference)


def test_the_death_of_the_parent_is_a_request_to_stop(monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    monkeypatch.setenv(PARENT, str(dead.pid))

    stop = StopRequest()
    with stop.listening():
        for _ in range(100):
            if stop.reason:
                break
            signal.sigtimedwait([], 0.05)

    assert stop.reason == "the sweep is gone"


# --------------------------------------------------------------------------------------------------
# Several processes


def start_torchrun(num_processes, *arguments, **options):
    return processes.start_torchrun(num_processes, *DIGITS, *arguments, **options)


def torchrun(num_processes, *arguments, **options):
    return processes.torchrun(num_processes, *DIGITS, *arguments, **options)


def wait_for_epoch(folder, number):
    def is_done():
        return (folder / "metrics.jsonl").exists() and len(rows_of(folder)) >= number

    wait_for(is_done, seconds=120)


def test_two_processes_train_as_one(reference, tmp_path):
    """On the same global batches, among them mixed ones and the smaller last one of an epoch."""
    code, out, err = torchrun(2, "--output_dir", str(tmp_path), *STRONG)
    assert code == 0, err
    assert out.count("finished: ") == 1
    assert_close(folder_of(tmp_path), reference, 1e-3)

    state = checkpoints.load_checkpoint(folder_of(tmp_path) / "last.pt")
    assert len(state["ranks"]) == 2
    for name, weight in weights_of(reference).items():
        torch.testing.assert_close(state["model"][name], weight, atol=2e-3, rtol=1e-2)


def test_two_processes_resume_the_run_of_one(reference, tmp_path, monkeypatch):
    stop_after(monkeypatch, 17)
    assert run(tmp_path, *STRONG) == utils.EXIT_AGAIN

    code, out, err = torchrun(2, "--output_dir", str(tmp_path), *STRONG)
    assert code == 0, err
    assert "resuming in epoch 2 after step 17" in out
    assert_close(folder_of(tmp_path), reference, 1e-3)


def test_two_processes_with_a_mask_are_stopped_and_resume_exactly(tmp_path):
    """The process that started them gets signal after signal, as from Slurm."""
    mask = ["--mask_type", "2d_cardinal", "--expansion_step", "1"]
    options = [*STRONG, *mask, "--epochs", "8", "--output_dir"]
    launcher = ["sweep/torchrun.py"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    code, _, err = torchrun(2, *options, str(whole), by=launcher)
    assert code == 0, err

    interrupted = start_torchrun(2, *options, str(parts), by=launcher)
    try:
        wait_for_epoch(folder_of(parts, "2d_cardinal_expansion_1"), 1)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            interrupted.send_signal(number)
            time.sleep(0.02)
        out, err = interrupted.communicate(timeout=60)
    finally:
        interrupted.kill()
    assert interrupted.returncode == utils.EXIT_AGAIN, err
    assert out.count("stopped (") == 1

    code, out, err = torchrun(2, *options, str(parts), by=launcher)
    assert code == 0, err
    assert "resuming in epoch" in out
    assert_same_run(*(folder_of(output, "2d_cardinal_expansion_1") for output in (parts, whole)))


def test_only_processes_on_gpus_need_one_gpu_each(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "LOCAL_RANK", 1)

    assert main.main([*DIGITS, "--device", "cpu", "--dry_run"]) == 0
    with pytest.raises(utils.UsageError, match="there are 1 GPUs"):
        main.main([*DIGITS, "--device", "cuda", "--dry_run"])


def test_a_process_that_dies_ends_the_run_with_a_message(tmp_path):
    options = [*STRONG, "--epochs", "20", "--output_dir", str(tmp_path)]
    folder = folder_of(tmp_path)
    process = start_torchrun(2, *options)
    try:
        wait_for_epoch(folder, 2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()

    assert process.returncode == 1
    assert err.count("has lost the other processes of this run") == 1, err
    assert not (folder / "summary.json").exists()
    assert checkpoints.load_checkpoint(folder / "last.pt")["epoch"] > 1

    code, out, err = torchrun(2, *options)
    assert code == 0, err
    assert "resuming in epoch" in out
    assert [row["epoch"] for row in rows_of(folder)] == list(range(1, 21))
    with run_folder.only_writer(folder):  # the lock is free
        pass


# --------------------------------------------------------------------------------------------------
# Speed


def test_steps_that_compile_do_not_lower_the_throughput(tmp_path, monkeypatch):
    """There are two: the last batch of an epoch is smaller, and compiled on its own."""
    train_step = trainer.Trainer.train_step
    compiled_sizes = set()

    def compiling(self, images, labels):
        if len(images) not in compiled_sizes:
            compiled_sizes.add(len(images))
            time.sleep(1)
        train_step(self, images, labels)

    monkeypatch.setattr(trainer.Trainer, "train_step", compiling)
    assert run(tmp_path) == 0
    assert len(compiled_sizes) == 2

    first, second = utils.read_json_lines(folder_of(tmp_path) / "metrics.jsonl")
    assert first["compile_seconds"] > 2
    assert second["compile_seconds"] == 0
    assert 0.2 < first["train_images_per_second"] / second["train_images_per_second"] < 5


@pytest.mark.cuda
def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    train_step = trainer.Trainer.train_step
    num_steps = 0

    def watched(self, *args):
        nonlocal num_steps
        num_steps += 1
        torch.cuda.set_sync_debug_mode("error" if num_steps > 2 else "default")
        try:
            train_step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.Trainer, "train_step", watched)
    options = ["--device", "cuda", "--ema", "0.9", "--compile", "off"]
    assert run(tmp_path, *STRONG, *options) == 0
    assert num_steps == 24


# --------------------------------------------------------------------------------------------------
# Signals and files


def test_a_second_ctrl_c_ends_at_once(capfd):
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        assert stop.by_keyboard is True
        assert "press Ctrl-C again to stop at once" in capfd.readouterr().err

        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_saved_even_if_nobody_reads_its_output(tmp_path, number):
    """As in `main.py 2>&1 | tee log`, where Ctrl-C ends tee as well.

    SIGTERM is sent again and again until the process has exited.
    """
    read_end, write_end = os.pipe()
    command = [sys.executable, "main.py", *DIGITS, "--epochs", "500", "--output_dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=utils.REPOSITORY, stdout=write_end, stderr=write_end)
    os.close(write_end)
    wait_for_epoch(folder_of(tmp_path), 1)
    os.close(read_end)

    last = folder_of(tmp_path) / "last.pt"
    saved_at = last.stat().st_mtime_ns
    process.send_signal(number)
    while number == signal.SIGTERM and process.poll() is None:
        process.send_signal(number)
        time.sleep(0.01)

    assert process.wait(60) == (130 if number == signal.SIGINT else utils.EXIT_AGAIN)
    assert last.stat().st_mtime_ns > saved_at


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EIO, "EIO"),
        OSError(errno.EMFILE, ""),
        RuntimeError("DefaultCPUAllocator: no"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch, error):
    def checkpoint_files():
        return sorted(path.name for path in folder_of(tmp_path).glob("*.pt*"))

    assert run(tmp_path, "--epochs", "1") == 0
    (folder_of(tmp_path) / "summary.json").unlink()
    files = checkpoint_files()

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with pytest.raises((OSError, utils.UserError, MemoryError)):
            run(tmp_path, "--epochs", "1")

    assert checkpoint_files() == files
    assert run(tmp_path, "--epochs", "1") == 0
