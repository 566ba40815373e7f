"""--track: runs as TensorBoard, Weights & Biases and Trackio have them, offline.

The packages are the real ones; tests of one that is not installed are skipped.
"""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import torchrun, wait_for

import main
import utils
from training import checkpoints, tracking, trainer
from training.settings import MAY_CHANGE
from training.tracking import Tracker

SHAPE = ["--img_size", "8", "--patch_size", "4", "--depth", "1"]
DIGITS = ["--dataset", "digits", "--model", "vit_micro", *SHAPE, "--device", "cpu"]
SHORT = [*DIGITS, "--batch_size", "256", "--lr", "2e-3", "--seed", "3"]
FOLDER = Path("digits", "full", "seed_3")

PACKAGES = [name for name in tracking.TRACKERS if name != "none"]
CURVES = {
    *("train/loss", "train/accuracy", "train/images_per_second", "lr", "epoch_seconds"),
    *("eval/loss", "eval/accuracy", "eval/images_per_second"),
}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Nothing of the user's is read or written, and no server is known."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb_cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=PACKAGES)
def name(request, tmp_path, monkeypatch):
    """A tracker whose package is installed."""
    pytest.importorskip(request.param)
    if request.param == "trackio":  # it reads TRACKIO_DIR once, when it is imported
        modules = [sys.modules[name] for name in list(sys.modules) if name.startswith("trackio")]
        for module in modules:
            for key, path in (("TRACKIO_DIR", "trackio"), ("MEDIA_DIR", "trackio/media")):
                if hasattr(module, key):
                    monkeypatch.setattr(module, key, tmp_path / path)
    return request.param


# --------------------------------------------------------------------------------------------------
# What a tracker has of a run: (config, {name of a curve: [(step, value), ...]})


def read(name, folder):
    readers = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}
    return readers[name](folder)


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"tensors": 0, "scalars": 0, "images": 0}  # all
    events = EventAccumulator(str(folder), sizes, purge_orphaned_data=False)
    events.Reload()
    tags = events.Tags()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    curves |= {tag: [(e.step, e.width) for e in events.Images(tag)] for tag in tags["images"]}
    (config,) = events.Tensors("config/text_summary")
    return json.loads(config.tensor_proto.string_val[0]), curves


def read_wandb(folder):
    """From the file that would be uploaded."""
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    # wandb writes in a process of its own, which may still be at it.
    wait_for(lambda: any(record.HasField("exit") for record in wandb_records(file)), seconds=20)
    config, curves = {}, {}
    for record in wandb_records(file):
        for item in record.run.config.update:
            config[item.key or item.nested_key[0]] = json.loads(item.value_json)
        step = record.history.step.num
        for item in record.history.item:
            names = list(item.nested_key) or [item.key]
            if names[0].startswith("_") or names[1:] not in ([], ["width"]):
                continue
            curves.setdefault(names[0], []).append((step, json.loads(item.value_json)))
        for item in record.summary.update:
            names = list(item.nested_key) or [item.key]
            if names[0].startswith("final/"):  # the latest value counts
                curves[names[0]] = [(None, json.loads(item.value_json))]
    return config, curves


