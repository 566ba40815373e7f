"""Image folders without test/: a fixed split by `--split_folder`, and `--labels` from a CSV."""

import random
import shutil

import image_folders
import pytest
from image_folders import make_classes, make_flat, run_arguments

import eval as evaluation
import main
import run_experiments
import utils
from masks import MaskSpec
from pipeline import identity, imagefolder, layout, sources
from pipeline.layout import Layout
from sweep import plan
from utils import UserError

FIFTH = Layout(test_share=0.2)
LABELED = Layout(test_share=0.2, labels="labels.csv")


def names(root, images):
    return [path.relative_to(root).as_posix() for path, _ in images]


# --------------------------------------------------------------------------------------------------
# The split


@pytest.mark.parametrize("folder", [".", "train"])
def test_each_class_gives_the_same_share_whether_there_is_a_train_folder_or_not(tmp_path, folder):
    make_classes(tmp_path / folder)
    (tmp_path / "label.txt").write_text("Pets")
    found = FIFTH.list_images(tmp_path)
    assert found.class_names == FIFTH.class_names(tmp_path) == ["cat", "dog", "eel"]
    assert [label for _, label in found.test] == [0, 0, 1, 1, 2, 2]
    assert [label for _, label in found.train] == [0] * 8 + [1] * 8 + [2] * 8
    assert not set(found.train) & set(found.test)
    assert found.ignored == []
    for path, label in found.train + found.test:
        assert path.parent.name == found.class_names[label]


def test_the_split_depends_on_names_alone_and_hardly_changes_with_more_images(tmp_path):
    found = FIFTH.list_images(make_classes(tmp_path / "a", 20))
    tested = names(tmp_path / "a", found.test)
    moved = shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    assert names(moved, FIFTH.list_images(moved).test) == tested

    for label, name in enumerate(image_folders.NAMES):
        image_folders.draw(moved / name / "one more.png", label)
    after = set(names(moved, FIFTH.list_images(moved).test))
    assert len(set(tested) - after) <= 3, "one more image may displace one of its class"

    # Known names, so that a change of the rule cannot go unnoticed: runs could not be resumed.
    assert tested[:4] == KNOWN


# By sha256 of the name relative to the root, in the shell:
#   for i in $(seq 0 19); do printf cat/$i.png | sha256sum | sed "s/-/$i/"; done | sort | head -4
KNOWN = ["cat/0.png", "cat/10.png", "cat/7.png", "cat/8.png"]


def test_the_order_of_the_files_does_not_matter(tmp_path):
    images = [(tmp_path / f"{number}.png", number % 2) for number in range(31)]
    expected = {share: layout.split(tmp_path, images, ["a", "b"], share) for share in (0.1, 0.5)}
    shuffled = random.Random(0).sample(images, len(images))
    for share, (train, test) in expected.items():
        assert len(test) == round(16 * share) + round(15 * share)
        again = layout.split(tmp_path, shuffled, ["a", "b"], share)
        assert [set(part) for part in again] == [set(train), set(test)]


def test_a_class_that_would_have_nothing_to_train_on_is_refused(tmp_path, run_script):
    make_classes(tmp_path / "pets", 4)
    image_folders.draw(tmp_path / "pets" / "fox" / "only.png", 0)
    code, _, err = run_script(main.main, *run_arguments(tmp_path / "pets", tmp_path / "out"))
    assert code == 2
    assert "would leave class 'fox'" in err
    assert "as it has 1;" in err


def test_a_folder_with_test_images_is_not_split(tmp_path, run_script):
    for split in ("train", "val"):
        make_classes(tmp_path / "pets" / split, 3)
    code, _, err = run_script(main.main, *run_arguments(tmp_path / "pets", tmp_path / "out"))
    assert code == 2
    assert "has val/; leave out --split_folder" in err


def test_a_folder_without_test_images_names_the_flag(tmp_path):
    make_classes(tmp_path / "train", 3)
    with pytest.raises(UserError, match=r"--split_folder 0\.2"):
        Layout().list_images(tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--split_folder", "0.2"], "--split_folder is for --dataset imagefolder"),
        (["--labels", "labels.csv"], "--labels is for --dataset imagefolder"),
        (["--labels", "a.csv", "--dataset", "imagefolder"], "add --split_folder 0.2"),
        (["--split_folder", "1", "--dataset", "imagefolder"], "below 1"),
    ],
)
def test_flags_that_do_not_go_together(flags, words, run_script):
    code, _, err = run_script(main.main, *flags, "--dry_run")
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1


