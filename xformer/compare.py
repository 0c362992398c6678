"""`xformer compare RUN RUN`: what differs between two runs, side by side; and whether one lies in a reference's band.

A recorded reference holds the curves of several seeds. Its band at each step is the 95% prediction interval of one more
seed: mean +- t * s * sqrt(1 + 1/n), with Student's t of n - 1 degrees of freedom. It is at least 1% of the mean wide on
either side, since other machines add numbers in another order.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xformer import publish
from xformer.alarms import ITM_MARGIN
from xformer.console import say, table
from xformer.errors import CheckpointError, SettingsError
from xformer.losses import ITM_CONSTANT
from xformer.monitor import read_log
from xformer.resume import HARMLESS, unread

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's t
INSIDE = 0.9  # of all points must lie in the band; a further seed has 95% of them there on average
SPEED = {"epoch", "draw", "lr", "samples_per_second", "data_wait", "memory_mib", "seconds_left", "temperature"}
CONSTANT = {"itm_constant", "recall1_of", "reconstruction_of_mean"}  # of the data, whatever a run learns
Curve = dict[int, list[float]]  # step -> the value of each seed


@dataclass(frozen=True)
class Record:
    """What was recorded of one run, or of several seeds of one recipe. `curves` by event ("train", "validate") and name."""

    name: str
    stage: int
    model: str
    settings: dict[str, Any]  # flat, with the identities of the features
    seeds: list[int]
    curves: dict[str, dict[str, Curve]]


def band(values: list[float]) -> tuple[float, float]:
    """Of n >= 2 seeds' values: where one more seed lies with 95% probability."""
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = max(T_975.get(n - 1, 2.262) * deviation * math.sqrt(1 + 1 / n), 0.01 * abs(mean))
    return mean - half, mean + half


def read_record(path: Path, stage: int | None = None) -> Record:
    """A run folder, a recorded reference, or a folder of references, of which that of `stage` is taken.

    Raises: CheckpointError where it is none of these.
    """
    if path.is_dir() and not (path / "log.jsonl").is_file():
        found = sorted(path.glob("stage*.json"))
        chosen = [file for file in found if stage is None or file.name == f"stage{stage}.json"]
        if len(chosen) == 1:
            return read_record(chosen[0])
        if found:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(f"{path} holds {names}; name the one that is meant.")
    if path.is_file():
        return _reference(path)
    if not (path / "settings.json").is_file() or not (path / "log.jsonl").is_file():
        raise CheckpointError(
            f"{path} is no run: it lacks settings.json or log.jsonl; give a folder that xformer train made, or a "
            "recorded reference."
        )
    described = _json(path / "settings.json")
    lines = read_log(path)
    try:
        settings = _flat(described["settings"]) | _flat({"features": described["identities"]})
        left_out = tuple(f"{section}." for section in unread(described))
        settings = {k: v for k, v in settings.items() if not k.startswith(left_out)}
        record = Record(str(path), described["stage"], described["model"], settings, [described["settings"]["seed"]],
                        curves_of([lines]))  # fmt: skip
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: settings.json or log.jsonl is not as xformer train writes it: {error}."
        ) from None
    if not record.curves["train"]:
        raise CheckpointError(f"{path}: its log.jsonl holds no step yet.")
    return record


def _reference(path: Path) -> Record:
    content = _json(path)
    try:
        curves = {
            event: {
                name: {
                    int(step): [float(v) for v in values] for step, values in zip(c["steps"], c["values"], strict=True)
                }
                for name, c in by_name.items()
            }
            for event, by_name in content["curves"].items()
        }
        return Record(str(path), content["stage"], content["model"], content["settings"], content["seeds"], curves)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no recorded reference: {error}; xformer reference writes one.") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no run and no recorded reference: {error}.") from None


def curves_of(logs: list[list[dict[str, Any]]]) -> dict[str, dict[str, Curve]]:
    """The curves of one or several logs of the same recipe; only steps that all of them have."""
    found: dict[str, dict[str, Curve]] = {"train": {}, "validate": {}}
    for number, lines in enumerate(logs):
        for line in lines:
            if line["event"] not in found:
                continue
            for name, value in line.items():
                if name not in SPEED | CONSTANT | {"step", "event"} and isinstance(value, int | float):
                    values = found[line["event"]].setdefault(name, {}).setdefault(line["step"], [])
                    if len(values) == number:
                        values.append(float(value))
    whole = {
        event: {n: {s: v for s, v in curve.items() if len(v) == len(logs)} for n, curve in by_name.items()}
        for event, by_name in found.items()
    }
    return {event: {n: curve for n, curve in by_name.items() if curve} for event, by_name in whole.items()}


def differences(first: Record, second: Record) -> dict[str, tuple[Any, Any]]:
    """The settings whose values differ; those of features and model too."""
    a, b = (
        r.settings | {"model": r.model, "seed": r.seeds[0] if len(r.seeds) == 1 else r.seeds} for r in (first, second)
    )
    found = {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}
    encoders = {key.split(".")[1] for key in a.keys() ^ b.keys() if key.startswith("features.")}
    for encoder in encoders:  # one run reads features that the other does not read: one line, not ten
        prefix = f"features.{encoder}."
        reads = [any(key.startswith(prefix) for key in values) for values in (a, b)]
        if not all(reads):
            found = {key: values for key, values in found.items() if not key.startswith(prefix)}
            found[prefix.rstrip(".")] = ("read" if reads[0] else None, "read" if reads[1] else None)
    return found


