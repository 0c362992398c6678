"""Pictures of a run: loss curves, a masked input beside its reconstruction, questions with answers."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from xformer import checkpoint
from xformer.compare import Record, band
from xformer.data import Cache, normalised
from xformer.losses import reconstruction
from xformer.model import build_stage1
from xformer.monitor import read_log
from xformer.reconstruction import mean_predicted, panels
from xformer.settings import settings_from
from xformer.text import TextTokenizer

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = {"xformer": "#c2410c", "qformer": "#1d4ed8"}
NAMES = {"xformer": "X-Former", "qformer": "Q-Former"}
PANELS = {"itc": "ITC", "itm": "ITM", "itg": "ITG", "reconstruction": "reconstruction", "lm": "stage 2: language model"}


def loss_curves(runs: dict[str, list[Path]], out: Path) -> None:
    """One panel per loss, one colour per model; dots are the validation split, dashes what needs no learning."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(3.4 * len(PANELS), 3), layout="constrained")
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for model, folders in runs.items():
            lines = [line for folder in folders for line in read_log(folder) if key in line]
            for event, style in (("train", "-"), ("validate", "o")):
                points = [(line["step"], line[key]) for line in lines if line["event"] == event]
                if points:
                    label = f"{NAMES[model]}{'' if event == 'train' else ', validation'}"
                    axis.plot(*zip(*points, strict=True), style, color=COLOURS[model], label=label, ms=4, lw=1.4)
            for constant in ("itm_constant", "reconstruction_of_mean"):
                if constant.startswith(key) and (levels := [line[constant] for line in lines if constant in line]):
                    axis.axhline(levels[-1], color="0.45", ls="--", lw=1)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def compared_curves(records: list[Record], out: Path) -> None:
    """One panel per figure that all records have: lines in training, dots on the validation split, a reference's band."""
    first = records[0].curves
    names = [n for n in dict.fromkeys([*first["train"], *first["validate"]]) if n not in ("loss", "gradient_norm")]
    names = [n for n in names if all(n in r.curves["train"] or n in r.curves["validate"] for r in records)]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 2.7 * lines), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for record, colour in zip(records, COLOURS.values(), strict=False):
            for event, style in (("train", "-"), ("validate", "o")):
                curve = record.curves[event].get(name, {})
                steps = sorted(curve)
                means = [float(np.mean(curve[step])) for step in steps]
                if len(record.seeds) > 1 and steps:
                    low, high = zip(*(band(curve[step]) for step in steps), strict=True)
                    if event == "train":
                        axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
                    else:
                        axis.vlines(steps, low, high, color=colour, lw=5, alpha=0.25)
                if steps:
                    axis.plot(steps, means, style, color=colour, ms=4, lw=1.4)
        axis.set(title=PANELS.get(name, name.replace("_", " ")), xlabel="step")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for record, colour in zip(records, COLOURS.values(), strict=False):
        many = f", mean and 95% band of {len(record.seeds)} seeds" if len(record.seeds) > 1 else ""
        axes.flat[0].plot([], [], "-", color=colour, label=f"{record.name}{many}")
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=2)
    figure.suptitle(f"stage {records[0].stage}: lines in training, dots on the validation split", fontsize=10)
    figure.savefig(out, dpi=110)
    plt.close(figure)


@torch.no_grad()
def rebuild(run: Path, store: Path, count: int) -> dict[str, Any]:
    """Validation images of a store, masked, rebuilt by the MAE alone (M) and by a stage-1 run (M').

    Returns: arrays [count, S, S, 3] in 0..1 by column title under "pictures", and the mean squared errors on masked
    patches over the whole validation split (at most 1,000 images) under "errors".
    """
    newest = checkpoint.newest(run)
    state = checkpoint.read_state(newest)
    settings = settings_from(state["settings"], str(newest))
    text = settings.qformer
    tokenizer = TextTokenizer(text.text, text.max_text, text.max_words)
    stage1 = build_stage1(settings, "xformer", tokenizer.vocabulary, tokenizer.begin)
    checkpoint.load_model(newest, stage1)
    stage1.eval()
    decoder = stage1.decoder
    assert decoder is not None
    cache = Cache(store, settings, "xformer", pixels=True)
    table = cache.store.index.column("split", "status")
    usable = np.flatnonzero(
        (np.array(table["split"].to_pylist()) == "val") & (np.array(table["status"].to_pylist()) == "ok")
    )
    rows = np.array([row for row in usable if row not in cache.dead])[:1000]
    errors: dict[str, list[float]] = {"each image's mean": [], "MAE alone (M)": [], "X-Former (M')": []}
    pictures: dict[str, np.ndarray] = {}
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        features = cache.read(part, 0)
        assert features.mae is not None and features.kept is not None and features.pixels is not None
        kept, local = torch.from_numpy(features.kept), torch.from_numpy(features.mae).float()
        pixels = normalised(features.pixels, settings.mae)
        _, rebuilt = stage1.xformer(torch.from_numpy(features.clip).float(), local)
        assert rebuilt is not None
        predicted = {
            "each image's mean": mean_predicted(pixels, decoder.patch, decoder.norm_pix),
            "MAE alone (M)": decoder(local, kept),
            "X-Former (M')": decoder(rebuilt, kept),
        }
        for name, value in predicted.items():
            loss = reconstruction(value, pixels, kept, decoder.patch, decoder.norm_pix)
            errors[name] += [float(loss)] * len(part)
        if not start:
            pictures = panels(decoder, settings.mae, *(x[:count] for x in (pixels, kept, local, rebuilt)))
    return {
        "pictures": pictures,
        "errors": {name: float(np.mean(v)) for name, v in errors.items()},
        "n": len(rows),
        "norm_pix_loss": decoder.norm_pix,
    }


def reconstructions(found: dict[str, Any], out: Path) -> None:
    """One row per image: original, masked input, what the MAE alone and what X-Former's M' rebuild."""
    columns = found["pictures"]
    count = len(next(iter(columns.values())))
    figure, axes = plt.subplots(
        count, len(columns), figsize=(1.9 * len(columns), 1.9 * count), layout="constrained", squeeze=False
    )
    for j, (name, images) in enumerate(columns.items()):
        error = found["errors"].get(name)
        axes[0, j].set_title(name if error is None else f"{name}\nmasked MSE {error:.3f}", fontsize=9)
        for i, image in enumerate(images):
            axes[i, j].imshow(image, interpolation="nearest")
            axes[i, j].axis("off")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def answers(rows: list[dict[str, Any]], out: Path) -> None:
    """Pictures with their question, the true answer, and each model's answer (green where it is right).

    Args:
        rows: dicts with `picture` (path), `question`, `truth`, and one entry per model.
    """
    columns = 4
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.1 * columns, 3.5 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        axis.imshow(plt.imread(row["picture"]), interpolation="nearest")
        axis.set_title(f"{row['question']}\ntruth: {row['truth']}", fontsize=9)
        for i, model in enumerate(NAMES):
            right = row[model] == row["truth"]
            text = f"{NAMES[model]}: {row[model] or '(nothing)'}"
            axis.text(
                0.5, -0.07 - 0.09 * i, text, transform=axis.transAxes, ha="center", fontsize=9,
                color="#15803d" if right else "#b91c1c",
            )  # fmt: skip
    figure.savefig(out, dpi=130)
    plt.close(figure)
