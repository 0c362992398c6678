"""A run ready to answer, and where the images of a benchmark lie in a store."""

from pathlib import Path
from typing import Any

import torch

from xformer import checkpoint
from xformer.data import Cache
from xformer.errors import CheckpointError, EvaluationError, SettingsError
from xformer.model import Stage1, build_stage1
from xformer.saved import opened
from xformer.settings import Settings, settings_from, with_overrides
from xformer.stage2 import Stage2, build_stage2, refuse_other_llm
from xformer.text import TextTokenizer


def load_stage2(run: Path, overrides: list[str]) -> tuple[Stage2, dict[str, Any], Settings]:
    """The stage-2 model of what --checkpoint gives, its state, and its settings with overrides (of `eval` only)."""
    newest, state = opened(run)
    if state["stage"] != 2:
        raise CheckpointError(
            f"{run} is of a stage-1 run, which has no language model; answers need one of stage 2: xformer train --stage 2"
        )
    settings = with_overrides(settings_from(state["settings"], str(newest)), overrides)
    refuse_another_model(settings, state, newest)
    stage2 = build_stage2(settings, state["model"])
    checkpoint.load_model(newest, stage2)
    refuse_other_llm(state.get("llm", {}).get("sha256"), stage2.llm, str(newest))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return stage2.to(device).eval(), state, settings


def refuse_another_model(settings: Settings, state: dict[str, Any], newest: Path) -> None:
    """Raises SettingsError where an override would compute something else with the weights of a checkpoint."""
    for section in ("qformer", "dual", "local", "clip"):
        theirs, ours = state["settings"][section], settings.dump()[section]
        if name := next((key for key in ours if ours[key] != theirs[key] and key not in ("weights", "batch")), None):
            raise SettingsError(
                f"{section}.{name} is {ours[name]!r} here and {theirs[name]!r} in {newest}; leave it out."
            )


def load_stage1(run: Path, overrides: list[str]) -> tuple[Stage1, TextTokenizer, dict[str, Any], Settings]:
    """The stage-1 model of what --checkpoint gives, its text tokenizer, its state, and its settings with overrides."""
    newest, state = opened(run)
    if state["stage"] != 1:
        raise CheckpointError(f"{run} is of a stage-2 run; this needs a stage-1 run: xformer train --stage 1")
    settings = with_overrides(settings_from(state["settings"], str(newest)), overrides)
    refuse_another_model(settings, state, newest)
    text = settings.qformer
    tokenizer = TextTokenizer(text.text, text.max_text, text.max_words)
    stage1 = build_stage1(settings, state["model"], tokenizer.vocabulary, tokenizer.begin)
    checkpoint.load_model(newest, stage1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return stage1.to(device).eval(), tokenizer, state, settings


def rows_of_images(cache: Cache, ids: list[str]) -> tuple[list[int], list[str | None]]:
    """The row of each image id, and its first caption where it has one.

    Raises: EvaluationError, with the first ids, where images are not in the store or are dead letters.
    """
    index = cache.store.index
    wanted, place = set(ids), {}
    for row, (key, status) in enumerate(zip(*(index.column("id", "status")[c] for c in ("id", "status")), strict=True)):
        text = key.as_py()
        if text in wanted and status.as_py() == "ok" and row not in cache.dead:
            place[text] = row
    if missing := sorted(wanted - set(place)):
        raise EvaluationError(
            f"{len(missing)} of {len(wanted)} images are not in {cache.store.path} (first: {', '.join(missing[:3])}); "
            "extract them, or give --images with a folder that holds them."
        )
    caption_rows, captions = index.captions()
    first: dict[int, str] = {}
    used = set(place.values())
    for number, row in enumerate(caption_rows.tolist()):
        if row in used and row not in first:
            first[row] = captions[number]
    rows = [place[key] for key in ids]
    return rows, [first.get(row) for row in rows]