def inside(curve: Curve, reference: Curve) -> list[bool]:
    """Of a run's curve, at every step that the reference has: whether it lies in the band."""
    found = []
    for step, values in curve.items():
        if step in reference:
            low, high = band(reference[step])
            found.append(low <= values[0] <= high)
    return found


def itm_at_constant(reference: Record) -> list[int]:
    """The steps, in training or validation, where the recorded seeds match no better than a constant guess (on average).

    A run whose ITM is broken lies in the band there.
    """
    curves = [curves["itm"] for curves in reference.curves.values() if "itm" in curves]
    at = {step for c in curves for step, v in c.items() if sum(v) / len(v) >= ITM_CONSTANT - ITM_MARGIN}
    return sorted(at)


def compare(first: Path, second: Path, out: Path) -> dict[str, Any]:
    """Prints and writes OUT/compare.json and compare.png. Returns what the JSON holds.

    Raises: CheckpointError for what is no run, SettingsError for runs of different stages.
    """
    a = read_record(first)
    b = read_record(second, a.stage)
    if a.stage != b.stage:
        raise SettingsError(
            f"{first} is of stage {a.stage} and {second} of stage {b.stage}; their losses are not the same."
        )
    differ = differences(a, b)
    rows = []
    for event in ("train", "validate"):
        for name in [n for n in a.curves[event] if n in b.curves[event]]:
            steps = sorted(a.curves[event][name].keys() & b.curves[event][name].keys())
            if steps:
                rows.append(_row(event, name, steps[-1], a.curves[event][name], b.curves[event][name]))
    if not rows:
        raise SettingsError(f"{first} and {second} were logged at no common step; compare runs of like log_every.")
    report: dict[str, Any] = {
        "stage": a.stage,
        "runs": [a.name, b.name],
        "seeds": [a.seeds, b.seeds],
        "settings": {key: list(values) for key, values in differ.items()},
        "figures": rows,
    }
    run, reference = (a, b) if len(b.seeds) > 1 else (b, a)
    if len(reference.seeds) > 1 and len(run.seeds) == 1:
        report["band"] = _against_band(run, reference, differ)
    _show(report)
    from xformer.pictures import compared_curves

    out.mkdir(parents=True, exist_ok=True)
    compared_curves([a, b], out / "compare.png")
    publish.write_json(out / "compare.json", report)
    say(f"in {out}: compare.json, compare.png")
    return report


def _row(event: str, name: str, step: int, a: Curve, b: Curve) -> dict[str, Any]:
    first, second = (sum(c[step]) / len(c[step]) for c in (a, b))
    row = {"event": event, "name": name, "step": step, "first": first, "second": second, "difference": second - first}
    seeds = b if len(b[step]) > 1 else a
    return row | ({"band": list(band(seeds[step]))} if len(seeds[step]) > 1 else {})


def _against_band(run: Record, reference: Record, differ: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    by_name: dict[str, dict[str, Any]] = {}
    for event, curves in reference.curves.items():
        for name, curve in curves.items():
            points = inside(run.curves[event].get(name, {}), curve)
            if points:
                by_name[f"{event}/{name}"] = {"inside": sum(points), "of": len(points)}
    within, total = (sum(v[key] for v in by_name.values()) for key in ("inside", "of"))
    return {
        "reference": reference.name,
        "inside": bool(within >= INSIDE * total),
        "points_inside": within,
        "points": total,
        "by_figure": by_name,
        "itm_at_constant": itm_at_constant(reference),
        "other_settings": [key for key in differ if key != "seed" and key.rpartition(".")[2] not in HARMLESS],
    }


def _show(report: dict[str, Any]) -> None:
    names = [Path(name).name for name in report["runs"]]
    names = names if names[0] != names[1] else report["runs"]
    if report["settings"]:
        rows = [(key, *map(_short, values)) for key, values in report["settings"].items()]
        table("settings that differ", ("", *names), rows)
    else:
        say("no setting differs")
    rows = []
    for row in report["figures"]:
        limits = row.get("band")
        value = row["first"] if len(report["seeds"][0]) == 1 else row["second"]
        verdict = () if limits is None else (_number(limits[0]), _number(limits[1]),
                                             "inside" if limits[0] <= value <= limits[1] else "OUTSIDE")  # fmt: skip
        title = row["name"] if row["event"] == "train" else f"{row['name']}, validation"
        rows.append((title, row["step"], *(_number(row[k]) for k in ("first", "second", "difference")), *verdict))
    banded = "band" in report["figures"][0]
    heads = ("", "step", *names, "difference", *(("band from", "to", "") if banded else ()))
    table(f"stage {report['stage']}, at the last common step", heads, rows)
    if (found := report.get("band")) is not None:
        where = "inside" if found["inside"] else "outside"
        counts = f"{found['points_inside']} of {found['points']} points of the curves"
        say(f"{counts} lie in the band of {found['reference']}: {where} ({INSIDE:.0%} are asked for).")
        if steps := found["itm_at_constant"]:
            say(
                f"At steps {steps[0]:,} to {steps[-1]:,} the recorded ITM is itself at the loss of a constant guess "
                f"({ITM_CONSTANT:.4f}): there the band does not tell whether matching is learnt."
            )
        if other := found["other_settings"]:
            say(f"The band was recorded with other settings ({', '.join(other[:6])}), so it may not apply.")


def _number(value: float) -> str:
    return f"{value:.4f}"


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 24 else text[:21] + "..."


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
