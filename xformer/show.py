"""`xformer show`: what a model sees of a picture, what it rebuilds, and where its queries look."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from xformer import checkpoint
from xformer.attention import attention_maps, query_similarity
from xformer.console import say
from xformer.data import Cache, normalised
from xformer.errors import EvaluationError
from xformer.evaluation.load import refuse_another_model
from xformer.losses import patchify
from xformer.model import build_xformer
from xformer.reconstruction import FrozenDecoder, rebuilt_pixels, unpatchify, visible
from xformer.saved import opened
from xformer.settings import Settings, settings_from, with_overrides
from xformer.train import compare_identities

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ACROSS = 8  # queries per line


def seen(weights: Tensor, placed: bool, kept: Tensor | None) -> np.ndarray:
    """What one image's attention [Q, tokens] is drawn as: maps of its patches, or the table itself.

    Args:
        placed: patches are among the tokens, the last ones; else these are a class token and registers, without a place.
        kept: bool [n], the patches that the mask left; None: all.
    """
    if not placed:
        return weights.numpy()
    if kept is not None:
        return grids(weights, len(kept), kept)
    patches = math.isqrt(weights.shape[-1] - 1) ** 2  # the last ones; before them the class token, and maybe registers
    return grids(weights[:, -1 - patches :], patches, None)


def grids(weights: Tensor, patches: int, kept: Tensor | None) -> np.ndarray:
    """Attention over [class token, patches] of one image, [Q, 1 + n] -> [Q, side, side]; NaN where a patch is masked."""
    inside = weights[:, 1:]
    whole = torch.full((len(inside), patches), torch.nan)
    whole[:, torch.arange(patches) if kept is None else kept] = inside
    side = int(patches**0.5)
    return whole.reshape(-1, side, side).numpy()


@torch.no_grad()
def show(run: Path, store: Path, pictures: list[Path], out: Path, overrides: list[str]) -> list[Path]:
    """Draws one PNG per picture (row i of the store is pictures[i]) into `out`. Returns the files."""
    newest, state = opened(run)
    settings, model = with_overrides(settings_from(state["settings"], str(newest)), overrides), state["model"]
    refuse_another_model(settings, state, newest)
    bridge = build_xformer(settings, model, vocabulary=0)
    checkpoint.load_model(newest, bridge, prefix="xformer.")
    bridge.eval()
    cache = Cache(store, settings, model, pixels=True, phase="eval")
    compare_identities(state["identities"], cache.identities(), str(run), str(store))
    dead = {letter["row"]: letter["reason"] for letter in cache.store.index.dead()} | cache.clip.dead
    if dead:
        raise EvaluationError(f"{pictures[min(dead)]}: {dead[min(dead)]}.")
    draw = settings.eval.draw % max(1, cache.draws)
    features = cache.read(np.arange(len(pictures)), draw)
    clip = torch.from_numpy(features.clip).float()
    local = None if features.mae is None else torch.from_numpy(features.mae).float()
    kept = None if features.kept is None else torch.from_numpy(features.kept)
    maps, enhanced, rebuilt = attention_maps(bridge, clip, local)
    panels = _panels(settings, model, features.pixels, kept, local, rebuilt)
    similar = query_similarity(enhanced)
    out.mkdir(parents=True, exist_ok=True)
    stems = [picture.stem for picture in pictures]
    files = []
    for i, picture in enumerate(pictures):
        own = None if kept is None else kept[i]
        rows = {"CLIP": seen(maps["clip"][i], settings.clip.tokens == "all", None)}
        if "local" in maps:
            of_mae = settings.local.tokens == "mae"
            placed = of_mae or not settings.clip.only_global(settings.local.layer)
            rows["MAE" if of_mae else f"CLIP block {settings.local.layer}"] = seen(maps["local"][i], placed, own)
        name = picture.stem if stems.count(picture.stem) == 1 else f"{picture.stem}-{i + 1}"
        files.append(out / f"{name}-{model}.png")
        _draw(files[-1], picture, {k: v[i] for k, v in panels.items()}, similar[i].numpy(), rows)
        say(f"{picture} -> {files[-1]}")
    return files


def _panels(
    settings: Settings, model: str, raw: np.ndarray | None, kept: Tensor | None, local: Tensor | None, rebuilt: Tensor | None
) -> dict[str, np.ndarray]:  # fmt: skip
    """Pictures [B, S, S, 3] in 0..1 by title: only X-Former with masked MAE tokens has a masked input and its M'."""
    if raw is None or kept is None or local is None:
        return {}
    pixels = normalised(raw, settings.mae)
    decoder = FrozenDecoder(settings.mae.weights)
    masked = unpatchify(patchify(pixels, decoder.patch) * kept[..., None], decoder.patch)
    found = {"masked input": masked, "rebuilt from M (MAE alone)": rebuilt_pixels(decoder, local, kept, pixels)}
    if model == "xformer" and rebuilt is not None:
        found["rebuilt from M'"] = rebuilt_pixels(decoder, rebuilt, kept, pixels)
    return {k: visible(v, settings.mae) for k, v in found.items()}