def wandb_records(file):
    """The records in the log format of LevelDB: blocks of 32 KiB, checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(raw):
        left = 2**15 - position % 2**15
        if left < 7:  # too little for a header
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[position : position + 7])
        parts += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def read_trackio(folder):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = [run for run in trackio.Api().runs("digits") if run.name == "full seed 3"]
    curves = {}
    for row in SQLiteStorage.get_logs("digits", run.name, run_id=run.id):
        for key, value in row.items():
            if key not in ("step", "timestamp"):
                curves.setdefault(key, []).append((row["step"], value))
    return run.config, curves


# --------------------------------------------------------------------------------------------------
# A whole run


def run(output, *arguments):
    assert main.main([*SHORT, "--output_dir", str(output), *arguments]) == 0
    return output / FOLDER


def rows_of(folder):
    return utils.read_json_lines(folder / utils.METRICS)


def result_of(folder):
    """Everything that is no measurement of time or memory, and the weights."""
    measured = ("seconds", "per_second", "memory_bytes")
    rows = [
        {key: value for key, value in row.items() if not key.endswith(measured)}
        for row in rows_of(folder)
    ]
    return rows, checkpoints.load_checkpoint(folder / "last.pt")["model"]


def test_a_tracker_has_every_epoch_the_mask_and_the_final_numbers(name, tmp_path, capsys):
    folder = run(tmp_path, "--epochs", "2", "--track", name)
    output, errors = capsys.readouterr()
    assert f"tracked by {name}: {name.replace('board', 'board --logdir').split()[0]}" in output
    assert "warning" not in errors
    config, curves = read(name, folder)

    assert config["mask_type"] == "full"
    assert config["num_parameters"] == utils.read_json(folder / utils.CONFIG)["num_parameters"]
    assert set(curves) >= CURVES
    for row in rows_of(folder):
        for curve in CURVES:
            step, value = curves[curve][row["epoch"] - 1]
            assert step == row["epoch"]
            assert value == pytest.approx(row[curve.replace("/", "_")], rel=1e-6)
    assert len(curves["attention_mask"]) == 1

    summary = utils.read_json(folder / utils.SUMMARY)
    for key, value in [
        ("final/eval_accuracy", summary["final"]["eval_accuracy"]),
        ("final/train_images_per_second", summary["train_images_per_second"]),
        ("final/total_seconds", summary["total_seconds"]),
    ]:
        ((_, found),) = curves[key]
        assert found == pytest.approx(value, rel=1e-6)


def test_tracking_changes_no_result(name, tmp_path):
    plain_rows, plain_weights = result_of(run(tmp_path / "plain", "--epochs", "2"))
    rows, weights = result_of(run(tmp_path / "tracked", "--epochs", "2", "--track", name))
    assert rows == plain_rows
    assert all(torch.equal(weights[key], plain_weights[key]) for key in plain_weights)


def test_a_run_may_begin_without_and_go_on_with_a_tracker(name, tmp_path, monkeypatch):
    """The epochs before are there as well."""

    class KilledError(Exception):
        pass

    def save_and_die(folder, state):
        checkpoints.save_checkpoint(folder, state)
        if state["epoch"] == 3:  # the one that comes next
            raise KilledError

    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(trainer, "save_checkpoint", save_and_die)
    with pytest.raises(KilledError):
        run(tmp_path, "--epochs", "3")
    monkeypatch.setattr(trainer, "save_checkpoint", checkpoints.save_checkpoint)
    folder = run(tmp_path, "--epochs", "3", "--track", name)

    _, curves = read(name, folder)
    expected = [(row["epoch"], pytest.approx(row["eval_loss"])) for row in rows_of(folder)]
    assert curves["eval/loss"] == expected
    assert len(expected) == 3


def test_only_the_first_process_tracks(tmp_path):
    pytest.importorskip("tensorboard")
    options = ["--output_dir", str(tmp_path), "--epochs", "1", "--track", "tensorboard"]
    code, out, err = torchrun(2, *SHORT, *options)
    assert code == 0, err
    assert out.count("tracked by") == 1
    assert len(list((tmp_path / FOLDER).glob(tracking.TensorBoard.FILES))) == 1
    assert len(read_tensorboard(tmp_path / FOLDER)[1]["eval/loss"]) == 1


# --------------------------------------------------------------------------------------------------
# Resuming, without training


@pytest.fixture
def folder(tmp_path):
    """The folder of a run that has just begun."""
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    config = {
        "settings": {"mask_type": "full", "seed": 3, "expansion_step": None},
        "num_parameters": 7,
        "attention": {"num_neighbors_nominal": 4, "num_neighbors_mean": 4.0, "backend": "dense"},
        "provenance": {"device": "Abacus"},
    }
    utils.write_json(folder / utils.CONFIG, config)
    return folder


def history_of(epochs, loss=1.0):
    return [{"epoch": epoch, "step": 5 * epoch, "eval_loss": loss / epoch} for epoch in epochs]


def begin(name, folder, history):
    tracker = Tracker(name)
    tracker.begin(folder, utils.read_json(folder / utils.CONFIG), history)
    assert tracker.backend is not None
    return tracker


KILLED = """
import os, signal, sys
from pathlib import Path
import utils
from training.tracking import Tracker
name, folder = sys.argv[1], Path(sys.argv[2])
tracker = Tracker(name)
tracker.begin(folder, utils.read_json(folder / utils.CONFIG), [])
for epoch in (1, 2, 3):
    tracker.log_epoch({"epoch": epoch, "step": 5 * epoch, "eval_loss": 9.0})
if name == "trackio":  # it writes twice a second
    __import__("time").sleep(1.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("num_saved", [0, 2, 3, 4])
def test_a_resumed_run_has_each_epoch_once(name, folder, num_saved):
    """Whether the tracker was ahead of the checkpoint when it was killed, or behind."""
    # A service that this process has started would go on holding the run that was killed.
    environment = {key: value for key, value in os.environ.items() if "_SERVICE" not in key}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, name, str(folder)],
        cwd=utils.REPOSITORY,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr

    tracker = begin(name, folder, history_of(range(1, num_saved + 1)))
    for row in history_of(range(num_saved + 1, 6)):
        tracker.log_epoch(row)
    tracker.close()
    expected = [(row["epoch"], pytest.approx(row["eval_loss"])) for row in history_of(range(1, 6))]
    assert read(name, folder)[1]["eval/loss"] == expected


