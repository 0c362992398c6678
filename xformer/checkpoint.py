"""Checkpoints: trainables only, safetensors only, whole or absent, every file's sha256 checked on reading.

RUN/checkpoints/step-00000250/{model.safetensors,optimizer.safetensors,state.json}
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
    target = run / "checkpoints" / f"step-{state['step']:08d}"
    if target.exists():
        shutil.rmtree(target)
    names = {id(p): name for name, p in model.named_parameters()}
    moments: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            moments[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    with publish.directory(target) as folder:
        save_file(trainable_state(model), folder / "model.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
        (folder / "state.json").write_text(json.dumps(state | {"sha256": files}, indent=2) + "\n", encoding="utf-8")
    for old in checkpoints(run)[:-keep]:
        (old / "state.json").unlink()  # the marker goes first: a half-removed checkpoint is not one
        shutil.rmtree(old)
    return target


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


def load_model(checkpoint: Path, model: nn.Module, prefix: str = "") -> None:
    """Fills the trainables of `model` below `prefix`. Raises CheckpointError where one is missing or another shape."""
    state = read_tensors(checkpoint, "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            key = prefix + name
            if key not in state:
                raise CheckpointError(f"{checkpoint} holds no {key}: it was trained with another model or settings.")
            if state[key].shape != parameter.shape:
                have, want = tuple(state[key].shape), tuple(parameter.shape)
                raise CheckpointError(f"{checkpoint}: {key} has shape {have}, the settings ask for {want}.")
            parameter.copy_(state[key])


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores AdamW's moments by parameter name."""
    moments = read_tensors(checkpoint, "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        values = {k.rpartition("/")[2]: v for k, v in moments.items() if k.rpartition("/")[0] == name}
        if values:
            moved = {k: v if k == "step" else v.to(parameter.device) for k, v in values.items()}
            optimizer.state[parameter] = moved
