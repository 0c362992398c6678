"""The embedded corpus: small pictures of coloured shapes, with captions and with questions in the real formats.

Everything is drawn from a counter-based generator keyed by (seed, split, number), so the same seed gives the same
bytes, in any order. Nothing is flipped or cropped afterwards: positions in the captions stay true.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline import shapes_text
from xformer.console import say
from xformer.errors import CorpusError
from xformer.settings import Settings

KINDS = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 48, 44),
    "green": (46, 158, 72),
    "blue": (44, 88, 208),
    "yellow": (232, 204, 46),
    "purple": (142, 62, 170),
    "orange": (236, 132, 36),
}
VAL_FIRST_ID = 1_000_001  # training ids start at 1
MARKER = "shapes.json"
FORMAT = 2  # of the questions; 2: GQA asks for absent kinds too
SUPERSAMPLING = 3


@dataclass(frozen=True)
class Shape:
    """One object: its centre and radius as fractions of the picture's side, in drawing order."""

    kind: str
    colour: str
    size: str  # "small" or "large"
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What one picture shows: 1 to 8 shapes in 1 to 3 groups that share kind, colour and size."""

    shapes: tuple[Shape, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    angle: float
    lines: tuple[tuple[float, float, float, float], ...]
    dark: bool


def generator(seed: int, *key: object) -> np.random.Generator:
    """A Philox generator that depends on nothing but the seed and the key."""
    digest = hashlib.sha256("/".join(map(str, (seed, *key))).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _place(rng: np.random.Generator, placed: list[Shape], radius: float) -> tuple[float, float]:
    """A free centre; one shape in six may partly hide another one."""
    closeness = 0.95 if rng.random() < 1 / 6 else 1.3
    best, best_gap = (0.5, 0.5), -np.inf
    for _ in range(60):
        x, y = (float(v) for v in rng.uniform(radius, 1 - radius, 2))
        gap = min((np.hypot(x - s.x, y - s.y) - closeness * (radius + s.radius) for s in placed), default=1.0)
        if gap >= 0:
            return x, y
        if gap > best_gap:
            best, best_gap = (x, y), gap
    return best


def draw_scene(rng: np.random.Generator) -> Scene:
    """Samples a scene. Counts are spread evenly over 1..8 before they are split into groups."""
    total = int(rng.integers(1, 9))
    n_groups = min(total, int(rng.integers(1, 4)))
    cuts = sorted(rng.choice(np.arange(1, total), n_groups - 1, replace=False)) if n_groups > 1 else []
    counts = np.diff([0, *cuts, total])
    pairs = rng.choice(len(KINDS) * len(COLOURS), n_groups, replace=False)
    shapes: list[Shape] = []
    for count, pair in zip(counts, pairs, strict=True):
        kind, colour = KINDS[pair % len(KINDS)], list(COLOURS)[pair // len(KINDS)]
        size = "large" if rng.random() < 0.5 else "small"
        for _ in range(count):
            radius = float(rng.uniform(0.095, 0.115) if size == "large" else rng.uniform(0.06, 0.075))
            x, y = _place(rng, shapes, radius)
            shapes.append(Shape(kind, colour, size, x, y, radius))
    dark = bool(rng.random() < 0.5)
    low, high = (10, 90) if dark else (165, 250)
    ends = rng.integers(low, high, (2, 3))
    lines = rng.uniform(0, 1, (int(rng.integers(0, 4)), 4))
    return Scene(
        tuple(shapes),
        (tuple(map(int, ends[0])), tuple(map(int, ends[1]))),  # type: ignore[arg-type]
        float(rng.uniform(0, 2 * np.pi)),
        tuple(tuple(map(float, line)) for line in lines),  # type: ignore[arg-type]
        dark,
    )


def render(scene: Scene, side: int, rng: np.random.Generator) -> Image.Image:
    """Draws a scene as an RGB picture of `side` x `side` pixels: gradient, faint lines, shapes, a little noise."""
    big = side * SUPERSAMPLING
    ramp = np.linspace(-0.5, 0.5, big)
    t = np.clip(0.5 + np.cos(scene.angle) * ramp[None, :] + np.sin(scene.angle) * ramp[:, None], 0, 1)[..., None]
    a, b = (np.array(end, float) for end in scene.background)
    picture = Image.fromarray(((1 - t) * a + t * b).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    faint = tuple(int(v + (40 if scene.dark else -40)) for v in a)
    for x0, y0, x1, y1 in scene.lines:
        pen.line([x0 * big, y0 * big, x1 * big, y1 * big], fill=faint, width=SUPERSAMPLING)
    for s in scene.shapes:
        x, y, r, fill = s.x * big, s.y * big, s.radius * big, COLOURS[s.colour]
        if s.kind == "circle":
            pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
        elif s.kind == "square":
            pen.rectangle([x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r], fill=fill)
        elif s.kind == "triangle":
            pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=fill)
        else:
            pen.rectangle([x - r, y - 0.36 * r, x + r, y + 0.36 * r], fill=fill)
            pen.rectangle([x - 0.36 * r, y - r, x + 0.36 * r, y + r], fill=fill)
    small = np.asarray(picture.resize((side, side), Image.Resampling.BOX), np.int16)
    noisy = small + rng.integers(-6, 7, small.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def scenes(split: str, count: int, seed: int) -> Iterator[tuple[int, Scene, np.random.Generator]]:
    """Yields (image id, scene, the scene's generator) one by one."""
    first = VAL_FIRST_ID if split == "val" else 1
    for i in range(count):
        rng = generator(seed, "shapes", split, i)
        yield first + i, draw_scene(rng), rng


def write_shapes(out: Path, train: int, val: int, seed: int, side: int = 64) -> dict[str, int]:
    """Writes the corpus into the new folder `out`; returns what was written.

    Layout: `{train,val}/images/*.png`, `{train,val}/captions.json` (COCO captions), `train/web_captions.json` (kinds
    and colours only, for the contrastive encoder), `train/qa.json` (text for the language model), and on `val` the
    questions: `vqa_questions.json`, `vqa_annotations.json`, `gvtbench_oc.json`, `gvtbench_mci.json`,
    `gqa_questions.json`. The folder appears whole or not at all.

    Raises: CorpusError where `out` exists and is not empty, or where no picture is asked for.
    """
    if train < 1 or val < 1:
        raise CorpusError(f"a shapes corpus needs at least one picture in each split, not --train {train} --val {val}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CorpusError(f"{out} already exists and is not empty; give --out a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        report = {}
        for split, count in (("train", train), ("val", val)):
            report |= _write_split(partial / split, split, count, seed, side)
        marker = {"format": FORMAT, "seed": seed, "train": train, "val": val, "side": side}
        _write_json(partial / MARKER, marker)
        partial.chmod(0o755)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def ensure_shapes(out: Path, settings: Settings) -> Path:
    """The default corpus: draws it into `out` unless it is there already."""
    if not (out / MARKER).is_file():
        say(f"drawing the shapes corpus into {out}")
        write_shapes(out, settings.corpus.train, settings.corpus.val, settings.seed, settings.image_size)
    return out


def _write_split(folder: Path, split: str, count: int, seed: int, side: int) -> dict[str, int]:
    (folder / "images").mkdir(parents=True)
    images, captions, web, writer = [], [], [], shapes_text.QuestionWriter()
    for image_id, scene, rng in scenes(split, count, seed):
        name = f"{image_id:012d}.png"
        render(scene, side, rng).save(folder / "images" / name, compress_level=6)
        images.append({"id": image_id, "file_name": name, "width": side, "height": side})
        for text in shapes_text.captions(scene, rng):
            captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": text})
        if split == "train":
            for text in shapes_text.web_captions(scene, rng):
                web.append({"id": len(web) + 1, "image_id": image_id, "caption": text})
        writer.add(image_id, scene, rng)
        if split == "train":
            writer.add_more(image_id, scene, rng)
    _write_json(folder / "captions.json", {"images": images, "annotations": captions})
    if split == "train":
        _write_json(folder / "web_captions.json", {"images": images, "annotations": web})
        _write_json(folder / "qa.json", writer.plain())
    else:
        for name, content in writer.benchmarks().items():
            _write_json(folder / name, content)
    return {f"{split} images": count, f"{split} captions": len(captions), f"{split} questions": writer.count}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