def test_resuming_twice(name, folder):
    for start in (1, 3, 5):
        tracker = begin(name, folder, history_of(range(1, start)))
        for row in history_of((start, start + 1)):
            tracker.log_epoch(row)
        tracker.close()
    steps = [step for step, _ in read(name, folder)[1]["eval/loss"]]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_of_the_same_name_elsewhere_is_left_alone(name, folder, tmp_path):
    """As in a second sweep with another --output_dir."""
    other = tmp_path / "other" / FOLDER
    other.mkdir(parents=True)
    utils.write_json(other / utils.CONFIG, utils.read_json(folder / utils.CONFIG))
    for place, loss in ((folder, 1.0), (other, 2.0), (folder, 1.0)):
        begin(name, place, history_of((1, 2), loss)).close()

    if name != "trackio":
        assert [value for _, value in read(name, folder)[1]["eval/loss"]] == [1.0, 0.5]
        assert [value for _, value in read(name, other)[1]["eval/loss"]] == [2.0, 1.0]
        return
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    runs = list(trackio.Api().runs("digits"))
    assert [run.name for run in runs] == ["full seed 3", "full seed 3"]
    logs = [SQLiteStorage.get_logs("digits", run.name, run_id=run.id) for run in runs]
    assert sorted([row["eval/loss"] for row in rows] for rows in logs) == [[1.0, 0.5], [2.0, 1.0]]


def test_parts_that_were_uploaded_stay(folder):
    pytest.importorskip("wandb")
    begin("wandb", folder, []).close()
    (part,) = (folder / "wandb").glob("offline-run-*")
    (uploaded,) = part.glob("*.wandb")
    uploaded.with_name(uploaded.name + ".synced").touch()
    part = part.rename(part.with_name(part.name.replace("offline-run-2", "offline-run-1")))
    begin("wandb", folder, history_of((1,))).close()
    assert part.exists()
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2


# --------------------------------------------------------------------------------------------------
# What can go wrong


class Faulty:
    """A backend that fails in one of its methods."""

    where = "nowhere"

    def __init__(self, failing):
        self.failing = failing
        self.calls = []

    def __call__(self, run):
        self._do("begin")
        return self

    def log(self, row):
        self._do("log")

    def finish(self, numbers, epoch):
        self._do("finish")

    def close(self):
        self._do("close")

    def _do(self, name):
        self.calls.append(name)
        print("talks a lot")
        if name == self.failing:
            raise RuntimeError("the server\nis down")


@pytest.mark.parametrize(
    ("failing", "calls"),
    [
        ("begin", ["begin"]),
        ("log", ["begin", "log"]),
        ("finish", ["begin", "log", "log", "finish"]),
        ("close", ["begin", "log", "log", "finish", "close"]),
        (None, ["begin", "log", "log", "finish", "close"]),
    ],
)
def test_a_failure_is_one_warning_and_the_training_goes_on(
    tmp_path, monkeypatch, capsys, failing, calls
):
    faulty = Faulty(failing)
    monkeypatch.setitem(tracking.BACKENDS, "wandb", faulty)
    monkeypatch.setattr(tracking, "check_installed", lambda name: None)
    folder = run(tmp_path, "--epochs", "2", "--track", "wandb")

    assert (folder / utils.SUMMARY).exists()
    assert faulty.calls == calls
    output, errors = capsys.readouterr()
    assert "talks a lot" not in output
    if failing is None:
        assert errors == ""
        return
    (warning,) = errors.splitlines()
    expected = "training goes on without --track wandb, which failed: the server"
    assert warning.endswith(expected)


def test_ids_that_cannot_be_read_are_one_warning(folder, capsys):
    pytest.importorskip("wandb")
    (folder / tracking.IDS).write_text("[")
    Tracker("wandb").begin(folder, utils.read_json(folder / utils.CONFIG), [])
    (warning,) = capsys.readouterr().err.splitlines()
    assert "training goes on without --track wandb" in warning


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_package_is_named_before_anything_starts(
    missing, tmp_path, monkeypatch, run_script
):
    monkeypatch.setitem(sys.modules, missing, None)
    options = ["--output_dir", str(tmp_path), "--track", missing]
    code, _, err = run_script(main.main, *SHORT, *options)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert f"pip install '{tracking.REQUIREMENTS[missing]}'" in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_named_like_a_package_is_none(tmp_path, monkeypatch):
    """wandb leaves such folders behind where it runs."""
    (tmp_path / "not_installed").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(tracking.REQUIREMENTS, "not_installed", "not_installed>=1")
    with pytest.raises(utils.UserError, match="needs the package not_installed"):
        tracking.check_installed("not_installed")


def test_an_unknown_tracker_is_a_usage_error(run_script):
    code, _, err = run_script(main.main, *SHORT, "--track", "mlflow")
    assert code == 2
    assert "invalid choice: 'mlflow'" in err


def test_tracking_is_no_part_of_the_result():
    assert "track" in MAY_CHANGE


def test_the_tests_install_what_the_message_asks_for():
    lines = (utils.REPOSITORY / "requirements-dev.txt").read_text().splitlines()
    assert {tracking.REQUIREMENTS[name] for name in ("tensorboard", "wandb")} <= set(lines)
