"""Datasets from small files in the real formats; batches against torchvision, image by image."""

import gzip
import os
import pickle
import struct
import subprocess
import sys
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms.v2 import functional as transforms

import data
import main
from pipeline import pixels, sources
from pipeline.layout import Layout
from utils import REPOSITORY, UserError

CPU = torch.device("cpu")
JPEG_COPY = REPOSITORY / "data" / "cifar10-jpeg"


def random_images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def dataset_of(images, labels=None, img_size=None, flip=True, mean=None, std=None):
    """The images, for both splits. By default each has its own label, and batches hold 0..255."""
    channels = images.shape[1]
    split = data.Split(images, torch.arange(len(images)) if labels is None else labels)
    return data.Dataset(
        name="own",
        label="Own",
        class_names=["a", "b"],
        train=split,
        test=split,
        mean=mean or [0.0] * channels,
        std=std or [1 / 255] * channels,
        flip=flip,
        img_size=img_size or tuple(images.shape[-2:]),
        device=CPU,
    )


def train_batches(dataset, batch_size, seed=0, epoch=1, augmentation=None, **options):
    how = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "augmentation": augmentation}
    return data.train_batches(dataset, **how, **options)


def collect(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(batches, others):
    if len(batches) != len(others):
        return False
    return all(
        torch.equal(images, other_images) and torch.equal(labels, other_labels)
        for (images, labels), (other_images, other_labels) in zip(batches, others, strict=True)
    )


# --------------------------------------------------------------------------------------------------
# scikit-learn's digits


def test_digits():
    dataset = data.load_dataset("digits", "nowhere", (8, 8), CPU)
    again = data.load_dataset("digits", "nowhere", (8, 8), CPU)
    splits = ((dataset.train, again.train, 1437), (dataset.test, again.test, 360))
    for split, other, count in splits:
        assert split.images.dtype == torch.uint8
        assert split.images.shape == (count, 1, 8, 8)
        assert split.labels.dtype == torch.int64
        assert len(split) == count
        assert (split.images.min(), split.images.max()) == (0, 255)
        assert torch.equal(split.images, other.images)
        assert torch.equal(split.labels, other.labels)
        shares = split.labels.bincount(minlength=10) / count
        assert (shares - 0.1).abs().max() < 0.01  # stratified
    assert not dataset.flip
    assert not Path("nowhere").exists()
    assert dataset.describe() == again.describe()
    assert dataset.describe()["num_train"] == 1437


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    def labeled_bytes(images, labels):
        pairs = zip(images, labels, strict=True)
        return {(image.tobytes(), int(label)) for image, label in pairs}

    loaded = sources.load_sklearn_digits(Path(), (8, 8))
    images, labels = (torch.cat([loaded.train[part], loaded.test[part]]) for part in (0, 1))
    digits = load_digits()
    expected = np.rint(digits.images / 16 * 255).astype(np.uint8)
    assert labeled_bytes(images.numpy(), labels) == labeled_bytes(expected, digits.target)


# --------------------------------------------------------------------------------------------------
# torchvision's datasets, from small files in their formats


def write_cifar10(folder):
    folder = folder / "cifar-10-batches-py"
    train_files = [f"data_batch_{i}" for i in range(1, 6)]
    splits = write_cifar_splits(folder, train_files, ["test_batch"], "labels", num_classes=10)
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return splits


def write_cifar100(folder):
    folder = folder / "cifar-100-python"
    splits = write_cifar_splits(folder, ["train"], ["test"], "fine_labels", num_classes=100)
    names = [f"class {i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    return splits


def write_cifar_splits(folder, train_files, test_files, labels_key, num_classes):
    """Unpacked files of 4 images each; returns images [n, 3, 32, 32] and labels of both splits."""
    folder.mkdir(parents=True)
    splits = []
    seed = 0
    for files in (train_files, test_files):
        parts = []
        for name in files:
            seed += 1
            images = random_images(4, 3, 32, 32, seed=seed)
            labels = [(7 * seed + i) % num_classes for i in range(4)]
            entry = {"data": images.flatten(1).numpy(), labels_key: labels}
            (folder / name).write_bytes(pickle.dumps(entry))
            parts.append((images, torch.tensor(labels)))
        splits.append(tuple(torch.cat(column) for column in zip(*parts, strict=True)))
    return splits


def write_fashion_mnist(folder):
    folder = folder / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    splits = []
    for prefix, count in (("train", 6), ("t10k", 3)):
        images = random_images(count, 1, 28, 28, seed=count)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        content = header + images.numpy().tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(content)

        labels = torch.arange(count) % 10
        header = struct.pack(">II", 0x801, count)
        content = header + labels.byte().numpy().tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(content)
        splits.append((images, labels))
    return splits


@pytest.fixture
def no_checksums(monkeypatch):
    """Accept any CIFAR files without comparing checksums."""
    for kind in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
        for name in ("train_list", "test_list"):
            monkeypatch.setattr(kind, name, [[file, None] for file, _ in getattr(kind, name)])
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails at once; gives the list of addresses tried."""
    tried = []

    def refuse(url, *args, **kwargs):
        tried.append(url)
        raise urllib.error.URLError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", refuse)
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", refuse)
    return tried


@pytest.mark.parametrize(
    ("name", "write", "shape", "num_classes"),
    [
        ("cifar10", write_cifar10, (3, 32, 32), 10),
        ("cifar100", write_cifar100, (3, 32, 32), 100),
        ("fashion_mnist", write_fashion_mnist, (1, 28, 28), 10),
    ],
)
def test_torchvision_datasets(tmp_path, no_checksums, no_network, name, write, shape, num_classes):
    written = write(tmp_path)
    dataset = data.load_dataset(name, str(tmp_path), (32, 32), CPU)
    for split, (images, labels) in zip((dataset.train, dataset.test), written, strict=True):
        assert split.images.dtype == torch.uint8
        assert split.images.shape[1:] == shape
        assert split.images.is_contiguous()
        assert split.labels.dtype == torch.int64
        assert torch.equal(split.images, images)
        assert torch.equal(split.labels, labels)
    assert (dataset.in_channels, dataset.num_classes) == (shape[0], num_classes)
    assert sources.channels_and_classes(name, "nowhere") == (shape[0], num_classes)
    assert dataset.flip
    assert no_network == []


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_without_network_the_error_says_what_to_do(tmp_path, no_network, name):
    with pytest.raises(UserError) as caught:
        data.load_dataset(name, str(tmp_path / "new"), (32, 32), CPU)
    message = str(caught.value)
    assert no_network
    for words in ("name resolution", str(tmp_path / "new"), "http", "--dataset digits"):
        assert words in message
    files = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix != ".lock"] == []


def test_a_corrupt_archive_is_not_unpacked(tmp_path, no_network):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half an archive")
    with pytest.raises(UserError, match="If a file there is damaged, remove it"):
        data.load_dataset("cifar10", str(tmp_path), (32, 32), CPU)
    assert no_network  # it tried to download the archive again
    assert not (tmp_path / "cifar-10-batches-py").exists()


@pytest.mark.parametrize("length", [0, 1000])
def test_a_broken_download_is_not_used(tmp_path, monkeypatch, no_network, length):
    def break_off(url, path):
        Path(path).write_bytes(b"x" * length)
        raise urllib.error.URLError("connection reset")

    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, **kwargs: url)
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", break_off)
    for name in ("cifar10", "fashion_mnist"):
        for _ in range(2):
            with pytest.raises(UserError, match="connection reset"):
                data.load_dataset(name, str(tmp_path), (32, 32), CPU)


def test_files_damaged_after_the_download_are_an_error(tmp_path, no_network):
    """CIFAR's are recognized by their checksums, those of Fashion-MNIST by their length."""
    write_cifar10(tmp_path)  # not the real checksums
    with pytest.raises(UserError, match="name resolution"):
        data.load_dataset("cifar10", str(tmp_path), (32, 32), CPU)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        root = tmp_path / name
        write_fashion_mnist(root)
        path = root / "FashionMNIST" / "raw" / name
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:10], b"", bytes(len(whole))):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"\S: \S+.*damaged, remove it") as caught:
                data.load_dataset("fashion_mnist", str(root), (32, 32), CPU)
            assert ": . It" not in str(caught.value)  # a bare AssertionError has no message