def _draw(file: Path, picture: Path, panels: dict, similar: np.ndarray, rows: dict[str, np.ndarray]) -> None:
    queries = len(similar)
    lines = -(-queries // ACROSS)
    heights = [3.0, *[0.35 + 1.15 * lines if maps.ndim == 3 else 2.4 for maps in rows.values()]]
    figure = plt.figure(figsize=(11, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    original = _open(picture, max([224, *(panel.shape[0] for panel in panels.values())]))
    top = parts[0] if len(heights) > 1 else parts
    axes = top.subplots(1, len(panels) + 2, squeeze=False)[0]
    for axis, (title, image) in zip(axes, {"picture": original, **panels}.items(), strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    drawn = axes[-1].imshow(similar, vmin=-1, vmax=1, cmap="RdBu_r")
    axes[-1].set_title("cosine similarity of the queries Z'", fontsize=9)
    axes[-1].set(xlabel="query", ylabel="query")
    top.colorbar(drawn, ax=axes[-1], shrink=0.7)
    for part, (name, maps) in zip(parts[1:], rows.items(), strict=True):
        of = "patches" if maps.ndim == 3 else "tokens"
        scale = ", each up to its own maximum; masked: grey" if maps.ndim == 3 else ""
        part.suptitle(
            f"attention of each query over the {of} of {name} (last cross-attention, mean over heads{scale})",
            fontsize=9,
        )
        _maps(part, maps, original) if maps.ndim == 3 else _table(part, maps)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _maps(part: Any, maps: np.ndarray, original: np.ndarray) -> None:
    """One small picture per query, [Q, side, side] over the original."""
    tiles = part.subplots(-(-len(maps) // ACROSS), ACROSS, squeeze=False)
    colours = plt.get_cmap("inferno").with_extremes(bad="0.6")
    for axis in tiles.flat:
        axis.axis("off")
    for number, (axis, grid) in enumerate(zip(tiles.flat, maps, strict=False)):
        axis.imshow(original, extent=(0, 1, 0, 1))
        axis.imshow(grid, extent=(0, 1, 0, 1), cmap=colours, alpha=0.65, vmin=0, interpolation="nearest")
        axis.set_title(str(number), fontsize=7, pad=1)


def _table(part: Any, weights: np.ndarray) -> None:
    """Tokens without a place: one column per query, one line per token, from [Q, tokens]."""
    axis = part.subplots()
    drawn = axis.imshow(weights.T, cmap="inferno", vmin=0, aspect="auto", interpolation="nearest")
    names = ["class token", *(f"register {k}" for k in range(1, weights.shape[1]))]
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("query", fontsize=7)
    axis.tick_params(labelsize=7)
    part.colorbar(drawn, ax=axis, shrink=0.8)


def _open(picture: Path, side: int) -> np.ndarray:
    """The picture as the encoders see it: squeezed to a square."""
    from PIL import Image

    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB").resize((side, side)))