# --------------------------------------------------------------------------------------------------
# Labels


def test_labels_of_a_flat_folder(tmp_path):
    make_flat(tmp_path)
    (tmp_path / "more").mkdir()
    image_folders.draw(tmp_path / "more" / "sixth, with a comma.png", 1)
    (tmp_path / "notes.txt").write_text("no image")
    with open(tmp_path / "labels.csv", "a", encoding="utf-8") as file:
        file.write('"./more/sixth, with a comma.png", dog \n')

    found = LABELED.list_images(tmp_path)
    assert found.class_names == LABELED.class_names(tmp_path) == ["cat", "dog", "eel"]
    assert [label for _, label in found.test] == [0, 1, 2]
    assert [label for _, label in found.train] == [0] * 4 + [1] * 5 + [2] * 4
    assert found.ignored == ["notes.txt"]
    for path, label in found.train + found.test:
        assert found.class_names[label] in path.name or path.parent.name == "more"

    folder = imagefolder.read(tmp_path, (24, 40), layout=LABELED)
    assert folder.train[0].shape == (13, 3, 24, 40)
    assert folder.train[1].tolist() == [label for _, label in found.train]
    assert sources.channels_and_classes("imagefolder", str(tmp_path), LABELED) == (3, 3)


def test_labels_may_lie_elsewhere_and_start_with_a_byte_order_mark(tmp_path, monkeypatch):
    make_flat(tmp_path / "pets")
    text = (tmp_path / "pets" / "labels.csv").read_text()
    (tmp_path / "pets" / "labels.csv").unlink()
    (tmp_path / "mine.csv").write_text(text.replace("file,class", "id,class,file"), "utf-8-sig")
    lines = text.splitlines()[1:]
    rows = [f"7,{name},{file}" for file, name in (line.split(",") for line in lines)]
    (tmp_path / "mine.csv").write_text("\n".join(["id,class,file", *rows]), "utf-8-sig")

    monkeypatch.chdir(tmp_path)
    for labels in ("mine.csv", str(tmp_path / "mine.csv")):
        found = Layout(0.2, labels).list_images(tmp_path / "pets")
        assert len(found.train) == 12
    with pytest.raises(UserError, match=r"no file .*pets/other\.csv or other\.csv; .* file,class"):
        Layout(0.2, "other.csv").list_images(tmp_path / "pets")


def test_labels_that_do_not_fit_are_counted_by_kind(tmp_path):
    make_flat(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    with open(tmp_path / "labels.csv", "a") as file:
        file.write("lost.png,cat\ngone.png,dog\n0cat.png,dog\nnotes.txt,eel\n../0cat.png,cat\n")
    image_folders.draw(tmp_path / "new.png", 0)
    with pytest.raises(UserError) as error:
        LABELED.list_images(tmp_path)
    message = str(error.value)
    assert "3 of its files do not exist (lost.png, gone.png, ../0cat.png)" in message
    assert "1 of its files are no images that Pillow can read (notes.txt)" in message
    assert "1 files have several rows (0cat.png)" in message
    assert "1 images have no row (new.png)" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "has nothing in its first line; expected the columns file,class"),
        (b"name;label\na;b\n", "has 'name;label' in its first line"),
        (b"file,class\n", "no rows below its first line"),
        (b"file,class\na.png\n,cat\nb.png,cat\n", r"2 of 3 rows lack .* \(line 2, line 3\)"),
        (b"file,class\n\xff\xfe.png,cat\n", "cannot read .*labels.csv"),
    ],
)
def test_files_that_hold_no_labels(tmp_path, text, words):
    make_flat(tmp_path)
    (tmp_path / "labels.csv").write_bytes(text)
    with pytest.raises(UserError, match=words):
        LABELED.class_names(tmp_path)


# --------------------------------------------------------------------------------------------------
# Part of the data's identity


def test_labels_and_splits_are_part_of_what_identifies_the_data(tmp_path):
    root = make_flat(tmp_path / "pets")
    before = identity.describe("imagefolder", str(root), LABELED)
    assert (before["files"]["train"], before["files"]["test"]) == (12, 3)
    moved = shutil.copytree(root, tmp_path / "moved")
    assert identity.describe("imagefolder", str(moved), LABELED)["files"] == before["files"]

    text = (root / "labels.csv").read_text()
    swapped = text.replace("0cat.png,cat", "0cat.png,dog").replace("0dog.png,dog", "0dog.png,cat")
    (moved / "labels.csv").write_text(swapped)
    after = identity.describe("imagefolder", str(moved), LABELED)
    assert identity.differences({"class_names": before["class_names"], **before}, after) == [
        "the same number of images, but other names or sizes, or other labels"
    ]

    half = identity.describe("imagefolder", str(root), Layout(0.4, "labels.csv"))
    assert len(identity.differences(before, half)) == 2


