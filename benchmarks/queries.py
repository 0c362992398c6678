"""What the queries of an ablation's runs know, and how different they are: before and after the dual cross-attention.

    python -m benchmarks.queries LAB [VARIANT ...]

Of every stage-2 run of these variants (all, if none is named): R2 of a ridge regression (benchmarks/probe.py) from all
queries of a picture to facts of the scene that drew it, on the validation pictures, and the cosine and effective rank of the
queries. Z is what the Q-Former made, Z' what the dual block made of it; the other bridges have no Z'. It tells what is not
known from what is known but not said.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.probe import facts, ridge
from pipeline.shapes import scenes
from xformer.console import progress, table
from xformer.data import Cache
from xformer.evaluation import diversity
from xformer.evaluation.load import load_stage2


@torch.inference_mode()
def queries_of(run: Path, store: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The ids of all pictures, and Z and Z' float32 [N, Q, W] of each."""
    stage2, about, settings = load_stage2(run, [])
    bridge = stage2.xformer
    cache = Cache(store, settings, about["model"], pixels=False, phase="eval")
    index = cache.store.index
    rows = [row for row, status in enumerate(index.column("status")["status"].to_pylist()) if status == "ok"]
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(rows), settings.eval.batch):
        features = cache.read(np.array(rows[start : start + settings.eval.batch]), settings.eval.draw)
        clip = torch.from_numpy(features.clip).float()
        local = None if features.mae is None else torch.from_numpy(features.mae).float()
        before, _ = bridge.qformer.queries(bridge.image_keys_values(clip, local))
        found.setdefault("Z", []).append(before.numpy())
        if bridge.dual is not None:
            found.setdefault("Z'", []).append(bridge.enhance(before, local)[0].numpy())
    ids = index.column("id")["id"].to_pylist()
    return [ids[row] for row in rows], {name: np.concatenate(parts) for name, parts in found.items()}


def main(lab: Path, variants: list[str]) -> dict[str, dict[str, float]]:
    """Prints and returns the means over seeds, by variant."""
    marker = json.loads((lab / "shapes/shapes.json").read_text(encoding="utf-8"))
    known = {
        str(number): facts(scene)
        for split in ("train", "val")
        for number, scene, _ in scenes(split, marker[split], marker["seed"])
    }
    drawn = [str(number) for number, _, _ in scenes("val", marker["val"], marker["seed"])]
    runs = [file.parent for file in sorted(lab.glob("runs/*-stage2/summary.json"))]
    runs = [run for run in runs if not variants or run.name.rpartition("-seed")[0] in variants]
    seeds: dict[str, list[dict[str, float]]] = {}
    with progress("queries of", len(runs), "runs") as bar:
        for run in runs:
            ids, queries = queries_of(run, lab / "store.zarr")
            held_out = np.isin(ids, drawn)  # the bridges were trained on the others
            for name, values in queries.items():
                told = ridge(values.reshape(len(values), -1), [known[number] for number in ids], ~held_out)
                measured, _ = diversity.measure(values[held_out])
                told |= {"cosine x100": measured["overall"], "effective rank": measured["effective_rank"]}
                seeds.setdefault(f"{run.name.rpartition('-seed')[0]} {name}", []).append(told)
            bar.advance()
    found = {name: {key: float(np.mean([t[key] for t in each])) for key in each[0]} for name, each in seeds.items()}
    rows = [(name, len(seeds[name]), *(f"{value:.2f}" for value in told.values())) for name, told in found.items()]
    table("R2 from all queries, validation pictures; mean over seeds", ("", "seeds", *next(iter(found.values()))), rows)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
