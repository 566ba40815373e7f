"""A ViT of timm with local attention: the same weights, another speed.

    python examples/localize_timm.py --img_size 448

The weights are random here; with `pretrained=True` timm downloads some.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

# The repository, wherever this is called from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch

from interop import localize


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="a ViT of timm")
    parser.add_argument("--img_size", type=int, default=448, help="height and width, in pixels")
    parser.add_argument("--expansion_step", type=int, default=2, help="reach, in patches")
    return parser.parse_args(argv)


@torch.inference_mode()
def seconds_of(model, images):
    model(images)  # warm up
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def main(argv=None):
    args = parse_args(argv)
    model = timm.create_model(args.model, img_size=args.img_size).eval()
    local = localize(copy.deepcopy(model), "2d_all_neighbors", args.expansion_step)
    images = torch.randn(1, 3, args.img_size, args.img_size)

    # The state dict is the same, so that weights and checkpoints go both ways.
    local.load_state_dict(model.state_dict())
    rows, columns = model.patch_embed.grid_size
    side = 2 * args.expansion_step + 1
    print(f"{args.model}: {rows}x{columns} patches, each attends to {side}x{side} around it")
    for name, each in (("full", model), ("local", local)):
        print(f"{name:<6}{1e3 * seconds_of(each, images):8.1f} ms, one forward pass")


if __name__ == "__main__":
    main()
