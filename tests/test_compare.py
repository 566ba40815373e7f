"""Two checkpoints on the same images: `eval.py --compare`, its numbers and its contact sheet."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import main
import utils
from analysis import comparison, contact_sheet
from pipeline import sources
from report import statistics

SHAPE = ["--model", "vit_micro", "--img_size", "8", "--patch_size", "4", "--depth", "1"]
DIGITS = ["--dataset", "digits", *SHAPE, "--batch_size", "256", "--lr", "4e-3", "--device", "cpu"]


def train(folder, *arguments):
    assert main.main([*DIGITS, "--epochs", "2", "--output_dir", str(folder), *arguments]) == 0
    return max(folder.rglob("last.pt"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return train(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    return train(folder, "--mask_type", "2d_cardinal", "--pool", "mean", "--seed", "1")


def probabilities_of(checkpoint, tmp_path):
    """Of each class for every test image, image by image, without the code under test."""
    from training.checkpoints import load_checkpoint, rebuild_model

    state = load_checkpoint(checkpoint)
    model = rebuild_model(state, "dense")
    images, labels = sources.load_sklearn_digits(tmp_path, (8, 8)).test
    (mean,), (std,) = state["data"]["mean"], state["data"]["std"]
    with torch.no_grad():
        pixels = (images.float() / 255 - mean) / std
        return model(pixels).softmax(-1).numpy(), labels.numpy()


# --------------------------------------------------------------------------------------------------
# From end to end


def test_a_comparison_agrees_with_loops_over_the_images(full, local, tmp_path, capsys):
    output = tmp_path / "deep" / "compare.json"
    options = ["--compare", str(full), str(local), "--device", "cpu", "--output", str(output)]
    assert evaluation.main([*options, "--batch_size", "100"]) == 0
    printed = capsys.readouterr().out
    report = utils.read_json(output)

    one, labels = probabilities_of(full, tmp_path)
    other, _ = probabilities_of(local, tmp_path)
    counts = dict.fromkeys(itertools.product((False, True), repeat=2), 0)
    num_agreeing = 0
    for image, label in enumerate(labels):
        guesses = one[image].argmax(), other[image].argmax()
        counts[bool(guesses[0] == label), bool(guesses[1] == label)] += 1
        num_agreeing += guesses[0] == guesses[1]

    assert report["num_images"] == 360 == sum(counts.values())
    assert report["both_right"] == counts[True, True] > 0
    assert report["only_first"] == counts[True, False] > 0
    assert report["only_second"] == counts[False, True] > 0
    assert report["both_wrong"] == counts[False, False] > 0
    assert report["agreement"] == pytest.approx(100 * num_agreeing / 360)

    first, second = report["first"], report["second"]
    assert first["name"] == "full, seed 0"
    assert second["name"] == "2d_cardinal, step 1, seed 1"
    assert first["num_correct"] == counts[True, True] + counts[True, False]
    assert first["interval"]["low"] < first["top1_accuracy"] < first["interval"]["high"]
    difference = first["top1_accuracy"] - second["top1_accuracy"]
    assert report["difference"] == pytest.approx(difference)
    assert report["interval"]["low"] < difference < report["interval"]["high"]
    final = utils.read_json(full.with_name("summary.json"))["final"]
    assert first["top1_accuracy"] == pytest.approx(final["eval_accuracy"])
    is_zero = labels == 0
    assert first["per_class_accuracy"][0] == pytest.approx(
        100 * (one[is_zero].argmax(1) == 0).mean()
    )

    rows = np.arange(360)
    differences = np.abs(one[rows, labels] - other[rows, labels])
    shown = report["images"]
    assert [image["index"] for image in shown] == np.argsort(-differences)[:24].tolist()
    for image in shown:
        index, label = image["index"], labels[image["index"]]
        assert image["label"] == label
        assert image["first"]["probability"] == pytest.approx(one[index, label], rel=1e-4)
        assert image["second"]["probability"] == pytest.approx(other[index, label], rel=1e-4)
        assert image["second"]["prediction"] == other[index].argmax()

    assert report["picture"] == "compare.png"
    with Image.open(output.with_suffix(".png")) as picture:
        assert min(picture.size) > 900
    assert "other seeds would be other models" in printed
    assert f"only A is right on {report['only_first']} images" in printed


def test_the_result_is_beside_the_first_checkpoint_and_names_the_second(full, local):
    assert evaluation.main(["--compare", str(full), str(local), "--device", "cpu"]) == 0
    written = full.with_name("compare_2d_cardinal_expansion_1_seed_1_test.json")
    assert utils.read_json(written)["split"] == "test"
    assert written.with_suffix(".png").exists()


def test_a_model_does_not_differ_from_itself(full, tmp_path):
    output = tmp_path / "same.json"
    options = ["--compare", str(full), str(full), "--device", "cpu", "--output", str(output)]
    assert evaluation.main(options) == 0
    report = utils.read_json(output)
    assert (report["agreement"], report["difference"], report["p"]) == (100, 0, 1)
    assert (report["only_first"], report["only_second"]) == (0, 0)
    assert (report["images"], report["picture"]) == ([], None)
    assert not output.with_suffix(".png").exists()


def test_models_of_different_grids_can_be_compared(full, tmp_path):
    finer = train(tmp_path, "--img_size", "16", "--run_name", "finer")
    output = tmp_path / "compare.json"
    options = ["--compare", str(full), str(finer), "--device", "cpu", "--output", str(output)]
    assert evaluation.main(options) == 0
    report = utils.read_json(output)
    assert report["first"]["name"] == "full, seed 0"  # the masks are the same, the names are not
    assert report["second"]["name"] == "finer, seed 0"


def test_the_images_are_read_once(full, local, tmp_path, monkeypatch):
    calls = []

    def load(data_dir, img_size):
        calls.append(img_size)
        return sources.load_sklearn_digits(data_dir, img_size)

    monkeypatch.setitem(sources.DATASETS, "digits", sources.Source(load, 1, 10, flip=False))
    output = ["--device", "cpu", "--output", str(tmp_path / "c.json")]
    assert evaluation.main(["--compare", str(full), str(local), *output]) == 0
    assert calls == [(8, 8)]


# --------------------------------------------------------------------------------------------------
# What cannot be compared


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--compare", "{full}"], 2, "expected 2 arguments"),
        (["--compare", "{full}", "none.pt"], 1, "no checkpoint at none.pt"),
        (["--compare", "{full}", "{full}", "--checkpoint", "{full}"], 2, "not allowed with"),
        (["--compare", "{full}", "{full}", "--analyze"], 2, "leave out --compare"),
        (["--compare", "{full}", "{full}", "--limit", "3"], 2, "--limit needs --analyze"),
        (["--compare", "{full}", "{full}", "--split", "holdout"], 2, "trained without --holdout"),
        (["--compare", "{full}", "{full}", "--output", "x.png"], 2, "must end in .json"),
        ([], 2, "one of the arguments --checkpoint --compare is required"),
    ],
)
def test_a_bad_command_line_ends_in_one_line(full, arguments, code, words, run_script):
    arguments = [argument.format(full=full) for argument in arguments]
    exit_code, out, err = run_script(evaluation.main, "--device", "cpu", *arguments)
    assert (exit_code, out) == (code, "")
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("--checkpoint",), ("--analyze", "--checkpoint")])
def test_weights_that_are_not_finite_end_in_one_line(full, arguments, tmp_path, run_script):
    state = torch.load(full, weights_only=True)
    state["model"]["head.bias"][0] = float("nan")
    damaged = tmp_path / "last.pt"
    torch.save(state, damaged)
    code, _, err = run_script(evaluation.main, *arguments, str(damaged), "--device", "cpu")
    assert code == 1
    assert err.count("\n") == 1
    assert "holds weights that are not finite" in err
    assert [damaged] == list(tmp_path.iterdir())


def test_different_parts_held_out_are_not_compared(tmp_path, run_script):
    one = train(tmp_path / "a", "--holdout", "0.1", "--epochs", "1")
    other = train(tmp_path / "b", "--holdout", "0.2", "--epochs", "1")
    options = ["--compare", str(one), str(other), "--split", "holdout", "--device", "cpu"]
    code, _, err = run_script(evaluation.main, *options)
    assert code == 1
    assert "142 held-out training images of digits" in err
    assert "the same --holdout" in err
    assert len(err.splitlines()) == 1


def make_folder(root, seed, class_names=("cat", "dog")):
    random = np.random.default_rng(seed)
    for split, name, number in itertools.product(("train", "test"), class_names, range(3)):
        path = root / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(path)
    return root


def train_on_folder(root, output, *arguments):
    options = ["--dataset", "imagefolder", "--data_dir", str(root), *SHAPE, "--device", "cpu"]
    folder = ["--epochs", "1", "--output_dir", str(output)]
    assert main.main([*options, *folder, *arguments]) == 0
    (checkpoint,) = output.rglob("last.pt")
    return checkpoint


def test_other_images_or_classes_are_not_compared(tmp_path, run_script):
    pets, others = make_folder(tmp_path / "pets", 0), make_folder(tmp_path / "others", 1)
    birds = make_folder(tmp_path / "birds", 0, ("hen", "owl"))
    of_pets = train_on_folder(pets, tmp_path / "1")
    of_others = train_on_folder(others, tmp_path / "2")
    of_birds = train_on_folder(birds, tmp_path / "3")

    def compare(*arguments):
        return run_script(evaluation.main, "--device", "cpu", "--compare", *map(str, arguments))

    code, _, err = compare(of_pets, of_others)
    assert code == 1
    assert "not evaluated on the same images (6 test images of" in err
    code, _, err = compare(of_pets, of_birds)
    assert code == 1
    assert "has classes ['cat', 'dog']" in err
    assert "['hen', 'owl']" in err
    assert len(err.splitlines()) == 1

    # On one folder both can be compared, and the JSON notes that one has not seen it.
    code, _, err = compare(of_pets, of_others, "--data_dir", pets)
    assert code == 0
    assert "holds other images than the checkpoint was trained" in err
    report = utils.read_json(of_pets.with_name("compare_full_seed_0_test.json"))
    assert report["first"]["data_as_trained"] is True
    assert report["second"]["data_as_trained"] is False
    assert report["second"]["name"] == str(of_others)


def test_a_folders_images_at_two_sizes_are_the_same_images(tmp_path, run_script):
    pets = make_folder(tmp_path / "pets", 0)
    small = train_on_folder(pets, tmp_path / "1")
    large = train_on_folder(pets, tmp_path / "2", "--img_size", "12")
    code, _, err = run_script(
        evaluation.main, "--device", "cpu", "--compare", str(small), str(large)
    )
    assert code == 0, err


# --------------------------------------------------------------------------------------------------
# The contact sheet


@pytest.mark.parametrize("num_images", [1, 5, 7, 24])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_the_contact_sheet_shows_each_image_with_both_probabilities(num_images, num_channels):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (num_images, 6, 9, num_channels), dtype=np.uint8)
    report = {
        "class_names": ["cat", "猫 $x^2$ with a name that is far too long"],
        "num_images": 100,
        "first": {"name": "full, seed 0"},
        "second": {"name": "2d_cardinal, step 1, seed 0"},
        "images": [
            {
                "index": number,
                "label": number % 2,
                "first": {"prediction": 0, "probability": 0.25},
                "second": {"prediction": 1, "probability": 0.75},
            }
            for number in range(num_images)
        ],
    }
    figure = contact_sheet.draw(images, report)
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert len(panels) == num_images
    assert panels[0].get_title() == "cat"
    first, second = panels[0].texts
    assert first.get_text() == "A 25%, says cat"
    assert second.get_text().startswith("B 75%, says 猫")
    assert first.get_color() == contact_sheet.RIGHT
    assert second.get_color() == contact_sheet.WRONG
    shown = np.asarray(panels[-1].get_images()[0].get_array())
    np.testing.assert_array_equal(shown.reshape(6, 9, num_channels), images[-1])
    assert "of 100 images" in figure.get_supxlabel()


# --------------------------------------------------------------------------------------------------
# Statistics


def test_mcnemar_is_the_sum_of_binomial_probabilities():
    for only_a, only_b in itertools.product(range(7), repeat=2):
        n = only_a + only_b
        tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
        found = statistics.mcnemar(only_a, only_b, 40)
        assert found.p == pytest.approx(min(1.0, 2 * tail))
        assert found.difference == pytest.approx(100 * (only_a - only_b) / 40)
        assert found.interval.low <= found.difference <= found.interval.high


# --------------------------------------------------------------------------------------------------
# Which images


def test_differing_images_are_in_order_and_without_those_that_do_not_differ():
    one = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]])
    other = torch.tensor([[0.5, 0.5], [0.7, 0.3], [0.8, 0.2]])
    found = comparison.differing_images(one, other, torch.tensor([0, 1, 1]))
    assert [image["index"] for image in found] == [2, 1]
    assert found[0]["first"] == {"prediction": 1, "probability": pytest.approx(0.7)}
