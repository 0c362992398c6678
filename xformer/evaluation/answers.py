"""What a stage-2 run, its blind language model, and its baselines answer to a benchmark's questions."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xformer.data import Cache
from xformer.errors import SettingsError
from xformer.evaluation.generate import Answerer, refuse_long_prompts
from xformer.evaluation.journal import Journal
from xformer.evaluation.load import load_stage2, rows_of_images
from xformer.gather import rank_and_world
from xformer.local import mask_ratio
from xformer.order import generator
from xformer.settings import Eval, Settings
from xformer.text import clean
from xformer.train import compare_identities

Row = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """Which systems answer beside the model, and with which prompt (None: the settings')."""

    blind: bool
    shuffled: bool
    told: bool
    prompt: str | None
    captions: bool


def answer(
    run: Path, store: Path, rows: list[Row], overrides: list[str], wanted: Wanted, progress_folder: Path
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Answers of every system by its name, the model last, and what made them.

    Raises: CheckpointError, StoreError, EvaluationError, SettingsError.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState()
    stage2, state, settings = load_stage2(run, overrides)
    chosen = _eval_settings(settings, wanted)
    cache = Cache(store, settings, state["model"], pixels=False, phase="eval")
    compare_identities(state["identities"], cache.identities(), str(run), str(store))
    found, captions = rows_of_images(cache, [str(row["image_id"]) for row in rows])
    places = np.array(found)
    prompts = [chosen.prompt.replace("{}", row["question"]) for row in rows]
    refuse_long_prompts(
        stage2.llm, prompts, settings.qformer.queries, chosen
    )  # before the first answer, not after hours
    frozen = {"llm": stage2.llm.sha256, "autocast": settings.llm.autocast, "eval": chosen.model_dump(mode="json")}
    reads = [array.attributes["usage"] for array in cache.mae]  # mask ratio, seed, and view of each draw
    weights = {"weights": state["sha256"]["model.safetensors"], "features": cache.identities(), "reads": reads}
    rank = rank_and_world()[0]

    def journal(what: Any) -> Journal:
        return Journal(progress_folder, what, rank)

    answerer = Answerer(stage2, cache, chosen, journal)
    systems: dict[str, list[str]] = {}
    if wanted.blind:
        systems["blind LLM"] = answerer.blind(prompts, frozen)
    if wanted.told and all(captions):
        systems["LLM given a true caption"] = answerer.told(
            [clean(str(c), settings.qformer.max_words) for c in captions], prompts, frozen
        )
    if wanted.shuffled:
        title = f"{state['model']} with shuffled images"
        systems[title] = answerer.seeing(title, other_images(places, settings.seed), prompts, frozen | weights)
    answerer.seconds = dict.fromkeys(answerer.seconds, 0.0)
    name = str(state["model"])
    systems[name] = answerer.seeing(f"answer with {name}", places, prompts, frozen | weights)
    return systems, {
        "model": name,
        "checkpoint": str(run),
        "step": state["step"],
        "features": str(store),
        "llm": settings.llm.weights,
        "eval": frozen["eval"],
        "mask_ratio": mask_ratio(settings, state["model"], "eval"),
        "seconds": {key: round(value, 3) for key, value in answerer.seconds.items()},
    }


def _eval_settings(settings: Settings, wanted: Wanted) -> Eval:
    """The generation settings of this benchmark; captions go on after the prompt that stage 2 was trained with."""
    if wanted.captions:
        prompt = settings.llm.prompt if wanted.prompt is None else wanted.prompt
        return settings.eval.for_captions().model_copy(update={"prompt": prompt})
    if wanted.prompt is not None and wanted.prompt.count("{}") != 1:
        raise SettingsError(f"--prompt {wanted.prompt!r}: must hold one {{}}, where the question goes.")
    return settings.eval if wanted.prompt is None else settings.eval.model_copy(update={"prompt": wanted.prompt})


def other_images(places: np.ndarray, seed: int) -> np.ndarray:
    """Every image replaced by another of the same set, the same one wherever it occurs: int64 [N] -> int64 [N]."""
    images, which = np.unique(places, return_inverse=True)
    order = generator(seed, "shuffled images").permutation(len(images))
    place = np.argsort(order)
    return images[order[(place + 1) % len(images)]][which]
