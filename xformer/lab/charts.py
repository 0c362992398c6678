"""The charts of a report, one small PNG each, so that they stay readable on a phone."""

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from xformer.lab.results import scores_of
from xformer.lab.summary import mean_and_half

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

Result = dict[str, Any]
NAMES = {"qformer": "Q-Former", "concat": "concatenation", "early": "early cross-attention", "xformer": "X-Former"}
COLOURS = {"qformer": "#1d4ed8", "concat": "#7c3aed", "early": "#0f766e", "xformer": "#c2410c"}
MORE = ("#be185d", "#15803d", "#a16207", "#0369a1", "#4d7c0f", "#9f1239", "#6d28d9", "#334155")
LOSSES = {
    "ITC": ("stage1", "itc"), "ITM": ("stage1", "itm"), "ITG": ("stage1", "itg"),
    "reconstruction": ("stage1", "reconstruction"), "ITM accuracy": ("stage1", "itm_accuracy"),
    "stage 2: language model": ("stage2", "lm"),
}  # fmt: skip
VERDICT_COLOURS = {"holds": "#15803d", "does not hold": "#b91c1c", "undecided": "#6b7280"}


def name_of(variant: str) -> str:
    return NAMES.get(variant, variant)


def colour_of(variant: str, variants: list[str]) -> str:
    others = [v for v in variants if v not in COLOURS]
    return COLOURS.get(variant) or MORE[others.index(variant) % len(MORE)]


def _saved(figure: Any, file: Path) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)
    file.write_bytes(stream.getvalue())
    return stream.getvalue()


def grouped_bars(values: dict[str, dict[str, dict[str, Any]]], order: list[str], file: Path) -> bytes:
    """Bars by group and variant with 95% intervals over seeds. Args: values: group -> variant -> mean_and_half."""
    groups = list(values)
    variants = [v for v in order if any(v in values[g] for g in groups)]
    figure, axis = plt.subplots(
        figsize=(max(4.4, 0.8 + 0.36 * len(groups) * (len(variants) + 1)), 3.1), layout="constrained"
    )
    width, cut, top = 0.84 / max(1, len(variants)), False, 1.0
    for i, variant in enumerate(variants):
        have = [(g, values[group][variant]) for g, group in enumerate(groups) if variant in values[group]]
        places = [g + (i - (len(variants) - 1) / 2) * width for g, _ in have]
        means, halves = (np.array([v[key] or 0.0 for _, v in have]) for key in ("mean", "half"))
        above = np.minimum(halves, np.maximum(0, 100 - means))
        cut |= bool((above < halves).any() or (means < halves).any())
        error, top = np.stack([np.minimum(halves, means), above]), max(top, float((means + above).max()))
        axis.bar(
            places, means, width * 0.92, yerr=error if halves.any() else None, capsize=2,
            color=colour_of(variant, variants), label=name_of(variant), error_kw={"lw": 1, "ecolor": "0.3"},
        )  # fmt: skip
    axis.set_xticks(range(len(groups)), groups)
    axis.set_ylim(0, top * 1.05)
    if cut:
        axis.set_xlabel("intervals are cut at 0 and 100", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside upper center")
    return _saved(figure, file)


def by_part(results: list[Result], benchmark: str, parts: list[str], variants: list[str]) -> dict[str, dict[str, Any]]:
    """part -> variant -> mean over seeds with half its interval, x100."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        for variant in variants:
            each = [scores_of(r, benchmark, part) for r in results if r["variant"] == variant]
            values = [100 * float(e.mean()) for e in each if len(e)]
            if values:
                found.setdefault(part, {})[variant] = mean_and_half(values)
    return found


def learning_curve(
    results: list[Result], variants: list[str], stage: str, loss: str, title: str, file: Path
) -> bytes | None:
    """A loss over steps: the mean over seeds with its range; dots are the validation split. None where nothing has it."""
    figure, axis = plt.subplots(figsize=(4.2, 2.9), layout="constrained")
    drawn = False
    for variant in variants:
        for event in ("train", "validate"):
            runs = [r["curves"][stage][event] for r in results if r["variant"] == variant and stage in r["curves"]]
            runs = [run for run in runs if loss in run and run["step"] == runs[0]["step"]]
            if not runs:
                continue
            steps, values = runs[0]["step"], np.array([run[loss] for run in runs])
            colour, drawn = colour_of(variant, variants), True
            if event == "train":
                axis.plot(steps, values.mean(0), color=colour, lw=1.4, label=name_of(variant))
                axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
            else:
                axis.plot(steps, values.mean(0), "o", color=colour, ms=4)
    if not drawn:
        plt.close(figure)
        return None
    if loss == "itm":
        axis.axhline(0.6365, color="0.45", ls="--", lw=1)  # a constant predictor of 1/3
    axis.set(title=title, xlabel="step")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return _saved(figure, file)


def claim_intervals(rows: list[dict[str, Any]], file: Path) -> bytes | None:
    """Every measured claim's difference with its 95% interval, coloured by its verdict."""
    rows = [row for row in rows if "interval" in row]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(4.4, 0.7 + 0.42 * len(rows)), layout="constrained")
    widest = max(abs(row["difference"]) for row in rows)
    reach = max(5.0, 1.3 * widest, *[min(abs(v), 3 * max(5.0, widest)) for row in rows for v in row["interval"]])
    reach = min(100.0, reach)
    for place, row in enumerate(reversed(rows)):
        colour = VERDICT_COLOURS[row["verdict"]]
        low, high = row["interval"]
        axis.plot([low, high], [place, place], color=colour, lw=2, solid_capstyle="butt")
        axis.plot(row["difference"], place, "o", color=colour, ms=5)
        text = f"{row['claim']} ({row['source']})"
        axis.text(0.01, place + 0.3, text, fontsize=7.5, va="center", transform=axis.get_yaxis_transform())
    axis.axvline(0, color="0.3", lw=1)
    axis.set_yticks([])
    axis.set(xlim=(-reach, reach), ylim=(-0.4, len(rows) - 0.3), xlabel="difference in points")
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return _saved(figure, file)


def similarity(heat: list[list[float]], title: str, file: Path) -> bytes:
    """The mean cosine between the output queries, [Q, Q]."""
    figure, axis = plt.subplots(figsize=(3.3, 2.9), layout="constrained")
    drawn = axis.imshow(np.asarray(heat), vmin=-1, vmax=1, cmap="RdBu_r")
    axis.set(title=title, xlabel="query", ylabel="query")
    figure.colorbar(drawn, shrink=0.85)
    return _saved(figure, file)


def costs(seconds: dict[str, float], file: Path) -> bytes:
    """Seconds by phase, one bar each."""
    figure, axis = plt.subplots(figsize=(4.6, 0.6 + 0.4 * len(seconds)), layout="constrained")
    names = list(seconds)
    axis.barh(names[::-1], [seconds[name] / 60 for name in names[::-1]], color="#0f766e")
    axis.set_xlabel("minutes")
    axis.spines[["top", "right"]].set_visible(False)
    return _saved(figure, file)
