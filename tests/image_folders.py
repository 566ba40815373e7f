"""Folders of small random images, for tests."""

import numpy as np
from PIL import Image

NAMES = ("cat", "dog", "eel")
SHAPE = ["--model", "vit_micro", "--depth", "2", "--patch_size", "8", "--batch_size", "8"]


def draw(path, label, size=(40, 26), seed=0):
    """Noise that lacks the color of its class; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([label, seed])
    pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[..., label] //= 8
    Image.fromarray(pixels).save(path)
    return path


def make_classes(root, number=10):
    """<root>/<class>/<n>.png, of different sizes."""
    for label, name in enumerate(NAMES):
        for index in range(number):
            draw(root / name / f"{index}.png", label, (40 + index, 26), index)
    return root


def make_flat(root, number=5):
    """Images side by side, and labels.csv."""
    lines = ["file,class"]
    for label, name in enumerate(NAMES):
        for index in range(number):
            path = draw(root / f"{index}{name}.png", label, seed=index)
            lines.append(f"{path.name},{name}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def run_arguments(root, output, *more):
    """For main.py: a run of a second on rectangular images."""
    where = ["--data_dir", str(root), "--output_dir", str(output), "--device", "cpu"]
    size = ["--img_size", "24x40", "--epochs", "2"]
    return ["--dataset", "imagefolder", "--split_folder", "0.2", *where, *SHAPE, *size, *more]
