"""Makes the tiny frozen models again: what they share. Each model has a file of its own beside this one."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.shapes import MARKER
from xformer.errors import CorpusError


def shapes_split(corpus: Path, split: str) -> Path:
    """The folder of one split. Raises CorpusError where `corpus` is no shapes corpus."""
    if not (corpus / MARKER).is_file():
        raise CorpusError(f"{corpus} is not a shapes corpus; make one with: xformer corpus shapes --out {corpus}")
    return corpus / split


def load_pictures(folder: Path) -> tuple[np.ndarray, dict[int, int]]:
    """All pictures of a split, uint8 [N, 3, S, S], and the row of each image id."""
    images = json.loads((folder / "captions.json").read_text(encoding="utf-8"))["images"]
    arrays = [np.asarray(Image.open(folder / "images" / image["file_name"])).transpose(2, 0, 1) for image in images]
    return np.stack(arrays), {image["id"]: row for row, image in enumerate(images)}


def texts_by_image(file: Path) -> dict[int, list[str]]:
    """Captions of a COCO caption file by image id."""
    found: dict[int, list[str]] = {}
    for row in json.loads(file.read_text(encoding="utf-8"))["annotations"]:
        found.setdefault(row["image_id"], []).append(row["caption"])
    return found


def begin(seed: int) -> np.random.Generator:
    """Seeds everything; one thread, because sums over several threads are not repeatable everywhere."""
    torch.manual_seed(seed)
    torch.set_num_threads(int(os.environ.get("XFORMER_PRETRAIN_THREADS", "1")))
    return np.random.default_rng(seed)


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine to zero."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def write_card(out: Path, title: str, lines: list[str], figures: dict[str, object]) -> None:
    """The model card: what it is, how it was trained, and its figures (also as JSON)."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    body = "\n".join(f"- {line}" for line in lines)
    (out / "README.md").write_text(f"# {title}\n\n{body}\n\n| figure | value |\n|---|---|\n{rows}\n", encoding="utf-8")
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