def test_a_killed_download_of_fashion_mnist_continues(tmp_path, no_network, monkeypatch):
    """Packed files with the right checksum are kept and unpacked; nothing is fetched twice."""
    write_fashion_mnist(tmp_path)
    raw = tmp_path / "FashionMNIST" / "raw"
    for path in list(raw.iterdir()):
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    (raw / "train-images-idx3-ubyte").write_bytes(b"half")
    names = [[name, None] for name, _ in torchvision.datasets.FashionMNIST.resources]
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", names)
    assert len(data.load_dataset("fashion_mnist", str(tmp_path), (32, 32), CPU).train) == 6
    assert no_network == []


def test_a_data_dir_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=str(path)):
            data.load_dataset("cifar10", str(path), (32, 32), CPU)


def test_loading_is_quiet(tmp_path, no_checksums, capfd, recwarn):
    write_cifar10(tmp_path)
    data.load_dataset("cifar10", str(tmp_path), (32, 32), CPU)
    assert capfd.readouterr() == ("", "")
    assert recwarn.list == []


def test_a_read_only_folder_is_enough(tmp_path, no_checksums, monkeypatch):
    write_cifar10(tmp_path)
    monkeypatch.setattr(sources.os, "access", lambda path, mode: False)  # root may write anywhere
    before = set(tmp_path.rglob("*"))
    assert len(data.load_dataset("cifar10", str(tmp_path), (32, 32), CPU).train) == 20
    assert set(tmp_path.rglob("*")) == before


