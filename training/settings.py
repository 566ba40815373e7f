"""The settings of a run: one dataclass per subject, one field per flag of main.py.

A field holds the flag's default and help, and says whether a resumed run may change it. The command
line, `config.json` (flat, one key per field) and the notes in reports derive from here. Imports no
torch, so that sweeps and reports start at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, get_type_hints

import utils
from masks import MaskSpec
from patterns.spec import format_layers, parse_layers
from pipeline import identity, sizes
from pipeline.layout import Layout
from training.budget import DEFAULT_EPOCHS, Budget
from utils import number_type

# Defaults by --recipe; a flag that is given overrides them.
RECIPES = {
    "plain": {
        "pool": "cls",
        "dropout": 0.1,
        "drop_path": 0.0,
        "policy": "none",
        "mix": 0.0,
        "batch_size": 64,
        "lr": 3e-4,
        "weight_decay": 0.1,
        "label_smoothing": 0.1,
    },
    # What the literature uses to train on small data from scratch: Touvron et al. 2021 (DeiT),
    # Lee et al. 2021 (SL-ViT).
    "strong": {
        "pool": "mean",
        "dropout": 0.0,
        "drop_path": 0.1,
        "policy": "rand",
        "mix": 0.5,
        "batch_size": 128,
        "lr": None,  # by batch size, see `strong_lr`
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
    },
}
PLAIN = RECIPES["plain"]


def strong_lr(batch_size: int) -> float:
    """1e-3 at 128 to 256 images per step, scaled linearly below and above (Goyal et al. 2017)."""
    return 1e-3 * max(min(batch_size / 128, 1.0), batch_size / 256)


# --------------------------------------------------------------------------------------------------
# What the flags accept

positive = number_type(int, minimum=1)
at_least_0 = number_type(float, minimum=0)
above_0 = number_type(float, above=0)
share = number_type(float, minimum=0, maximum=1)
rate = number_type(float, above=0, maximum=1)
fraction = number_type(float, minimum=0, below=1)
width = number_type(int, minimum=1, maximum=65_536)
num_blocks = number_type(int, minimum=1, maximum=1000)


def layers(text: str) -> str | None:
    """`7,3` -> `3,7`, for an argument of layers; the number of layers is checked later."""
    try:
        return format_layers(parse_layers(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def flag(
    default: Any,
    help: str,
    type: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    may_change: bool = False,
) -> Any:
    """A field that is a flag.

    `may_change` marks flags that decide where and how a run computes, but not its result: a resumed
    run may change them. The field itself has no default: recipes and presets are resolved before
    settings are made.
    """
    about = {"default": default, "help": help, "type": type, "metavar": metavar}
    return field(metadata={**about, "may_change": may_change})


def resolved() -> Any:
    """A field that is no flag: it follows from the flags when a run begins."""
    return field(metadata={"default": None, "help": None, "may_change": False})


# --------------------------------------------------------------------------------------------------
# The settings


@dataclass(frozen=True)
class MaskSettings:
    title: ClassVar[str] = "attention pattern"

    mask_type: str = flag("full", "who attends to whom")
    expansion_step: int | None = flag(  # patches; None where the mask type has no step
        1,
        "reach of 2D patterns, in patches; 1D windows are as large",
        number_type(int, minimum=0),
        "S",
    )
    dilation: int = flag(1, "distance from one neighbor to the next, in patches", positive, "D")
    edge: str = flag("truncate", "shift: at the border, as many neighbors as elsewhere")
    mask_seed: int = flag(
        0, "which random mask is drawn", number_type(int, minimum=0, below=2**32), "N"
    )
    mask_file: str | None = flag(
        None,
        "bool [N, N] over the patches, instead of a mask type: .npy, .pt, or .png with white for "
        "True",
        utils.home_path,
        "FILE",
        may_change=True,  # what it held is in mask_hash
    )
    mask_hash: str | None = resolved()
    global_layers: str | None = flag(
        None, "layers of full attention, counted from 0, as in 3,7,11", layers, "LAYERS"
    )
    backend: str = flag("auto", "how masked attention is computed")

    @property
    def spec(self) -> MaskSpec:
        return MaskSpec(**{field.name: getattr(self, field.name) for field in fields(MaskSpec)})


@dataclass(frozen=True)
class DataSettings:
    title: ClassVar[str] = "data"

    dataset: str = flag("cifar10", "what to train on")
    data_dir: str = flag(
        identity.DATA_DIR,
        "downloads go here; for imagefolder: its root",
        utils.home_path,
        "DIR",
        may_change=True,
    )
    holdout: float = flag(
        0.0,
        "fraction of the training images to hold out and evaluate on, instead of the test images",
        fraction,
        "F",
    )
    split_folder: float = flag(
        0.0,
        "for imagefolder without test/: fraction of each class to take as test images",
        fraction,
        "F",
    )
    labels: str | None = flag(  # a path, in data_dir or from here
        None,
        "for imagefolder without class folders: CSV with the columns file,class",
        utils.home_path,
        "CSV",
        may_change=True,
    )
    skip_unreadable: bool = flag(
        False, "for imagefolder: leave out images that cannot be read", may_change=True
    )
    device_data_limit: float | None = flag(  # GiB; None is half of the GPU's free memory
        None,
        "keep larger datasets in CPU memory and stream them (default: half of the GPU's free "
        "memory)",
        at_least_0,
        "GIB",
        may_change=True,
    )

    @property
    def eval_split(self) -> str:
        """What accuracies are of; a key of EVAL_SPLITS."""
        return "holdout" if self.holdout else "test"

    @property
    def layout(self) -> Layout:
        return Layout(self.split_folder, self.labels)

    @property
    def reading_options(self) -> dict:
        """How to read an image folder, for `data.load_dataset`; other data has no options."""
        if self.dataset != identity.IMAGE_FOLDER:
            return {}
        return {"skip_unreadable": self.skip_unreadable, "layout": self.layout}


# What a run can be evaluated on, and how messages and reports call it.
EVAL_SPLITS = {"test": "test images", "holdout": "held-out training images"}


@dataclass(frozen=True)
class RecipeSettings:
    title: ClassVar[str] = "recipe: sets the defaults of the flags marked with *"

    recipe: str = flag("plain", "plain: crop and flip; strong: made for small data")


@dataclass(frozen=True)
class ModelSettings:
    title: ClassVar[str] = "model"

    model: str = flag("vit_base", "size preset")
    embed_dim: int = flag(None, "width (default: by preset)", width, "E")
    depth: int = flag(None, "blocks (default: by preset)", num_blocks, "L")
    num_heads: int = flag(None, "heads (default: by preset)", width, "H")
    img_size: int | str = flag(  # pixels: 224, or height x width: "192x320"
        224, "images are resized to this side, or to height x width like 192x320", sizes.parse, "PX"
    )
    patch_size: int = flag(16, "side of a patch", positive, "PX")  # pixels
    pool: str = flag(PLAIN["pool"], "* class token (global), or mean of the patches")
    num_registers: int = flag(
        0,
        "learned tokens beside the class token, global like it (Darcet et al. 2023)",
        number_type(int, minimum=0, maximum=1000),
        "R",
    )
    dropout: float = flag(
        PLAIN["dropout"], "* probability; not on attention weights", fraction, "P"
    )
    drop_path: float = flag(
        PLAIN["drop_path"],
        "* stochastic depth: probability of skipping a branch, rising to this in the last block",
        fraction,
        "P",
    )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return sizes.sides_of(self.img_size)


@dataclass(frozen=True)
class StartSettings:
    title: ClassVar[str] = "starting weights"

    # Runs may name the same file by another path: its content is compared, see run_folder.py.
    pretrained: str | None = flag(
        None,
        "start from a ViT of timm, torchvision or Hugging Face (.safetensors, .pth)",
        utils.home_path,
        "FILE",
        may_change=True,
    )
    init_from: str | None = flag(
        None, "start from the last.pt of another run", utils.home_path, "FILE", may_change=True
    )
    freeze: int | None = flag(
        None,
        "keep the embeddings and the first N blocks as they are",
        number_type(int, minimum=0),
        "N",
    )

    @property
    def path(self) -> str | None:
        return self.pretrained or self.init_from


@dataclass(frozen=True)
class AugmentationSettings:
    title: ClassVar[str] = "augmentation of training images, drawn anew for each"

    crop: bool = flag(True, "pad by an eighth, then crop at random")
    flip: bool = flag(True, "mirror half of the images; never digits")
    policy: str = flag(PLAIN["policy"], "* trivial: TrivialAugment Wide, rand: RandAugment")
    random_erasing: float = flag(0.0, "probability of a blank box", share, "P")
    mix: float = flag(PLAIN["mix"], "* share of the batches with MixUp or CutMix", share, "P")
    mixup_alpha: float = flag(0.8, "of the beta distribution; 0 = no MixUp", at_least_0, "A")
    cutmix_alpha: float = flag(1.0, "of the beta distribution; 0 = no CutMix", at_least_0, "A")
    mix_off: float = flag(0.1, "fraction of the training, at the end, without mixing", share, "F")


@dataclass(frozen=True)
class OptimizationSettings:
    title: ClassVar[str] = "optimization"

    epochs: int | None = flag(  # None where `minutes` are given
        None, f"passes over the training images (default: {DEFAULT_EPOCHS})", positive, "N"
    )
    minutes: float | None = flag(
        None,
        "train for this long instead, not counting evaluations and saving; the schedule goes by "
        "the clock",
        above_0,
        "M",
    )
    batch_size: int = flag(PLAIN["batch_size"], "* images per step, over all GPUs", positive, "N")
    optimizer: str = flag("adamw", "muon: for the matrices of the blocks")
    lr: float = flag(
        PLAIN["lr"],
        "* peak learning rate; strong: 1e-3 at batch 128 to 256, else scaled linearly",
        above_0,
    )
    weight_decay: float = flag(PLAIN["weight_decay"], "* on weight matrices only", at_least_0)
    layer_decay: float = flag(
        1.0, "factor on the learning rate, for each layer farther from the head; 1 = off", rate, "D"
    )
    warmup_fraction: float = flag(0.1, "of the training; then cosine to 0", fraction, "F")
    label_smoothing: float = flag(
        PLAIN["label_smoothing"],
        "* share of the target that is spread over all classes",
        fraction,
        "P",
    )
    grad_clip: float = flag(1.0, "gradient norm; 0 = off", at_least_0)
    ema: float = flag(
        0.0, "decay of the weights' moving average, which is then evaluated; 0 = off", fraction, "D"
    )
    seed: int = flag(
        0, "of weights, data order, augmentation, dropout", number_type(int, minimum=0, below=2**63)
    )

    @property
    def budget(self) -> Budget:
        return Budget(self.epochs, self.minutes)


@dataclass(frozen=True)
class MachineSettings:
    title: ClassVar[str] = "machine"

    device: str = flag("auto", "auto: CUDA, else MPS, else the CPU", may_change=True)
    precision: str = flag(
        "auto",
        "auto: bf16 on CUDA from compute capability 8.0 on; tf32: fp32 with faster, coarser matrix "
        "products, on CUDA",
    )
    compile: str = flag(
        "auto",
        "torch.compile the blocks; auto: on CUDA, from 10 epochs or minutes on; "
        "reduce-overhead: with CUDA graphs",
    )
    grad_accumulation: int = flag(
        1, "micro-batches per step, to save memory", positive, "N", may_change=True
    )
    checkpoint_activations: bool = flag(
        False, "recompute blocks in the backward pass, to save memory", may_change=True
    )


@dataclass(frozen=True)
class RunSettings:
    title: ClassVar[str] = "run"

    output_dir: str = flag(
        "experiments", "root of all run folders", utils.home_path, "DIR", may_change=True
    )
    dataset_name: str = flag(
        None,
        "folder of the dataset's runs (default: --dataset; for imagefolder the name of its root)",
        metavar="NAME",
        may_change=True,
    )
    run_name: str = flag(
        None, "folder name (default: by the mask, as 2d_cardinal_expansion_2)", metavar="NAME"
    )
    log_every: int = flag(  # steps
        0,
        "print the loss every N steps; 0 = every epoch",
        number_type(int, minimum=0),
        "N",
        may_change=True,
    )
    checkpoint_every_minutes: float = flag(
        10.0,
        "also save within long epochs; 0 = only after each epoch",
        at_least_0,
        "M",
        may_change=True,
    )
    track: str = flag(
        "none", "also show the run in a tracker, which must be installed", may_change=True
    )
    dry_run: bool = flag(False, "print the resolved configuration and stop", may_change=True)
    debug: bool = flag(False, "show errors with their traceback", may_change=True)


@dataclass(frozen=True)
class Settings:
    """All settings of a run, with nothing left to decide."""

    mask: MaskSettings
    data: DataSettings
    recipe: RecipeSettings
    model: ModelSettings
    start: StartSettings
    augmentation: AugmentationSettings
    optimization: OptimizationSettings
    machine: MachineSettings
    run: RunSettings

    @classmethod
    def from_dict(cls, values: dict) -> Settings:
        """From the flat dict of `to_dict`.

        A missing key, as in a run older than its flag, has the flag's default.
        """
        values = DEFAULTS | values
        sections = {
            name: section(**{field.name: values[field.name] for field in fields(section)})
            for name, section in SECTIONS.items()
        }
        return cls(**sections)

    @property
    def default_run_name(self) -> str:
        return default_run_name(self.mask.spec, self.model.num_registers)

    def to_dict(self) -> dict:
        """One key per field, as in `config.json`."""
        return {name: value for section in asdict(self).values() for name, value in section.items()}

    def changed(self, **values) -> Settings:
        return Settings.from_dict(self.to_dict() | values)


def default_run_name(mask: MaskSpec, num_registers: int) -> str:
    """The folder of a run, whatever its seed: runs that a sweep compares have different ones."""
    return mask.run_name + (f"_registers_{num_registers}" if num_registers else "")


# --------------------------------------------------------------------------------------------------
# Derived: section name -> dataclass; setting -> its field, its default; which may change

SECTIONS = get_type_hints(Settings)
SETTINGS = {field.name: field for section in SECTIONS.values() for field in fields(section)}
FLAGS = {name: field for name, field in SETTINGS.items() if field.metadata["help"] is not None}
MASK_FLAGS = [field.name for field in fields(MaskSpec) if field.name in FLAGS]
DEFAULTS = {name: field.metadata["default"] for name, field in SETTINGS.items()}
MAY_CHANGE = {name for name, field in SETTINGS.items() if field.metadata["may_change"]}
