"""Retrieval with a stage-1 run as LAVIS does it (blip2_qformer.py, compute_sim_matrix): ITC over everything, then the best
candidates again by ITM + ITC.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xformer import publish
from xformer.checkpoint import newest_run
from xformer.console import progress, say
from xformer.data import Cache
from xformer.errors import EvaluationError
from xformer.evaluation import retrieval, tables
from xformer.evaluation.answers import other_images
from xformer.evaluation.intervals import paired
from xformer.evaluation.load import load_stage1, rows_of_images
from xformer.evaluation.run import Open, Request
from xformer.evaluation.suite import SHAPES
from xformer.losses import similarity
from xformer.model import Stage1
from xformer.settings import Settings
from xformer.train import compare_identities

TOP = 128  # candidates that ITM ranks again (LAVIS: k_test)
KEPT = 10  # what a ranking holds in the end


def evaluate_retrieval(request: Request, open_store: Open) -> dict[str, Any]:
    """Rankings from a stage-1 run, beside chance, ITC alone, and shuffled images; writes scores.json, results.json and
    page.html into `out`.

    Raises: EvaluationError, StoreError, CheckpointError.
    """
    data = retrieval.load(request.files.annotations or SHAPES / "captions.json")
    data = retrieval.first(data, request.limit) if request.limit else data
    run = request.checkpoint or newest_run(Path("runs"), stage=1)
    rankings, described = _ranked(request, run, open_store, data)
    systems = {name: retrieval.score(found, data) for name, found in rankings.items()}
    name = described["model"]
    report: dict[str, Any] = {"benchmark": "retrieval", "title": "Image-text retrieval", "n": len(data["images"])}
    report |= {"n_texts": len(data["texts"]), **described}
    if request.against is not None:
        theirs, about = _ranked(request, request.against, open_store, data)
        other = f"{about['model']} of {request.against}"
        systems[other] = retrieval.score(theirs[about["model"]], data)
        report["against"] = paired(systems[name][1], systems[other][1]) | {"than": other, "metric": "R@1, both ways"}
    report["scores"] = {"chance": retrieval.chance(data)} | {key: found for key, (found, _) in systems.items()}
    publish.write_json(request.out / "results.json", retrieval.write_rankings(rankings[name], data))
    tables.report_retrieval(request.out, report)
    say(f"and results.json (the rankings of {name})")
    return report


def _ranked(
    request: Request, run: Path, open_store: Open, data: dict[str, Any]
) -> tuple[dict[str, retrieval.Rankings], dict[str, Any]]:
    """Rankings by ITC alone, with shuffled images, and in full, by system name."""
    stage1, tokenizer, state, settings = load_stage1(run, request.overrides)
    store = open_store(run, set(data["images"]))
    cache = Cache(store, settings, state["model"], pixels=False, phase="eval")
    compare_identities(state["identities"], cache.identities(), str(run), str(store))
    rows = np.array(rows_of_images(cache, data["images"])[0])
    ids, mask = tokenizer(data["texts"])
    began = time.perf_counter()
    plain, full = rank(stage1, cache, rows, ids, mask, settings)
    seconds = time.perf_counter() - began
    name = str(state["model"])
    found = {f"{name}, ITC alone": plain}
    if request.shuffled and len(rows) > 1:
        found[f"{name} with shuffled images"] = retrieval.shuffled(full, other_images(np.arange(len(rows)), 0).tolist())
    found[name] = full
    about = {"model": name, "checkpoint": str(run), "step": state["step"], "features": str(store), "reranked": TOP}
    return found, about | {"seconds": round(seconds, 3)}


@torch.inference_mode()
def rank(
    stage1: Stage1, cache: Cache, rows: np.ndarray, ids: Tensor, mask: Tensor, settings: Settings
) -> tuple[retrieval.Rankings, retrieval.Rankings]:
    """Rankings of all texts for the image in every row, and of all images for every text: by ITC, and re-ranked.

    Args:
        rows: int64 [I]; ids: int64 [T, L]; mask: bool [T, L].

    Raises: EvaluationError where fewer than two images are there.
    """
    if len(rows) < 2:
        raise EvaluationError("retrieval needs at least two images.")
    device, size = next(stage1.parameters()).device, settings.eval.batch
    ids, mask = ids.to(device), mask.to(device)
    qformer = stage1.xformer.qformer
    parts = [(ids[i : i + size], mask[i : i + size]) for i in range(0, len(ids), size)]
    texts = [qformer.text(qformer.words(i), m)[:, 0] for i, m in parts]
    text_embedding = torch.nn.functional.normalize(stage1.text_proj(torch.cat(texts)), dim=-1)
    found = []
    for start in range(0, len(rows), size):
        clip, local = _features(cache, rows[start : start + size], settings, device)
        enhanced, _ = stage1.xformer(clip, local)
        queries = torch.nn.functional.normalize(stage1.vision_proj(enhanced), dim=-1)
        found.append(similarity(queries, text_embedding))
    itc = torch.cat(found)  # [I, T]
    to_text = _reranked(stage1, cache, rows, ids, mask, itc, settings, "re-rank captions", by_image=True)
    to_image = _reranked(stage1, cache, rows, ids, mask, itc.T, settings, "re-rank images", by_image=False)
    plain = {"image_to_text": _best(itc), "text_to_image": _best(itc.T)}
    return plain, {"image_to_text": to_text, "text_to_image": to_image}


def _features(cache: Cache, rows: np.ndarray, settings: Settings, device: torch.device) -> tuple[Tensor, Tensor | None]:
    features = cache.read(rows, settings.eval.draw % max(1, cache.draws))
    local = None if features.mae is None else torch.from_numpy(features.mae).to(device).float()
    return torch.from_numpy(features.clip).to(device).float(), local


def _best(scores: Tensor) -> list[list[int]]:
    return scores.topk(min(KEPT, scores.shape[1]), dim=1).indices.tolist()


def _reranked(
    stage1: Stage1, cache: Cache, rows: np.ndarray, ids: Tensor, mask: Tensor, itc: Tensor, settings: Settings,
    title: str, by_image: bool,
) -> list[list[int]]:  # fmt: skip
    """The best of the TOP candidates of every query by ITM + ITC; `itc` [queries, candidates]."""
    count = min(TOP, itc.shape[1])
    values, candidates = itc.topk(count, dim=1)
    found = []
    with progress(title, len(itc), "queries") as bar:
        for query in range(len(itc)):
            chosen = candidates[query]
            scores = []
            for start in range(0, count, settings.eval.batch):
                part = chosen[start : start + settings.eval.batch]
                images = rows[[query]] if by_image else rows[part.cpu().numpy()]
                clip, local = _features(cache, images, settings, ids.device)
                text = part if by_image else part.new_full((len(part),), query)
                scores.append(match(stage1, clip, local, ids[text], mask[text]))
            order = (torch.cat(scores) + values[query]).argsort(descending=True, stable=True)[:KEPT]
            found.append(chosen[order].tolist())
            bar.advance()
    return found


def match(stage1: Stage1, clip: Tensor, local: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:
    """ITM scores [B] of images and texts, without a softmax: the mean over the queries of the logit of "they match".

    Args:
        clip: [B or 1, N, Wc]; local: [B or 1, V, Wm]; one image is compared with all texts.
    """
    image = [
        None if kv is None else (kv[0].expand(len(ids), -1, -1, -1), kv[1].expand(len(ids), -1, -1, -1))
        for kv in stage1.xformer.image_keys_values(clip, local)
    ]
    local = None if local is None else local.expand(len(ids), -1, -1)
    qformer = stage1.xformer.qformer
    enhanced, _ = stage1.xformer.enhance(qformer.joint(image, qformer.words(ids), mask), local)
    return stage1.itm_head(enhanced)[..., 1].mean(1).float()
