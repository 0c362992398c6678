"""Query diversity of a run of either stage, from cached features; with --against a second run beside it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from xformer import checkpoint, publish
from xformer.console import progress, say, table
from xformer.data import Cache
from xformer.errors import EvaluationError
from xformer.evaluation import diversity, page
from xformer.evaluation.intervals import paired
from xformer.evaluation.load import load_stage1, load_stage2
from xformer.evaluation.run import Open, Request
from xformer.model import XFormer
from xformer.saved import opened
from xformer.settings import Settings
from xformer.train import compare_identities


def evaluate_diversity(request: Request, open_store: Open) -> dict[str, Any]:
    """Measures one run, or two on the same images; writes scores.json and page.html with heat maps into `out`.

    Raises: StoreError, CheckpointError, EvaluationError.
    """
    run = request.checkpoint or checkpoint.newest_run(Path("runs"), stage=2)
    runs = [run] + ([request.against] if request.against else [])
    scores: dict[str, Any] = {}
    each: list[list[float]] = []
    for one in runs:
        name, queries = queries_of(one, open_store(one, None), request)
        key = name if name not in scores else f"{name} of {one}"
        scores[key], values = diversity.measure(queries)
        scores[key] |= {"checkpoint": str(one)}
        each.append(values)
    report: dict[str, Any] = {"benchmark": "diversity", "n": len(each[0]), "scores": scores}
    if len(each) == 2:
        report["against"] = paired(each[0], each[1])
    publish.write_json(request.out / "scores.json", report)
    rows = [
        (name, s["overall"], "{:.2f} - {:.2f}".format(*s["interval"]), s["effective_rank"], s["queries"])
        for name, s in scores.items()
    ]
    heads = ("mean cosine x100", "95% interval", "effective rank", "queries")
    body = [
        f"<h1>Query diversity</h1><p class=note>{len(each[0])} images; lower cosine = more different queries</p>",
        page.plain_table(list(heads), rows),
        *[page.heat_map(name, s["heat"]) for name, s in scores.items()],
    ]
    publish.write_bytes(request.out / "page.html", page.document("Query diversity", body).encode())
    table(f"Query diversity, {len(each[0])} images", ("", *heads), rows)
    if len(each) == 2:
        found = report["against"]
        low, high = found["interval"]
        say(f"difference {found['difference']:+.2f} ({low:+.2f} to {high:+.2f}), paired p = {found['p']:.4f}")
    say(f"in {request.out}: scores.json, page.html (heat maps)")
    return report


@torch.inference_mode()
def queries_of(run: Path, store: Path, request: Request) -> tuple[str, np.ndarray]:
    """The model's name and its output queries float32 [N, Q, W] on the images of the settings' evaluation split."""
    state = opened(run)[1]
    xformer, settings = _bridge(run, int(state["stage"]), request.overrides)
    cache = Cache(store, settings, state["model"], pixels=False, phase="eval")
    compare_identities(state["identities"], cache.identities(), str(run), str(store))
    column = cache.store.index.column("split", "status")
    pairs = zip(column["split"].to_pylist(), column["status"].to_pylist(), strict=True)
    split = settings.eval.split
    rows = [i for i, (s, ok) in enumerate(pairs) if ok == "ok" and s in (split, "") or ok == "ok" and split == "all"]
    rows = [row for row in rows if row not in cache.dead][: request.limit]
    if not rows:
        raise EvaluationError(f"{store}: holds no images of the split {split}; give --set eval.split=all.")
    device = next(xformer.parameters()).device
    found = []
    with progress(f"queries of {state['model']}", len(rows), "images") as bar:
        for start in range(0, len(rows), settings.eval.batch):
            part = np.array(rows[start : start + settings.eval.batch])
            features = cache.read(part, settings.eval.draw % max(1, cache.draws))
            local = None if features.mae is None else torch.from_numpy(features.mae).to(device).float()
            enhanced, _ = xformer(torch.from_numpy(features.clip).to(device).float(), local)
            found.append(enhanced.float().cpu().numpy())
            bar.advance(len(part))
    return str(state["model"]), np.concatenate(found)


def _bridge(run: Path, stage: int, overrides: list[str]) -> tuple[XFormer, Settings]:
    if stage == 1:
        stage1, _, _, settings = load_stage1(run, overrides)
        return stage1.xformer, settings
    stage2, _, settings = load_stage2(run, overrides)
    return stage2.xformer, settings
