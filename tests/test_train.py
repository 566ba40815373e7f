"""The training loop: micro-batches, processes, stops within an epoch, averaged weights, no waiting for the device."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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

DIGITS = [
    *("--dataset", "digits", "--model", "vit_micro", "--img_size", "8", "--patch_size", "2", "--device", "cpu"),
    *("--batch_size", "128", "--lr", "2e-3", "--epochs", "2", "--dropout", "0"),
]
TIMES = ("seconds", "per_second", "memory")


def run(output, *arguments):
    return main.main([*DIGITS, "--output_dir", str(output), *arguments])


def folder_of(output, name="full"):
    return output / "digits" / name / "seed_0"


def rows_of(folder):
    """The rows of metrics.jsonl, without what a clock measured."""
    rows = utils.read_json_lines(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not any(word in key for word in TIMES)} for row in rows]


def weights_of(folder):
    return checkpoints.load_checkpoint(folder / "last.pt")["model"]


def assert_close(rows, others, tolerance=1e-4):
    for row, other in zip(rows, others, strict=True):
        for key in ("train_loss", "eval_loss"):
            assert row[key] == pytest.approx(other[key], rel=tolerance), key


STRONG = ["--policy", "rand", "--mix", "0.5", "--mix_off", "0.5", "--random_erasing", "0.3"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run of one process with mixing in its first epoch."""
    output = tmp_path_factory.mktemp("reference")
    assert run(output, *STRONG) == 0
    return folder_of(output)


@pytest.mark.parametrize("options", [["--grad_accumulation", "3"], ["--checkpoint_activations"], ["--log_every", "5"]])
def test_ways_of_computing_give_the_same_run(reference, tmp_path, options, capsys):
    assert run(tmp_path, *STRONG, *options) == 0
    assert_close(rows_of(folder_of(tmp_path)), rows_of(reference))
    if "--log_every" in options:
        assert "epoch 1/2, step 10/12: loss 2." in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--ema 0.9", "--optimizer muon", "--drop_path 0.3", "--device_data_limit 0"])
def test_ways_of_training_learn_and_resume_exactly(tmp_path, monkeypatch, option):
    options = option.split()
    assert run(tmp_path / "whole", *options) == 0
    stop_after(monkeypatch, 17)  # in the second epoch
    assert run(tmp_path / "parts", *options) == utils.EXIT_AGAIN
    monkeypatch.undo()
    assert run(tmp_path / "parts", *options) == 0
    whole, parts = folder_of(tmp_path / "whole"), folder_of(tmp_path / "parts")
    assert rows_of(parts) == rows_of(whole)
    assert rows_of(whole)[1]["train_loss"] < rows_of(whole)[0]["train_loss"]
    assert all(torch.equal(weights_of(parts)[name], weight) for name, weight in weights_of(whole).items())


def stop_after(monkeypatch, num_steps, number=signal.SIGTERM):
    """Send this process a signal in a training step."""
    step, count = trainer.Trainer.train_step, []

    def counted(self, *args):
        step(self, *args)
        count.append(1)
        if len(count) == num_steps:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer.Trainer, "train_step", counted)


STOPS = [(step, signal.SIGTERM) for step in (1, 5, 11, 12, 13, 23, 24)] + [(5, signal.SIGUSR1), (5, signal.SIGINT)]


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
    assert [row["epoch"] for row in rows_of(folder)] == list(range(1, (num_steps - 1) // 12 + 1))
    monkeypatch.undo()
    torch.manual_seed(99)
    assert run(tmp_path, *STRONG) == 0
    assert rows_of(folder) == rows_of(reference)
    assert all(torch.equal(weights_of(folder)[name], weight) for name, weight in weights_of(reference).items())


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_stopped_in_an_evaluation_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, ema):
    assert run(tmp_path / "whole", "--ema", ema) == 0
    eval_batches, count = data.eval_batches, []

    def counted(*args):
        for batch in eval_batches(*args):
            count.append(1)
            if len(count) == 5:  # of 3 an epoch
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(data, "eval_batches", counted)
    assert run(tmp_path / "parts", "--ema", ema) == utils.EXIT_AGAIN
    whole, parts = folder_of(tmp_path / "whole"), folder_of(tmp_path / "parts")
    assert len(rows_of(parts)) == 1
    assert run(tmp_path / "parts", "--ema", ema) == 0
    assert len(count) == 5 + 3
    assert rows_of(parts) == rows_of(whole)
    assert all(torch.equal(weights_of(parts)[name], weight) for name, weight in weights_of(whole).items())


def test_a_signal_in_the_last_save_does_not_stop_a_run_that_is_done(tmp_path, monkeypatch):
    save = trainer.save_checkpoint

    def signalled(folder, state):
        if state["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        save(folder, state)

    monkeypatch.setattr(trainer, "save_checkpoint", signalled)
    assert run(tmp_path) == 0
    assert (folder_of(tmp_path) / "summary.json").exists()


def test_long_epochs_are_saved_within(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        trainer, "save_checkpoint", lambda folder, state: saved.append((state["epoch"], state["epoch_step"]))
    )
    assert run(tmp_path, "--epochs", "1", "--checkpoint_every_minutes", "1e-9") == 0
    assert saved == [*((1, step) for step in range(1, 12)), (2, 0)]


def test_the_average_is_what_is_evaluated(tmp_path):
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
    assert [getattr(block.drop_path, "p", 0.0) for block in blocks] == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])


