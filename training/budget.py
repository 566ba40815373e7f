"""How long a run trains: a number of epochs, or minutes by the clock. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from utils import UsageError

DEFAULT_EPOCHS = 50


@dataclass(frozen=True)
class Budget:
    """Exactly one of the two is set.

    Minutes count the time in training steps, and the loading of their images; evaluations and
    saving are not counted.
    """

    epochs: int | None = None
    minutes: float | None = None

    @classmethod
    def resolve(cls, epochs: int | None, minutes: float | None) -> Budget:
        """From the flags, None where they are not given. Raises UsageError if both are."""
        if minutes is None:
            return cls(epochs=DEFAULT_EPOCHS if epochs is None else epochs)
        if epochs is not None:
            raise UsageError(
                f"--epochs {epochs} and --minutes {minutes:g} both say how long to train; "
                "give one of them"
            )
        return cls(minutes=minutes)

    def share_done(self, epochs: float, seconds: float) -> float:
        """Of the training, in [0, 1], after so many epochs and so many seconds of it."""
        if self.minutes is None:
            return min(1.0, epochs / max(1, self.epochs))
        return min(1.0, seconds / (60 * self.minutes))

    def is_mixed(self, epoch: int, seconds_before: float, mix_off: float) -> bool:
        """Whether images may be mixed in an epoch: not in the last share `mix_off` of the training.

        Epochs are whole: the last ones without mixing are rounded in number; by the clock, it is
        the time at which an epoch begins that counts.
        """
        if self.minutes is None:
            return epoch <= self.epochs - round(mix_off * self.epochs)
        return self.share_done(0, seconds_before) < 1 - mix_off

    def __str__(self) -> str:
        if self.minutes is not None:
            return f"{self.minutes:g} minute{'s' * (self.minutes != 1)} of training"
        return f"{self.epochs} epoch{'s' * (self.epochs != 1)}"

    def name_of(self, epoch: int) -> str:
        """An epoch, in the lines of a log: `3/12`, or `3` where nobody knows how many come."""
        if self.minutes is not None:
            return str(epoch)
        return f"{epoch:>{len(str(self.epochs))}}/{self.epochs}"


def trained_seconds(rows: list[dict]) -> float:
    """Seconds of training in these rows; rows from before the field existed count as 0."""
    return sum(row.get("train_seconds", 0.0) for row in rows)
