"""Which cached features a set of variants needs, what of it a store lacks, and the commands that make it once."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.store import FeatureStore
from xformer import publish
from xformer.data import Cache
from xformer.errors import SettingsError, WeightsError
from xformer.lab.run import Run
from xformer.lab.variants import Variant
from xformer.local import Phase, local_tokens, mask_ratio, rebuilds
from xformer.settings import Settings
from xformer.weights import resolve, sha256_of, sha256_of_folder

FILES = {
    "clip": ("model.safetensors",),
    "bert": ("model.safetensors",),
    "mae": ("config.json", "model.safetensors|pytorch_model.bin"),
    "llm": (
        "config.json",
        "model.safetensors|model.safetensors.index.json|pytorch_model.bin|pytorch_model.bin.index.json",
    ),
}
PHASES: tuple[Phase, ...] = ("stage1", "stage2", "eval")


@dataclass
class Needs:
    """What one store must hold: CLIP blocks, mask draws (0 = none) at one ratio, and whole images through the MAE."""

    layers: list[int]
    ratio: float = 0.0
    draws: int = 0
    whole: bool = False
    pixels: bool = False
    variants: list[str] = field(default_factory=list)


def masked_ratio(settings: Settings, model: str, where: str) -> float:
    """The one ratio above 0 that a variant reads masks at; 0 where it reads none. Raises SettingsError for two."""
    if local_tokens(settings, model) != "mae":
        return 0.0
    found = sorted({mask_ratio(settings, model, phase) for phase in PHASES} - {0.0})
    if len(found) > 1:
        raise SettingsError(
            f"{where}: reads masks at {found[0]} and at {found[1]}; a store holds one ratio and "
            "the whole image: use one of them, or 0."
        )
    return found[0] if found else 0.0


def store_of(variant: Variant, base: Settings) -> str:
    """The store's file name: one for all, and one more for every other ratio of masked patches."""
    ratio = masked_ratio(variant.settings, variant.model, f"ablations.variants.{variant.name}")
    return "store.zarr" if ratio in (0.0, base.mae.mask_ratio) else f"store-mask-{ratio:g}.zarr"


