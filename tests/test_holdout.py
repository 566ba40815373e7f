"""--holdout: a stratified part of the training images is evaluated on, not the test images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_runs import write_run
from processes import torchrun

import data
import eval as evaluation
import main
import plot_result
import utils
from pipeline import holdout, sources
from report import differences, logs
from training import checkpoints, trainer

CPU = torch.device("cpu")
SHAPE = ["--img_size", "8", "--patch_size", "4", "--depth", "1"]
DIGITS = ["--dataset", "digits", "--model", "vit_micro", *SHAPE, "--device", "cpu"]
SHORT = [*DIGITS, "--batch_size", "256", "--epochs", "2", "--lr", "2e-3"]
FOLDER = Path("digits", "full", "seed_0")
FRACTION = 0.1

# Keys of a row of metrics.jsonl that depend on the clock.
MEASURED = {
    *("epoch_seconds", "train_seconds", "compile_seconds"),
    *("train_images_per_second", "eval_images_per_second"),
    "peak_memory_bytes",
}


def run(output, *arguments):
    assert main.main([*SHORT, "--output_dir", str(output), *arguments]) == 0
    return output / FOLDER


def rows_of(folder):
    rows = utils.read_json_lines(folder / utils.METRICS)
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def config_of(folder):
    return utils.read_json(folder / utils.CONFIG)


def load_digits(fraction, limit_bytes=None):
    return data.load_dataset("digits", "", (8, 8), CPU, limit_bytes, held_out=fraction)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished"), "--holdout", str(FRACTION))


# --------------------------------------------------------------------------------------------------
# The split


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_each_class_is_divided_in_the_same_proportion(fraction):
    labels = torch.tensor([2] * 30 + [0] * 15 + [1] * 100)[torch.randperm(145)]
    kept, held_out = holdout.split(labels, ["a", "b", "c"], fraction)

    assert sorted(kept.tolist() + held_out.tolist()) == list(range(145))
    for indices in (kept, held_out):
        assert indices.tolist() == sorted(indices.tolist())
    for label, size in ((0, 15), (1, 100), (2, 30)):
        number = sum(labels[index] == label for index in held_out)
        assert number >= 1
        assert number == 1 or abs(number - fraction * size) <= 0.5


def test_the_split_depends_on_the_labels_alone():
    """Known, so that it stays what it is: a run may be resumed with another version of NumPy."""
    labels = torch.tensor([0, 1] * 5)
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        assert holdout.split(labels, ["a", "b"], 0.4)[1].tolist() == [0, 1, 4, 5]


def test_held_out_images_are_a_random_part_of_a_class():
    """Not its first or last ones, which may be frames of one scene."""
    held_out = holdout.split(torch.zeros(1000, dtype=torch.int64), ["a"], 0.2)[1]
    assert held_out.float().mean() == pytest.approx(499.5, abs=5 * 1000 / math.sqrt(12 * 200))
    assert (held_out.diff() == 1).sum() < 100  # if they were in a row: 199


@pytest.mark.parametrize(("sizes", "fraction"), [((1, 50), 0.1), ((3, 50), 0.9)])
def test_a_class_that_would_lose_all_its_images_is_named(sizes, fraction):
    labels = torch.tensor([0] * sizes[0] + [1] * sizes[1])
    words = f"--holdout {fraction} would hold out every .* class 'rare', which has {sizes[0]};"
    with pytest.raises(utils.UsageError, match=words):
        holdout.split(labels, ["rare", "common"], fraction)


def test_the_images_of_a_dataset_are_divided_and_the_test_images_stay():
    whole, divided = load_digits(0.0), load_digits(FRACTION)
    kept, held_out = holdout.split(whole.train.labels, whole.class_names, FRACTION)

    assert whole.held_out is None
    assert whole.evaluated is whole.test
    assert divided.evaluated is divided.held_out
    assert len(held_out) == 142
    for part, indices in ((divided.train, kept), (divided.held_out, held_out)):
        assert torch.equal(part.images, whole.train.images[indices])
        assert torch.equal(part.labels, whole.train.labels[indices])
    assert torch.equal(divided.test.images, whole.test.images)
    assert divided.checksum == whole.checksum  # it is the same data


def test_mean_and_std_are_those_of_the_images_that_are_trained_on():
    divided = load_digits(FRACTION)
    pixels = divided.train.images.double() / 255
    assert divided.mean == pytest.approx([pixels.mean().item()], abs=1e-12)
    assert divided.std == pytest.approx([pixels.std(correction=0).item()], abs=1e-12)
    assert divided.mean != load_digits(0.0).mean


def test_streamed_images_are_divided_in_the_same_way():
    fits, streams = load_digits(FRACTION), load_digits(FRACTION, limit_bytes=0)
    assert streams.streams
    for dataset in (fits, streams):
        dataset.batches = list(data.eval_batches(dataset, dataset.evaluated, 64))
    for (images, labels), (others, other_labels) in zip(fits.batches, streams.batches, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


# --------------------------------------------------------------------------------------------------
# A run


def test_a_run_says_what_its_accuracy_is_of(finished, tmp_path, capsys):
    run(tmp_path, "--holdout", str(FRACTION))
    printed = capsys.readouterr().out
    assert "evaluated on 142 held-out training images" in printed
    assert "% on 142 held-out training images; results in" in printed

    data = config_of(finished)["data"]
    run(tmp_path, "--holdout", str(FRACTION), "--seed", "1")
    assert config_of(tmp_path / FOLDER.with_name("seed_1"))["data"] == data  # with mean and std
    capsys.readouterr()

    run(tmp_path, "--holdout", str(FRACTION))
    nothing_to_do = "after epoch 2, on held-out training images; nothing to do"
    assert nothing_to_do in capsys.readouterr().out

    config = config_of(finished)
    assert config["settings"]["holdout"] == FRACTION
    assert config["data"]["num_train"] == 1437 - 142
    assert config["data"]["num_held_out"] == 142
    assert {row["eval_split"] for row in rows_of(finished)} == {"holdout"}
    assert utils.read_json(finished / utils.SUMMARY)["final"]["eval_split"] == "holdout"


def test_without_it_everything_is_as_before(tmp_path, capsys):
    folder = run(tmp_path, "--epochs", "1")
    assert "% on 360 test images; results in" in capsys.readouterr().out
    assert {row["eval_split"] for row in rows_of(folder)} == {"test"}
    config = config_of(folder)
    assert config["data"]["num_train"] == 1437
    assert "num_held_out" not in config["data"]

    # A run that began before there was the flag had none, and is still the same run.
    del config["settings"]["holdout"]
    utils.write_json(folder / utils.CONFIG, config)
    run(tmp_path, "--epochs", "1")
    assert "nothing to do" in capsys.readouterr().out


def test_another_fraction_is_another_run(finished):
    output = finished.parents[2]
    for asked in ("0", "0.2"):
        words = rf"holdout {FRACTION} there, {float(asked)} asked for"
        with pytest.raises(utils.UsageError, match=words):
            run(output, "--holdout", asked)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(finished, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def save_and_die(folder, state):
        checkpoints.save_checkpoint(folder, state)
        raise KilledError

    monkeypatch.setattr(trainer, "save_checkpoint", save_and_die)
    with pytest.raises(KilledError):
        run(tmp_path, "--holdout", str(FRACTION))
    monkeypatch.setattr(trainer, "save_checkpoint", checkpoints.save_checkpoint)
    folder = run(tmp_path, "--holdout", str(FRACTION), "--device_data_limit", "0")  # streamed

    assert rows_of(folder) == rows_of(finished)
    expected = checkpoints.load_checkpoint(finished / "last.pt")["model"]
    weights = checkpoints.load_checkpoint(folder / "last.pt")["model"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_two_processes_evaluate_the_same_images(finished, tmp_path):
    options = ["--output_dir", str(tmp_path), "--holdout", str(FRACTION), "--dropout", "0"]
    code, _, err = torchrun(2, *SHORT, *options)
    assert code == 0, err
    single = run(tmp_path / "single", "--holdout", str(FRACTION), "--dropout", "0")
    pairs = zip(rows_of(tmp_path / FOLDER), rows_of(single), strict=True)
    for of_two, of_one in pairs:
        assert of_two["eval_loss"] == pytest.approx(of_one["eval_loss"], rel=1e-4)
        assert of_two["eval_split"] == "holdout"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1", "must be below 1"),
        ("-0.1", "must be at least 0"),
        ("x", "expected a number"),
        ("0.999", "would hold out every training image of class '0', which has"),
    ],
)
def test_an_impossible_fraction_is_refused_on_one_line(tmp_path, value, words, run_script):
    options = ["--output_dir", str(tmp_path), f"--holdout={value}"]
    code, _, err = run_script(main.main, *DIGITS, *options)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert words in err
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# eval.py


def evaluate(checkpoint, output, *arguments):
    options = ["--checkpoint", str(checkpoint), "--output", str(output), "--device", "cpu"]
    assert evaluation.main([*options, *arguments]) == 0
    return utils.read_json(output)


def test_a_checkpoint_is_evaluated_on_the_images_asked_for(finished, tmp_path, capsys):
    checkpoint, output = finished / "last.pt", tmp_path / "eval.json"
    final = utils.read_json(finished / utils.SUMMARY)["final"]

    held_out = evaluate(checkpoint, output, "--split", "holdout")
    assert held_out["top1_accuracy"] == pytest.approx(final["eval_accuracy"])
    assert held_out["loss"] == pytest.approx(final["eval_loss"], rel=1e-5)
    assert held_out["split"] == "holdout"
    assert "digits (scikit-learn), held-out training images, epoch 2" in capsys.readouterr().out

    test = evaluate(checkpoint, output)
    assert (test["split"], test["num_images"], test["data_as_trained"]) == ("test", 360, True)
    assert "digits (scikit-learn), test images, epoch 2" in capsys.readouterr().out

    assert evaluate(checkpoint, output, "--split", "train")["num_images"] == 1437 - 142


def test_nothing_held_out_cannot_be_evaluated(tmp_path, run_script):
    checkpoint = run(tmp_path, "--epochs", "1") / "last.pt"
    options = ["--checkpoint", str(checkpoint), "--split", "holdout"]
    code, _, err = run_script(evaluation.main, *options)
    assert code == 2
    assert "was trained without --holdout" in err
    assert len(err.splitlines()) == 1


def test_of_other_data_nothing_is_known_to_be_held_out(finished, tmp_path, monkeypatch, run_script):
    def load_changed(data_dir, img_size):
        images = sources.load_sklearn_digits(data_dir, img_size)
        images.train[0][0] = 7
        return images

    changed = sources.Source(load_changed, 1, 10, flip=False)
    monkeypatch.setitem(sources.DATASETS, "digits", changed)
    options = ["--checkpoint", str(finished / "last.pt"), "--output", str(tmp_path / "eval.json")]
    code, _, err = run_script(evaluation.main, *options, "--split", "holdout")
    assert code == 1
    assert "none of them is known to be held out" in err
    assert len(err.splitlines()) == 1
    code, _, err = run_script(evaluation.main, *options, "--split", "train")
    assert code == 0
    assert "other images" in err


# --------------------------------------------------------------------------------------------------
# Reports


def test_runs_of_different_splits_are_not_compared(tmp_path, run_script):
    write_run(tmp_path, holdout=0.1)
    write_run(tmp_path, "2d_cardinal", 1)
    code, _, err = run_script(plot_result.main, "--results_path", str(tmp_path))
    assert code == 1
    assert "runs evaluated on different images" in err
    assert "Digits, 10% of the training images held out, in" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "results.md").exists()

    one, other = (logs.load_run(folder.parent) for folder in tmp_path.rglob(utils.CONFIG))
    assert not differences.is_same_data(one, other)
    assert any(
        note.startswith("--holdout") for note in differences.differing_settings([one, other])
    )


def test_the_report_says_what_the_accuracies_are_of(tmp_path, capsys):
    write_run(tmp_path, holdout=0.25)
    write_run(tmp_path, "2d_cardinal", 1, holdout=0.25)
    assert plot_result.main(["--results_path", str(tmp_path)]) == 0
    assert "| final accuracy, % on held-out training images |" in capsys.readouterr().out

    report = (tmp_path / "results.md").read_text(encoding="utf-8")
    note = "is the accuracy on held-out training images (`--holdout 0.25`), not on test images,"
    assert note in report
    assert "held-out values are measured" in report
    assert "test accuracy" not in report
    picture = (tmp_path / "figures" / "accuracy_vs_neighbors.svg").read_text(encoding="utf-8")
    assert "held-out accuracy after the final epoch" in picture


def test_a_report_on_test_images_says_so(tmp_path):
    write_run(tmp_path)
    assert plot_result.main(["--results_path", str(tmp_path)]) == 0
    report = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "Final accuracy is the test accuracy after the last epoch" in report
    assert "test values are measured" in report
    assert "held" not in report