def test_stochastic_depth_skips_whole_images():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, dropout=0.0, drop_path=0.5)
    images = torch.randn(1, 3, 8, 8).expand(64, -1, -1, -1)
    outputs = {tuple(row.tolist()) for row in model.train()(images).detach()}
    assert len(outputs) == 4  # the last block's two branches are there or not
    assert len({tuple(row.tolist()) for row in model.eval()(images).detach()}) == 1


def test_another_writer_is_refused(tmp_path):
    folder = folder_of(tmp_path)
    with run_folder.only_writer(folder), pytest.raises(utils.BusyError, match="another process is writing") as caught:
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
def test_running_out_of_memory_says_what_to_do(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(trainer.Trainer, "train_step", fail)
    with pytest.raises(utils.OutOfMemoryError, match="--grad_accumulation 2") as caught:
        run(tmp_path)
    assert caught.value.exit_code == utils.EXIT_OUT_OF_MEMORY


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(reference, tmp_path, monkeypatch, damage, capsys):
    stop_after(monkeypatch, 17)
    assert run(tmp_path, *STRONG) == utils.EXIT_AGAIN
    monkeypatch.undo()
    last = folder_of(tmp_path) / "last.pt"
    content = last.read_bytes()
    last.write_bytes({"truncated": content[:-1000], "empty": b"", "garbage": b"x" * 5000}[damage])
    assert run(tmp_path, *STRONG) == 0
    captured = capsys.readouterr()
    assert "set aside as last.pt.damaged" in captured.err
    assert "resuming in epoch 2 after step 12" in captured.out
    assert rows_of(folder_of(tmp_path)) == rows_of(reference)


def test_the_death_of_the_parent_is_a_request_to_stop(monkeypatch):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    monkeypatch.setenv(PARENT, str(done.pid))
    stop = StopRequest()
    with stop.listening():
        for _ in range(100):
            if stop.reason:
                break
            signal.sigtimedwait([], 0.05)
    assert stop.reason == "the sweep is gone"


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


def start_torchrun(num_processes, *arguments, by=("-m", "torch.distributed.run")):
    command = [sys.executable, *by, "--standalone", "--nproc_per_node", str(num_processes), "main.py", *DIGITS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *arguments], cwd=utils.REPOSITORY, env=environment, **how)


def torchrun(num_processes, *arguments, **how):
    """To the end -> (exit code, stdout, stderr)."""
    whole = start_torchrun(num_processes, *arguments, **how)
    try:
        out, err = whole.communicate(timeout=300)
    finally:
        whole.kill()
    return whole.returncode, out, err


def wait_for_epoch(folder, number):
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(rows_of(folder)) >= number, seconds=120)


def test_two_processes_train_as_one(reference, tmp_path):
    """The same global batch, the last of an epoch smaller and mixed batches among them."""
    code, out, err = torchrun(2, "--output_dir", str(tmp_path), *STRONG)
    assert code == 0, err
    assert out.count("finished: ") == 1
    assert_close(rows_of(folder_of(tmp_path)), rows_of(reference), 1e-3)
    state = checkpoints.load_checkpoint(folder_of(tmp_path) / "last.pt")
    assert len(state["ranks"]) == 2
    for name, weight in weights_of(reference).items():
        torch.testing.assert_close(state["model"][name], weight, atol=2e-3, rtol=1e-2)


def test_two_processes_stop_and_resume_as_one(reference, tmp_path, monkeypatch):
    stop_after(monkeypatch, 17)
    assert run(tmp_path, *STRONG) == utils.EXIT_AGAIN  # by one process
    code, out, err = torchrun(2, "--output_dir", str(tmp_path), *STRONG)
    assert code == 0, err
    assert "resuming in epoch 2 after step 17" in out
    assert_close(rows_of(folder_of(tmp_path)), rows_of(reference), 1e-3)


