"""`xformer import`: recognises a source by what is in it, imports it, and writes the account of every key."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from xformer import publish
from xformer.accounting import read_folder, read_pth
from xformer.console import say, table
from xformer.errors import WeightsError
from xformer.import_blip2 import import_blip2
from xformer.import_mae import import_mae
from xformer.settings import Settings


def import_weights(source: Path, out: Path, settings: Settings, norm_pix: bool | None) -> dict[str, Any]:
    """Reads a LAVIS BLIP-2 file, a transformers BLIP-2 folder, or an MAE file. Returns what OUT/import.json holds.

    Raises: WeightsError, in one sentence, for anything else.
    """
    _refuse_out(out)
    if source.is_dir():
        report = _folder(source, out, settings)
    elif source.is_file():
        tensors = read_pth(source)
        if any(key.startswith("Qformer.") for key in tensors):
            report = import_blip2(source, tensors, out, settings, lavis=True)
        elif "patch_embed.proj.weight" in tensors:
            report = import_mae(source, tensors, out, norm_pix)
        else:
            first = next(iter(tensors), "nothing")
            raise WeightsError(f"{source}: neither LAVIS's BLIP-2 nor MAE (its first key is {first}).")
    else:
        raise WeightsError(f"{source}: there is no such file or folder.")
    report = {"source": str(source), **report}
    publish.write_json(out / "import.json", report)
    rows = [("imported", len(report["imported"]))]
    for part in ("ignored", "new"):
        rows += [(f"{part}: {why}", n) for why, n in Counter(report[part].values()).items()]
    table(f"{report['what']} from {source} in {out}", ("keys", "count"), rows)
    say(f"every key is in {out / 'import.json'}")
    return report


def _refuse_out(out: Path) -> None:
    """Raises WeightsError, before anything is read, where no folder can be made under that name."""
    try:
        for place in (out, *out.parents):
            if (place.exists() or place.is_symlink()) and not place.is_dir():
                raise WeightsError(f"--out {out}: {place} is a file, not a folder; give a new folder.")
    except OSError as error:
        raise WeightsError(f"--out {out}: {error.strerror}; give a new folder.") from None


def _folder(source: Path, out: Path, settings: Settings) -> dict[str, Any]:
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        kind, llm = config.get("model_type"), (config.get("text_config") or {}).get("model_type", "opt")
        heads = (config.get("qformer_config") or {}).get("num_attention_heads", 12)  # transformers' default
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{source}: no transformers folder: config.json cannot be read ({error}).") from None
    if kind != "blip-2":
        raise WeightsError(f"{source}: model_type is {kind!r}; of transformers' models only 'blip-2' is imported.")
    if heads != settings.qformer.heads:  # no tensor's shape tells it
        raise WeightsError(
            f"{source}: qformer.heads is {heads} in the file and {settings.qformer.heads} in the settings."
        )
    tensors = read_folder(source)
    if llm != "opt" and "language_projection.weight" in tensors:
        raise WeightsError(f"{source}: text_config.model_type is {llm!r}; only BLIP-2 with OPT is supported.")
    return import_blip2(source, tensors, out, settings, lavis=False)
