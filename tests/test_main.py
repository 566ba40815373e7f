"""One run, end to end on the bundled digits: its folder, its resume, its refusals, its evaluation."""

import json
import math

import pytest
import torch

import eval as evaluation
import main
import utils
from main import parse_args, resolve_settings
from training import checkpoints, trainer

DIGITS = [
    *("--dataset", "digits", "--model", "vit_micro", "--img_size", "8", "--patch_size", "2", "--device", "cpu"),
    *("--batch_size", "256", "--lr", "2e-3", "--epochs", "3"),
]
LOCAL = ["--mask_type", "2d_cardinal", "--expansion_step", "1"]
TIMES = ("epoch_seconds", "train_images_per_second", "eval_images_per_second", "peak_memory_bytes", "compile_seconds")


def run(output, *arguments):
    return main.main([*DIGITS, "--output_dir", str(output), *arguments])


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs."""
    output = tmp_path_factory.mktemp("finished")
    assert run(output, *LOCAL) == 0
    return output / "digits" / "2d_cardinal_expansion_1" / "seed_0"


def test_the_run_folder_is_complete(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("config.json", "metrics.jsonl", "attention_mask.png", "last.pt", "previous.pt", "summary.json", ".lock")
    }
    rows = utils.read_json_lines(finished / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [6, 12, 18]  # 1,437 images in batches of 256
    keys = "epoch step train_loss train_accuracy eval_loss eval_accuracy lr epoch_seconds train_images_per_second"
    others = "eval_images_per_second peak_memory_bytes compile_seconds flops_utilization"
    assert set(rows[0]) == {*keys.split(), *others.split()}
    assert rows[0]["compile_seconds"] > 0 == rows[1]["compile_seconds"]  # of the first step of a process
    assert rows[0]["flops_utilization"] is None  # the CPU's peak is not known
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] < 2.5
    assert rows[-1]["train_accuracy"] > rows[0]["train_accuracy"]
    assert rows[-1]["lr"] == 0


def test_a_picture_that_fails_costs_a_warning(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(main.mask_pictures, "draw_attention_mask", fail)
    assert run(tmp_path, "--epochs", "1") == 0
    assert (tmp_path / "digits" / "full" / "seed_0" / "summary.json").exists()
    (warning,) = capsys.readouterr().err.splitlines()
    assert "training goes on without" in warning
    assert warning.endswith("attention_mask.png, which could not be drawn: no")


def test_config_says_what_was_run(finished):
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
    rows, summary = utils.read_json_lines(finished / "metrics.jsonl"), utils.read_json(finished / "summary.json")
    assert summary["final"] == rows[-1]
    assert summary["best"]["eval_accuracy"] == max(row["eval_accuracy"] for row in rows)
    later = [1437 / row["train_images_per_second"] for row in rows[1:]]
    assert summary["train_images_per_second"] == pytest.approx(2 * 1437 / sum(later))


def test_a_finished_run_is_left_alone(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert run(finished.parents[2], *LOCAL) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.mark.parametrize("saved_epochs", [0, 1, 2, 3])
def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch, saved_epochs):
    """Killed right after a checkpoint, before its line in metrics.jsonl."""

    class KilledError(Exception):
        pass

    original, saved = trainer.save_checkpoint, []

    def save_and_die(folder, state):
        if len(saved) == saved_epochs:
            raise KilledError
        original(folder, state)
        saved.append(state["epoch"])
        if len(saved) == saved_epochs:
            raise KilledError

    monkeypatch.setattr(trainer, "save_checkpoint", save_and_die)
    with pytest.raises(KilledError):
        run(tmp_path, *LOCAL)
    monkeypatch.setattr(trainer, "save_checkpoint", original)
    torch.manual_seed(99)  # whatever the generators hold by then
    assert run(tmp_path, *LOCAL) == 0
    folder = tmp_path / "digits" / "2d_cardinal_expansion_1" / "seed_0"
    expected, rows = (utils.read_json_lines(path / "metrics.jsonl") for path in (finished, folder))
    assert without_times(rows) == without_times(expected)
    weights = [checkpoints.load_checkpoint(path / "last.pt")["model"] for path in (finished, folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert len(utils.read_json(folder / "config.json")["resumed"]) == 1


def test_another_seed_gives_another_run(finished, tmp_path):
    run(tmp_path, *LOCAL, "--seed", "1")
    rows = utils.read_json_lines(tmp_path / "digits" / "2d_cardinal_expansion_1" / "seed_1" / "metrics.jsonl")
    assert rows[0]["train_loss"] != utils.read_json_lines(finished / "metrics.jsonl")[0]["train_loss"]


def test_other_settings_are_refused_by_name(finished):
    with pytest.raises(utils.UsageError, match=r"lr 0\.002 there, 0\.001 asked for"):
        run(finished.parents[2], *LOCAL, "--lr", "1e-3")


def test_a_config_of_another_version_is_refused(tmp_path):
    folder = tmp_path / "digits" / "full" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"format": 99}')
    with pytest.raises(utils.UserError, match="has format 99, expected 2"):
        run(tmp_path)


def test_a_non_finite_loss_stops_the_run_and_keeps_what_was_saved(tmp_path, monkeypatch):
    original = trainer.F.cross_entropy
    calls = []

    def poisoned(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (math.nan if len(calls) == 10 else 1.0)

    monkeypatch.setattr(
        trainer.F, "cross_entropy", lambda *a, **k: poisoned(*a, **k) if "label_smoothing" in k else original(*a, **k)
    )
    with pytest.raises(utils.UserError, match=r"became nan at step 10 \(epoch 2\)"):
        run(tmp_path)
    folder = tmp_path / "digits" / "full" / "seed_0"
    assert checkpoints.load_checkpoint(folder / "last.pt")["epoch"] == 2  # the one in progress
    assert len(utils.read_json_lines(folder / "metrics.jsonl")) == 1
    assert not (folder / "summary.json").exists()


def test_weights_that_became_nan_in_the_last_step_are_not_saved(tmp_path, monkeypatch):
    original = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *args: original(*args) | {"loss": math.nan})
    with pytest.raises(utils.UserError, match="evaluation loss became nan after epoch 1"):
        run(tmp_path)
    assert not (tmp_path / "digits" / "full" / "seed_0" / "last.pt").exists()


def test_a_checkpoint_of_other_settings_is_not_taken(finished, tmp_path):
    folder = tmp_path / "digits" / "full" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    with pytest.raises(utils.UsageError, match="mask_type '2d_cardinal' there, 'full' asked for"):
        run(tmp_path)


def test_dry_run_trains_and_writes_nothing(tmp_path, capsys):
    arguments = ["--mask_type", "2d_all_neighbors", "--expansion_step", "2", "--output_dir", str(tmp_path), "--dry_run"]
    assert main.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"]["model"] == "vit_base"
    assert printed["settings"]["batch_size"] == 64
    assert printed["num_parameters"] == 85_806_346
    assert printed["attention"]["num_neighbors_nominal"] == 25
    assert printed["attention"]["num_neighbors_mean"] == pytest.approx(20.9, abs=0.05)
    assert 0 < printed["attention"]["attention_share_of_flops"] < 0.01
    assert list(tmp_path.iterdir()) == []


def test_defaults_are_those_of_the_design():
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


def test_compiled_training_gives_the_same_losses(finished, tmp_path):
    one_shape = ["--batch_size", "479", "--epochs", "1", "--dropout", "0"]  # 1,437 images in 3 batches
    run(tmp_path, *LOCAL, "--compile", *one_shape)
    run(tmp_path, *LOCAL, "--run_name", "eager", *one_shape)
    losses = [
        utils.read_json_lines(tmp_path / "digits" / name / "seed_0" / "metrics.jsonl")[0]["train_loss"]
        for name in ("2d_cardinal_expansion_1", "eager")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("recipe", ["plain", "strong"])
def test_bf16_training_learns(tmp_path, recipe):
    run(tmp_path, "--precision", "bf16", "--epochs", "4", "--recipe", recipe)
    rows = utils.read_json_lines(tmp_path / "digits" / "full" / "seed_0" / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


# ---------------------------------------------------------------------------------------------------------------------
# eval.py


def test_evaluation_of_the_checkpoint_agrees_with_training(finished, tmp_path, capsys):
    output = tmp_path / "eval.json"
    arguments = ["--checkpoint", str(finished / "last.pt"), "--device", "cpu", "--output", str(output)]
    assert evaluation.main(arguments) == 0
    report, final = utils.read_json(output), utils.read_json(finished / "summary.json")["final"]
    assert report["top1_accuracy"] == pytest.approx(final["eval_accuracy"])
    assert report["loss"] == pytest.approx(final["eval_loss"], rel=1e-5)
    assert f"top-1 {report['top1_accuracy']:.2f}%" in capsys.readouterr().out


def test_the_confusion_matrix_is_written_one_row_per_line(finished, tmp_path, monkeypatch):
    number, evaluate = 1000, evaluation.evaluate
    matrix = [[row * number + column for column in range(number)] for row in range(number)]
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: evaluate(*args) | {"confusion_matrix": matrix})
    monkeypatch.setattr(evaluation, "describe", lambda report: "")
    output = tmp_path / "eval.json"
    arguments = ["--checkpoint", str(finished / "last.pt"), "--device", "cpu", "--output", str(output)]
    assert evaluation.main(arguments) == 0
    report, text = utils.read_json(output), output.read_text()
    assert report["confusion_matrix"] == matrix
    assert {"loss", "top1_accuracy", "per_class_accuracy", "provenance"} <= report.keys()
    assert number < len(text.splitlines()) < number + 100
    assert "    [1000, 1001, 1002" in text


def test_evaluate_against_an_oracle():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator)
    labels = torch.randint(6, (50,), generator=generator)  # no image of the last class
    batches = [(logits[:32], labels[:32]), (logits[32:], labels[32:])]
    result = evaluation.evaluate(torch.nn.Identity(), batches, 7, torch.device("cpu"), "fp32")
    confusion, hits, top5, losses = [[0] * 7 for _ in range(7)], 0, 0, []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(7), key=lambda index: -row[index])
        confusion[label][order[0]] += 1
        hits += order[0] == label
        top5 += label in order[:5]
        losses.append(math.log(sum(math.exp(value) for value in row)) - row[label])
    assert result["confusion_matrix"] == confusion
    assert result["top1_accuracy"] == pytest.approx(100 * hits / 50)
    assert result["top5_accuracy"] == pytest.approx(100 * top5 / 50)
    assert result["loss"] == pytest.approx(sum(losses) / 50)
    assert result["per_class_accuracy"][6] is None
    assert result["per_class_accuracy"][2] == pytest.approx(100 * confusion[2][2] / sum(confusion[2]))


def test_evaluate_leaves_the_model_in_its_mode():
    model = torch.nn.Linear(3, 3).train()
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    result = evaluation.evaluate(model, [batch], 3, torch.device("cpu"), "fp32")
    assert model.training
    assert result["top5_accuracy"] is None


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "code", "foreign", "version"])
def test_bad_checkpoints_end_in_one_line(finished, tmp_path, kind, run_script):
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


# ---------------------------------------------------------------------------------------------------------------------
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
        (["--img_size", "16000", "--mask_type", "2d_cardinal", "--dry_run"], "1000x1000 patches, at most 65,536"),
        (["--img_size", "1600000000", "--dry_run"], "at most 65,536"),
        (["--depth", "999999999"], "at most 1000"),
        (["--embed_dim", "100000"], "at most 65536"),
        (["--batch_size", "4", "--grad_accumulation", "5"], "more micro-batches than --batch_size 4"),
        (["--compile", "reduce-overhead", "--grad_accumulation", "2"], "replays the memory"),
    ],
)
def test_bad_command_lines_end_in_one_line(arguments, words, tmp_path, run_script):
    code, _, err = run_script(main.main, "--output_dir", str(tmp_path), *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert words in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there():
    with pytest.raises(utils.UsageError, match=r"--device cuda.*available: "):
        resolve_settings(parse_args(["--device", "cuda"]))
