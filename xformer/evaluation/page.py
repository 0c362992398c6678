"""The HTML page of an evaluation: one file, no network, no script. Everything that is not ours is escaped.

Questions stand sorted by disagreement, as in the paper's Figure 6; bars by category, as in its Figure 5.
"""

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

MAX_ROWS = 120
THUMBNAIL = 224  # pixels
MAX_BARS = 16  # categories
BASELINES = re.compile(r"constant answer|blind LLM|LLM given a true caption|.* with shuffled images")
COLOURS = ("#9ca3af", "#c4a484", "#0f766e", "#7c3aed", "#c2410c", "#1d4ed8", "#be185d", "#15803d")
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#1f2937;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}.note{color:#6b7280}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #e5e7eb}
td:first-child,th:first-child{text-align:left}.theirs td{color:#6b7280;font-style:italic}
.bars{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:1rem 2rem}
.bars h3{margin:.2rem 0;font-size:.95rem}
.bar{display:grid;grid-template-columns:9.5rem 1fr 3.2rem;gap:.5rem;align-items:center;font-size:.8rem}
.bar i{display:block;height:.75rem;border-radius:2px}.bar span:last-child{text-align:right}
.bar span:first-child{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:1rem}
.card{border:1px solid #e5e7eb;border-radius:8px;padding:.7rem;overflow-wrap:anywhere}
.card img{width:100%;image-rendering:auto;border-radius:4px}.card b{display:block;margin:.3rem 0}
.card .none{background:#f3f4f6;color:#9ca3af;text-align:center;padding:3rem 0;border-radius:4px}
.answer{font-size:.87rem;display:flex;justify-content:space-between;gap:.5rem}.answer em{color:#6b7280;font-style:normal}
.scroll{overflow-x:auto}figure{margin:.6rem 0}figure img{max-width:100%;height:auto}
figcaption{color:#6b7280;font-size:.85rem}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:1rem}
pre{overflow-x:auto;font-size:.8rem}
.holds{color:#15803d;font-weight:600}.fails{color:#b91c1c;font-weight:600}.undecided{color:#6b7280}
.scroll td:not(:first-child),.scroll th{white-space:nowrap}.left td{text-align:left}
@media(max-width:640px){body{margin:.8rem auto;padding:0 .7rem}
td,th{padding:.2rem .4rem;font-size:.8rem}td:first-child{min-width:8.5rem}
.cards{grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.6rem}.bars{grid-template-columns:1fr}}
.right{color:#15803d}.wrong{color:#b91c1c}.half{color:#a16207}
"""


def answers_page(report: dict[str, Any], part: str, rows: list[dict[str, Any]], pictures: Path | None) -> str:
    """The page of a benchmark whose answers are texts.

    Args:
        report: what scores.json holds; part: its key of the scores by category.
        rows: question, truth, image_id, category, and `answers` and `scores` by system.
        pictures: the folder of the pictures; None leaves them out.
    """
    scorer = next(iter(next(iter(report["scores"].values()))))
    scores = {name: found[scorer] for name, found in report["scores"].items()}
    chosen = by_disagreement(rows)[:MAX_ROWS]
    thumbnails = thumbnail_uris({str(row["image_id"]) for row in chosen}, pictures)
    note = f"{report['n']} questions, {scorer} scorer."
    if "eval" in report:
        note += f" Checkpoint {report['checkpoint']}, step {report['step']}; prompt {report['eval']['prompt']!r}."
    body = [
        f"<h1>{escape(report['title'])}</h1><p class=note>{escape(note)}</p>",
        score_table(scores, report["paper"]["numbers"]),
        *[bars(scores, each) for each in _parts(scores, part)],
        f"<h2>Where the answers differ most</h2><p class=note>The first {len(chosen)} of {len(rows)} questions, sorted by "
        "disagreement: first those on which the scores of the answers lie furthest apart. Right answers are green.</p>",
        "<div class=cards>",
        *[card(row, thumbnails.get(str(row["image_id"]))) for row in chosen],
        "</div>",
    ]
    return document(report["title"], body)


def document(title: str, body: list[str]) -> str:
    """A whole page around parts that are HTML already."""
    head = "<meta name=viewport content='width=device-width,initial-scale=1'>"
    head += f"<meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    allowed = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    policy = f'<meta http-equiv=Content-Security-Policy content="{allowed}">'
    return f"<!doctype html><html lang=en><head>{policy}{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n"


def score_table(scores: dict[str, dict[str, Any]], paper: dict[str, dict[str, float]]) -> str:
    """Every system with its interval; the paper's numbers below, marked as theirs."""
    lines = ["<table><tr><th>system</th><th>overall</th><th>95% interval</th></tr>"]
    for name, found in scores.items():
        limits = " - ".join(f"{v:.2f}" for v in found["interval"]) if "interval" in found else ""
        lines.append(f"<tr><td>{escape(name)}</td><td>{found['overall']:.2f}</td><td>{limits}</td></tr>")
    for name, numbers in paper.items():
        lines.append(
            f"<tr class=theirs><td>the paper's own: {escape(name)}</td><td>{numbers['overall']:.2f}</td><td></td></tr>"
        )
    return "".join(lines) + "</table>"


def plain_table(heads: list[str], rows: list[tuple]) -> str:
    """A table whose first column is a name; floats with two decimals."""
    lines = ["<div class=scroll><table><tr><th></th>", *[f"<th>{escape(head)}</th>" for head in heads], "</tr>"]
    for row in rows:
        cells = ["" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in row]
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return "".join(lines) + "</table></div>"


def figure(png: bytes, caption: str) -> str:
    """A picture inside the page; the caption is its description too."""
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<figure><img src="{uri}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def heat_map(title: str, values: list[list[float]], cell: int = 12) -> str:
    """A square matrix of cosines from -1 (blue) over 0 (white) to 1 (red), as an SVG."""
    side = cell * len(values)
    out = [f"<h2>{escape(title)}: mean cosine between queries</h2><svg width={side} height={side} role=img>"]
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            faded = round(255 * (1 - min(1.0, abs(value))))
            colour = f"rgb(255,{faded},{faded})" if value >= 0 else f"rgb({faded},{faded},255)"
            out.append(f'<rect x={j * cell} y={i * cell} width={cell} height={cell} fill="{colour}"/>')
    return "".join(out) + "</svg>"


def by_disagreement(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by how far the systems' scores lie apart, then by how many different answers there are; baselines count
    only where there are no two models."""

    def key(row: dict[str, Any]) -> tuple[float, int]:
        names = [name for name in row["answers"] if not BASELINES.fullmatch(name)]
        if len(names) < 2:
            names = list(row["answers"])
        values = [row["scores"][name] or 0.0 for name in names]
        return (min(values) - max(values), -len({row["answers"][name] for name in names}))

    return sorted(rows, key=key)


def _parts(scores: dict[str, dict[str, Any]], part: str) -> list[str]:
    """The scores by category that are drawn: the benchmark's own, then all others of few categories."""
    found = next(iter(scores.values()))
    others = [key for key in found if key.startswith("per_") and key != part and len(found[key]) <= MAX_BARS]
    return [key for key in (part, *others) if isinstance(found.get(key), dict)]


def bars(scores: dict[str, dict[str, Any]], part: str, title: str = "", colours: Sequence[str] = COLOURS) -> str:
    """Bars of every system by category; `part` is the key of the scores by category, "per_structural" for example."""
    kinds = next(iter(scores.values()))[part]
    values = [v for found in scores.values() for v in found[part].values() if not isinstance(v, str)]
    longest = max([100.0, *values])
    name = part.removeprefix("per_").replace("_", " ")
    out = [f"<h2>{escape(title or f'By category: {name}')}</h2><div class=bars>"]
    for kind in kinds:
        out.append(f"<div><h3>{escape(kind)}</h3>")
        for i, (name, found) in enumerate(scores.items()):
            value = found[part].get(kind)
            if value is None or isinstance(value, str):
                continue
            style = f"width:{100 * max(0.0, value) / longest:.1f}%;background:{colours[i % len(colours)]}"
            label = escape(name)
            out.append(
                f'<div class=bar><span title="{label}">{label}</span><span><i style="{style}"></i></span>'
                f"<span>{value:.1f}</span></div>"
            )
        out.append("</div>")
    return "".join(out) + "</div>"


def card(row: dict[str, Any], picture: str | None) -> str:
    """A question with its picture, the truth, and what every system answers."""
    image = (
        f'<img src="{picture}" alt="">' if picture else f"<div class=none>image {escape(str(row['image_id']))}</div>"
    )
    lines = [f"<div class=card>{image}<b>{escape(row['question'])}</b>"]
    lines.append(f"<div class=answer><em>truth</em><span>{escape(row['truth'])}</span></div>")
    for name, text in row["answers"].items():
        value = row["scores"][name]
        style = "" if value is None else "right" if value >= 0.9 else "wrong" if value == 0 else "half"
        lines.append(
            f'<div class=answer><em>{escape(name)}</em><span class="{style}">{escape(text or "(nothing)")}</span></div>'
        )
    return "".join(lines) + "</div>"


def picture_folder(images: Path | None, questions: Path | None) -> Path | None:
    """Where the pictures lie: --images, else a folder `images` beside the questions, else there are none."""
    beside = (questions.parent if questions else Path("shapes/val")) / "images"
    return images or (beside if beside.is_dir() else None)


def thumbnail_uris(ids: set[str], folder: Path | None) -> dict[str, str]:
    """Small pictures as data URIs by image id; those that are missing or broken are left out."""
    if folder is None or not folder.is_dir():
        return {}
    from PIL import Image

    found: dict[str, str] = {}
    for file in sorted(folder.rglob("*")):
        digits = file.stem.rpartition("_")[2]
        coco = str(int(digits)) if len(digits) == 12 and digits.isascii() and digits.isdigit() else ""
        key = next((k for k in (coco, file.relative_to(folder).as_posix()) if k in ids), None)
        if key is None or key in found:
            continue
        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        small = max(picture.size) <= THUMBNAIL
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        stream = io.BytesIO()
        picture.save(stream, "PNG" if small else "JPEG", quality=80)
        kind = "png" if small else "jpeg"
        found[key] = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
    return found
