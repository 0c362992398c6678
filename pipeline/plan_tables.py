"""What `xformer plan` prints: bytes by array, hours by phase, and when the cache pays."""

from typing import Any

from xformer.console import say, table


def show(report: dict[str, Any]) -> None:
    """Prints a plan as tables."""
    gpus, pays = f"{report['machine']['gpus']} GPUs", report["when_it_pays"]
    arrays = [
        (name, "x".join(map(str, a["shape"])), a["dtype"], f"{a['bytes_per_image']:,}", _size(a["bytes"]))
        for name, a in report["arrays"].items()
    ]
    per_image = sum(a["bytes_per_image"] for a in report["arrays"].values())
    table(
        f"{report['images']:,} images, {report['captions']:,} captions, preset {report['preset']}; "
        f"{_size(report['free_bytes'])} are free here",
        ("array", "shape", "dtype", "bytes/image", "bytes"),
        [*arrays, ("in all", "", "", f"{per_image:,}", _size(report["bytes"]))],
    )
    table(
        f"phases; {gpus} at {report['machine']['tflops']:g} TFLOP/s each ({report['machine']['source']})",
        ("phase", "images or pairs", "GFLOP each", "this machine", gpus, f"GB/s for {gpus}", "this machine's figure from"),
        [
            (
                p["phase"], f"{p['samples']:,}", p["flop_per_sample"] / 1e9, _hours(p["here_seconds"]),
                _hours(p["gpu_seconds"]), _rate(p), p["here"],
            )
            for p in report["phases"]
        ],
    )  # fmt: skip
    table(
        f"whole runs (both stages) on {gpus}: cached (encoding included) against encoding online",
        ("runs", "cached", "online", "online : cached"),
        [
            (r["runs"], _hours(r["cached"]), _hours(r["online"]), r["online"] / r["cached"])
            for r in pays["gpus"]["runs_in_seconds"]
        ],
    )
    for where, found in ((gpus, pays["gpus"]), ("this machine", pays["here"])):
        epoch, first = found["from_epoch"], found["from_run"]
        says = "never pays: the storage is too slow" if first is None else f"pays from whole run {first}"
        says += f", from epoch {epoch} of stage 1 on" if epoch is not None else ""
        say(f"on {where} the cache {says}")
    say(
        f"decoding takes {report['decode_core_seconds'] * 1e3:.1f} ms of a core per image: {gpus} need about "
        f"{report['decode_cores_for_gpus']:,.0f} cores for it"
    )


def _size(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 1e6:,.2f} MB"


def _rate(phase: dict[str, Any]) -> str:
    if not phase["flop_per_sample"]:
        return f"{_size(phase['samples'] * phase['bytes_per_sample'])} read once"
    return f"{phase['gpu_gb_per_second']:.2f} {'read' if 'train' in phase['phase'] else 'written'}"


def _hours(seconds: float) -> str:
    return (
        f"{seconds / 3600:,.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:,.1f} min"
        if seconds >= 120
        else f"{seconds:,.1f} s"
    )
