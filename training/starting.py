"""What a run starts from: drawn weights, those of another library, or those of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from interop import weight_files, weights
from interop.layouts import EPS, Weights
from models import VisionTransformer
from training.checkpoints import load_checkpoint
from training.settings import Settings
from utils import UsageError


@dataclass
class Start:
    """What is known before the model is built; `apply` then does the rest."""

    norm_eps: float = EPS
    weights: Weights | None = None  # None: drawn, or read from the run's own checkpoint
    about: dict | None = None  # for config.json; None for weights that were drawn
    lines: list[str] = field(default_factory=list)  # for the user

    def apply(self, model: VisionTransformer, num_frozen: int | None) -> None:
        """Load the weights, and freeze the first layers if asked to.

        Raises UsageError if weights would be frozen that the file does not have.
        """
        if self.weights is not None:
            fitted = weights.fit(self.weights, model)
            self.about = self.about | {"parts": fitted.describe()}
            self.lines = [f"weights of {self.about['file']}:", fitted.table()]
            refuse_frozen_as_drawn(fitted.kept, model, num_frozen)

        for name in frozen_names(model, num_frozen):
            model.get_parameter(name).requires_grad_(False)

    def describe(self) -> dict:
        """For config.json: what it started from, nothing for weights that were drawn."""
        return {"weights": self.about} if self.about else {}


def read(settings: Settings, state: dict | None) -> Start:
    """What to start from; `state` is that of the run's own checkpoint, if it resumes."""
    if state is not None:
        return Start(state["model_config"].get("norm_eps", EPS), about=state.get("weights"))

    pretrained, earlier = settings.start.pretrained, settings.start.init_from
    if pretrained is not None:
        found, sha256 = weights.read_pretrained(pretrained)
        about = {"file": pretrained, "sha256": sha256, "source": found.source}
    elif earlier is not None:
        found, about = read_earlier_run(earlier)
    else:
        return Start()
    if found.num_heads is None:
        about["num_heads"] = "not in the file: taken from --model or --num_heads"
    return Start(found.norm_eps, found, about)


def read_earlier_run(path: str) -> tuple[Weights, dict]:
    """The averaged weights if that run had any: they are what was evaluated."""
    if Path(path).suffix == weight_files.SAFETENSORS:
        raise UsageError(
            f"--init_from takes the last.pt of a run folder, got {path}; use --pretrained for it"
        )
    state = load_checkpoint(Path(path))
    about = {
        "file": path,
        "sha256": weight_files.hash_of(Path(path)),
        "source": "main.py",
        "epoch": len(state["history"]),
        "averaged": bool(state.get("average")),
    }
    return weights.of_checkpoint(state, path), about


def frozen_names(model: VisionTransformer, num_blocks: int | None) -> list[str]:
    """Parameters of everything up to and with the first blocks; none if that is None.

    The class token and registers are part of it, so that no gradient has to go through them.
    """
    if num_blocks is None:
        return []
    first = ("patch_embed.", "pos_embed", "cls_token", "reg_token")
    first += tuple(f"blocks.{layer}." for layer in range(num_blocks))
    return [name for name, _ in model.named_parameters() if name.startswith(first)]


def refuse_frozen_as_drawn(
    kept: list[str], model: VisionTransformer, num_frozen: int | None
) -> None:
    stuck = [name for name in frozen_names(model, num_frozen) if name in kept]
    if stuck:
        raise UsageError(
            f"--freeze {num_frozen} would keep {', '.join(stuck)} as drawn, since the file has "
            "none; leave out --freeze, or choose another --pool"
        )
