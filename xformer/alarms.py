"""What goes wrong in training without an error: pure functions of a run's log lines, one sentence each.

Each rule sees the lines of log.jsonl up to now and says what is wrong and what to try, or nothing. An alarm sounds once
for as long as its rule keeps speaking. Rules compare a run with what needs no learning, over several lines, so that noise
and the first steps do not sound.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xformer.losses import ITM_CONSTANT

LINES = 5  # of training in a row that must show it
VALIDATIONS = 2  # in a row that must show it
ITM_PATIENCE = (
    2000  # steps after the warm-up, or half of a shorter run: it may take some hundred steps to leave the constant
)
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
    """ITM no better than guessing 1/3 always, in every line since ITM_PATIENCE steps."""
    after = [line for line in _of(lines, "train", "itm") if line["step"] > plan.warmup]
    patience = min(ITM_PATIENCE, plan.steps / 2)
    if not after or after[-1]["step"] - plan.warmup < patience:
        return None
    last = after[-1]["step"]
    recent = [line for line in after if line["step"] > last - patience]
    if len(recent) < LINES or min(line["itm"] for line in recent) < ITM_CONSTANT - ITM_MARGIN:
        return None
    return (
        f"ITM has stayed at the loss of a constant guess ({ITM_CONSTANT:.4f}) from step {recent[0]['step']:,} to {last:,}, "
        "so no match is learnt: raise stage1.hard_negatives_after or the batch, lower train.lr, and check that captions "
        "belong to their images."
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


RULES: dict[str, Callable[[Sequence[Line], Plan], str | None]] = {
    "itm_at_constant": itm_at_constant,
    "queries_collapsed": queries_collapsed,
    "reconstruction_at_mean": reconstruction_at_mean,
    "reader_is_slow": reader_is_slow,
}


def sounding(lines: Sequence[Line], plan: Plan) -> dict[str, str]:
    """Name -> sentence of every alarm that holds after the last of `lines`."""
    return {name: says for name, rule in RULES.items() if (says := rule(lines, plan)) is not None}


def _of(lines: Sequence[Line], event: str, key: str) -> list[Line]:
    return [line for line in lines if line["event"] == event and key in line]
