"""Going on with a run: what must be the same, and the state that is neither weights nor moments."""

from pathlib import Path
from typing import Any

from xformer.errors import CheckpointError, SettingsError, StoreError

SAME = (
    "stage",
    "model",
    "task",
    "settings",
    "identities",
    "stores",
    "pairs",
    "questions",
    "draws",
    "llm",
)  # else the samples or losses would differ
HARMLESS = (
    "trackers",
    "pictures",
    "threads",
    "ahead",
    "keep",
    "log_every",
    "save_every",
    "validate_every",
    "validate_batches",
    "cache_dir",
    "cache_bytes",
)  # settings that change neither: a run may go on with others, for example on another machine


def unread(described: dict[str, Any]) -> tuple[str, ...]:
    """The sections of the settings that a run does not read: they may differ when it goes on, and say nothing about it."""
    if described["stage"] == 1:
        return ("stage2", "finetune", "eval", "llm")
    return ("stage1", "finetune") if described.get("task") else ("stage1", "finetune", "eval")


def refuse_other_run(run: Path, state: dict[str, Any], described: dict[str, Any]) -> None:
    """Raises SettingsError, which names the field, where a run would go on in another way than it was started, and
    StoreError where its stores have other pairs now."""
    left_out = unread(described)
    for key in SAME:
        there, here = state.get(key), described.get(key)
        if key == "settings":
            there, here = (
                {k: v for k, v in values.items() if k not in left_out} for values in (there or {}, here or {})
            )
        if key == "pairs" and there != here:
            raise StoreError(
                f"{run} was started with {there} pairs in its stores and they give {here} now (xformer store retry brings "
                f"images back, repairs may lose some), so its sample order is gone; start a new run with --init {run}"
            )
        if difference := _difference(there, here, key):
            raise SettingsError(f"{run} was started with {difference}; use the same, or start a new run.")


def _difference(there: Any, here: Any, name: str) -> str | None:
    """The first field in which two nested values differ, with both values; tuples are equal to lists."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [k for k in {**there, **here} if k not in HARMLESS]
        found = (_difference(there.get(k), here.get(k), f"{name}.{k}") for k in keys)
        return next((text for text in found if text), None)
    if isinstance(there, list | tuple) and isinstance(here, list | tuple) and len(there) == len(here):
        found = (_difference(a, b, f"{name}[{i}]") for i, (a, b) in enumerate(zip(there, here, strict=True)))
        return next((text for text in found if text), None)
    return None if there == here else f"{name.removeprefix('settings.')} = {there!r}, not {here!r}"


def refuse_missing_state(checkpoint: Path, state: dict[str, Any], seed: int) -> None:
    """Raises CheckpointError where a checkpoint lacks the state that makes going on exact.

    Every random number is drawn by a generator keyed by the seed and the step, so these two are the generators' state.
    """
    if state.get("random") != {"seed": seed, "step": state.get("step")}:
        raise CheckpointError(f"{checkpoint} lacks the state of the random generators; use an older one.")
    if missing := {"scaler", "nonfinite", "epochs", "validation", "seconds", "measured", "cpu_threads"} - set(state):
        raise CheckpointError(f"{checkpoint} lacks {min(missing)} in state.json; use an older one.")


def scaler_state(scaler: Any) -> dict[str, float] | None:
    """The loss scaler of fp16 training; None where there is none."""
    return None if scaler is None else scaler.state_dict()


def load_scaler(checkpoint: Path, state: dict[str, Any], scaler: Any) -> None:
    """Restores the loss scaler. Raises CheckpointError where only one side has one."""
    if (scaler is None) != (state["scaler"] is None):
        raise CheckpointError(
            f"{checkpoint}: saved {'without' if scaler else 'with'} a loss scaler; use its precision."
        )
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])
