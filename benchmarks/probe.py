"""The premise, before any comparison: what can be read linearly from the frozen tokens that the models are given.

    python -m benchmarks.probe STORE SHAPES

A ridge regression from each picture's tokens (their mean and standard deviation) to facts of the scene that drew it; R2
on held-out pictures. The scenes are drawn again from the corpus's own seed. The comparison of the models means something
only where the CLIP tokens tell kinds and colours well, and counts worse than the MAE's.
"""

import json
import sys
from pathlib import Path

import numpy as np
import zarr

from pipeline.index import Index
from pipeline.shapes import COLOURS, KINDS, Scene, scenes
from xformer.console import table

RATIOS = (1e-3, 1e-2, 1e-1, 1.0)  # penalties


def facts(scene: Scene) -> dict[str, list[float]]:
    """Targets by name; a list is averaged."""
    shapes = scene.shapes
    return {
        "objects in all": [len(shapes)],
        "objects of each kind": [sum(s.kind == k for s in shapes) for k in KINDS],
        "objects of each colour": [sum(s.colour == c for s in shapes) for c in COLOURS],
        "colour present": [any(s.colour == c for s in shapes) for c in COLOURS],
        "kind present": [any(s.kind == k for s in shapes) for k in KINDS],
        "kind and colour present": [any(s.kind == k and s.colour == c for s in shapes) for k in KINDS for c in COLOURS],
        "centre of mass": [float(np.mean([s.x for s in shapes])), float(np.mean([s.y for s in shapes]))],
    }


def ridge(x: np.ndarray, drawn: list[dict[str, list[float]]], train: np.ndarray) -> dict[str, float]:
    """R2 of every fact on the rows not in `train`: the mean over its numbers, at the best of a few penalties."""
    mean, spread = x[train].mean(0), x[train].std(0) + 1e-6
    x = (x - mean) / spread
    values, vectors = np.linalg.eigh(x[train].T @ x[train])
    found = {}
    for fact in drawn[0]:
        y = np.array([row[fact] for row in drawn], np.float32)
        y = y - y[train].mean(0)
        right, variance = vectors.T @ (x[train].T @ y[train]), y[~train].var(0)
        kept = variance > 0
        told = []
        for ratio in RATIOS:
            rest = y[~train] - x[~train] @ (vectors @ (right / (values + ratio * len(x))[:, None]))
            told.append(float(np.mean(1 - (rest**2).mean(0)[kept] / variance[kept])))
        found[fact] = round(max(told), 3)
    return found


def main(store: Path, corpus: Path) -> dict[str, dict[str, float]]:
    """Prints and returns R2 by array and fact."""
    marker = json.loads((corpus / "shapes.json").read_text(encoding="utf-8"))
    known = {
        str(number): scene
        for split in ("train", "val")
        for number, scene, _ in scenes(split, marker[split], marker["seed"])
    }
    ids = Index(store / "index").column("id")["id"].to_pylist()
    rows = [i for i, name in enumerate(ids) if name in known]
    drawn = [facts(known[ids[i]]) for i in rows]
    train = np.arange(len(rows)) % 5 != 0
    root = zarr.open_group(store, mode="r")
    found: dict[str, dict[str, float]] = {}
    for name in sorted(path for path, node in root.members(None) if path.endswith("tokens")):
        tokens = np.asarray(root[name], dtype=np.float32)[rows]  # type: ignore[arg-type]
        x = np.concatenate([tokens.mean(1), tokens.std(1)], 1)
        found[name] = ridge(x, drawn, train)
    title = f"R2 of a linear probe on {int((~train).sum())} held-out pictures of {len(rows)}"
    table(title, ("", *found), [(fact, *(f"{found[name][fact]:.2f}" for name in found)) for fact in drawn[0]])
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
