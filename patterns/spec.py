"""A mask by its name: everything that flags say about it, and how to build it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

# Masks are built with numpy, so that the launcher can list the mask types without loading torch.
import numpy as np

from patterns import files
from patterns.offsets import EDGES
from patterns.table import TYPES, MaskType

if TYPE_CHECKING:
    import torch

MAX_PATCHES = 65_536  # 256 x 256: a mask of 4 GiB
MAX_COMPARED = 4096  # 64 x 64: a mask of 16 MiB


@dataclass(frozen=True)
class MaskSpec:
    """Which mask: the flags `--mask_type`, `--expansion_step`, `--dilation`, ... in one object.

    Fields that this mask type does not use are reset to their defaults, so that equal specs mean
    equal masks. Unknown mask types are accepted, so that logs of other checkouts can be read;
    `build` and `num_neighbors` raise ValueError for what they cannot make.
    """

    mask_type: str = "full"
    expansion_step: int | None = None  # reach, in patches
    dilation: int = 1  # distance between neighbors, in patches
    edge: str = "truncate"  # one of EDGES
    mask_seed: int = 0  # of random masks
    mask_file: str | None = None
    mask_hash: str | None = None  # the beginning of files.hash_of what the file held
    global_layers: tuple[int, ...] = ()  # layers of full attention, counted from 0

    def __post_init__(self):
        with contextlib.suppress(ValueError):  # `build` complains
            object.__setattr__(self, "global_layers", parse_layers(self.global_layers))
        for field in fields(self)[1:]:
            if self.mask_type in TYPES and not self.takes(field.name):
                object.__setattr__(self, field.name, field.default)

    @classmethod
    def of_flags(cls, mask_type: str, mask_file: str | None, **flags) -> MaskSpec:
        """The mask that flags ask for; a file implies the mask type `file`.

        Raises ValueError for a flag that would have no effect, except for the step, which has a
        default.
        """
        if mask_file is not None and mask_type == cls.mask_type:
            mask_type = "file"

        asked = {"mask_file": mask_file, **flags}
        spec = cls(mask_type, **asked)
        for name, value in asked.items():
            has_effect = name == "expansion_step" or spec.takes(name)
            if not has_effect and value not in (None, getattr(spec, name)):
                raise ValueError(f"--{name} {value} has no effect on --mask_type {mask_type}")
        return spec

    def takes(self, name: str) -> bool:
        """Whether the mask depends on this field."""
        if name == "global_layers":
            return self.mask_type != "full"
        return name in self._type().takes

    @property
    def is_known(self) -> bool:
        """Whether `build` can make it; a damaged or foreign log may name what it cannot."""
        try:
            self._check()
            if self.mask_type == "file":
                found = files.hash_of(files.read(self.mask_file))
                return found.startswith(self.mask_hash or "")
        except ValueError:
            return False
        return True

    @property
    def family(self) -> str:
        """Display name of all that differ in the step only: `2d_cardinal, dilation 2`."""
        return ", ".join([self._name, *self._words().values()])

    @property
    def label(self) -> str:
        """Display name in tables and plots: `2d_cardinal, step 2`."""
        step = [] if self.expansion_step is None else [f"step {self.expansion_step}"]
        return ", ".join([self._name, *step, *self._words().values()])

    @property
    def _name(self) -> str:
        return Path(self.mask_file).name if self.mask_file else self.mask_type

    @property
    def run_name(self) -> str:
        """Name of the run's folder: `2d_cardinal_expansion_2`."""
        parts = [self.mask_type]
        if self.mask_file:
            parts.append(Path(self.mask_file).stem)
            parts += [self.mask_hash[:8]] if self.mask_hash else []
        if self.expansion_step is not None:
            parts.append(f"expansion_{self.expansion_step}")
        return "_".join([*parts, *self._words()])

    def _words(self) -> dict[str, str]:
        """For each field beside the step that is not as usual: in a run name -> in a label."""
        words = {}
        if self.dilation != 1:
            words[f"dilation_{self.dilation}"] = f"dilation {self.dilation}"
        if self.edge != "truncate":
            words[self.edge] = f"edge {self.edge}"
        if self.mask_seed != 0:
            words[f"draw_{self.mask_seed}"] = f"draw {self.mask_seed}"
        if self.global_layers:
            layers = [str(layer) for layer in self.global_layers]
            plural = "s" if len(layers) > 1 else ""
            words[f"global_{'-'.join(layers)}"] = f"full in layer{plural} {' '.join(layers)}"
        return words

    def to_settings(self) -> dict:
        """One value per field that JSON can hold; `MaskSpec(**settings)` is the same spec."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"global_layers": format_layers(self.global_layers)}

    def to_flags(self) -> dict[str, str]:
        """What main.py needs to make it: flag -> value, without the dashes and without defaults."""
        values = self.to_settings()
        defaults = {field.name: field.default for field in fields(self)[1:]}
        del values["mask_hash"]
        if self.mask_type == "file":  # which the file implies
            del values["mask_type"]
        return {
            name: str(value)
            for name, value in values.items()
            if value is not None and value != defaults.get(name)
        }

    def with_hash(self) -> MaskSpec:
        """The same with the hash of the file, so that another content is another mask.

        Raises ValueError for a file that holds no mask.
        """
        self._check()
        if self.mask_type != "file":
            return self
        return replace(self, mask_hash=files.hash_of(files.read(self.mask_file))[:16])

    def num_neighbors(self, num_patches_height: int, num_patches_width: int) -> int:
        """Nominal number of neighbors, the patch itself included, where attention is not full.

        That of a patch away from the border or, where the number depends on the grid, the largest.
        """
        count = self._type().num_neighbors
        if self.mask_type == "full":
            return num_patches_height * num_patches_width
        if count is None:
            mask = self._build_kind(num_patches_height, num_patches_width, 0)
            return int(mask.sum(1).max())
        self._check()
        return count(self.expansion_step)

    def build(
        self, num_patches_height: int, num_patches_width: int, layer: int = 0
    ) -> torch.Tensor | None:
        """The mask of a layer, bool [N, N]; None for full attention, which runs without a mask.

        Raises ValueError for an unknown mask type, a field with an impossible value, a mask file
        that is missing, has changed or is for another grid, and for more than MAX_PATCHES patches,
        whose mask would not fit into memory.
        """
        return to_tensor(self.build_array(num_patches_height, num_patches_width, layer))

    def build_array(
        self, num_patches_height: int, num_patches_width: int, layer: int = 0
    ) -> np.ndarray | None:
        """The same as a numpy array, for code that must not load torch."""
        self._check()
        check_integer("layer", layer, minimum=0)
        return self._build_kind(num_patches_height, num_patches_width, self._kind_of(layer))

    def build_layers(
        self, num_patches_height: int, num_patches_width: int, num_layers: int
    ) -> list[torch.Tensor | None]:
        """The mask of each layer, as in `build`; layers with the same mask share one tensor.

        Raises ValueError as `build` does, and for global layers that do not exist.
        """
        arrays = self.build_layer_arrays(num_patches_height, num_patches_width, num_layers)
        tensors = {id(array): to_tensor(array) for array in arrays}
        return [tensors[id(array)] for array in arrays]

    def build_layer_arrays(
        self, num_patches_height: int, num_patches_width: int, num_layers: int
    ) -> list[np.ndarray | None]:
        """The same as numpy arrays."""
        self._check()
        beyond = [layer for layer in self.global_layers if layer >= num_layers]
        if beyond:
            raise ValueError(
                f"global_layers names layer {beyond[0]}, but the model has {num_layers} layers, 0 "
                f"to {num_layers - 1}"
            )
        kinds = [self._kind_of(layer) for layer in range(num_layers)]
        size = (num_patches_height, num_patches_width)
        arrays = {kind: self._build_kind(*size, kind) for kind in dict.fromkeys(kinds)}
        return [arrays[kind] for kind in kinds]

    def identity(self, num_patches_height: int, num_patches_width: int) -> str:
        """Equal for two specs if their masks on this grid are equal, in every layer.

        Names differ more than masks do: `1d_cardinal` at step 2 and `1d_all_neighbors` at step 1
        are the same window of 9, and a step beyond the grid is full attention. It does not know how
        many layers there are, so `global_layers` that name all of them are not taken for `full`. On
        a grid of more than MAX_COMPARED patches only windows are compared, by their width.
        """
        size = (num_patches_height, num_patches_width)
        in_words = " ".join(self._words())
        if num_patches_height * num_patches_width > MAX_COMPARED:
            is_window = self.mask_type.startswith("1d")
            return f"{self.num_neighbors(*size)} {in_words}" if is_window else self.run_name

        masks = [self._build_kind(*size, kind) for kind in range(self._type().num_kinds)]
        if all(mask is None or mask.all() for mask in masks):
            return "full"
        hashes = dict.fromkeys(files.hash_of(mask) for mask in masks)
        return " ".join([*hashes, format_layers(self.global_layers) or ""])

    def _kind_of(self, layer: int) -> int | None:
        """Which of the masks that layers take turns in; None where attention is full."""
        if self.mask_type == "full" or layer in self.global_layers:
            return None
        return layer % self._type().num_kinds

    def _build_kind(self, height: int, width: int, kind: int | None) -> np.ndarray | None:
        self._check()
        height = check_integer("num_patches_height", height, minimum=1)
        width = check_integer("num_patches_width", width, minimum=1)
        if height * width > MAX_PATCHES:
            raise ValueError(
                f"the grid has {height}x{width} patches, at most {MAX_PATCHES:,} are supported; "
                "use smaller images or larger patches"
            )
        mask_type = self._type()
        if kind is None or mask_type.build is None:
            return None
        values = {name: getattr(self, name) for name in mask_type.takes}
        return mask_type.build(height, width, kind, **values)

    def _type(self) -> MaskType:
        """Raises ValueError for an unknown name."""
        if self.mask_type not in TYPES:
            expected = ", ".join(TYPES)
            raise ValueError(f"unknown mask type {self.mask_type!r}; expected one of {expected}")
        return TYPES[self.mask_type]

    def _check(self) -> None:
        """Raise ValueError if a field has no valid value."""
        if self.takes("expansion_step"):
            step = check_integer("expansion_step", self.expansion_step, minimum=0)
            if step > MAX_PATCHES:
                raise ValueError(f"expansion_step must be at most {MAX_PATCHES:,}, got {step}")
        check_integer("dilation", self.dilation, minimum=1)
        check_integer("mask_seed", self.mask_seed, minimum=0)
        if self.edge not in EDGES:
            raise ValueError(f"unknown edge {self.edge!r}; expected one of {', '.join(EDGES)}")
        if self.mask_type == "file" and not isinstance(self.mask_file, str):
            raise ValueError("mask type 'file' needs a mask_file, the path of a mask")
        for layer in self.global_layers:
            check_integer("each of global_layers", layer, minimum=0)


def parse_layers(layers: str | Iterable[int] | None) -> tuple[int, ...]:
    """`"3,7,11"`, or any integers -> (3, 7, 11), in ascending order. Raises ValueError."""
    if layers is None or layers == "":
        return ()
    try:
        if isinstance(layers, str):
            layers = [int(number) for number in layers.split(",")]
        numbers = tuple(sorted({operator.index(number) for number in layers}))
    except (TypeError, ValueError):
        numbers = (-1,)
    if min(numbers, default=0) < 0:
        raise ValueError(f"expected layers like 3,7,11, counted from 0, got {layers!r}")
    return numbers


def format_layers(layers: Iterable[int]) -> str | None:
    """(3, 7, 11) -> `"3,7,11"`; None for no layers."""
    return ",".join(map(str, layers)) or None


def to_tensor(mask: np.ndarray | None) -> torch.Tensor | None:
    if mask is None:
        return None
    import torch  # deferred: see the import of numpy

    return torch.from_numpy(np.require(mask, requirements=["C", "W"]))


def check_integer(name: str, value, minimum: int) -> int:
    """`value` as an int. Raises ValueError if it is no integer (bools are none) or too small."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None

    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number
