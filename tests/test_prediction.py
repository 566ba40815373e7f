"""`eval.py --predict`: any files become a CSV and a contact sheet, even broken ones."""

import csv
import shutil
from pathlib import Path

import image_folders
import numpy as np
import pytest
import torch
from image_folders import make_classes, run_arguments
from PIL import Image, ImageOps

import eval as evaluation
import main
import utils
from analysis import comparison, contact_sheet, prediction
from analysis.trained_model import TrainedModel
from runtime import hardware
from training import checkpoints

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder `pets`, and the folder of a run on it."""
    root = tmp_path_factory.mktemp("predict")
    make_classes(root / "pets")
    assert main.main(run_arguments(root / "pets", root / "out")) == 0
    return root / "pets", root / "out" / "pets" / "full" / "seed_0"


@pytest.fixture
def predict(trained, tmp_path, run_script):
    """`predict(*paths)` -> (exit code, stdout, stderr, rows of the CSV)."""

    def predict(*paths, checkpoint=trained[1] / "last.pt", flags=()):
        output = tmp_path / "result" / "found.csv"
        where = ["--checkpoint", checkpoint, "--device", "cpu", "--output", output]
        words = [*where, *flags, "--predict", *paths]
        code, out, err = run_script(evaluation.main, *map(str, words))
        rows = None
        if output.exists():
            with open(output, newline="") as file:
                rows = list(csv.DictReader(file))
        return code, out, err, rows

    return predict


def test_the_images_of_the_training_get_what_an_evaluation_gives_them(trained, predict, tmp_path):
    pets, run = trained
    code, out, err, rows = predict(pets, flags=("--batch_size", "7"))
    assert (code, err) == (0, "")
    assert len(rows) == 30
    assert list(rows[0]) == [
        *("file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3")
    ]

    of_file = {row["file"]: row for row in rows}
    for split in ("train", "test"):
        model = TrainedModel.load(run / "last.pt", split, CPU)
        paths = [path for path, _ in model.settings.data.layout.list_images(pets).splits[split]]
        with torch.no_grad():
            (images, _), *others = model.batches(100)
            probabilities = model.model(images).softmax(-1)
        assert others == []
        for path, expected in zip(paths, probabilities, strict=True):
            row = of_file[str(path)]
            order = expected.argsort(descending=True).tolist()
            ranks = ("", "_2", "_3")
            assert [row[f"class{rank}"] for rank in ranks] == [
                image_folders.NAMES[label] for label in order
            ]
            found = [float(row[f"probability{rank}"]) for rank in ranks]
            assert found == pytest.approx(expected[order].tolist(), abs=2e-6)

    with Image.open(tmp_path / "result" / "found.png") as picture:
        assert picture.width > 900
    counts = [sum(row["class"] == name for row in rows) for name in image_folders.NAMES]
    for name, count in zip(image_folders.NAMES, counts, strict=True):
        assert not count or f"{name} {count}" in out


def test_matrix_products_have_the_precision_of_each_model(trained, monkeypatch):
    """TF32 is a mode of the process: the model that is loaded last must not decide for others."""
    found = []
    monkeypatch.setattr(hardware, "set_precision", found.append)
    path = trained[1] / "last.pt"
    prediction.Predictor.load(path, CPU, "bf16")
    assert found == ["bf16"]

    models = [TrainedModel.load(path, "test", CPU, precision) for precision in ("fp32", "bf16")]
    found.clear()
    comparison.compare(*models, batch_size=100)
    assert found == ["fp32", "bf16"]


def test_broken_files_are_named_and_the_others_predicted(trained, predict, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(trained[0] / "cat", photos)
    (photos / "broken.png").write_bytes(b"no image")
    whole = (photos / "3.png").read_bytes()
    (photos / "half.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    (photos / "notes.txt").write_text("no image")
    code, out, err, rows = predict(photos, tmp_path / "missing.jpg")
    assert code == 1
    assert "10 images: cat 10" in out
    ignored, unreadable = err.splitlines()
    assert "ignored what is not an image (1)" in ignored
    assert "3 of 13 files cannot be read: " in unreadable
    for name in ("broken.png (", "half.png (", "missing.jpg ("):
        assert name in unreadable

    assert len(rows) == 13, "every file that was asked for has a row"
    empty = [row for row in rows if not row["class"]]
    assert {row["file"].rpartition("/")[2] for row in empty} == {
        "broken.png", "half.png", "missing.jpg",
    }  # fmt: skip
    assert all(value == "" for row in empty for key, value in row.items() if key != "file")


def test_nothing_is_written_where_nothing_can_be_read(predict, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    code, _, err, rows = predict(tmp_path / "broken.png")
    assert (code, rows) == (1, None)
    assert "none of the files can be read: " in err
    assert len(err.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    code, _, err, rows = predict(tmp_path / "empty")
    assert (code, rows) == (1, None)
    assert "no images in" in err


def test_files_of_all_sizes_and_names_once_each(trained, predict, tmp_path):
    """Files that are given need no extension, and a checkpoint needs no other data."""
    alone = shutil.copy(trained[1] / "last.pt", tmp_path / "last.pt")
    tall = image_folders.draw(tmp_path / "a" / 'tall, "ü".png', 0, (9, 300))
    plain = shutil.copy(tall, tmp_path / "a" / "no extension")
    code, _, err, rows = predict(tall, plain, tmp_path / "a", tall, checkpoint=alone)
    assert code == 0
    assert [row["file"] for row in rows] == [str(tall), str(plain)]
    assert rows[0]["probability"] == rows[1]["probability"]
    assert "no extension" in err, "in the folder it does not pass for an image"


def test_predictions_at_another_size_use_the_pixels_that_are_there(trained, predict):
    path = trained[0] / "dog" / "9.png"
    code, out, _, (row,) = predict(path, flags=("--img_size", "48x80"))
    assert code == 0
    assert "48x80 pixels instead of 24x40: positions interpolated from the 3x5 grid to 6x10" in out

    state = checkpoints.load_checkpoint(trained[1] / "last.pt")
    model = checkpoints.rebuild_model(state, "dense", (48, 80))
    image = ImageOps.fit(Image.open(path).convert("RGB"), (80, 48), Image.BILINEAR)
    image = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(state["data"][key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model(((image - mean) / std)[None]).softmax(-1)[0]
    assert float(row["probability"]) == pytest.approx(expected.max().item(), abs=1e-5)


def test_predictions_of_two_sizes_are_two_files(trained):
    checkpoint = trained[1] / "last.pt"
    sizes = (None, (24, 40), (48, 80))
    names = [prediction.Predictor.load(checkpoint, CPU, img_size=x).file_name for x in sizes]
    assert names == ["predictions.csv", "predictions.csv", "predictions_48x80.csv"]


def test_gray_models_read_gray(tmp_path, predict):
    flags = "--dataset digits --model vit_micro --depth 1 --img_size 16 --patch_size 4 --epochs 1"
    assert main.main([*flags.split(), "--device", "cpu", "--output_dir", str(tmp_path)]) == 0
    (checkpoint,) = tmp_path.rglob("last.pt")
    model = TrainedModel.load(checkpoint, "test", CPU)
    files = []
    for index in range(5):
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(model.split.images[index, 0].numpy()).save(files[-1])
    code, _, _, rows = predict(*files, checkpoint=checkpoint)
    assert code == 0
    (images, _), *_ = model.batches(5)
    with torch.no_grad():
        best = model.model(images).softmax(-1).topk(5)
    for row, labels, values in zip(rows, best.indices.tolist(), best.values, strict=True):
        assert [row["class"], row["class_5"]] == [str(labels[0]), str(labels[4])]
        assert float(row["probability"]) == pytest.approx(values[0].item(), abs=1e-5)


def test_gray_of_16_bits_has_the_range_that_it_had_in_training(tmp_path, predict):
    """The training images used 12 bits. A darker image alone must not become brighter."""
    root = tmp_path / "scans"
    generator = np.random.default_rng(0)
    for name, top in (("dark", 1000), ("light", 4095)):
        (root / name).mkdir(parents=True)
        for index in range(5):
            values = generator.integers(0, top, (24, 40)).astype(np.uint16)
            values[0, 0] = top
            Image.fromarray(values).save(root / name / f"{index}.png")
    assert main.main(run_arguments(root, tmp_path / "out")) == 0
    (checkpoint,) = (tmp_path / "out").rglob("last.pt")
    config = utils.read_json(checkpoint.with_name("config.json"))
    assert config["data"]["gray_bits"] == {"16": 12}

    together = predict(root, checkpoint=checkpoint)[3]
    alone = predict(root / "dark" / "0.png", checkpoint=checkpoint)[3]
    values = [float(row["probability"]) for row in (alone[0], together[0])]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--analyze"], "leave out --analyze"),
        (["--data_dir", "x"], "leave out --data_dir"),
        (["--labels", "x"], "leave out --labels"),
        (["--split_folder", "0"], "leave out --split_folder"),
        (["--split", "train"], "leave out --split"),
        (["--output", "x.json"], "must end in .csv"),
        (["--img_size", "0"], "at least 1"),
    ],
)
def test_flags_that_do_not_go_with_predict(flags, words, run_script):
    code, _, err = run_script(
        evaluation.main, "--checkpoint", "last.pt", "--predict", "a.png", *flags
    )
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1


def test_the_contact_sheet_shows_files_with_their_classes():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    shown = [(Path(f"a/{n}.png"), pixels, [(1, 0.7), (0, 0.3)]) for n in range(7)]
    figure = contact_sheet.draw_predictions(shown, ["cat", "dog $x$"], 20)
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert [axes.get_title() for axes in panels] == [f"{n}.png" for n in range(7)]
    assert [words.get_text() for words in panels[3].texts] == ["dog $x$ 70%", "cat 30%"]
    assert "7 of 20 images" in figure.get_supxlabel()


def test_the_images_shown_are_spread_over_the_files():
    assert prediction.spread([*range(100)], 4) == [0, 25, 50, 75]
    assert prediction.spread([*range(3)], 4) == [0, 1, 2]