def needs(variants: list[Variant], base: Settings) -> dict[str, Needs]:
    """What each store must hold for all of these variants. Raises SettingsError where no encoder can make it."""
    found: dict[str, Needs] = {}
    depth, patches = clip_depth(base), (base.image_size // base.mae.patch) ** 2
    for variant in variants:
        name, settings = store_of(variant, base), variant.settings
        need = found.setdefault(name, Needs(layers=[base.clip.layers[0]]))
        need.variants.append(variant.name)
        local, where = local_tokens(settings, variant.model), f"ablations.variants.{variant.name}"
        for layer in [settings.clip.layers[0]] + ([settings.local.layer] if local == "clip" else []):
            if layer > depth:
                raise SettingsError(f"{where}: CLIP block {layer} cannot be cached: the encoder has {depth} blocks.")
            need.layers += [] if layer in need.layers else [layer]
        if local != "mae":
            continue
        need.whole |= any(mask_ratio(settings, variant.model, phase) == 0 for phase in PHASES)
        if ratio := masked_ratio(settings, variant.model, where):
            if patches * (1 - ratio) < 1:
                raise SettingsError(f"{where}: a mask ratio of {ratio:g} leaves none of {patches} patches.")
            need.ratio, need.draws = ratio, base.mae.draws
            if (settings.local.draws or 0) > need.draws:
                raise SettingsError(
                    f"{where}: local.draws is {settings.local.draws}; the cache holds {need.draws} draws."
                )
            have = settings.local.draws or need.draws
            if mask_ratio(settings, variant.model, "eval") and settings.eval.draw >= have:
                raise SettingsError(f"{where}: eval.draw is {settings.eval.draw}; it reads the draws 0 to {have - 1}.")
        need.pixels |= any(rebuilds(settings, variant.model, stage) for stage in ("stage1", "stage2"))
    return found


def clip_depth(settings: Settings) -> int:
    """How many blocks the CLIP encoder has, without its weights."""
    return _depth(settings.clip.architecture, json.dumps(settings.clip.kwargs))


@cache
def _depth(architecture: str, kwargs: str) -> int:
    import timm
    import torch

    arguments: dict[str, Any] = json.loads(kwargs)
    with torch.device("meta"):
        model: Any = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    return len(model.blocks)


def frozen_weights(variant: Variant) -> dict[str, str]:
    """The sha256 of every frozen part that a variant uses. Raises WeightsError where one is missing."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries are in the sentence of the WeightsError
    settings = variant.settings
    wanted = {"clip": settings.clip.weights, "llm": settings.llm.weights}
    wanted |= {"mae": settings.mae.weights} if local_tokens(settings, variant.model) == "mae" else {}
    wanted |= {"bert": settings.qformer.text} if settings.qformer.bert else {}
    found = {}
    for name, spec in wanted.items():
        try:
            found[name] = sha256_of_folder(resolve(spec, FILES[name]))
        except WeightsError as error:
            raise WeightsError(
                f"ablations.variants.{variant.name}: {name} features or answers cannot be made: {error}"
            ) from None
    folder = resolve(settings.qformer.text, ("tokenizer.json|vocab.txt",), "qformer.text")
    found["text"] = sha256_of(next(f for n in ("tokenizer.json", "vocab.txt") if (f := folder / n).is_file()))
    return found


def arrays_read(run: Run, phases: tuple[Phase, ...] = PHASES) -> dict[str, str]:
    """The fingerprint of every array that a run reads in these phases, by name; those of a benchmark's own images by
    store and name. What made an array decides its fingerprint. Raises StoreError where one is missing or incomplete."""
    found: dict[str, str] = {}
    for phase in phases:
        pixels = phase != "eval" and rebuilds(run.settings, run.model, phase)
        stores = {run.store: ""}
        if phase == "eval":
            stores |= {q.store: f"{q.store.name}/" for q in run.benchmarks.values() if q.store != run.store}
        for store, before in stores.items():
            cache = Cache(store, run.settings, run.model, pixels, phase)
            for array in [*cache.clips.values(), *cache.mae, *cache.kept, *cache.pixels.values()]:
                found[before + array.name] = array.attributes["fingerprint"]
    return dict(sorted(found.items()))


def lines(need: Needs, store: Path, corpus: Path) -> list[list[str]]:
    """The `xformer extract` lines that fill what a store lacks.

    The encoders run one after the other, so that each one's seconds are measured.
    """
    start = ["extract", "--corpus", str(corpus), "--store", str(store)]
    lacking, found = missing(need, store), []
    if any(name.startswith("clip/") for name in lacking):
        found.append([*start, "--encoder", "clip", "--layers", ",".join(map(str, need.layers))])
    if need.draws and any(name.startswith(("mae/draw-", "pixels/")) for name in lacking):
        found.append([*start, "--encoder", "mae", "--mask-ratio", f"{need.ratio:g}", "--draws", str(need.draws)])
    if "mae/full/tokens" in lacking:
        found.append([*start, "--encoder", "mae", "--mask-ratio", "0"])
    return found


def share(source: Path, target: Path) -> None:
    """Starts a store of the same images with another one's index, CLIP features and pixels: hard links, made once. Files
    of a store are only ever replaced, so neither store can change the other's."""
    if indexed(target) or not indexed(source):
        return

    def link(file: str, place: str) -> None:
        try:
            os.link(file, place)
        except OSError:  # a file system without links
            shutil.copy2(file, place)

    with publish.directory(target) as folder:
        shutil.copytree(
            source, folder, copy_function=link, ignore=shutil.ignore_patterns("mae", ".*"), dirs_exist_ok=True
        )


def missing(need: Needs, store: Path) -> list[str]:
    """The arrays that a store does not hold complete yet."""
    wanted = [f"clip/{layer}/tokens" for layer in need.layers]
    wanted += [f"mae/draw-{draw}/{part}" for draw in range(need.draws) for part in ("tokens", "kept")]
    wanted += (["mae/full/tokens"] if need.whole else []) + (["pixels/view-0"] if need.pixels else [])
    if not indexed(store):
        return wanted
    opened = FeatureStore(store)
    names = opened.names()
    return [name for name in wanted if name not in names or opened.array(name).missing_shards]


def indexed(store: Path) -> bool:
    return (store / "index" / "index.json").is_file()


def data_sha256(store: Path) -> str:
    """One hash of every image and caption of a store, in row order."""
    index = FeatureStore(store).index
    digest = hashlib.sha256(json.dumps(index.description["corpus"], sort_keys=True).encode())
    for value in index.column("sha256")["sha256"]:
        digest.update(value.as_py())
    digest.update((store / "index" / "captions.arrow").read_bytes())
    return digest.hexdigest()
