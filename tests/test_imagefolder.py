"""Image folders as people have them: every format, every defect."""

import contextlib
import os
import socket
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

import main
import utils
from pipeline import decoding, imagefiles, imagefolder, in_threads
from runtime import distributed
from utils import UserError

RED, GREEN, BLUE, GRAY = (200, 30, 40), (20, 190, 60), (10, 60, 180), (120, 120, 120)


def save(path, color=RED, size=(8, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path, **options)


def good_tree(root, size=(8, 8)):
    """Two classes with two training images and one test image each, all of one size."""
    for split, count in (("train", 2), ("test", 1)):
        for index in range(count):
            save(root / split / "cat" / f"{index}.png", RED, size)
            save(root / split / "dog" / f"{index}.png", BLUE, size)
    return root


def read_tree(root):
    folder = imagefolder.read(root, (8, 8))
    return folder.train, folder.test, folder.class_names, folder.label


def read_one(path, side=8):
    return np.asarray(decoding.read_image(path, side, side)).astype(int)


def is_plain(pixels, color, tolerance=0):
    return np.abs(pixels - np.asarray(color)).max() <= tolerance


def as_pixels(image):
    """uint8 tensor [3, H, W] -> int array [H, W, 3]."""
    return image.permute(1, 2, 0).numpy().astype(int)


def png_chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_header(width, height):
    """The start of a PNG that claims a size but has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")


# --------------------------------------------------------------------------------------------------
# Good folders


def test_a_good_tree(tmp_path):
    train, test, names, label = read_tree(good_tree(tmp_path / "pets"))
    assert names == ["cat", "dog"]
    assert label == "pets"
    for (images, labels), expected in ((train, [0, 0, 1, 1]), (test, [0, 1])):
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert images.shape == (len(expected), 3, 8, 8)
        assert labels.tolist() == expected
        for image, name in zip(images, expected, strict=True):
            assert image[:, 3, 4].tolist() == list((RED, BLUE)[name])


def test_files_come_in_order_of_their_names_whatever_thread_reads_them(tmp_path):
    good_tree(tmp_path)
    for index in range(40):
        save(tmp_path / "train" / "cat" / f"n{index:02}.png", (index, 0, 0))
    images = imagefolder.read(tmp_path, (8, 8)).train[0]
    assert images[2:42, 0, 0, 0].tolist() == list(range(40))


@pytest.mark.parametrize(
    ("size", "img_size", "expected"),
    [
        ((8, 8), (8, 8), (8, 8)),
        ((8, 8), (32, 32), (8, 8)),  # enlarged later, on the device
        ((12, 8), (32, 32), (8, 12)),
        ((12, 8), (8, 12), (8, 12)),
        ((40, 30), (8, 8), (8, 8)),
        ((40, 30), (6, 10), (6, 10)),
        ((1, 1), (8, 8), (1, 1)),
    ],
)
def test_one_size_is_kept_unless_it_is_larger_than_needed(tmp_path, size, img_size, expected):
    images = imagefolder.read(good_tree(tmp_path, size), img_size).train[0]
    assert images.shape[-2:] == expected
    assert images[0].float().mean((1, 2)).tolist() == list(RED)


def test_mixed_sizes_are_resized_and_cropped_at_the_center(tmp_path):
    good_tree(tmp_path)
    wide = Image.new("RGB", (40, 10), RED)
    wide.paste(GREEN, (12, 0, 28, 10))  # the center square, with a margin for the filter
    wide.save(tmp_path / "train" / "cat" / "wide.png")
    for size in ((1, 1), (1, 3000), (3000, 1), (7, 9)):
        save(tmp_path / "train" / "dog" / f"{size}.png", BLUE, size)
    images, labels = imagefolder.read(tmp_path, (8, 8)).train
    assert images.shape == (9, 3, 8, 8)
    assert is_plain(as_pixels(images[2]), GREEN)
    assert all(is_plain(as_pixels(image), BLUE) for image in images[labels == 1])


SOME_NAMES = ["a.jpg", "a.JPEG", "a.PNG", "a.ppm", "a.bmp", "a.tif", "a.TIFF", "a.webp"]


@pytest.mark.parametrize("name", SOME_NAMES)
def test_formats_and_extensions(tmp_path, name):
    good_tree(tmp_path)
    save(tmp_path / "train" / "cat" / name, GREEN)
    images, _ = imagefolder.read(tmp_path, (8, 8)).train
    assert len(images) == 5
    assert is_plain(read_one(tmp_path / "train" / "cat" / name), GREEN, tolerance=6)


def test_hidden_and_foreign_files_are_ignored(tmp_path):
    good_tree(tmp_path)
    cats = tmp_path / "train" / "cat"
    hidden = (".DS_Store", "._0.png", ".hidden.jpg")
    foreign = ("Thumbs.db", "notes.txt", "0.png.txt", "png")
    for name in hidden + foreign:
        (cats / name).write_text("not an image")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "README.md").write_text("not a class")
    (tmp_path / "validation").mkdir()
    (cats / "folder").mkdir()
    train, _, names, _ = read_tree(tmp_path)
    assert names == ["cat", "dog"]
    assert len(train[0]) == 4


def test_names_of_all_kinds(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "Käfer 甲虫 🐞" / "ein bild, ü.png")
        save(tmp_path / split / "-dash" / "--help.png")
    assert imagefolder.read(tmp_path, (8, 8)).class_names == ["-dash", "Käfer 甲虫 🐞"]


# --------------------------------------------------------------------------------------------------
# Every kind of image becomes RGB


GRAY_FILES = [("L", "a.png"), ("L", "a.pgm"), ("L", "a.jpg"), ("LA", "a.png")]


@pytest.mark.parametrize(("mode", "name"), GRAY_FILES)
def test_gray(tmp_path, mode, name):
    save(tmp_path / name, GRAY, mode=mode)
    assert is_plain(read_one(tmp_path / name), GRAY)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big_endian.tif", "a.pgm"])
def test_16_bit_gray_keeps_its_upper_byte(tmp_path, name):
    levels = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 8 8 65535\n" + levels.astype(">u2").tobytes())
    elif name == "big_endian.tif":
        Image.frombytes("I;16B", (8, 8), levels.astype(">u2").tobytes()).save(tmp_path / name)
    else:
        Image.fromarray(levels).save(tmp_path / name)
    assert (read_one(tmp_path / name) == (levels >> 8)[:, :, None]).all()


def test_cmyk(tmp_path):
    save(tmp_path / "a.jpg", GREEN, mode="CMYK", quality=100)
    assert is_plain(read_one(tmp_path / "a.jpg"), GREEN, tolerance=6)


def test_transparency_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (*BLUE, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    image.putpixel((7, 0), (0, 0, 0, 128))
    image.save(tmp_path / "rgba.png")
    image.save(tmp_path / "rgba.webp", lossless=True)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *BLUE])
    palette.paste(0, (0, 0, 4, 8))
    palette.save(tmp_path / "palette.png", transparency=0)
    palette.save(tmp_path / "palette.gif", transparency=0)
    palette.save(tmp_path / "bytes.png", transparency=b"\0\xff")
    keyed = Image.new("RGB", (8, 8), BLUE)
    keyed.paste((1, 2, 3), (0, 0, 4, 8))
    keyed.save(tmp_path / "keyed.png", transparency=(1, 2, 3))
    for path in tmp_path.iterdir():
        pixels = read_one(path)
        assert is_plain(pixels[:, :4], (255, 255, 255)), path
        assert is_plain(pixels[1:, 4:], BLUE), path
    assert is_plain(read_one(tmp_path / "rgba.png")[0, 7], (127, 127, 127), tolerance=1)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, name, orientation):
    """If all images are stored on their side, their common size is the one after rotation."""
    seen = Image.new("RGB", (24, 16), BLUE)
    seen.paste(RED, (0, 0, 8, 8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = seen.transpose(undo[orientation]) if orientation > 1 else seen
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        stored.save(tmp_path / split / "cat" / name, exif=exif, quality=100)
    images = imagefolder.read(tmp_path, (32, 32)).train[0]
    assert images.shape == (1, 3, 16, 24)
    assert (images[0, :, 4, 4] - torch.tensor(RED)).abs().max() < 20
    assert (images[0, :, 12, 20] - torch.tensor(BLUE)).abs().max() < 20
    assert (images[0, :, 4, 20] - torch.tensor(BLUE)).abs().max() < 20


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_only_the_first_frame_of_an_animation_is_read(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), color) for color in (GREEN, RED, BLUE)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert is_plain(read_one(tmp_path / name), GREEN, tolerance=6)


# --------------------------------------------------------------------------------------------------
# label.txt


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (b"My pets\n", "My pets"),
        ("Käfer 甲虫".encode(), "Käfer 甲虫"),
        (b"\xef\xbb\xbfFrom Notepad\r\n", "From Notepad"),
        (b"two\nlines\n", "two lines"),
        (b"", "folder"),
        (b" \n", "folder"),
    ],
)
def test_label(tmp_path, content, label):
    root = good_tree(tmp_path / "folder")
    (root / "label.txt").write_bytes(content)
    assert imagefolder.read(root, (8, 8)).label == label


def test_a_label_that_is_not_text_is_an_error(tmp_path):
    good_tree(tmp_path)
    (tmp_path / "label.txt").write_bytes(b"\xff\xfe\x00K\xe4fer")
    with pytest.raises(UserError, match=r"label\.txt.*UTF-8"):
        imagefolder.read(tmp_path, (8, 8))
    (tmp_path / "label.txt").unlink()
    (tmp_path / "label.txt").mkdir()
    with pytest.raises(UserError, match=r"label\.txt"):
        imagefolder.read(tmp_path, (8, 8))
    (tmp_path / "label.txt").rmdir()
    os.mkfifo(tmp_path / "label.txt")  # opening it would wait forever
    with pytest.raises(UserError, match=r"label\.txt is not a file"):
        imagefiles.read_label(tmp_path)


# --------------------------------------------------------------------------------------------------
# Errors are one line that names the problem


def remove(path):
    if path.is_dir():
        for child in path.iterdir():
            remove(child)
        path.rmdir()
    else:
        path.unlink()


def remove_both_classes(folder):
    remove(folder / "cat")
    remove(folder / "dog")


def remove_all_images(folder):
    for path in folder.glob("*.png"):
        remove(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: remove(root), "train"),
        (lambda root: remove(root / "train"), "train"),
        (lambda root: remove(root / "test"), "test"),
        (lambda root: (remove(root / "train"), (root / "train").write_text("")), "train"),
        (lambda root: remove_both_classes(root / "train"), "no class folders in"),
        (lambda root: remove_both_classes(root / "test"), "no class folders in"),
        (lambda root: remove_all_images(root / "train" / "cat"), "train/cat"),
        (lambda root: remove(root / "test" / "dog" / "0.png"), "test/dog"),
        (lambda root: remove(root / "train" / "dog"), "class dog only in test/"),
        (
            lambda root: [save(root / "test" / name / "0.png") for name in ("eel", "ant")],
            "classes ant, eel only in test/",
        ),
    ],
)
def test_a_bad_layout_is_named_in_one_line(tmp_path, spoil, words):
    root = good_tree(tmp_path / "root")
    spoil(root)
    with pytest.raises(UserError) as caught:
        imagefolder.read(root, (8, 8))
    message = str(caught.value)
    assert words in message
    assert str(root) in message
    assert "\n" not in message


def test_a_class_without_test_images_is_a_warning(tmp_path, capsys):
    good_tree(tmp_path)
    save(tmp_path / "train" / "ant" / "0.png", GREEN)
    train, test, names, _ = read_tree(tmp_path)
    assert names == ["ant", "cat", "dog"]
    assert train[1].tolist() == [0, 1, 1, 2, 2]
    assert test[1].tolist() == [1, 2]
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "class ant only in train/" in err


def truncated(path, name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(path / name)
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.jpg", b"not an image"),
        ("empty.png", b""),
        ("empty.webp", b""),
        ("huge.png", png_header(20_000, 20_000)),
        ("no_pixels.png", png_header(8, 8)),
        ("none.bmp", b"BM"),
        ("lying.pgm", b"P5 8 8 255\n12"),
        ("huge.pgm", b"P5 20000 20000 255\n12"),
        *((f"half.{kind}", None) for kind in ("jpg", "png", "gif", "tif", "webp", "bmp", "ppm")),
    ],
)
def test_a_bad_image_is_named_in_one_line(tmp_path, split, name, content, run_script):
    bad = good_tree(tmp_path / "root") / split / "dog" / name
    if content is None:
        truncated(bad.parent, name)
    else:
        bad.write_bytes(content)

    output = tmp_path / "output"
    arguments = ["--dataset", "imagefolder", "--data_dir", str(tmp_path / "root")]
    arguments += ["--img_size", "16", "--device", "cpu", "--output_dir", str(output)]
    started = time.perf_counter()
    code, out, err = run_script(main.main, *arguments)

    assert time.perf_counter() - started < 5
    assert code == 1
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert str(bad) in err
    assert not output.exists()
    if name.startswith("huge"):
        assert "20000x20000 pixels, more than 64 million" in err


def test_only_files_are_images_whatever_their_names(tmp_path, capsys):
    good_tree(tmp_path)
    cats = tmp_path / "train" / "cat"
    (cats / "folder.png").mkdir()  # and empty
    (cats / "dead.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(cats / "pipe.jpg")  # opening it would wait forever
    (cats / "text.txt").write_text("")
    (tmp_path / "train" / "eel").symlink_to(tmp_path / "nowhere")  # on a disk that is gone
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(cats / "socket.jpg"))
        assert len(imagefolder.read(tmp_path, (8, 8)).train[1]) == 4
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    examples = "train/eel, train/cat/dead.png, train/cat/pipe.jpg and 3 more"
    assert f"ignored what is not an image of a class (6): {examples}" in err


def test_an_image_next_to_the_class_folders_is_ignored(tmp_path, capsys):
    good_tree(tmp_path)
    save(tmp_path / "train" / "two\nlines.png")
    imagefolder.read(tmp_path, (8, 8))
    err = capsys.readouterr().err
    assert "ignored what is not an image of a class (1): train/two lines.png" in err
    assert len(err.splitlines()) == 1


def test_subfolders_and_links_are_followed_but_not_in_circles(tmp_path, capsys):
    good_tree(tmp_path / "pets")
    cats = tmp_path / "pets" / "train" / "cat"
    save(cats / "b" / "deep" / "0.png", GREEN)
    save(cats / "a" / "0.png", GRAY)
    save(tmp_path / "elsewhere" / "0.png", BLUE)
    (cats / "c").symlink_to(tmp_path / "elsewhere")
    (cats / "a" / "ring").symlink_to(cats)

    images, labels = imagefolder.read(tmp_path / "pets", (8, 8)).train
    assert labels.tolist() == [0] * 5 + [1] * 2
    assert [tuple(image[:, 0, 0].tolist()) for image in images[:5]] == [RED, RED, GRAY, GREEN, BLUE]
    err = capsys.readouterr().err
    assert "ignored what is not an image of a class (1): train/cat/a/ring/" in err


@pytest.mark.parametrize("name", ["a.jfif", "a.jp2", "a.jpe", "a.tga", "a.pcx", "a.dib", "a.mpo"])
def test_whatever_pillow_reads_is_an_image(tmp_path, name):
    good_tree(tmp_path)
    save(tmp_path / "train" / "cat" / name, GREEN)
    assert len(imagefolder.read(tmp_path, (8, 8)).train[0]) == 5
    assert not {".pdf", ".eps", ".mpg", ".h5"} & imagefiles.image_suffixes()


def test_no_file_is_run_as_a_program(tmp_path, monkeypatch):
    """An EPS is a program for Ghostscript, whatever the name of the file."""

    def fail(*args, **kwargs):
        pytest.fail("it was run")

    good_tree(tmp_path)
    Image.new("RGB", (8, 8), RED).save(tmp_path / "train" / "cat" / "a.jpg", format="EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", fail)
    message = r"a\.jpg as an image: not in a format that Pillow can read"
    with pytest.raises(UserError, match=message):
        imagefolder.read(tmp_path, (8, 8))


@pytest.mark.parametrize("name", ["val", "validation"])
def test_validation_images_stand_in_for_missing_test_images(tmp_path, capsys, name):
    good_tree(tmp_path)
    (tmp_path / "test").rename(tmp_path / name)
    folder = imagefolder.read(tmp_path, (8, 8))
    assert (len(folder.test[1]), folder.notes) == (2, {"test_folder": name})
    assert f"{name}/ is used for the test images" in capsys.readouterr().err

    good_tree(tmp_path)  # now with test images
    assert imagefolder.read(tmp_path, (8, 8)).notes == {}
    assert f"ignored what is not an image of a class (1): {name}/" in capsys.readouterr().err


def spoil_some(root, number):
    good_tree(root)
    for index in range(number):
        (root / "train" / "dog" / f"bad{index:02}.png").write_bytes(b"no image")
    truncated(root / "test" / "cat", "half.jpg")


def test_all_unreadable_images_are_named_at_once(tmp_path):
    spoil_some(tmp_path, 30)
    with pytest.raises(UserError) as caught:
        imagefolder.read(tmp_path, (8, 8))
    message = str(caught.value)
    assert message.startswith("31 images cannot be read: ")
    assert message.count("bad") == 19
    assert "test/cat/half.jpg (image file is truncated" in message
    advice = "remove or replace them, or leave them out with --skip_unreadable"
    assert f"and 11 more; {advice}" in message
    assert "\n" not in message


def test_unreadable_images_are_left_out_on_request(tmp_path, run_script):
    spoil_some(tmp_path / "pets", 2)
    arguments = ["--dataset", "imagefolder", "--data_dir", str(tmp_path / "pets")]
    arguments += ["--model", "vit_micro", "--depth", "1", "--img_size", "8", "--patch_size", "4"]
    arguments += ["--epochs", "1", "--device", "cpu", "--output_dir", str(tmp_path)]
    code, _, err = run_script(main.main, *arguments, "--skip_unreadable")
    assert code == 0, err

    names = "test/cat/half.jpg, train/dog/bad00.png, train/dog/bad01.png"
    assert f"left out 3 images that cannot be read: {names}" in err
    found = utils.read_json(tmp_path / "pets" / "full" / "seed_0" / "config.json")["data"]
    assert (found["num_train"], found["num_test"], found["skipped"]["number"]) == (4, 2, 3)


def test_a_class_without_readable_images_is_an_error(tmp_path):
    good_tree(tmp_path)
    for index in range(2):
        (tmp_path / "train" / "dog" / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the train images of class dog can be read"):
        imagefolder.read(tmp_path, (8, 8), skip_unreadable=True)


def test_images_that_are_left_out_do_not_affect_the_size(tmp_path):
    good_tree(tmp_path)
    truncated(tmp_path / "train" / "dog", "half.png")  # of 64 x 64 pixels
    left = imagefolder.read(tmp_path, (16, 16), skip_unreadable=True).train[0]
    (tmp_path / "train" / "dog" / "half.png").unlink()
    assert torch.equal(left, imagefolder.read(tmp_path, (16, 16)).train[0])


def test_skip_unreadable_is_only_for_image_folders(run_script):
    code, _, err = run_script(main.main, "--dataset", "digits", "--skip_unreadable")
    assert code == 2
    assert "--skip_unreadable is for --dataset imagefolder" in err


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_libtiff_prints_nothing_next_to_the_error(tmp_path, capfd, name):
    """Also if the TIFF has another extension."""
    good_tree(tmp_path)
    truncated(tmp_path / "train" / "cat", "half.png")
    whole = tmp_path / "train" / "cat" / name
    Image.effect_noise((64, 64), 50).save(whole, format="TIFF", compression="tiff_lzw")
    content = bytearray(whole.read_bytes())
    content[100:1000] = os.urandom(900)
    whole.write_bytes(content)
    with pytest.raises(UserError, match="2 images cannot be read"):
        imagefolder.read(tmp_path, (8, 8))
    assert capfd.readouterr().err == ""


def test_stderr_is_restored_after_two_threads_have_read_at_once(tmp_path, capfd):
    """As two runs in threads of one process do: each redirects stderr and restores it."""
    first_is_in, second_may_go = threading.Event(), threading.Event()

    def read(others_turn, mine):
        with in_threads.quiet_libraries(has_tiff=True):
            others_turn.set()
            mine.wait(0.2)

    threads = [threading.Thread(target=read, args=(first_is_in, second_may_go))]
    threads[0].start()
    first_is_in.wait()
    threads.append(threading.Thread(target=read, args=(second_may_go, threading.Event())))
    threads[1].start()
    for thread in threads:
        thread.join()
    os.write(2, b"here again")
    assert capfd.readouterr().err == "here again"


def test_only_one_of_several_processes_warns(tmp_path, monkeypatch, capsys):
    good_tree(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("")
    monkeypatch.setattr(distributed, "IS_FIRST", False)
    imagefolder.read(tmp_path, (8, 8))
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------------
# More than 8 bits


def gray_tree(root, low, high, kind="png", dtype=np.uint16, **options):
    """Two classes of images whose values rise evenly from `low` to `high`."""
    pixels = np.linspace(low, high, 64).astype(dtype).reshape(8, 8)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            path = root / split / name / f"0.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, **options)
    return root


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
@pytest.mark.parametrize(
    ("low", "high", "kind", "dtype", "darkest", "brightest", "bits"),
    [
        (0, 65535, "png", np.uint16, 0, 255, None),  # as declared
        (0, 30000, "png", np.uint16, 0, 117, None),  # dark, but only one bit unused
        (0, 255, "png", np.uint16, 0, 255, 8),
        (0, 255, "tif", np.uint16, 0, 255, 8),
        (0, 4095, "png", np.uint16, 0, 255, 12),  # from a camera
        (291, 694, "tif", np.uint16, 72, 173, 10),  # from a microscope
        (0, 255, "tif", np.int32, 0, 255, 8),
        (0, 100_000, "tif", np.int32, 0, 195, 17),
        (0, 7, "png", np.uint16, 0, 255, 3),
        (0, 1, "tif", np.uint16, 0, 255, 1),  # a mask
        (0, 2**31 - 1, "tif", np.int32, 0, 255, None),  # signed: the top bit is the sign
        (0, 100_000, "im", np.int32, 0, 195, 17),
    ],
)
def test_gray_is_scaled_by_the_bits_in_use(
    tmp_path, capsys, low, high, kind, dtype, darkest, brightest, bits
):
    images = imagefolder.read(gray_tree(tmp_path, low, high, kind, dtype), (8, 8)).train[0]
    assert (images.min(), images.max()) == (darkest, brightest)
    err = capsys.readouterr().err
    if bits is None:
        assert err == ""
        return
    white = 2**bits - 1
    assert f"use only {bits} bits and are scaled to match: 0 is black, {white} white" in err
    assert len(err.splitlines()) == 1


def test_signed_16_bit_gray_uses_15_bits(tmp_path, capsys):
    gray_tree(tmp_path, 0, 32767, "tif", tiffinfo={339: 2})
    assert imagefolder.read(tmp_path, (8, 8)).train[0].max() == 255
    assert capsys.readouterr().err == ""


def test_all_images_of_a_folder_share_one_range(tmp_path):
    gray_tree(tmp_path, 0, 255)
    bright = np.full((8, 8), 4000, dtype=np.uint16)
    Image.fromarray(bright).save(tmp_path / "test" / "dog" / "bright.png")
    folder = imagefolder.read(tmp_path, (8, 8))
    assert folder.test[0].amax((1, 2, 3)).tolist() == [15, 15, 250]
    assert folder.train[0].max() == 15


def add_chunk(root, kind, content):
    """Insert a chunk after the header of every PNG below `root`."""
    for path in root.glob("*/*/*.png"):
        whole = path.read_bytes()
        path.write_bytes(whole[:33] + png_chunk(kind, content) + whole[33:])


def test_the_bits_that_a_file_declares_are_used(tmp_path, capsys):
    gray_tree(tmp_path / "tiff", 0, 4000, "tif", tiffinfo={281: 4095})
    gray_tree(tmp_path / "png", 0, 4000)
    add_chunk(tmp_path / "png", b"sBIT", bytes([12]))
    for kind in ("tiff", "png"):
        assert imagefolder.read(tmp_path / kind, (8, 8)).train[0].max() == 250
    assert capsys.readouterr().err == ""


def test_values_larger_than_declared_are_read_as_stored(tmp_path, capsys):
    """The PNG specification tells writers of sBIT to scale up; a TIFF may just be wrong."""
    gray_tree(tmp_path / "png", 0, 65535)
    add_chunk(tmp_path / "png", b"sBIT", bytes([12]))
    gray_tree(tmp_path / "tiff", 0, 65535, "tif", tiffinfo={281: 511})

    upper_bytes = np.linspace(0, 65535, 64).astype(np.uint16) >> 8
    for kind in ("png", "tiff"):
        images = imagefolder.read(tmp_path / kind, (8, 8)).train[0]
        assert images[0, 0].flatten().tolist() == upper_bytes.tolist()
    assert capsys.readouterr().err == ""


def test_files_that_each_declare_their_own_largest_value_share_one_range(tmp_path):
    gray_tree(tmp_path, 0, 694, "tif", tiffinfo={281: 694})
    dim = np.full((8, 8), 400, dtype=np.uint16)
    Image.fromarray(dim).save(tmp_path / "test" / "dog" / "dim.tif", tiffinfo={281: 400})
    folder = imagefolder.read(tmp_path, (8, 8))
    assert folder.test[0].amax((1, 2, 3)).tolist() == [173, 173, 100]


def test_training_and_test_images_of_different_types_share_one_range(tmp_path, capsys):
    gray_tree(tmp_path, 0, 4095, "tif")
    for path in tmp_path.glob("test/*/*.tif"):
        Image.fromarray(np.full((8, 8), 2000, dtype=np.int32)).save(path)
    folder = imagefolder.read(tmp_path, (8, 8))
    assert (folder.train[0].max(), folder.test[0].max()) == (255, 125)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_transparent_16_bit_gray_is_white(tmp_path):
    gray_tree(tmp_path, 1000, 60000)
    add_chunk(tmp_path, b"tRNS", struct.pack(">H", 1000))
    images = imagefolder.read(tmp_path, (8, 8)).train[0]
    assert images[0, 0].flatten()[:2].tolist() == [255, 1936 >> 8]


def test_signed_8_bit_values_are_refused(tmp_path):
    gray_tree(tmp_path, 0, 100, "tif", np.uint8, tiffinfo={339: 2})
    with pytest.raises(UserError, match=r"4 images cannot be read: .*signed 8-bit numbers"):
        imagefolder.read(tmp_path, (8, 8))


def test_gray_where_0_is_white_is_inverted(tmp_path):
    gray_tree(tmp_path, 0, 65535, "tif", tiffinfo={262: 0})
    for path in tmp_path.glob("*/*/*.tif"):
        with Image.open(path) as image:
            assert image.tag_v2[262] in (0, 1)
            inverted = image.tag_v2[262] == 0
    images = imagefolder.read(tmp_path, (8, 8)).train[0]
    assert images[0, 0, 0, 0] == (255 if inverted else 0)


def test_negative_values_are_refused(tmp_path):
    gray_tree(tmp_path, -5, 100, "tif", np.int32)
    message = r"4 images cannot be read: .*its pixels go down to -5 .*below 2\^31"
    with pytest.raises(UserError, match=message):
        imagefolder.read(tmp_path, (8, 8))


def write_16_bit_color_png(path, high, opaque=False):
    """8 x 8 pixels of red, green and blue from 0 to `high`; with `opaque`, also full opacity."""
    pixels = np.linspace(0, high, 8 * 8 * 3).astype(np.uint16).reshape(8, 8, 3)
    if opaque:
        pixels = np.concatenate([pixels, np.full((8, 8, 1), 65535, dtype=np.uint16)], axis=2)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 6 if opaque else 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts))


@pytest.mark.parametrize("opaque", [False, True])
def test_16_bit_color_keeps_its_upper_byte_or_is_refused_if_that_is_empty(tmp_path, opaque):
    good_tree(tmp_path)
    odd = tmp_path / "train" / "cat" / "deep.png"
    write_16_bit_color_png(odd, 65535, opaque)
    assert imagefolder.read(tmp_path, (8, 8)).train[0][2].max() == 255
    write_16_bit_color_png(odd, 255, opaque)
    message = r"deep\.png and all other 16-bit images with color.*convert them to 8 bits"
    with pytest.raises(UserError, match=message):
        imagefolder.read(tmp_path, (8, 8))


def write_16_bit_sgi(path, high):
    pixels = np.linspace(0, high, 64).astype(">u2")
    header = struct.pack(">HBBHHHHII", 474, 0, 2, 2, 8, 8, 1, 0, high)
    path.write_bytes(header.ljust(512, b"\0") + pixels.tobytes())


def write_16_bit_ppm(path, high):
    path.write_bytes(b"P6 8 8 65535\n" + np.linspace(0, high, 192).astype(">u2").tobytes())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("deep.sgi", write_16_bit_sgi),
        ("deep.ppm", write_16_bit_ppm),
    ],
)
def test_other_formats_of_which_only_the_upper_byte_is_read(tmp_path, name, write):
    good_tree(tmp_path)
    write(tmp_path / "train" / "cat" / name, 65535)
    assert imagefolder.read(tmp_path, (8, 8)).train[0][2].max() == 255
    write(tmp_path / "train" / "cat" / name, 4095)
    message = r"all other 16-bit images with color.*convert them to 8 bits"
    with pytest.raises(UserError, match=message):
        imagefolder.read(tmp_path, (8, 8))


def test_a_dark_bitmap_with_16_bits_per_pixel_is_read(tmp_path):
    """It has 5 or 6 bits per channel, not 16."""
    good_tree(tmp_path)
    pixels = np.full(64, 0x0841, dtype="<u2").tobytes()
    channel_masks = (0xF800, 0x07E0, 0x001F)
    header = struct.pack("<IiiHHIIiiII3I", 40, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0, *channel_masks)
    start = 14 + len(header)
    content = b"BM" + struct.pack("<IHHI", start + 128, 0, 0, start) + header + pixels
    (tmp_path / "train" / "cat" / "dark.bmp").write_bytes(content)
    assert imagefolder.read(tmp_path, (8, 8)).train[0][2].max() == 8


def test_fits_files_are_ignored(tmp_path, capsys):
    """Pillow ignores the zero point BZERO, which would swap dark and bright halves of 16 bits."""
    good_tree(tmp_path)
    (tmp_path / "train" / "cat" / "sky.fits").write_bytes(b"SIMPLE  =                    T")
    assert len(imagefolder.read(tmp_path, (8, 8)).train[0]) == 4
    err = capsys.readouterr().err
    assert "ignored what is not an image of a class (1): train/cat/sky.fits" in err


def test_unused_channels_are_a_warning(tmp_path, capsys):
    good_tree(tmp_path)
    save(tmp_path / "train" / "cat" / "opaque.tif", GREEN, mode="RGBA")
    assert capsys.readouterr().err == ""
    infrared = tmp_path / "train" / "cat" / "infrared.tif"
    save(infrared, GREEN, mode="RGBX")
    with Image.open(infrared) as image:
        assert (image.mode, image.tag_v2[277]) == ("RGB", 4)

    images = imagefolder.read(tmp_path, (8, 8)).train[0]
    assert is_plain(as_pixels(images[2]), GREEN)
    err = capsys.readouterr().err
    assert "channels beyond color and opacity are ignored: train/cat/infrared.tif" in err
    assert len(err.splitlines()) == 1


def test_several_frames_are_a_warning(tmp_path, capsys):
    good_tree(tmp_path)
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN)]
    pages = tmp_path / "train" / "cat" / "pages.tif"
    frames[0].save(pages, save_all=True, append_images=frames[1:])

    images = imagefolder.read(tmp_path, (8, 8)).train[0]
    assert is_plain(as_pixels(images[2]), RED)
    err = capsys.readouterr().err
    assert "only the first frame is used of images with several: train/cat/pages.tif" in err


def test_floats_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif.*floating-point"):
        decoding.read_image(tmp_path / "float.tif", 8, 8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.tif", "a.webp", "a.bmp"])
def test_damaged_bytes_give_an_image_or_a_user_error(tmp_path, name):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for _ in range(150):
        damaged = bytearray(whole[: generator.integers(1, len(whole) + 1)])
        for position in generator.integers(0, len(damaged), 3):
            damaged[position] = generator.integers(256)
        (tmp_path / name).write_bytes(damaged)
        with contextlib.suppress(UserError):
            decoding.read_header(tmp_path / name)
            assert read_one(tmp_path / name).shape == (8, 8, 3)


def test_a_path_too_long_for_the_system_is_an_error():
    with pytest.raises(UserError, match="name too long"):
        imagefiles.find_classes(Path("x" * 5000), "train")


def test_the_first_failure_stops_the_reading(monkeypatch):
    calls = []

    def fail_early(index):
        calls.append(index)
        if index == 3:
            raise KeyboardInterrupt
        time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        in_threads.map_with_bar(fail_early, range(5000), "", sys.stderr)
    assert len(calls) < 1000


def test_no_file_is_left_open(tmp_path):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here")
    good_tree(tmp_path)
    (tmp_path / "bad.png").write_bytes(png_header(20_000, 20_000))
    before = len(os.listdir(descriptors))
    imagefolder.read(tmp_path, (8, 8))
    with pytest.raises(UserError):
        decoding.read_image(tmp_path / "bad.png", 8, 8)
    assert len(os.listdir(descriptors)) == before
