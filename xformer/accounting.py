"""Weights of other projects, read without running anything in them; every key is imported, ignored, or an error."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xformer.errors import WeightsError

Rules = list[tuple[str, str]]  # a pattern for the whole key, and its name here or the reason why it is left out


@dataclass
class Account:
    """What became of each key; `tensors` by their names here."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    imported: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)


def read_pth(file: Path) -> dict[str, Tensor]:
    """The tensors under "model" of a PyTorch file, unpickled with weights_only. Raises WeightsError."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no pickle the restricted unpickler may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{file}: not a file of plain tensors, and nothing else is ever executed: {reason}"
        ) from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(isinstance(v, Tensor) for v in model.values()):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise WeightsError(f"{file}: no tensors under the key 'model' (it holds {found[:200]}).")
    if strange := [key for key in (*content, *model) if not isinstance(key, str)]:
        kind = type(strange[0]).__name__
        raise WeightsError(f"{file}: the key {strange[0]!r} is of the type {kind}; LAVIS and MAE write only names.")
    if unknown := sorted(set(content) - {"model", "optimizer", "config", "scaler", "epoch", "args", "iters"}):
        raise WeightsError(f"{file}: the key {unknown[0]!r} beside 'model' is none that LAVIS or MAE writes.")
    return model


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a transformers folder, one safetensors file or several. Raises WeightsError."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        tensors: dict[str, Tensor] = {}
        for name in names:
            if Path(name).name != name:
                raise WeightsError(f"{index}: the file name {name!r} leads out of the folder.")
            tensors |= load_file(folder / name)
        return tensors
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{folder}: {', '.join(map(str, names))} cannot be read: {error}") from None


def sizes(source: Path, tensors: dict[str, Tensor], key: str, wanted: tuple[int | str, ...]) -> tuple[int, ...]:
    """The shape of a tensor that must have as many axes as `wanted`, none empty; words stand for sizes not yet known.

    Raises: WeightsError with both shapes.
    """
    shape = tuple(tensors[key].shape)
    if len(shape) != len(wanted) or 0 in shape:
        raise WeightsError(f"{source}: {key} has shape {shape}, not ({', '.join(map(str, wanted))}).")
    return shape


def plain(value: Tensor) -> bool:
    """Whether values can be read from a tensor: dense, with storage, of floating-point numbers."""
    return value.is_floating_point() and value.layout == torch.strided and not (value.is_meta or value.is_nested)


def refuse_strange(source: Path, key: str, value: Tensor) -> None:
    """Raises WeightsError where a tensor is not `plain`."""
    if not plain(value):
        kind = f"{value.dtype}, {value.layout}, on {value.device}"
        raise WeightsError(f"{source}: {key} is {kind}, not a plain tensor of floating-point numbers.")


def account(
    source: Path, tensors: dict[str, Tensor], taken: Rules, left: Rules, wanted: dict[str, torch.Size]
) -> Account:
    """Renames tensors by the first rule that matches the whole key.

    Raises: WeightsError, which names the first key that no rule knows, that is missing, of another shape or type, or not
    finite.
    """
    found, unknown = Account(), []
    for key, value in tensors.items():
        ours = next((re.sub(p, name, key) for p, name in taken if re.fullmatch(p, key)), None)
        reason = next((why for p, why in left if re.fullmatch(p, key)), None)
        if reason is not None:
            found.ignored[key] = reason
        elif ours is None or ours not in wanted:
            unknown.append(key)
        else:
            found.tensors[ours], found.imported[key] = value, ours
    if unknown:
        raise WeightsError(
            f"{source}: {len(unknown)} keys belong to no part of the model (first: {sorted(unknown)[0]})."
        )
    if missing := sorted(set(wanted) - set(found.tensors)):
        raise WeightsError(f"{source}: {len(missing)} keys are missing (first: {missing[0]}, as it is called here).")
    for key, ours in found.imported.items():
        if tensors[key].shape != wanted[ours]:
            raise WeightsError(f"{source}: {key} has shape {tuple(tensors[key].shape)}, not {tuple(wanted[ours])}.")
        refuse_strange(source, key, tensors[key])
        found.tensors[ours] = tensors[key].float()  # first: what is finite may not be so in a shorter type
        if not found.tensors[ours].isfinite().all():
            raise WeightsError(f"{source}: {key} ({tensors[key].dtype}) is NaN or infinite in torch.float32.")
    return found
