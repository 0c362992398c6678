"""The tables of `xformer eval`."""

from pathlib import Path
from typing import Any

from xformer import publish
from xformer.console import say, table
from xformer.evaluation import page, retrieval
from xformer.evaluation.suite import Benchmark

MAX_COLUMNS = 8


def show(benchmark: Benchmark, report: dict[str, Any]) -> None:
    """One table per scorer: every system with its 95% interval, then the paper's numbers, marked as theirs."""
    scores = report["scores"]
    first = next(iter(scores.values()))
    for scorer in first:
        inner = first[scorer]
        kinds = list(inner[benchmark.part])[:MAX_COLUMNS] if isinstance(inner.get(benchmark.part), dict) else []
        rows = [
            (
                name,
                *[_number(s[scorer][benchmark.part].get(kind)) for kind in kinds],
                *[_number(s[scorer].get(key)) for key in benchmark.columns],
                s[scorer]["overall"],
                "{:.2f} - {:.2f}".format(*s[scorer]["interval"]),
            )
            for name, s in scores.items()
        ]
        for name, numbers in report["paper"]["numbers"].items():
            columns = [numbers.get(key) for key in (*kinds, *benchmark.columns)]
            rows.append((f"theirs: {name}", *columns, numbers["overall"], None))
        title = f"{benchmark.title}, {scorer} scorer, n = {report['n']}"
        table(title, ("", *kinds, *benchmark.columns, "overall", "95% interval"), rows)
        _notes(list(scores.values())[-1][scorer])
    for scorer, found in report.get("against", {}).items():
        low, high = found["interval"]
        say(
            f"against {found['than']}, {scorer}: {found['difference']:+.2f} ({low:+.2f} to {high:+.2f}), paired "
            f"p = {found['p']:.4f}; better on {found['better']}, worse on {found['worse']} of {found['n']}"
        )
    if "eval" in report:
        seconds = report["seconds"]
        say(
            f"prompt {report['eval']['prompt']!r}, {report['eval']['beams']} beams; reading features and queries "
            f"{seconds['queries']:.1f} s, generation {seconds['generation']:.1f} s"
        )


def _number(value: Any) -> Any:
    return None if isinstance(value, str) else value


def _notes(inner: dict[str, Any]) -> None:
    """What could not be computed, and why; which tokeniser was used."""
    flat = inner | (inner.get("metrics") or {})
    for key, value in flat.items():
        if isinstance(value, str) and value.startswith("not available"):
            say(f"{key}: {value}")
    if "tokeniser" in inner:
        reason = f" ({inner['tokeniser_reason']})" if "tokeniser_reason" in inner else ""
        say(f"tokens by the {inner['tokeniser']}{reason}; overall = CIDEr, with the document frequencies of this set")


def report_retrieval(out: Path, report: dict[str, Any]) -> None:
    """Writes scores.json and page.html, prints the table."""
    publish.write_json(out / "scores.json", report)
    heads = [f"{way} R@{k}" for way in ("text", "image") for k in retrieval.KS]
    rows = [
        (name, *found["image_to_text"].values(), *found["text_to_image"].values(), found["overall"])
        for name, found in report["scores"].items()
    ]
    body = [f"<h1>Image-text retrieval</h1><p class=note>{report['n']} images</p>", page.plain_table(heads, rows)]
    publish.write_bytes(out / "page.html", page.document("Image-text retrieval", body).encode())
    table(f"Image-text retrieval, {report['n']} images", ("", *heads, "mean"), rows)
    if "against" in report:
        found = report["against"]
        low, high = found["interval"]
        change = f"{found['difference']:+.2f} ({low:+.2f} to {high:+.2f}), paired p = {found['p']:.4f}"
        say(f"against {found['than']}, {found['metric']}: {change}")
    say(f"in {out}: scores.json, page.html")
