"""The guard of a run: steps that are not finite change nothing, and three in a row end it with what they were fed."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from xformer import publish
from xformer.data import Pairs
from xformer.errors import TrainingError

MAX_BAD_STEPS = 3


class Guard:
    """Remembers the steps in a row whose loss or gradient was not finite; every process of a run holds the same."""

    def __init__(self, folder: Path, pairs: Pairs, bad: list[dict[str, Any]]) -> None:
        self.folder, self.pairs, self.bad = folder, pairs, bad

    def stepped(self, step: int, finite: bool, numbers: np.ndarray, losses: dict[str, float], main: bool) -> None:
        """Tells of one step over the pairs `numbers`, int64 [global batch].

        Raises: TrainingError at the third step in a row that is not finite; nonfinite.json holds their losses and samples.
        """
        if finite:
            self.bad = []
            return
        told = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
        self.bad = [*self.bad, {"step": step, "losses": told, "samples": self.pairs.samples(numbers)}]
        if len(self.bad) == MAX_BAD_STEPS:
            file = self.folder / "nonfinite.json"
            if main:
                publish.write_json(file, self.bad)
            worst = next((name for name, value in told.items() if isinstance(value, str)), "the gradient")
            raise TrainingError(
                f"{worst} was not finite in {MAX_BAD_STEPS} steps in a row (step {step}); the last checkpoint is kept and "
                f"{file} names the samples: train anew with a lower train.lr or train.precision=bf16; a first stage may "
                "start from this run (--init)."
            )