def test_main_without_network_ends_in_one_line(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key.lower() != "no_proxy"}
    for scheme in ("http", "https", "HTTP", "HTTPS"):
        environment[f"{scheme}_proxy"] = "http://127.0.0.1:9"
    command = [sys.executable, "main.py", "--dataset", "cifar10", "--device", "cpu"]
    command += ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "output")]
    how = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, **how)

    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("main.py: error: cannot load CIFAR-10 from ")
    assert "https://www.cs.toronto.edu" in done.stderr
    assert not (tmp_path / "output").exists()
    assert [path.name for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"] == []


# --------------------------------------------------------------------------------------------------
# Before the images are read


def test_channels_and_classes_read_no_image(tmp_path):
    expected = {"cifar10": (3, 10), "cifar100": (3, 100)}
    expected |= {"fashion_mnist": (1, 10), "digits": (1, 10)}
    for name, answer in expected.items():
        assert sources.channels_and_classes(name, "nowhere") == answer
    for name in ("ant", "bee", "cow"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.jpg").write_text("not an image")
    assert sources.channels_and_classes("imagefolder", str(tmp_path)) == (3, 3)
    assert set(sources.DATASETS) == {*expected, "imagefolder"}
    assert not Path("nowhere").exists()


def test_a_dry_run_of_a_missing_folder_ends_in_one_line(tmp_path, run_script):
    arguments = ("--dataset", "imagefolder", "--data_dir", str(tmp_path / "none"), "--dry_run")
    code, out, err = run_script(main.main, *arguments)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    assert str(tmp_path / "none") in err


# --------------------------------------------------------------------------------------------------
# Mean and standard deviation


@pytest.mark.parametrize("shape", [(7, 3, 5, 9), (1, 1, 1, 1), (300, 1, 8, 8)])
def test_channel_statistics_against_numpy(shape):
    images = random_images(*shape)
    mean, std = data.channel_statistics(images)
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, np.maximum(pixels.std((0, 2, 3)), 1 / 255), rtol=1e-12)


@pytest.mark.parametrize("value", [0, 77, 255])
def test_constant_images_stay_finite(value):
    images = torch.full((5, 3, 4, 4), value, dtype=torch.uint8)
    mean, std = data.channel_statistics(images)
    assert mean == pytest.approx([value / 255] * 3)
    assert std == [1 / 255] * 3
    assert pixels.normalize(images, mean, std).abs().max() < 1e-4


# --------------------------------------------------------------------------------------------------
# Transforms of a batch, compared with one image at a time

SHAPES = [(6, 3, 8, 8), (5, 1, 6, 11), (4, 3, 13, 5), (1, 3, 9, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_crop_and_flip(shape, padding):
    images = random_images(*shape)
    offsets = torch.randint(2 * padding + 1, (len(images), 2))
    offsets[0] = 2 * padding
    offsets[-1] = torch.tensor([0, 2 * padding])
    mirrored = torch.arange(len(images)) % 2 == 0

    found = pixels.crop_and_flip(images, offsets, mirrored, padding)
    for i, image in enumerate(images):
        top, left = offsets[i].tolist()
        expected = transforms.crop(transforms.pad(image, [padding]), top, left, *shape[-2:])
        if mirrored[i]:
            expected = transforms.horizontal_flip(expected)
        assert torch.equal(found[i], expected)

    centered = torch.full_like(offsets, padding)
    untouched = pixels.crop_and_flip(images, centered, torch.zeros_like(mirrored), padding)
    assert torch.equal(untouched, images)


@pytest.mark.parametrize(("shorter", "padding"), [(32, 4), (8, 1), (28, 4), (1, 0), (224, 28)])
def test_padding_is_an_eighth_of_the_shorter_side(shorter, padding):
    for size in ((shorter, shorter), (shorter, 300), (300, shorter)):
        assert pixels.crop_padding(torch.empty(1, 3, *size)) == padding


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("img_size", [(8, 8), (16, 24), (4, 3), (24, 4), (6, 11)])
def test_normalize_and_resize(shape, img_size):
    images = random_images(*shape)
    mean = [0.4, 0.5, 0.6][: shape[1]]
    std = [0.2, 0.3, 0.25][: shape[1]]
    results = pixels.resize(pixels.normalize(images, mean, std), img_size)
    assert results.dtype == torch.float32
    assert results.shape == (*shape[:2], *img_size)
    for image, result in zip(images.numpy().astype(np.float64) / 255, results, strict=True):
        normalized = np.stack([(image[c] - mean[c]) / std[c] for c in range(shape[1])])
        expected = torch.from_numpy(normalized)[None]
        if shape[-2:] != img_size:  # if an image grows, antialiasing has no effect
            expected = F.interpolate(expected, img_size, mode="bilinear", antialias=True)
        torch.testing.assert_close(result, expected[0].float(), rtol=1e-4, atol=1e-4)


def test_an_image_that_shrinks_is_antialiased():
    """A checkerboard of single pixels becomes gray, not one of its two colors."""
    board = (255 * (torch.arange(64)[:, None] + torch.arange(64)).remainder(2)).byte()[None, None]
    result = pixels.resize(pixels.normalize(board, [0.5], [0.5]), (8, 8))
    assert result.abs().max() < 0.05


# --------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (12, 4), (3, 8), (1, 1), (7, 7)])
def test_an_epoch_has_each_image_once_with_its_own_label(num_images, batch_size):
    """All pixels of image i are i + 1, so that even a crop tells which image it is."""
    numbers = torch.arange(num_images, dtype=torch.uint8)
    dataset = dataset_of((numbers + 1).view(-1, 1, 1, 1).expand(-1, 3, 8, 8))
    batches = list(train_batches(dataset, batch_size))
    assert len(batches) == data.steps_per_epoch(num_images, batch_size)
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (len(batches) - 1)
    images, labels = collect(batches)
    assert sorted(labels.tolist()) == list(range(num_images))
    assert torch.equal(images.amax((1, 2, 3)).long(), labels + 1)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_training_images_are_crops_and_flips_drawn_uniformly():
    """Each is one of the crops of its image, mirrored or not; all occur about equally often."""
    base = random_images(1, 3, 8, 10)
    dataset = dataset_of(base.expand(3600, -1, -1, -1), labels=torch.zeros(3600, dtype=torch.int64))
    padded = transforms.pad(base[0], [1])
    crops = [transforms.crop(padded, top, left, 8, 10) for top in range(3) for left in range(3)]
    crops += [transforms.horizontal_flip(crop) for crop in crops]
    counts = {crop.numpy().tobytes(): 0 for crop in crops}
    assert len(counts) == 18

    for images, _ in train_batches(dataset, 100):
        kinds = {image.numpy().tobytes() for image in images.round().byte()}
        assert len(kinds) > 10  # drawn for each image, not for the batch
        for image in images.round().byte():
            counts[image.numpy().tobytes()] += 1
    assert min(counts.values()) > 140  # 200 expected, standard deviation 14
    assert max(counts.values()) < 260


def test_images_are_not_flipped_if_that_changes_their_class():
    copies = random_images(1, 1, 8, 8).expand(200, -1, -1, -1)
    dataset = dataset_of(copies, torch.zeros(200, dtype=torch.int64), flip=False)
    images, _ = collect(train_batches(dataset, 64))
    assert len({image.numpy().tobytes() for image in images}) == 9


def test_batches_depend_only_on_seed_and_epoch():
    dataset = dataset_of(random_images(20, 3, 8, 8))

    def batches(seed, epoch):
        return list(train_batches(dataset, 8, seed, epoch))

    reference = batches(0, 1)
    state = torch.random.get_rng_state()
    torch.rand(5)
    assert same(reference, batches(0, 1))
    torch.random.set_rng_state(state)
    list(train_batches(dataset, 8, seed=5, epoch=5))
    assert torch.equal(torch.random.get_rng_state(), state)  # other draws are not affected
    others = [batches(0, 2), batches(1, 1), batches(1, 0), batches(2**63, 1)]
    for index, other in enumerate(others):
        assert not any(same(other, one) for one in (reference, *others[:index]))
    labels = [collect(other)[1].tolist() for other in (reference, *others)]
    assert len({tuple(order) for order in labels}) == len(labels)
    assert labels[0] != sorted(labels[0])


@pytest.mark.parametrize("start_step", [0, 1, 2, 3, 9])
def test_start_step_continues_exactly(start_step):
    dataset = dataset_of(random_images(21, 3, 8, 8), img_size=(12, 12))
    whole = list(train_batches(dataset, 8, seed=3, epoch=4))
    resumed = list(train_batches(dataset, 8, seed=3, epoch=4, start_step=start_step))
    assert same(resumed, whole[start_step:])


def test_the_draws_of_an_image_do_not_depend_on_the_batch_size():
    dataset = dataset_of(random_images(21, 3, 8, 8))
    small = collect(train_batches(dataset, 4, seed=3, epoch=4))
    large = collect(train_batches(dataset, 50, seed=3, epoch=4))
    assert same([small], [large])


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_evaluation_images_are_in_order_and_unchanged(batch_size):
    images = random_images(10, 3, 8, 6)
    dataset = dataset_of(images)
    batches = list(data.eval_batches(dataset, dataset.test, batch_size))
    assert len(batches) == data.steps_per_epoch(10, batch_size)
    result, labels = collect(batches)
    assert torch.equal(result.round().byte(), images)
    assert labels.tolist() == list(range(10))


def test_rectangular_batches():
    dataset = dataset_of(random_images(5, 3, 8, 12), img_size=(16, 20))
    for batches in (train_batches(dataset, 4), data.eval_batches(dataset, dataset.test, 4)):
        assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 16, 20), (1, 3, 16, 20)]


def test_changing_a_batch_does_not_change_the_data():
    images = random_images(9, 3, 8, 8)
    dataset = dataset_of(images.clone(), img_size=(8, 8))
    for _ in range(2):
        trained_on = list(train_batches(dataset, 4))
        evaluated_on = list(data.eval_batches(dataset, dataset.test, 4))
        for batch, _ in trained_on + evaluated_on:
            batch.zero_()
    assert torch.equal(dataset.train.images, images)


def test_batches_of_training_data_have_zero_mean_and_unit_variance():
    images = (random_images(200, 3, 8, 8) // 3) + 40
    mean, std = data.channel_statistics(images)
    dataset = dataset_of(images, mean=mean, std=std)
    result, _ = collect(data.eval_batches(dataset, dataset.train, 64))
    mean = result.mean((0, 2, 3))
    std = result.std((0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=1e-5, rtol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("fits", [True, False])
def test_batches_on_cuda_are_those_of_the_cpu(monkeypatch, fits):
    cuda = torch.device("cuda")
    monkeypatch.setattr(data, "_bytes_for_data", lambda device: float("inf") if fits else 0)
    here = data.load_dataset("digits", "nowhere", (16, 16), CPU)
    there = data.load_dataset("digits", "nowhere", (16, 16), cuda)
    assert there.train.images.is_cuda == fits
    for one, other in zip(train_batches(here, 100), train_batches(there, 100), strict=True):
        assert other[0].is_cuda
        torch.testing.assert_close(one[0], other[0].cpu(), atol=1e-4, rtol=1e-4)
        assert torch.equal(one[1], other[1].cpu())


# --------------------------------------------------------------------------------------------------
# A real image folder, if it has been unpacked


@pytest.mark.skipif(not JPEG_COPY.is_dir(), reason="data/cifar10-jpeg is not there")
def test_the_jpeg_copy_of_cifar10(monkeypatch):
    """All files are found; one in 50 is read, to save time."""
    list_images = Layout.list_images
    counts = []

    def list_some(layout, root):
        files = list_images(layout, root)
        counts.extend(len(split) for split in files.splits.values())
        return replace(files, train=files.train[::50], test=files.test[::50])

    monkeypatch.setattr(Layout, "list_images", list_some)
    dataset = data.load_dataset("imagefolder", str(JPEG_COPY), (224, 224), CPU)
    assert counts == [50_000, 10_000]
    assert dataset.train.images.shape == (1000, 3, 32, 32)
    assert dataset.test.images.shape == (200, 3, 32, 32)
    assert dataset.train.labels.bincount().tolist() == [100] * 10
    assert dataset.label == "CIFAR-10 (JPEG q75 copy)"
    assert dataset.class_names[:2] == ["airplane", "automobile"]
    assert dataset.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.01)  # CIFAR-10's
    images, labels = next(train_batches(dataset, 16))
    assert images.shape == (16, 3, 224, 224)
    assert labels.shape == (16,)


# --------------------------------------------------------------------------------------------------
# Resizing, augmentation, ranks, streaming


@pytest.mark.parametrize("factors", [(1, 2), (2, 1), (3, 3), (7, 7), (8, 4), (5, 2)])
@pytest.mark.parametrize("size", [(1, 1), (4, 6), (9, 2)])
def test_enlarging_by_whole_factors(factors, size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = pixels.enlarge(pixels.enlarge(x, factors[1], dim=3), factors[0], dim=2)
    new_size = [side * factor for side, factor in zip(size, factors, strict=True)]
    expected = F.interpolate(x, new_size, mode="bilinear")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


STRONG = data.Augmentation(policy="rand", random_erasing=0.5, mix=0.5)


def test_without_augmentation_images_are_unchanged():
    images = random_images(10, 3, 8, 8)
    nothing = data.Augmentation(crop=False, flip=False)
    found, labels = collect(train_batches(dataset_of(images), 4, augmentation=nothing))
    assert torch.equal(found.round().byte(), images[labels])


def test_each_image_of_a_batch_is_augmented_by_its_own_draws():
    copies = random_images(1, 3, 16, 16).expand(64, -1, -1, -1)
    dataset = dataset_of(copies, labels=torch.zeros(64, dtype=torch.int64))
    for augmentation in (
        data.Augmentation(crop=False, flip=False, policy="trivial"),
        data.Augmentation(crop=False, random_erasing=1),
    ):
        ((images, _),) = train_batches(dataset, 64, augmentation=augmentation)
        assert len({image.numpy().tobytes() for image in images}) > 20


def labeled(num_images, num_classes=5, size=8):
    images = random_images(num_images, 3, size, size)
    dataset = dataset_of(images, labels=torch.arange(num_images) % num_classes)
    dataset.class_names = [str(number) for number in range(num_classes)]
    return dataset


def test_mixed_batches_have_mixed_targets():
    dataset = labeled(640)
    batches = list(train_batches(dataset, 10, augmentation=data.Augmentation(mix=0.5)))
    mixed = [labels for _, labels in batches if labels.ndim == 2]
    assert 15 < len(mixed) < 50
    for labels in mixed:
        torch.testing.assert_close(labels.sum(1), torch.ones(10))
        assert labels.shape == (10, 5)
    assert any((labels.max(1).values < 1).any() for labels in mixed)

    never = train_batches(dataset, 10)
    assert not any(labels.ndim == 2 for _, labels in never)
    always = train_batches(dataset, 10, augmentation=data.Augmentation(mix=1))
    assert all(labels.ndim == 2 for _, labels in always)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_an_image_is_mixed_with_the_one_before_it(kind):
    """The images are constant, so their mean shows that they are mixed as their labels are."""
    values = torch.tensor([50, 0, 100, 200], dtype=torch.uint8)
    images = values.view(4, 1, 1, 1).expand(4, 3, 20, 20).float()
    labels = torch.arange(4)
    found, targets = data.mixing.mix(kind, 1.0, images, labels, 4, seed=3)
    assert found.shape == (3, 3, 20, 20)
    for i, (image, target) in enumerate(zip(found, targets, strict=True), start=1):
        own, other = float(values[i]), float(values[i - 1])
        expected = target[i].item() * own + target[i - 1].item() * other
        assert image.mean().item() == pytest.approx(expected, abs=1e-3)
        assert 0 < target[i] < 1
        if kind == "cutmix":
            assert set(image.unique().tolist()) == {own, other}
    again = data.mixing.mix(kind, 1.0, images, labels, 4, seed=3)
    assert torch.equal(again[0], found)
    assert not torch.equal(data.mixing.mix(kind, 1.0, images, labels, 4, seed=4)[0], found)


def test_mixing_does_not_affect_other_draws():
    state = torch.random.get_rng_state()
    list(train_batches(labeled(20), 5, augmentation=data.Augmentation(mix=1)))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("augmentation", [data.Augmentation(), STRONG])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_ranks_share_each_batch(augmentation, world_size):
    """21 images in batches of 6: the last has 3, fewer than there are ranks."""
    dataset = labeled(21)

    def batches(**rank_and_world_size):
        epoch = {"seed": 3, "epoch": 4, "augmentation": augmentation}
        return list(train_batches(dataset, 6, **epoch, **rank_and_world_size))

    whole = batches()
    parts = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, (images, labels) in enumerate(whole):
        limits = [data.rank_part(len(images), rank, world_size) for rank in range(world_size)]
        assert limits[0][0] == 0
        assert limits[-1][1] == len(images)
        for rank, (start, stop) in enumerate(limits):
            assert start == (limits[rank - 1][1] if rank else 0)
            found, found_labels = parts[rank][step]
            if stop > start:
                torch.testing.assert_close(found, images[start:stop])
                torch.testing.assert_close(found_labels, labels[start:stop])
            else:
                assert len(found) == 1  # a placeholder, so that the rank has something to compute


@pytest.mark.parametrize("batches_at_once", [2, 3, 100])
def test_batches_augmented_together_are_those_augmented_alone(monkeypatch, batches_at_once):
    dataset = labeled(50)
    monkeypatch.setattr(data, "BYTES_AT_ONCE", 0)
    alone = list(train_batches(dataset, 8, augmentation=STRONG))
    monkeypatch.setattr(data, "BYTES_AT_ONCE", batches_at_once * 8 * dataset.train.images[0].nbytes)
    fetch = data.fetch
    fetched = []

    def recording(split, indices, dataset):
        fetched[:] = indices
        return fetch(split, fetched, dataset)

    monkeypatch.setattr(data, "fetch", recording)
    for start_step in range(8):
        together = list(train_batches(dataset, 8, augmentation=STRONG, start_step=start_step))
        assert same(together, alone[start_step:])
        groups = [group.tolist() for group in fetched]
        if start_step == 0:
            whole = groups
            assert len(whole) == -(-7 // batches_at_once)
        assert groups == whole[start_step // batches_at_once :]  # the same as without a restart


@pytest.mark.parametrize("bytes_at_once", [0, data.BYTES_AT_ONCE])
@pytest.mark.parametrize("augmentation", [data.Augmentation(), STRONG])
def test_streamed_batches_are_those_of_resident_images(monkeypatch, augmentation, bytes_at_once):
    monkeypatch.setattr(data, "BYTES_AT_ONCE", bytes_at_once)
    dataset = labeled(50)
    streaming = labeled(50)
    streaming.streams = True
    for start_step in (0, 3, 6, 7):
        how = {"batch_size": 8, "augmentation": augmentation, "start_step": start_step}
        resident = list(train_batches(dataset, **how))
        assert same(list(train_batches(streaming, **how)), resident)
    expected = list(data.eval_batches(dataset, dataset.test, 8))
    assert same(list(data.eval_batches(streaming, streaming.test, 8)), expected)
    next(iter(train_batches(streaming, 8)))  # abandoned midway; its thread ends anyway


def test_the_limit_decides_what_streams():
    size = 1797 * 64
    for limit, streams in ((size, False), (size - 1, True), (0, True), (None, False)):
        assert data.load_dataset("digits", "nowhere", (8, 8), CPU, limit).streams == streams


@pytest.mark.cuda
@pytest.mark.parametrize("streams", [True, False])
def test_batches_do_not_wait_for_the_device(streams):
    limit = 0 if streams else None
    dataset = data.load_dataset("digits", "nowhere", (16, 16), torch.device("cuda"), limit)
    list(train_batches(dataset, 100, augmentation=STRONG))
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(train_batches(dataset, 100, epoch=2, augmentation=STRONG))
    finally:
        torch.cuda.set_sync_debug_mode("default")
