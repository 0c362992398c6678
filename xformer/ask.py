"""`xformer ask` and `xformer caption`: a stage-2 run answers about, or describes, the pictures of a small store."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from xformer.data import Cache
from xformer.errors import EvaluationError
from xformer.evaluation.generate import complete
from xformer.evaluation.load import load_stage2
from xformer.settings import Settings
from xformer.stage2 import Stage2
from xformer.train import compare_identities


def _open(run: Path, store: Path, overrides: list[str]):
    stage2, state, settings = load_stage2(run, overrides)
    cache = Cache(store, settings, state["model"], pixels=False, phase="eval")
    compare_identities(state["identities"], cache.identities(), str(run), str(store))
    reasons = {letter["row"]: letter["reason"] for letter in cache.store.index.dead()}
    return stage2, settings, cache, reasons | cache.clip.dead


@torch.inference_mode()
def _soft_prompt(stage2: Stage2, cache: Cache, rows: np.ndarray, settings: Settings) -> torch.Tensor:
    device = next(stage2.parameters()).device
    features = cache.read(rows, settings.eval.draw % max(1, cache.draws))
    local = None if features.mae is None else torch.from_numpy(features.mae).to(device)
    return stage2.prefix(torch.from_numpy(features.clip).to(device), local)[0]


def ask(run: Path, store: Path, picture: Path, question: str, overrides: list[str]) -> str:
    """Answers one question about the picture in row 0."""
    if not question.strip():
        raise EvaluationError(f"the question is {question!r}; ask something.")
    stage2, settings, cache, dead = _open(run, store, overrides)
    if dead:
        raise EvaluationError(f"{picture}: {dead[0]}.")
    soft = _soft_prompt(stage2, cache, np.array([0]), settings)
    (text,) = complete(stage2.llm, soft, [settings.eval.prompt.replace("{}", question)], settings.eval)
    print(text)
    return text


@torch.inference_mode()
def caption(run: Path, store: Path, pictures: list[Path], as_lines: bool, overrides: list[str]) -> list[dict]:
    """Describes the picture of each row; prints text, or one JSON object a line.

    Raises: EvaluationError after all others are done, where a file is no picture.
    """
    stage2, settings, cache, dead = _open(run, store, overrides)
    rows = [row for row in range(len(pictures)) if row not in dead]
    decoding, found = settings.eval.for_captions(), []
    for start in range(0, len(rows), settings.eval.batch):
        part = rows[start : start + settings.eval.batch]
        soft = _soft_prompt(stage2, cache, np.array(part), settings)
        texts = complete(stage2.llm, soft, [settings.llm.prompt] * len(part), decoding)
        for row, text in zip(part, texts, strict=True):
            found.append({"image": str(pictures[row]), "caption": text})
            print(json.dumps(found[-1], ensure_ascii=False) if as_lines else f"{pictures[row]}: {text}", flush=True)
    for row in sorted(dead):
        print(f"{pictures[row]}: {dead[row]}", file=sys.stderr)
    if dead:
        first = min(dead)
        raise EvaluationError(
            f"{len(dead)} of {len(pictures)} files are no pictures (first: {pictures[first]}: {dead[first]})."
        )
    return found