def test_folders_that_are_laid_out_as_before_keep_their_identity(tmp_path):
    """The hash of the names and sizes alone, as in the logs of earlier versions."""
    for split in ("train", "test"):
        make_classes(tmp_path / split, 1)
        for path in (tmp_path / split).rglob("*.png"):
            path.write_bytes(b"12345")
    files = identity.describe("imagefolder", str(tmp_path))["files"]
    assert files == {"train": 3, "test": 3, "hash": "62475f2bdd24659b"}


def test_a_run_with_labels_resumes_only_on_the_same_labels(tmp_path, run_script):
    root = make_flat(tmp_path / "pets")
    arguments = run_arguments(root, tmp_path / "out", "--labels", "labels.csv")
    code, out, err = run_script(main.main, *arguments)
    assert code == 0, err
    assert "on 3 test images" in out
    folder = tmp_path / "out" / "pets" / "full" / "seed_0"
    config = utils.read_json(folder / "config.json")
    assert (config["settings"]["split_folder"], config["settings"]["labels"]) == (0.2, "labels.csv")
    assert (config["data"]["num_train"], config["data"]["num_test"]) == (12, 3)

    # The same labels from another place are the same data.
    shutil.move(root / "labels.csv", tmp_path / "mine.csv")
    moved = [*arguments[:-1], str(tmp_path / "mine.csv")]
    code, out, _ = run_script(main.main, *moved)
    assert (code, "nothing to do" in out) == (0, True)

    text = (tmp_path / "mine.csv").read_text()
    (tmp_path / "mine.csv").write_text(text.replace("1cat.png,cat", "1cat.png,eel"))
    code, _, err = run_script(main.main, *moved)
    assert code == 2
    assert "holds a run with other data" in err
    code, _, err = run_script(main.main, *moved, "--split_folder", "0.3")
    assert code == 2
    assert "split_folder 0.2 there, 0.3 asked for" in err


def test_an_evaluation_reads_the_folder_as_the_training_did_or_as_it_is_told(tmp_path, run_script):
    root = make_flat(tmp_path / "pets")
    labels = ["--labels", "labels.csv"]
    assert main.main(run_arguments(root, tmp_path / "out", *labels)) == 0
    (checkpoint,) = tmp_path.rglob("last.pt")

    def evaluate(*flags):
        options = ["--checkpoint", str(checkpoint), "--device", "cpu", *flags]
        code, _, err = run_script(evaluation.main, *options)
        return code, err, utils.read_json(checkpoint.with_name("eval_test.json"))

    code, err, report = evaluate()
    assert (code, err) == (0, "")
    assert (report["num_images"], report["data_as_trained"]) == (3, True)
    other = make_classes(tmp_path / "other", 10)
    code, err, report = evaluate("--data_dir", str(other), "--split_folder", "0.4")
    assert code == 1
    assert "no file" in err
    for split in ("train", "test"):
        make_classes(tmp_path / "split" / split, 4)
    code, err, report = evaluate("--data_dir", str(tmp_path / "split"), "--split_folder", "0")
    assert code == 0
    assert (report["num_images"], report["data_as_trained"]) == (12, False)
    code, err, _ = evaluate("--split_folder", "0", *labels)
    assert code == 2
    assert "add --split_folder" in err


def test_a_sweep_reads_the_folder_as_the_run_does(tmp_path):
    root = make_flat(tmp_path / "pets")
    options = ["--data_dir", str(root), "--split_folder=0.2", "--labels", "labels.csv"]

    def plan_of(*more):
        sweep = ["--dataset", "imagefolder", "--output_dir", str(tmp_path / "out")]
        args = run_experiments.parse_args([*sweep, "--", *options, *more])
        return plan.make_plan(args, "cpu", [MaskSpec()])

    (run,) = plan_of()
    assert run.data == identity.describe("imagefolder", str(root), LABELED)
    with pytest.raises(utils.UsageError, match="--split_folder: expected a number"):
        plan_of("--split_folder", "much")