def test_two_processes_with_a_mask_are_stopped_and_resume_exactly(tmp_path):
    """By signals that come again and again, as Slurm's do, to the process that started the others."""
    options = [*STRONG, "--mask_type", "2d_cardinal", "--expansion_step", "1", "--epochs", "8"]
    whole, parts = (folder_of(tmp_path / name, "2d_cardinal_expansion_1") for name in ("whole", "parts"))
    code, _, err = torchrun(2, "--output_dir", str(tmp_path / "whole"), *options, by=["sweep/torchrun.py"])
    assert code == 0, err
    first = start_torchrun(2, "--output_dir", str(tmp_path / "parts"), *options, by=["sweep/torchrun.py"])
    try:
        wait_for_epoch(parts, 1)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            first.send_signal(number)
            time.sleep(0.02)
        out, err = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == utils.EXIT_AGAIN, err
    assert out.count("stopped (") == 1
    code, out, err = torchrun(2, "--output_dir", str(tmp_path / "parts"), *options, by=["sweep/torchrun.py"])
    assert code == 0, err
    assert "resuming in epoch" in out
    assert rows_of(parts) == rows_of(whole)
    assert all(torch.equal(weights_of(parts)[name], weight) for name, weight in weights_of(whole).items())


def test_processes_on_the_cpu_need_no_gpu_each(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "LOCAL_RANK", 1)
    assert main.main([*DIGITS, "--device", "cpu", "--dry_run"]) == 0
    with pytest.raises(utils.UsageError, match="there are 1 GPUs"):
        main.main([*DIGITS, "--device", "cuda", "--dry_run"])


def test_first_steps_are_not_counted_as_speed(tmp_path, monkeypatch):
    """The last batch of an epoch is smaller, and compiled once more."""
    step, slow = trainer.Trainer.train_step, set()

    def compiling(self, images, labels):
        if len(images) not in slow:
            slow.add(len(images))
            time.sleep(1)
        step(self, images, labels)

    monkeypatch.setattr(trainer.Trainer, "train_step", compiling)
    assert run(tmp_path) == 0
    assert len(slow) == 2
    first, second = utils.read_json_lines(folder_of(tmp_path) / "metrics.jsonl")
    assert first["compile_seconds"] > 2
    assert second["compile_seconds"] == 0
    assert 0.2 < first["train_images_per_second"] / second["train_images_per_second"] < 5


@pytest.mark.cuda
def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    step, count = trainer.Trainer.train_step, []

    def watched(self, *args):
        count.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(count) > 2 else "default")
        try:
            step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.Trainer, "train_step", watched)
    assert run(tmp_path, *STRONG, "--device", "cuda", "--ema", "0.9", "--compile", "off") == 0
    assert len(count) == 24


def test_a_process_that_dies_ends_the_run_with_a_message(tmp_path):
    options = [*STRONG, "--epochs", "20", "--output_dir", str(tmp_path)]
    whole = start_torchrun(2, *options)
    try:
        wait_for_epoch(folder_of(tmp_path), 2)
        children = Path(f"/proc/{whole.pid}/task/{whole.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        _, err = whole.communicate(timeout=60)
    finally:
        whole.kill()
    assert whole.returncode == 1
    assert err.count("has lost the other processes of this run") == 1, err
    assert not (folder_of(tmp_path) / "summary.json").exists()
    assert checkpoints.load_checkpoint(folder_of(tmp_path) / "last.pt")["epoch"] > 1
    code, out, err = torchrun(2, *options)
    assert code == 0, err
    assert "resuming in epoch" in out
    assert [row["epoch"] for row in rows_of(folder_of(tmp_path))] == list(range(1, 21))
    with run_folder.only_writer(folder_of(tmp_path)):  # the lock is free
        pass


def test_a_second_ctrl_c_ends_at_once(capfd):
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.reason, stop.by_keyboard) == ("SIGINT", True)
        assert "press Ctrl-C again to stop at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_saved_also_when_nobody_reads_the_output(tmp_path, number):
    """As in `main.py 2>&1 | tee log`, where Ctrl-C ends tee as well; and asked once more while it leaves."""
    read, write = os.pipe()
    command = [sys.executable, "main.py", *DIGITS, "--epochs", "500", "--output_dir", str(tmp_path)]
    run = subprocess.Popen(command, cwd=utils.REPOSITORY, stdout=write, stderr=write)
    os.close(write)
    wait_for_epoch(folder_of(tmp_path), 1)
    os.close(read)
    saved = (folder_of(tmp_path) / "last.pt").stat().st_mtime_ns
    run.send_signal(number)
    while number == signal.SIGTERM and run.poll() is None:
        run.send_signal(number)
        time.sleep(0.01)
    assert run.wait(60) == (130 if number == signal.SIGINT else utils.EXIT_AGAIN)
    assert (folder_of(tmp_path) / "last.pt").stat().st_mtime_ns > saved


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(5, "EIO"), RuntimeError("DefaultCPUAllocator: no"), OSError(24, "")]
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, error):
    assert run(tmp_path, "--epochs", "1") == 0
    (folder_of(tmp_path) / "summary.json").unlink()
    files = sorted(path.name for path in folder_of(tmp_path).glob("*.pt*"))

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with pytest.raises((OSError, utils.UserError, MemoryError)):
            run(tmp_path, "--epochs", "1")
    assert sorted(path.name for path in folder_of(tmp_path).glob("*.pt*")) == files
    assert run(tmp_path, "--epochs", "1") == 0
