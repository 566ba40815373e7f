"""One run on the bundled digits, end to end: run folder, resume, refusals, evaluation, flags."""

import json
import math

import pytest
import torch

import eval as evaluation
import main
import utils
from main import parse_args, resolve_settings
from training import checkpoints, run_folder, trainer

DIGITS = [
    *("--dataset", "digits", "--model", "vit_micro", "--img_size", "8", "--patch_size", "2"),
    *("--device", "cpu", "--batch_size", "256", "--lr", "2e-3", "--epochs", "3"),
]
LOCAL = ["--mask_type", "2d_cardinal", "--expansion_step", "1"]
LOCAL_NAME = "2d_cardinal_expansion_1"

# Keys of a row of metrics.jsonl that differ between two equal runs.
MEASURED = {
    *("epoch_seconds", "train_seconds", "compile_seconds"),
    *("train_images_per_second", "eval_images_per_second"),
    "peak_memory_bytes",
}


def run(output, *arguments):
    return main.main([*DIGITS, "--output_dir", str(output), *arguments])


def folder_of(output, name="full", seed=0):
    return output / "digits" / name / f"seed_{seed}"


def metrics_of(folder):
    return utils.read_json_lines(folder / "metrics.jsonl")


def without_measured(rows):
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs."""
    output = tmp_path_factory.mktemp("finished")
    assert run(output, *LOCAL) == 0
    return folder_of(output, LOCAL_NAME)


def test_the_run_folder_is_complete(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("config.json", "metrics.jsonl", "summary.json", "attention_mask.png"),
        *("last.pt", "previous.pt", ".lock"),
    }


def test_metrics_has_one_row_per_epoch(finished):
    rows = metrics_of(finished)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [6, 12, 18]  # 1,437 images in batches of 256
    assert set(rows[0]) == MEASURED | {
        *("epoch", "step", "train_images", "lr", "flops_utilization"),
        *("train_loss", "train_accuracy", "eval_split", "eval_loss", "eval_accuracy"),
    }

    assert rows[0]["compile_seconds"] > 0  # the first step of each process is counted apart
    assert rows[1]["compile_seconds"] == 0
    assert rows[0]["flops_utilization"] is None  # the CPU's peak rate is not known
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] < 2.5
    assert rows[-1]["train_accuracy"] > rows[0]["train_accuracy"]
    assert rows[-1]["lr"] == 0


def test_a_picture_that_cannot_be_drawn_is_only_a_warning(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(main.mask_pictures, "draw_attention_masks", fail)
    assert run(tmp_path, "--epochs", "1") == 0
    assert (folder_of(tmp_path) / "summary.json").exists()

    (warning,) = capsys.readouterr().err.splitlines()
    assert "training goes on without" in warning
    assert warning.endswith("attention_mask.png, which could not be drawn: no")


def test_config_records_what_was_run(finished):
    config = utils.read_json(finished / "config.json")
    assert config["settings"]["expansion_step"] == 1
    assert config["settings"]["precision"] == "fp32"
    assert config["attention"]["grid"] == [4, 4]
    assert config["attention"]["num_neighbors_nominal"] == 5
    assert config["attention"]["num_neighbors_mean"] == 4.0
    assert config["data"]["num_train"] == 1437
    assert config["provenance"]["versions"]["torch"] == torch.__version__

    state = checkpoints.load_checkpoint(finished / "last.pt")
    assert config["num_parameters"] == sum(value.numel() for value in state["model"].values())


def test_the_summary_reports_the_final_epoch(finished):
    rows = metrics_of(finished)
    summary = utils.read_json(finished / "summary.json")
    assert summary["final"] == rows[-1]
    assert summary["best"]["eval_accuracy"] == max(row["eval_accuracy"] for row in rows)

    # The mean throughput leaves out the first epoch.
    seconds = [1437 / row["train_images_per_second"] for row in rows[1:]]
    assert summary["train_images_per_second"] == pytest.approx(2 * 1437 / sum(seconds))


def test_a_finished_run_is_left_alone(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert run(finished.parents[2], *LOCAL) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def test_a_run_that_another_process_finishes_just_before_is_left_alone(
    finished, monkeypatch, capsys
):
    """The first look, without the lock, sees it unfinished."""
    is_finished, looks = run_folder.is_finished, []

    def look(*args):
        looks.append(args)
        return len(looks) > 1 and is_finished(*args)

    monkeypatch.setattr(run_folder, "is_finished", look)
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert run(finished.parents[2], *LOCAL) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.mark.parametrize("saved_epochs", [0, 1, 2, 3])
def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch, saved_epochs):
    """The run is killed right after a checkpoint, before its row in metrics.jsonl."""

    class KilledError(Exception):
        pass

    save_checkpoint = trainer.save_checkpoint
    num_saved = 0

    def save_and_die(folder, state):
        nonlocal num_saved
        if num_saved == saved_epochs:
            raise KilledError
        save_checkpoint(folder, state)
        num_saved += 1
        if num_saved == saved_epochs:
            raise KilledError

    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(trainer, "save_checkpoint", save_and_die)
    with pytest.raises(KilledError):
        run(tmp_path, *LOCAL)

    monkeypatch.setattr(trainer, "save_checkpoint", save_checkpoint)
    torch.manual_seed(99)  # the state of the generators must not matter
    assert run(tmp_path, *LOCAL) == 0

    folder = folder_of(tmp_path, LOCAL_NAME)
    assert without_measured(metrics_of(folder)) == without_measured(metrics_of(finished))
    expected = checkpoints.load_checkpoint(finished / "last.pt")["model"]
    weights = checkpoints.load_checkpoint(folder / "last.pt")["model"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(utils.read_json(folder / "config.json")["resumed"]) == 1


def test_another_seed_gives_another_run(finished, tmp_path):
    run(tmp_path, *LOCAL, "--seed", "1")
    rows = metrics_of(folder_of(tmp_path, LOCAL_NAME, seed=1))
    assert rows[0]["train_loss"] != metrics_of(finished)[0]["train_loss"]


def test_other_settings_are_refused_and_named(finished):
    with pytest.raises(utils.UsageError, match=r"lr 0\.002 there, 0\.001 asked for"):
        run(finished.parents[2], *LOCAL, "--lr", "1e-3")


def test_a_config_of_another_version_is_refused(tmp_path):
    folder = folder_of(tmp_path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"format": 99}')
    with pytest.raises(utils.UserError, match="has format 99, expected 2"):
        run(tmp_path)


def test_a_non_finite_loss_stops_the_run_and_keeps_what_was_saved(tmp_path, monkeypatch):
    cross_entropy = trainer.F.cross_entropy
    num_steps = 0

    def nan_at_step_10(*args, **kwargs):
        nonlocal num_steps
        loss = cross_entropy(*args, **kwargs)
        if "label_smoothing" not in kwargs:  # in evaluation
            return loss
        num_steps += 1
        return loss * math.nan if num_steps == 10 else loss

    monkeypatch.setattr(trainer.F, "cross_entropy", nan_at_step_10)
    with pytest.raises(utils.UserError, match=r"became nan at step 10 \(epoch 2\)"):
        run(tmp_path)

    folder = folder_of(tmp_path)
    assert checkpoints.load_checkpoint(folder / "last.pt")["epoch"] == 2  # the one in progress
    assert len(metrics_of(folder)) == 1
    assert not (folder / "summary.json").exists()


def test_nothing_is_saved_after_an_evaluation_loss_of_nan(tmp_path, monkeypatch):
    """As when weights become NaN in the last step of an epoch."""
    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *args: evaluate(*args) | {"loss": math.nan})
    with pytest.raises(utils.UserError, match="evaluation loss became nan after epoch 1"):
        run(tmp_path)
    assert not (folder_of(tmp_path) / "last.pt").exists()


def test_a_checkpoint_of_other_settings_is_refused(finished, tmp_path):
    folder = folder_of(tmp_path)
    folder.mkdir(parents=True)
    (folder / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    with pytest.raises(utils.UsageError, match="mask_type '2d_cardinal' there, 'full' asked for"):
        run(tmp_path)


def test_dry_run_trains_and_writes_nothing(tmp_path, capsys):
    mask = ["--mask_type", "2d_all_neighbors", "--expansion_step", "2"]
    assert main.main([*mask, "--output_dir", str(tmp_path), "--dry_run"]) == 0

    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"]["model"] == "vit_base"
    assert printed["settings"]["batch_size"] == 64
    assert printed["num_parameters"] == 85_806_346
    attention = printed["attention"]
    assert attention["num_neighbors_nominal"] == 25
    assert attention["num_neighbors_mean"] == pytest.approx(20.9, abs=0.05)
    assert 0 < attention["attention_share_of_flops"] < 0.01
    assert list(tmp_path.iterdir()) == []


def test_the_default_settings():
    settings = resolve_settings(parse_args([])).to_dict()
    expected = {
        "mask_type": "full",
        "expansion_step": None,
        "model": "vit_base",
        "img_size": 224,
        "patch_size": 16,
        "dropout": 0.1,
        "batch_size": 64,
        "lr": 3e-4,
        "weight_decay": 0.1,
        "run_name": "full",
    }
    assert {key: settings[key] for key in expected} == expected


def test_compiled_training_gives_the_same_loss(tmp_path):
    # 1,437 images in 3 equal batches, so that only one shape is compiled.
    one_shape = ["--batch_size", "479", "--epochs", "1", "--dropout", "0"]
    run(tmp_path, *LOCAL, *one_shape, "--run_name", "compiled", "--compile")
    run(tmp_path, *LOCAL, *one_shape, "--run_name", "eager")

    (compiled,) = metrics_of(folder_of(tmp_path, "compiled"))
    (eager,) = metrics_of(folder_of(tmp_path, "eager"))
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-4)


@pytest.mark.parametrize("recipe", ["plain", "strong"])
def test_bf16_training_learns(tmp_path, recipe):
    run(tmp_path, "--precision", "bf16", "--epochs", "4", "--recipe", recipe)
    rows = metrics_of(folder_of(tmp_path))
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


# --------------------------------------------------------------------------------------------------
# eval.py


def test_evaluation_of_the_checkpoint_agrees_with_training(finished, tmp_path, capsys):
    output = tmp_path / "eval.json"
    arguments = ["--checkpoint", str(finished / "last.pt"), "--device", "cpu"]
    assert evaluation.main([*arguments, "--output", str(output)]) == 0

    report = utils.read_json(output)
    final = utils.read_json(finished / "summary.json")["final"]
    assert report["top1_accuracy"] == pytest.approx(final["eval_accuracy"])
    assert report["loss"] == pytest.approx(final["eval_loss"], rel=1e-5)
    assert f"top-1 {report['top1_accuracy']:.2f}%" in capsys.readouterr().out


def test_the_confusion_matrix_is_written_one_row_per_line(finished, tmp_path, monkeypatch):
    evaluate = evaluation.evaluate
    num_classes = 1000
    matrix = torch.arange(num_classes**2).view(num_classes, num_classes).tolist()
    with_matrix = {"confusion_matrix": matrix}
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: evaluate(*args) | with_matrix)
    monkeypatch.setattr(evaluation, "describe", lambda report: "")

    output = tmp_path / "eval.json"
    arguments = ["--checkpoint", str(finished / "last.pt"), "--device", "cpu"]
    assert evaluation.main([*arguments, "--output", str(output)]) == 0

    report = utils.read_json(output)
    assert report["confusion_matrix"] == matrix
    assert {"loss", "top1_accuracy", "per_class_accuracy", "provenance"} <= report.keys()

    text = output.read_text()
    assert num_classes < len(text.splitlines()) < num_classes + 100
    assert "    [1000, 1001, 1002" in text


def test_evaluate_agrees_with_a_loop_over_the_images():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator)
    labels = torch.randint(6, (50,), generator=generator)  # no image of the last class
    batches = [(logits[:32], labels[:32]), (logits[32:], labels[32:])]
    result = evaluation.evaluate(torch.nn.Identity(), batches, 7, torch.device("cpu"), "fp32")

    confusion = [[0] * 7 for _ in range(7)]
    top1_hits = 0
    top5_hits = 0
    losses = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(7), key=lambda index: -row[index])
        confusion[label][order[0]] += 1
        top1_hits += order[0] == label
        top5_hits += label in order[:5]
        losses.append(math.log(sum(math.exp(value) for value in row)) - row[label])

    assert result["confusion_matrix"] == confusion
    assert result["top1_accuracy"] == pytest.approx(100 * top1_hits / 50)
    assert result["top5_accuracy"] == pytest.approx(100 * top5_hits / 50)
    assert result["loss"] == pytest.approx(sum(losses) / 50)
    assert result["per_class_accuracy"][6] is None
    accuracy = 100 * confusion[2][2] / sum(confusion[2])
    assert result["per_class_accuracy"][2] == pytest.approx(accuracy)


def test_evaluate_leaves_the_model_in_training_mode():
    model = torch.nn.Linear(3, 3).train()
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    result = evaluation.evaluate(model, [batch], 3, torch.device("cpu"), "fp32")
    assert model.training
    assert result["top5_accuracy"] is None  # of three classes


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("code ran",))


BAD_CHECKPOINTS = ("missing", "empty", "text", "truncated", "code", "foreign", "version")


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_gives_a_one_line_error(finished, tmp_path, kind, run_script):
    path = tmp_path / "last.pt"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "truncated":
        path.write_bytes((finished / "last.pt").read_bytes()[:-2000])
    elif kind == "code":
        torch.save({"format": checkpoints.FORMAT, "model_config": Evil()}, path)
    elif kind == "foreign":
        torch.save({"state_dict": {}}, path)
    elif kind == "version":
        torch.save({"format": 99}, path)

    code, out, err = run_script(evaluation.main, "--checkpoint", str(path))
    assert code == 1
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert str(path) in err


# --------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "at least 1"),
        (["--lr", "nan"], "--lr: must be"),
        (["--lr", "-1"], "above 0"),
        (["--dropout", "1"], "below 1"),
        (["--mask_type", "3d"], "invalid choice"),
        (["--epoch", "3"], "unrecognized arguments"),
        (["--img_size", "30", "--dry_run"], "30x30 is not a multiple of patch_size 16"),
        (["--run_name", "a/b", "--dry_run"], "plain folder name"),
        (["--run_name", "..", "--dry_run"], "plain folder name"),
        (["--run_name", "", "--dry_run"], "plain folder name"),
        (["--seed", "99999999999999999999"], "below"),
        (["--mix", "1.5"], "at most 1"),
        (["--dataset=--"], "argument --dataset: expected a value"),
        (
            ["--img_size", "16000", "--mask_type", "2d_cardinal", "--dry_run"],
            "1000x1000 patches, at most 65,536",
        ),
        (["--img_size", "1600000000", "--dry_run"], "at most 65,536"),
        (["--depth", "999999999"], "at most 1000"),
        (["--embed_dim", "100000"], "at most 65536"),
        (
            ["--batch_size", "4", "--grad_accumulation", "5"],
            "more micro-batches than --batch_size 4",
        ),
        (["--compile", "reduce-overhead", "--grad_accumulation", "2"], "replays the memory"),
    ],
)
def test_a_bad_command_line_gives_a_one_line_error(arguments, words, tmp_path, run_script):
    code, _, err = run_script(main.main, "--output_dir", str(tmp_path), *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert words in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused():
    with pytest.raises(utils.UsageError, match=r"--device cuda.*available: "):
        resolve_settings(parse_args(["--device", "cuda"]))
