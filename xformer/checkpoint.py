"""Checkpoints: trainables only, safetensors only, whole or absent, every file's sha256 checked on reading.

RUN/checkpoints/step-00000250/{model.safetensors,config.json,optimizer.safetensors,state.json,SHA256SUMS}

model.safetensors and config.json are a transformers model folder (xformer/pretrained.py). SHA256SUMS, in the format of
`sha256sum -c`, is the marker of a complete checkpoint: it is inside before the folder gets its name, and goes first when
an old one is removed. A new checkpoint has its name, durably, before anything older is touched, so at every moment at
least one complete checkpoint exists from the first on.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xformer import publish
from xformer.console import say
from xformer.errors import CheckpointError

MARKER = "SHA256SUMS"
NAME = re.compile(r"step-(\d{8,})(-replaced-[0-9a-f]+)?")


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained; frozen encoders, decoders and language models are never saved again."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def save(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int) -> Path:
    """Publishes one checkpoint, and only then removes those older than the newest `keep`.

    Raises: OSError where the disk does not take it, CheckpointError where a weight is NaN or infinite; the older ones stay.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    moments: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            moments[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    trained = trainable_state(model)
    if bad := next((name for name, value in (trained | moments).items() if not value.isfinite().all()), None):
        raise CheckpointError(
            f"{run}: {bad} holds values that are NaN or infinite; nothing is saved, go on with --resume."
        )
    without = sorted(set(trained) - {name.rpartition("/")[0] for name in moments})
    target = write(run, {"model": trained, "optimizer": moments}, state | {"without_moments": without})
    retain(run, keep, state["step"])
    return target


def write(run: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Publishes one checkpoint folder: each group of tensors, config.json, state.json, and the marker."""
    target = run / "checkpoints" / f"step-{state['step']:08d}"
    with publish.directory(target) as folder:
        for name, group in tensors.items():
            _save_file(group, folder / f"{name}.safetensors")
        sums = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
        for name, content in (("config.json", model_config(state)), ("state.json", state | {"sha256": dict(sums)})):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            sums[name] = _sha256(folder / name)
        lines = "".join(f"{value}  {name}\n" for name, value in sums.items())
        (folder / MARKER).write_text(lines, encoding="utf-8")
        if (target / MARKER).is_file():  # stays complete, under a name that still counts, until the new one has its own
            os.rename(target, target.with_name(f"{target.name}-replaced-{secrets.token_hex(4)}"))
        elif target.exists():
            shutil.rmtree(target)
    return target


def _save_file(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def retain(run: Path, keep: int, last: int) -> None:
    """Removes all but the newest `keep` complete checkpoints, and what interrupted saves and removals have left.

    Args:
        last: the step that was just saved. What is newer was damaged, or the run would have gone on from it.
    """
    complete = checkpoints(run)
    steps = sorted({step for folder in complete if (step := _step(folder)) <= last})[-keep:]
    kept = {_step(folder): folder for folder in complete if _step(folder) in steps}
    for folder in (run / "checkpoints").iterdir():
        if folder in kept.values() or not folder.is_dir():
            continue
        if NAME.fullmatch(folder.name) or folder.name.startswith(".step-"):
            (folder / MARKER).unlink(missing_ok=True)  # first: a half-removed checkpoint is not one
            publish.fsync_path(folder)
            shutil.rmtree(folder)


def model_config(state: dict[str, Any]) -> dict[str, Any]:
    """config.json of a checkpoint: the settings, and the frozen parts by id and hash (null where it is not known)."""
    settings, identities, llm = state["settings"], state.get("identities", {}), state.get("llm", {})
    frozen = {
        name: {"weights": settings[name]["weights"], "sha256": identities[name].get("weights_sha256")}
        for name in ("clip", "mae")
        if name in identities
    }
    if llm:
        frozen["llm"] = {"weights": settings["llm"]["weights"], **llm}
    return {
        "model_type": "xformer",
        "architectures": ["XFormerForConditionalGeneration"] if state["stage"] == 2 else [],
        "stage": state["stage"],
        "variant": state["model"],
        "settings": settings,
        "identities": identities,
        "frozen": frozen,
    }


def _step(checkpoint: Path) -> int:
    found = NAME.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [file.parent for file in (run / "checkpoints").glob(f"step-*/{MARKER}") if NAME.fullmatch(file.parent.name)]
    return sorted(found, key=lambda folder: (_step(folder), "replaced" not in folder.name))


def damage(checkpoint: Path, only: str | None = None) -> str | None:
    """The first file (or whether `only`) of a checkpoint is not as it was saved, as half a sentence; None if all are."""
    try:
        *lines, rest = (checkpoint / MARKER).read_text(encoding="ascii").split("\n")
        sums = {name: value for value, name in (line.split("  ") for line in lines)}
        missing = {only or "model.safetensors", "config.json", "state.json"} - set(sums)
        if missing or rest:
            return f"{checkpoint / MARKER} is damaged: it does not name {min(missing, default='whole lines')}"
        for name, expected in sums.items():
            if only in (None, name) and (Path(name).name != name or _sha256(checkpoint / name) != expected):
                return f"{checkpoint / name} is damaged: its sha256 differs from the one saved with it"
    except (OSError, ValueError) as error:
        return f"{checkpoint} cannot be read: {error}"
    return None


def newest(run: Path) -> Path:
    """The newest complete checkpoint whose files are all as they were saved; says where a newer one is damaged.

    Raises: CheckpointError where there is none.
    """
    found, reason = checkpoints(run), None
    for checkpoint in reversed(found):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        say(f"{reason}; using an older checkpoint.")
    if reason is not None:
        raise CheckpointError(f"all {len(found)} checkpoints of {run} are damaged; the oldest: {reason}; train again.")
    raise CheckpointError(f"{run} holds no checkpoint; give a run of xformer train.")


def newest_run(folder: Path, stage: int | None) -> Path:
    """The run below `folder` of that stage (None: of any) with the latest checkpoint. Raises CheckpointError."""
    states = sorted(folder.glob(f"*/checkpoints/step-*/{MARKER}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in states:
        if stage in (None, read_state(file.parent)["stage"]):
            return file.parents[2]
    raise CheckpointError(
        f"{folder} holds no checkpoint of a stage-{stage or 1} run; train one: xformer train --stage {stage or 1}"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What was saved beside the weights. Raises CheckpointError where it cannot be read."""
    try:
        return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}/state.json cannot be read: {error}; use an older checkpoint.") from None


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """One safetensors file of a checkpoint or saved model. Raises CheckpointError where it is missing or damaged."""
    if not (checkpoint / name).is_file():
        raise CheckpointError(f"{checkpoint} holds no {name}.")
    if (checkpoint / MARKER).is_file() and (reason := damage(checkpoint, name)):
        raise CheckpointError(f"{reason}; use an older one.")
    try:
        return load_file(checkpoint / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint / name} cannot be read: {error}") from None


def load_model(checkpoint: Path, model: nn.Module, prefix: str = "", new: frozenset[str] = frozenset()) -> None:
    """Fills the trainables of `model` below `prefix`, except those in `new`, which a checkpoint may lack.

    Raises: CheckpointError where one is missing, of another shape, or not finite.
    """
    fill(model, read_tensors(checkpoint, "model.safetensors"), str(checkpoint), prefix, new)


def fill(
    model: nn.Module, state: dict[str, Tensor], checkpoint: str, prefix: str = "", new: frozenset[str] = frozenset()
) -> None:
    """Copies tensors into the trainables of `model`; without a prefix every tensor must have its place."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    if not prefix and (extra := sorted(set(state) - names)):
        raise CheckpointError(
            f"{checkpoint} holds {extra[0]}, which a model of its variant and settings does not have."
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            key = prefix + name
            if key not in state:
                if name in new:
                    continue
                raise CheckpointError(f"{checkpoint} holds no {key}: it was trained with another variant or settings.")
            if state[key].shape != parameter.shape:
                have, want = tuple(state[key].shape), tuple(parameter.shape)
                raise CheckpointError(f"{checkpoint}: {key} has shape {have}, the settings ask for {want}.")
            if not state[key].is_floating_point():
                raise CheckpointError(f"{checkpoint}: {key} is {state[key].dtype}, the model has {parameter.dtype}.")
            value = state[key].to(parameter.dtype)  # first: what is finite may not be so in a shorter type
            if not value.isfinite().all():
                raise CheckpointError(
                    f"{checkpoint}: {key} holds values that are NaN or infinite in {value.dtype}; use an older one."
                )
            parameter.copy_(value)


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores AdamW's moments by parameter name.

    Raises: CheckpointError where the checkpoint holds none, as an imported one, or where those of a parameter are missing.
    """
    if not (checkpoint / "optimizer.safetensors").is_file():
        raise CheckpointError(
            f"{checkpoint} holds no optimiser state, so nothing can go on from it; start with --init."
        )
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(checkpoint, "optimizer.safetensors").items():
        name, _, kind = key.rpartition("/")
        saved.setdefault(name, {})[kind] = value
    without = read_state(checkpoint).get("without_moments", [])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name in without:
            continue
        if set(saved.get(name, {})) != {"step", "exp_avg", "exp_avg_sq"}:
            raise CheckpointError(f"{checkpoint} lacks optimiser state of {name}; use an older one.")
        optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in saved[name].items()}
