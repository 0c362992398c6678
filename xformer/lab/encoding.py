"""What encoding cost once, and what it would have cost inside every run: measured seconds, and the estimate from them.

What one pass of an encoder over a shard made carries the same measured seconds, each array an equal share of them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.store import FeatureStore, committed
from xformer.lab.features import indexed, masked_ratio
from xformer.lab.results import read_json
from xformer.local import Phase, local_tokens, mask_ratio
from xformer.settings import Settings

FILE = "encoding.json"  # beside the runs' JSONs, so that it is committed with them


def encoder_seconds(store: Path, counted: set[tuple[str, float]] | None = None) -> dict[str, float]:
    """Measured seconds of one forward pass per image, the median over shards: `clip` (to the deepest cached block),
    `draw`, `whole`; the seconds of all forward passes that filled the store: `once`; how often the CLIP ran over the images:
    `clip_passes`; the share of patches that the draws mask: `ratio`.

    Args:
        counted: shards, by sha256 and seconds, that another store holds too and that count there; grows.
    """
    opened, counted = FeatureStore(store), set() if counted is None else counted
    shards: dict[int, dict[str, dict[str, Any]]] = {}
    for name in opened.names():
        for shard, record in committed(store, name).items():
            shards.setdefault(shard, {})[name] = record
    each: dict[str, list[float]] = {"clip": [], "draw": [], "whole": []}
    once, clip_rows, images = 0.0, 0, 0
    for records in shards.values():
        rows = int(np.diff(next(iter(records.values()))["rows"])[0])
        images += rows
        passes: dict[tuple[bool, float], list[str]] = {}
        for name, record in records.items():
            passes.setdefault((name.startswith("clip/"), record["seconds"]), []).append(name)
            key = record["sha256"], record["seconds"]
            once += 0.0 if key in counted else record["seconds"]
            counted.add(key)
        deepest = (0, 0.0)
        for (clip, seconds), names in passes.items():
            spent = seconds * len(names) / rows
            tokens = [name for name in names if name.endswith("/tokens")]
            if clip and tokens:
                depth = max(int(name.split("/")[1]) for name in tokens)
                views = sum(name.startswith(f"clip/{depth}/") for name in tokens)
                deepest = max(deepest, (depth, spent / views))
                clip_rows += rows
            elif tokens:
                kind = "whole" if any(name.startswith("mae/full/") for name in tokens) else "draw"
                each[kind].append(spent / len(tokens))
        each["clip"].append(deepest[1])
    found = {kind: float(np.median(values)) if values else 0.0 for kind, values in each.items()}
    draws = [name for name in opened.names() if name.startswith("mae/draw-")]
    ratio = opened.array(draws[0]).attributes["usage"]["mask_ratio"] if draws else 0.0
    return found | {"once": once, "clip_passes": clip_rows / max(1, images), "ratio": ratio}


def known(out: Path, results: Path) -> dict[str, dict[str, float]]:
    """encoder_seconds of every store of an ablation, by its name; of stores that are gone what stands in RESULTS."""
    counted: set[tuple[str, float]] = set()
    found: dict[str, Any] = read_json(results / FILE, results / FILE) if (results / FILE).is_file() else {}
    stores = [store for store in sorted(out.glob("*.zarr"), key=lambda s: s.name != "store.zarr") if indexed(store)]
    return found | {store.name: encoder_seconds(store, counted) for store in stores}


def online_seconds(
    settings: Settings, model: str, stores: dict[str, dict[str, float]], images: dict[Phase, int]
) -> float | None:
    """What the encoders would have cost inside one run: every image that a step or a benchmark reads, encoded there.

    Args:
        images: how many images each phase read; in evaluation each image counts once per benchmark.

    Returns: None where no store is known whose draws are masked as this run reads them.
    """
    ratio = masked_ratio(settings, model, model)
    ours = [name for name in stores if not Path(name).name.startswith("eval-")]
    seconds = next((stores[name] for name in ours if not ratio or stores[name]["ratio"] == ratio), None)
    if seconds is None:
        return None
    total = 0.0
    for phase, count in images.items():
        one = seconds["clip"]
        if local_tokens(settings, model) == "mae":
            one += seconds["draw" if mask_ratio(settings, model, phase) else "whole"]
        total += count * one
    return total
