"""Checkpoints: trainables only, safetensors only, whole or absent, every file's sha256 checked on reading.

RUN/checkpoints/step-00000250/{model.safetensors,config.json,optimizer.safetensors,state.json}

model.safetensors and config.json are a transformers model folder (xformer/pretrained.py).
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xformer import publish
from xformer.errors import CheckpointError


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained; frozen encoders, decoders and language models are never saved again."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def save(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int) -> Path:
    """Publishes one checkpoint, and only then removes those older than the newest `keep`."""
    names = {id(p): name for name, p in model.named_parameters()}
    moments: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            moments[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    target = write(run, {"model": trainable_state(model), "optimizer": moments}, state)
    for old in checkpoints(run)[:-keep]:
        (old / "state.json").unlink()  # the marker goes first: a half-removed checkpoint is not one
        shutil.rmtree(old)
    return target


def write(run: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Publishes one checkpoint folder: each group of tensors, config.json, and with state.json the marker."""
    target = run / "checkpoints" / f"step-{state['step']:08d}"
    if target.exists():
        shutil.rmtree(target)
    with publish.directory(target) as folder:
        for name, group in tensors.items():
            save_file(group, folder / f"{name}.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(model_config(state), indent=2) + "\n", encoding="utf-8")
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
        (folder / "state.json").write_text(json.dumps(state | {"sha256": files}, indent=2) + "\n", encoding="utf-8")
    return target


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


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(file.parent for file in (run / "checkpoints").glob("step-*/state.json"))


def newest(run: Path) -> Path:
    """The newest complete checkpoint. Raises CheckpointError where there is none."""
    found = checkpoints(run)
    if not found:
        raise CheckpointError(f"{run} holds no checkpoint; train one first: xformer train --out {run}")
    return found[-1]


def newest_run(folder: Path, stage: int) -> Path:
    """The run below `folder` of that stage whose newest checkpoint is the latest. Raises CheckpointError."""
    states = sorted(folder.glob("*/checkpoints/step-*/state.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in states:
        if read_state(file.parent)["stage"] == stage:
            return file.parents[2]
    raise CheckpointError(
        f"{folder} holds no checkpoint of a stage-{stage} run; train one: xformer train --stage {stage}"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """One safetensors file of a checkpoint. Raises CheckpointError where its sha256 differs."""
    file = checkpoint / name
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != read_state(checkpoint)["sha256"][name]:
            raise CheckpointError(
                f"{file} is damaged: its sha256 differs from the one saved with it; use an older one."
            )
        return load_file(file)
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


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
        raise CheckpointError(f"{checkpoint} holds {extra[0]}, which a model of these settings does not have.")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            key = prefix + name
            if key not in state:
                if name in new:
                    continue
                raise CheckpointError(f"{checkpoint} holds no {key}: it was trained with another model or settings.")
            if state[key].shape != parameter.shape:
                have, want = tuple(state[key].shape), tuple(parameter.shape)
                raise CheckpointError(f"{checkpoint}: {key} has shape {have}, the settings ask for {want}.")
            if not state[key].isfinite().all():
                raise CheckpointError(f"{checkpoint}: {key} holds values that are NaN or infinite; use an older one.")
            parameter.copy_(state[key])


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores AdamW's moments by parameter name."""
    moments = read_tensors(checkpoint, "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        values = {k.rpartition("/")[2]: v for k, v in moments.items() if k.rpartition("/")[0] == name}
        if values:
            moved = {k: v if k == "step" else v.to(parameter.device) for k, v in values.items()}
            optimizer.state[parameter] = moved
