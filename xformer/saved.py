"""What a --checkpoint may be: a run (its newest checkpoint), one checkpoint of it, or a folder of `save_pretrained`."""

import json
from pathlib import Path
from typing import Any

from xformer import checkpoint
from xformer.errors import CheckpointError, SettingsError
from xformer.local import MODELS
from xformer.settings import settings_from
from xformer.weights import sha256_of


def model_folder(path: Path) -> Path:
    """The folder with config.json. Raises CheckpointError, also where a checkpoint is incomplete or damaged."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder; give a run, one of its checkpoints, or a saved model.")
    if (path / "checkpoints").is_dir():
        return checkpoint.newest(path)
    whole = (path / checkpoint.MARKER).is_file()
    if not whole and (path / "state.json").is_file():
        raise CheckpointError(f"{path} is no complete checkpoint: it holds no {checkpoint.MARKER}; use an older one.")
    if whole and (reason := checkpoint.damage(path)):
        raise CheckpointError(f"{reason}; use another checkpoint.")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no checkpoint: give a run, one of its checkpoints, or a saved model.")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder: `variant`, `stage`, `settings`, `identities`, `frozen` (xformer/checkpoint.py).

    Raises: CheckpointError, which names the first field that is not as this program writes it.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, not an object with model_type 'xformer'.")
    for field, allowed in (("model_type", ("xformer",)), ("stage", (1, 2)), ("variant", MODELS)):
        if config.get(field) not in allowed or isinstance(config[field], bool):
            raise CheckpointError(f"{file}: {field} is {config.get(field)!r}, not {' or '.join(map(repr, allowed))}.")
    for field in ("settings", "identities", "frozen"):
        if not isinstance(config.get(field), dict):
            raise CheckpointError(f"{file}: {field} is {config.get(field)!r}, not an object.")
    if bad := next((name for name, value in config["identities"].items() if not isinstance(value, dict)), None):
        raise CheckpointError(f"{file}: identities.{bad} is {config['identities'][bad]!r}, not an object.")
    try:
        settings = settings_from(config["settings"], str(file))
    except SettingsError as error:
        raise CheckpointError(str(error)) from None
    if config["stage"] == 2:
        _refuse_unnamed_llm(config["frozen"].get("llm"), settings.llm.weights, file)
    return config


def _refuse_unnamed_llm(llm: Any, weights: str, file: Path) -> None:
    """frozen.llm: where the language model was, its width, and its sha256 (null after an import, which knows none)."""
    if not isinstance(llm, dict):
        raise CheckpointError(f"{file}: frozen.llm is {llm!r}, not an object with weights, sha256 and width.")
    kinds = {"weights": str, "sha256": str | None, "width": int}
    for field, kind in kinds.items():
        if field not in llm:
            raise CheckpointError(f"{file}: frozen.llm.{field} is missing.")
        if not isinstance(llm[field], kind) or field == "width" and (llm[field] is True or llm[field] < 1):
            wanted = {"weights": "a name", "sha256": "64 hexadecimal digits", "width": "a positive number"}[field]
            raise CheckpointError(f"{file}: frozen.llm.{field} is {llm[field]!r}, not {wanted}.")
    if llm["weights"] != weights:
        named = f"frozen.llm.weights is {llm['weights']!r} and settings.llm.weights {weights!r}"
        raise CheckpointError(f"{file}: {named}; both are one place.")


def opened(path: Path) -> tuple[Path, dict[str, Any]]:
    """The model folder and its state: stage, model, settings, identities, llm, step (None of a saved model), sha256.

    Raises: CheckpointError.
    """
    folder = model_folder(path)
    config = read_config(folder)
    if (folder / checkpoint.MARKER).is_file():
        return folder, checkpoint.read_state(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{folder} holds no model.safetensors; it is a processor's folder, give a saved model.")
    state = {key: config[key] for key in ("stage", "settings", "identities")}
    state |= {"model": config["variant"], "llm": config["frozen"].get("llm", {}), "step": None}
    return folder, state | {"sha256": {weights.name: sha256_of(weights)}}
