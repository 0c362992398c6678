"""What goes wrong in training without an error: pure functions of a run's log lines, one sentence each.

Each rule sees the lines of log.jsonl up to now and says what is wrong and what to try, or nothing. An alarm sounds once
for as long as its rule keeps speaking. Rules compare a run with what needs no learning, over several lines, so that noise
and the first steps do not sound.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xformer.losses import ITM_CONSTANT

LINES = 5  # of training in a row that must show it
VALIDATIONS = 2  # in a row that must show it
LINE_STEPS = 50  # of training, or fewer lines that are means over as many steps together
ITM_PATIENCE = 2000  # steps after the warm-up, or half of a shorter run
ITM_LEAST = 300  # but no less before the run ends: the tiny preset leaves the constant between steps 125 and 225
ITM_MARGIN = 0.01  # below the constant predictor's loss; stuck runs stay within it
MIN_RANK = 1.5  # effective rank of an image's output queries; 1 = all of them are the same vector up to their length
MAX_WAIT = 0.5  # share of the time that a step waits for its batch: above it the reader decides the speed

Line = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What was planned: steps in all, steps of warm-up, and the number of queries."""

    steps: int
    warmup: int
    queries: int


def itm_at_constant(lines: Sequence[Line], plan: Plan) -> str | None:
    """ITM no better than guessing 1/3 always, in every line since ITM_PATIENCE steps, or in the last half of a short run."""
    seen = _of(lines, "train", "itm")
    if not seen:
        return None
    last = seen[-1]["step"]
    patience = min(ITM_PATIENCE, plan.steps / 2)
    if last < plan.steps:
        patience = max(patience, ITM_LEAST)
    since = last - patience
    if since < plan.warmup:
        return None
    begun = [0, *(line["step"] for line in seen[:-1])]  # a line is the mean since the one before
    recent = [(start, line["itm"]) for start, line in zip(begun, seen, strict=True) if start >= since]
    if not recent or (len(recent) < LINES and last - recent[0][0] < LINE_STEPS):
        return None
    if min(value for _, value in recent) < ITM_CONSTANT - ITM_MARGIN:
        return None
    longer = f"train longer than {last:,} steps, " if last < ITM_LEAST else ""
    return (
        f"ITM has stayed at the loss of a constant guess ({ITM_CONSTANT:.4f}) from step {recent[0][0] + 1:,} to {last:,}, "
        f"so no match is learnt: {longer}raise stage1.hard_negatives_after or the batch, lower train.lr, and check that "
        "captions belong to their images."
    )


def queries_collapsed(lines: Sequence[Line], plan: Plan) -> str | None:
    """The output queries of an image all point the same way (effective rank, Roy & Vetterli 2007)."""
    seen = _of(lines, "validate", "effective_rank")[-VALIDATIONS:]
    if plan.queries < 2 or len(seen) < VALIDATIONS or max(line["effective_rank"] for line in seen) > MIN_RANK:
        return None
    return (
        f"the {plan.queries} output queries have collapsed (effective rank {seen[-1]['effective_rank']:.2f}, "
        f"{plan.queries} would be the most), so they say one thing: lower train.lr, lengthen train.warmup, or start again "
        "from an earlier checkpoint with another seed."
    )


def reconstruction_at_mean(lines: Sequence[Line], plan: Plan) -> str | None:
    """The masked patches rebuilt from M' are no better than each image's mean."""
    seen = _of(lines, "validate", "reconstruction_of_mean")[-VALIDATIONS:]
    if len(seen) < VALIDATIONS or any(line["reconstruction"] < line["reconstruction_of_mean"] for line in seen):
        return None
    last = seen[-1]
    return (
        f"reconstruction ({last['reconstruction']:.3f}) is no better than predicting the mean "
        f"({last['reconstruction_of_mean']:.3f}): check that encoder, decoder and norm_pix are of one MAE "
        "(xformer store show draws what it rebuilds), or lower train.lr."
    )


def reader_is_slow(lines: Sequence[Line], plan: Plan) -> str | None:
    """Steps wait for their batches longer than they compute."""
    seen = _of(lines, "train", "data_wait")[-LINES:]
    if len(seen) < LINES or min(line["data_wait"] for line in seen) < MAX_WAIT:
        return None
    share = sum(line["data_wait"] for line in seen) / len(seen)
    return (
        f"{share:.0%} of the time since step {seen[0]['step']:,} was spent waiting for features, so the reader and not the "
        "compute is the bottleneck: put the store on a local disk, store it as int8, or give each process more cores."
    )


def validation_not_finite(lines: Sequence[Line], plan: Plan) -> str | None:
    """The last validation measured what is no number."""
    seen = [line for line in lines if line["event"] == "validate"][-1:]
    names = [key for line in seen for key, value in line.items() if _no_number(value)]
    if not names:
        return None
    return (
        f"validation is not finite ({', '.join(names)}), while the steps are: check the held-out features (xformer store "
        "verify), and try train.precision=fp32 or a lower train.lr from the last good checkpoint."
    )


RULES: dict[str, Callable[[Sequence[Line], Plan], str | None]] = {
    "itm_at_constant": itm_at_constant,
    "queries_collapsed": queries_collapsed,
    "reconstruction_at_mean": reconstruction_at_mean,
    "reader_is_slow": reader_is_slow,
    "validation_not_finite": validation_not_finite,
}


def sounding(lines: Sequence[Line], plan: Plan) -> dict[str, str]:
    """Name -> sentence of every alarm that holds after the last of `lines`."""
    return {name: says for name, rule in RULES.items() if (says := rule(lines, plan)) is not None}


def _of(lines: Sequence[Line], event: str, key: str) -> list[Line]:
    """Those that have the figure. Lines with a figure that is no number have an alarm of their own."""
    return [
        line for line in lines if line["event"] == event and key in line and not any(map(_no_number, line.values()))
    ]


def _no_number(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
