"""What a corpus or a store holds, as a table and as JSON."""

from collections import Counter
from pathlib import Path
from typing import Any

from pipeline import images
from pipeline.corpora import open_corpus, read_image
from xformer import publish
from xformer.console import progress, say, table
from xformer.errors import CorpusError

SHOWN = 10


def survey(source: Path, image_root: Path | None, max_pixels: int, json_file: Path | None) -> dict[str, Any]:
    """Decodes every image of a corpus. Raises CorpusError where none is usable."""
    corpus = open_corpus(source, image_root)
    counts: Counter[str] = Counter()
    dead: list[dict[str, str]] = []
    with progress(f"reading {source}", corpus.expected(), "images") as bar:
        for row in corpus.rows():
            counts["images"] += 1
            counts["captions"] += len(row.captions)
            counts[f"split {row.split or 'by hash'}"] += 1
            reason = row.reason
            try:
                images.decode(read_image(corpus.root, row.location), max_pixels)
            except images.BadImage as error:
                reason = reason or str(error)
            except OSError as error:
                reason = reason or f"cannot be read: {error.strerror}"
            if reason:
                dead.append({"id": row.id, "location": row.location, "reason": reason})
            bar.total = max(bar.total, counts["images"])  # of tars it was an estimate
            bar.advance()
        bar.total = counts["images"]
    report = {"source": str(source), "kind": corpus.kind, **counts, "dead": dead}
    table(f"{source} ({corpus.kind})", ("what", "count"), [*counts.items(), ("dead letters", len(dead))])
    for letter in dead[:SHOWN]:
        say(f"dead: {letter['location']}: {letter['reason']}")
    if json_file:
        publish.write_json(json_file, report)
    if len(dead) == counts["images"]:
        raise CorpusError(f"{source}: none of {len(dead)} images is usable; the first: {dead[0]['reason']}.")
    return report


def report_extraction(report: dict[str, Any], json_file: Path | None) -> None:
    rows = [
        (kind, done["images"], done["seconds"], done["images"] / done["seconds"] if done["seconds"] else None)
        for kind, done in report["encoders"].items()
    ]
    table(f"extracted into {report['store']}", ("encoder", "images", "seconds", "images/s"), rows)
    dead = report["dead"]
    say(
        f"{report['images'] - len(dead)} of {report['images']} images, {report['captions']} captions, "
        f"{report['bytes'] / 1e6:,.1f} MB, {len(dead)} dead letters"
    )
    for letter in dead[:SHOWN]:
        say(f"dead: {letter['id']}: {letter['reason']}")
    if json_file:
        publish.write_json(json_file, report)


def report_store(report: dict[str, Any], json_file: Path | None) -> None:
    rows = [
        (name, "x".join(map(str, a["shape"])), a["dtype"], a["shards"], a["bytes"] / 1e6, a["seconds"])
        for name, a in report["arrays"].items()
    ]
    table(
        f"{report['store']}: {report['images']} images, {report['captions']} captions, {report['train']} train, "
        f"{report['val']} val, {len(report['dead'])} dead letters",
        ("array", "shape", "dtype", "shards", "MB", "encoding s"),
        rows,
    )
    for said in report["made"].values():
        if "damaged" in said:
            say(said["damaged"])
    for letter in report["dead"][:SHOWN]:
        say(f"dead: {letter['id']}: {letter['reason']}")
    if json_file:
        publish.write_json(json_file, report)
