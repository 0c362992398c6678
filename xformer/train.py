"""The two trainers: settings -> model and cached pairs -> one loop with Accelerate."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.store import absolute
from xformer import checkpoint
from xformer.console import say
from xformer.data import Cache, Pairs
from xformer.errors import CheckpointError, EvaluationError, SettingsError, StoreError
from xformer.local import rebuilds
from xformer.loop import Loop
from xformer.model import Batch, build_stage1, build_xformer
from xformer.order import refuse_weights
from xformer.questions import Question, read_questions, refuse_missing_images, rows_of_questions, split_questions
from xformer.resume import refuse_other_run
from xformer.saved import opened
from xformer.settings import Settings
from xformer.stage2 import Text, build_stage2, caption_text, question_text, refuse_long_text, refuse_other_llm
from xformer.text import TextTokenizer, bert_state
from xformer.validate import validate_stage1, validate_stage2

Task = Literal["vqa", "caption"]


def _pairs(
    features: list[Path], settings: Settings, model: str, stage: Literal["stage1", "stage2"],
    draws: int | None, asked: list[Question] | None = None,
) -> tuple[Pairs, Pairs, list[Cache]]:  # fmt: skip
    """Training and validation pairs: the captions of the stores, or the questions that a task asks.

    Args:
        draws: read only so many mask draws; None: all.
    """
    pixels = rebuilds(settings, model, stage)
    if len({absolute(path) for path in features}) < len(features):
        raise SettingsError("--features names a store twice; data.weights decides how often each is read.")
    caches = [Cache(path, settings, model, pixels, stage, draws) for path in features]
    text = settings.qformer
    tokenizer = TextTokenizer(text.text, text.max_text, text.max_words)
    if asked is None:
        train, val = (Pairs(caches, split, tokenizer, settings) for split in ("train", "val"))
    else:
        refuse_missing_images(asked, caches)
        train, val = (
            Pairs(caches, split, tokenizer, settings, partial(rows_of_questions, questions=asked, wanted=wanted))
            for split, wanted in split_questions(asked, caches, settings)
        )
    if not len(train) and asked is not None:
        raise EvaluationError(
            f"--questions: none of the {len(asked):,} questions is about an image of the training split."
        )
    if not len(train):
        where = ", ".join(map(str, features))
        raise StoreError(f"{where}: no image-text pairs to train on; a plain folder of pictures has no captions.")
    first = caches[0]
    for cache in caches[1:]:
        for one, other in ((first, cache), (cache, first)):
            compare_identities(one.identities(), other.identities(), str(one.store.path), str(other.store.path))
    if first.kept and (draws := min(cache.draws for cache in caches)) < settings.mae.draws:
        say(
            f"the stores hold {draws} of the {settings.mae.draws} mask draws of mae.draws: epoch e reads draw e mod {draws}"
        )
    refuse_weights(settings.data.weights, train.sizes)
    say(f"{len(train):,} pairs of {train.images:,} images to train on, {len(val):,} pairs to validate on")
    return train, val, caches


def _describe(
    settings: Settings, model: str, stage: int, train: Pairs, draws: int, init: Path | None
) -> dict[str, Any]:
    """What is saved with every checkpoint beside the weights."""
    return {
        "stage": stage,
        "model": model,
        "settings": settings.dump(),
        "features": [str(absolute(cache.store.path)) for cache in train.caches],
        "stores": [cache.store.index.description for cache in train.caches],
        "pairs": train.sizes,
        "identities": train.caches[0].identities(),
        "draws": draws,
        "init": None if init is None else str(init),
    }


def _draws(run: Path, caches: list[Cache], before: dict[str, Any] | None) -> int:
    """How many mask draws a run reads: those the stores hold when it starts, however many there are later.

    Args:
        before: the state of a run that goes on.

    Raises: StoreError where it does and a draw is no longer there.
    """
    have = min(cache.draws for cache in caches)
    wanted = have if before is None else before["draws"]
    if have < wanted:
        poor = next(cache for cache in caches if cache.draws == have)
        raise StoreError(
            f"{run} reads {wanted} mask draws and {poor.store.path} holds {have}; run: xformer extract --encoder mae "
            f"--draws {wanted} --store {poor.store.path}"
        )
    return wanted


def _before(run: Path, resume: bool, init: Path | None, stage: int) -> tuple[dict[str, Any] | None, bool]:
    """What a run that goes on has saved of itself, and whether with a checkpoint; None for a new run.

    Raises: CheckpointError where that is not what was asked for, and where another start is asked for than the run's own.
    """
    have = bool(checkpoint.checkpoints(run))
    if have and not resume:
        raise CheckpointError(f"{run} holds a run already; go on with --resume, or give another --out.")
    if not resume:
        return None, False
    if have:
        state = checkpoint.read_state(checkpoint.newest(run))
    else:
        try:
            state = json.loads((run / "settings.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            raise CheckpointError(f"{run} holds no run to resume; leave --resume out.") from None
        say(f"{run} stopped before its first checkpoint; it starts again")
    if state["stage"] != stage:
        raise CheckpointError(f"{run} holds a run of stage {state['stage']}, not of stage {stage}; give another --out.")
    own = state["init"]
    if init is not None and (own is None or absolute(init) != absolute(Path(own))):
        started = "without --init" if own is None else f"from {own}"
        raise CheckpointError(f"{run} was started {started}, not from {init}; leave --init out.")
    return state, have


def train_stage1(
    features: list[Path], run: Path, settings: Settings, model: str, resume: bool, init: Path | None = None
) -> dict[str, Any]:
    """Stage 1: ITC + ITM + ITG + reconstruction. Returns the run's summary, also in RUN/summary.json.

    Args:
        init: a stage-1 run to start from, for example an imported BLIP-2; what the Q-Former has not starts as new.
    """
    own, resume = _before(run, resume, init, 1)
    if own is not None and own["init"] is not None:
        init = Path(own["init"])
    recipe = settings.stage1
    torch.manual_seed(settings.seed)
    train, val, caches = _pairs(features, settings, model, "stage1", None if own is None else own["draws"])
    stage1 = build_stage1(settings, model, train.tokenizer.vocabulary, train.tokenizer.begin)
    if settings.qformer.bert and init is None and not resume:
        from xformer.qformer import load_bert

        load_bert(stage1.xformer.qformer, bert_state(settings.qformer.text))
    if init is not None and not resume:
        start, before = _start(init, 1, "--init")
        if before["model"] not in ("qformer", model):
            raise CheckpointError(
                f"{init} is of the model {before['model']}, --model is {model}; start from that or from a qformer."
            )
        again = before["model"] == model
        _refuse_other_sizes(before["settings"], settings, init, ("qformer", "dual") if again else ("qformer",))
        compare_identities(before["identities"], caches[0].identities(), str(init), str(features[0]))
        with torch.device("meta"):
            plain = {f"xformer.{n}" for n, _ in build_xformer(settings, "qformer", 1).named_parameters()}
        beside = set() if again else {n for n, _ in stage1.named_parameters() if n.startswith("xformer.")} - plain
        checkpoint.load_model(start, stage1, new=frozenset(beside))
    described = _describe(settings, model, 1, train, _draws(run, caches, own), init)
    if own is not None:
        refuse_other_run(run, own, described)
    loop = Loop(run, stage1, train, recipe, settings.data, settings.seed, described, resume)

    def losses_of(batch: Batch, captions: list[str], step: int, draws: torch.Generator) -> dict[str, Tensor]:
        found, measured = loop.model(batch, step >= recipe.hard_negatives_after, draws)
        loop.measure(itm_accuracy=measured["itm_accuracy"], temperature=measured["temperature"])
        return found

    def validate() -> tuple[dict[str, float], np.ndarray | None]:
        with loop.accelerator.autocast():
            return validate_stage1(stage1, val, recipe, loop.accelerator.device)

    return loop.run(losses_of, validate)


def train_stage2(
    features: list[Path], init: Path | None, run: Path, settings: Settings, model: str | None, resume: bool,
    task: Task | None = None, questions: Path | None = None, annotations: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Stage 2: Z' -> linear -> frozen OPT. Starts from a stage-1 run; returns the run's summary.

    Args:
        init: what to start from; None: runs/stage1, or for a task runs/stage2. A run that goes on knows its own.
        task: fine-tunes a stage-2 run instead, by the settings' `finetune`: on captions, or on questions with the loss on
            the answer only.
    """
    own, resume = _before(run, resume, init, 2)
    asked = read_questions(questions, annotations) if task == "vqa" else None
    init = init or Path(own["init"] if own is not None else "runs/stage2" if task else "runs/stage1")
    if own is not None and resume:
        start, before = checkpoint.newest(run), own
    else:
        start, before = _start(init, 1, "stage 2") if task is None else _start(init, 2, "--task")
    if model is not None and model != before["model"]:
        raise CheckpointError(f"{init} is a {before['model']} run, --model says {model}; leave --model out.")
    model = str(before["model"])
    _refuse_other_sizes(before["settings"], settings, init, ("qformer", "dual", "local"))
    if task is not None:
        settings = settings.model_copy(update={"stage2": settings.finetune})
    recipe = settings.stage2
    torch.manual_seed(settings.seed)
    train, val, caches = _pairs(features, settings, model, "stage2", None if own is None else own["draws"], asked)
    compare_identities(before["identities"], caches[0].identities(), str(init), str(features[0]))
    stage2 = build_stage2(settings, model, settings.llm.spread)
    refuse_long_text(stage2.llm, settings, "stage2" if task is None else "finetune")
    if task is None and not resume:  # the loop loads what goes on
        checkpoint.load_model(start, stage2.xformer, prefix="xformer.")
    elif not resume:
        checkpoint.load_model(start, stage2)
        refuse_other_llm(before.get("llm", {}).get("sha256"), stage2.llm, str(start))
    described = _describe(settings, model, 2, train, _draws(run, caches, own), init) | {"task": task}
    if asked is not None:
        described["questions"] = hashlib.sha256(repr(asked).encode()).hexdigest()
    described["llm"] = {"width": stage2.llm.width, "sha256": stage2.llm.sha256}
    if own is not None:
        refuse_other_run(run, own, described)

    def encode(texts: list[str], step: int | None) -> Text:
        if asked is None:
            return caption_text(stage2.llm, texts, settings)
        chosen = [asked[int(number)] for number in texts]
        answers = [q.frequent_answer() if step is None else q.drawn_answer(settings.seed, step) for q in chosen]
        return question_text(stage2.llm, [q.text for q in chosen], answers, settings)

    loop = Loop(run, stage2, train, recipe, settings.data, settings.seed, described, resume)

    def losses_of(batch: Batch, texts: list[str], step: int, draws: torch.Generator) -> dict[str, Tensor]:
        return loop.model(batch, *(part.to(loop.accelerator.device) for part in encode(texts, step)))

    def validate() -> tuple[dict[str, float], np.ndarray | None]:
        with loop.accelerator.autocast():
            return validate_stage2(stage2, val, recipe, lambda texts: encode(texts, None), loop.accelerator.device)

    return loop.run(losses_of, validate)


def _refuse_other_sizes(before: dict[str, Any], settings: Settings, init: Path, sections: tuple[str, ...]) -> None:
    """Raises SettingsError, with the field and both values, where a start was trained with other settings."""
    for section in sections:
        theirs, ours = before[section], settings.dump()[section]
        if difference := next((key for key in theirs if theirs[key] != ours.get(key)), None):
            raise SettingsError(
                f"{section}.{difference} is {ours.get(difference)!r} here and {theirs[difference]!r} in {init}; "
                "use the same settings in both stages."
            )


def _start(init: Path, stage: int, who: str) -> tuple[Path, dict[str, Any]]:
    """The model folder and state of what `who` starts from: a run, a checkpoint or a saved model, of that stage."""
    if not init.is_dir() or not any(init.iterdir()):
        raise CheckpointError(
            f"{who} starts from a stage-{stage} run, and {init} holds none; run: xformer train --stage {stage}"
        )
    folder, state = opened(init)
    if state["stage"] != stage:
        raise CheckpointError(f"{init} is a run of stage {state['stage']}; {who} starts from one of stage {stage}.")
    return folder, state


def compare_identities(theirs: dict[str, dict], ours: dict[str, dict], run: str, store: str) -> None:
    """Raises StoreError, naming the field, where features were made in another way than a checkpoint's."""
    from pipeline.store import first_misfit

    for encoder, identity in theirs.items():
        if difference := first_misfit(identity, ours.get(encoder, {})):
            raise StoreError(f"{store} does not fit {run}: {encoder} {difference}; extract with the same encoder.")
