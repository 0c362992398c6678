"""`xformer report`: one page of a set of runs, with everything inside; its pictures and tables also as PNG and CSV."""

import csv
import io
import json
from html import escape
from pathlib import Path
from typing import Any

from xformer import publish
from xformer.console import duration, say
from xformer.errors import UserError
from xformer.evaluation import page
from xformer.lab import charts, claims
from xformer.lab.collect import Collected, collect
from xformer.lab.summary import numbers, saving, score_rows, seeds_of, spread

MAIN = ("qformer", "concat", "early", "xformer")
TITLES = {"vqav2": "VQAv2", "gqa": "GQA", "oc": "object counting", "mci": "MCI", "coco-caption": "captions (CIDEr)",
          "diversity": "query cosine"}  # fmt: skip
STYLES = {claims.HOLDS: "holds", claims.FAILS: "fails", claims.UNDECIDED: "undecided"}
CARDS = 12


def report(folders: list[Path], out: Path) -> None:
    """Writes the page OUT, and its PNGs and CSVs into a folder of their own beside it: report.html, report-files/.

    Raises: EvaluationError where a folder holds no finished run, or runs do not belong side by side.
    """
    found = collect(folders)
    beside = out.with_name(f"{out.stem}-files")
    beside.mkdir(parents=True, exist_ok=True)
    variants = list(dict.fromkeys(result["variant"] for result in found.results))
    main = [v for v in MAIN if v in variants] or variants[:6]
    seeds = sorted({result["seed"] for result in found.results})
    judged, scores = claims.judge(found.results), score_rows(found.results, found.systems)
    explored = claims.explore(found.results)
    _csv(beside / "claims.csv", judged)
    _csv(beside / "gqa-types.csv", explored)
    flat = [{"system": system, "benchmark": b} | value for system, each in scores.items() for b, value in each.items()]
    _csv(beside / "scores.csv", flat)
    counted = f"{len(found.results)} runs: {len(variants)} systems, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    body = [
        "<h1>X-Former on one cache: what the runs say</h1>",
        f"<p class=note>{counted} ({', '.join(map(str, seeds))}). Small models on a drawn corpus, unless the "
        "settings below say otherwise: an illustration of the paper's comparisons, not a replication.</p>",
        *_claims(judged, beside),
        *_scores(found, scores, main, beside),
        *_explored(explored),
        *_curves(found, main, beside),
        *_answers(found, main),
        *_pictures(found, beside),
        *_similarity(found, main, beside),
        *_cost(found, beside),
        *_settings(found, variants),
    ]
    publish.write_bytes(out, page.document("X-Former: report", body).encode())
    say(f"{out}: {counted}; its pictures and tables lie in {beside}")


def _csv(file: Path, rows: list[dict[str, Any]]) -> None:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    publish.write_bytes(file, stream.getvalue().encode())


def _claims(judged: list[dict[str, Any]], beside: Path) -> list[str]:
    rule = " ".join((claims.__doc__ or "").partition("The rule")[2].split()).replace(" * ", " • ")
    run, not_run = ([row for row in judged if bool(row["seeds"]) == there] for there in (True, False))
    png = charts.claim_intervals(judged, beside / "claims.png")
    others = [f"<details><summary>{len(not_run)} more claims, not run</summary>", *_claim_rows(not_run), "</details>"]
    return [
        "<h2>Claims</h2>", *_claim_rows(run), *(others if not_run else []),
        "<p class=note>On a phone the table scrolls sideways. theirs: what the paper prints for both systems, with other "
        "data and sizes (Table 1 with OPT-2.7b, Tables 5 and 6 with OPT-6.7b).</p>",
        *([page.figure(png, "Differences, 95% intervals: green holds, red does not, grey is open")] if png else []),
        "<details><summary>The rule, fixed before any run over five seeds</summary>",
        f"<p class=note>The rule {escape(rule)}</p></details>",
    ]  # fmt: skip


def _claim_rows(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["<div class=scroll><table class=claims><tr><th>claim</th><th>verdict</th><th>paper</th><th>difference</th>"
             "<th>95% interval</th><th>p (Holm)</th><th>seeds</th><th>n</th><th>theirs</th></tr>"]  # fmt: skip
    for row in rows:
        theirs = f"{row['paper'][0]:g} / {row['paper'][1]:g}" if row["paper"] else ""
        difference, interval, p = (text or "" for text in numbers(row))
        cells = [row["source"], "", difference, interval, p, str(len(row["seeds"])), str(row.get("n", "")), theirs]
        drawn = [f"<td>{escape(cell)}</td>" for cell in cells]
        drawn[1] = f"<td class={STYLES[row['verdict']]}>{row['verdict']}</td>"
        drawn[0], drawn[1] = drawn[1], drawn[0]  # the verdict beside the claim, where a phone shows it
        lines.append(
            f"<tr><td>{escape(row['claim'])}<br><small class=note>{escape(row['why'])}</small></td>{''.join(drawn)}</tr>"
        )
    return [*lines, "</table></div>"]


def _explored(rows: list[dict[str, Any]]) -> list[str]:
    measured = [row for row in rows if "missing" not in row]
    if not measured:
        return []
    lines = [(row["claim"], *numbers(row), len(row["seeds"]), row["n"]) for row in measured]
    return [
        "<h2>X-Former minus Q-Former by type of GQA, and controls</h2>",
        page.plain_table(["difference", "95% interval", "p (Holm)", "seeds", "n"], lines),
        "<p class=note>Not predefined, so without verdicts; p is corrected among the types, and among the controls.</p>",
    ]


def _scores(found: Collected, scores: dict[str, Any], main: list[str], beside: Path) -> list[str]:
    names: list[str] = list(dict.fromkeys(name for each in scores.values() for name in each))
    rows = [
        (
            charts.name_of(s),
            seeds_of(each) or "",
            *[(spread(each.get(name)) or "").replace("+-", "±") for name in names],
        )
        for s, each in scores.items()
    ]
    body = ["<h2>Scores</h2>", page.plain_table(["seeds", *[TITLES.get(name, name) for name in names]], rows)]
    body.append("<p class=note>Mean over seeds; the interval (95%) is over seeds only.</p><div class=figures>")
    sets = {TITLES[b]: {v: scores[v][b] for v in main if b in scores[v]} for b in ("vqav2", "gqa", "oc") if b in names}
    if any(sets.values()):
        png = charts.grouped_bars(sets, main, beside / "figure2.png")
        body.append(page.figure(png, "As in the paper's Figure 2: the bridges on three question sets"))
    parts = {part for r in found.results for part in r["scores"].get("gqa", {}).get("parts", {})}
    split = [sorted({part.split("/")[i] for part in parts if "/" in part}) for i in (0, 1)]
    split = split if any(split) else [sorted(parts), []]
    wide: list[str] = []
    for kind, chosen in (("structural", split[0]), ("semantic", split[1])):
        if values := charts.by_part(found.results, "gqa", chosen, main):
            png = charts.grouped_bars(values, main, beside / f"figure5-{kind}.png")
            named = {v: {kind: {part: each[v]["mean"] for part, each in values.items() if v in each}} for v in main}
            drawn = {charts.name_of(v): each for v, each in named.items()}
            colours = [charts.colour_of(v, main) for v in named]
            wide.append(page.bars(drawn, kind, f"As in Figure 5: GQA by {kind} type", colours))
            wide.append(page.figure(png, f"The same with 95% intervals over seeds: GQA by {kind} type"))
    for benchmark, title in (("vqav2", "VQAv2 by answer type"), ("oc", "Object counting by the true count")):
        chosen = sorted({part for r in found.results for part in r["scores"].get(benchmark, {}).get("parts", {})})
        if values := charts.by_part(found.results, benchmark, chosen, main):
            body.append(page.figure(charts.grouped_bars(values, main, beside / f"{benchmark}.png"), title))
    return [*body, "</div>", *wide]


def _curves(found: Collected, main: list[str], beside: Path) -> list[str]:
    body = ["<h2>Learning curves</h2><p class=note>Lines: training, mean and range over seeds; dots: the validation split; "
            "dashes: the constant predictor of ITM.</p><div class=figures>"]  # fmt: skip
    for title, (stage, loss) in charts.LOSSES.items():
        file = beside / f"curve-{stage}-{loss}.png"
        if png := charts.learning_curve(found.results, main, stage, loss, title, file):
            body.append(page.figure(png, title))
    return [*body, "</div>"]


def _answers(found: Collected, main: list[str]) -> list[str]:
    body = []
    for benchmark in ("vqav2", "oc"):
        rows = []
        for row in found.answers.get(benchmark, []):
            kept = [name for name in main if name in row["answers"]]
            rows.append(row | {key: {charts.name_of(n): row[key][n] for n in kept} for key in ("answers", "scores")})
        chosen = page.by_disagreement(rows)[:CARDS] if rows else []
        if chosen:
            uris = page.thumbnail_uris({str(row["image_id"]) for row in chosen}, found.pictures)
            title = f"As in Figure 6: where the answers differ most, {TITLES[benchmark]}"
            body += [f"<h2>{title}</h2><p class=note>Chosen for disagreement, no picture of the average; right answers are "
                     "green. The first seed.</p><div class=cards>"]  # fmt: skip
            body += [*[page.card(row, uris.get(str(row["image_id"]))) for row in chosen], "</div>"]
    return body


def _pictures(found: Collected, beside: Path) -> list[str]:
    """Reconstructions of the first X-Former run that was masked, where its folder and the store are here."""
    run = next((f for (v, _), f in sorted(found.stage1.items()) if v == "xformer"), None)
    if run is None or found.store is None:
        return []
    from xformer import pictures

    try:
        rebuilt = pictures.rebuild(run, found.store, 5)
    except (UserError, AssertionError) as error:
        return [
            f"<h2>Reconstructions</h2><p class=note>not drawn: {escape(str(error) or 'this run has no decoder')}</p>"
        ]
    file = beside / "reconstructions.png"
    pictures.reconstructions(rebuilt, file)
    rows = [(name, f"{value:.4f}") for name, value in rebuilt["errors"].items()]
    return [
        "<h2>Reconstructions</h2>", page.figure(file.read_bytes(), f"Validation images, {run.name}: what M and M' rebuild"),
        page.plain_table(["masked MSE"], rows), f"<p class=note>over {rebuilt['n']} validation images</p>",
    ]  # fmt: skip


def _similarity(found: Collected, main: list[str], beside: Path) -> list[str]:
    body = []
    for variant in main:
        heats = [
            r["scores"]["diversity"] for r in found.results if r["variant"] == variant and "diversity" in r["scores"]
        ]
        if heats:
            cosine, rank = heats[0]["overall"] / 100, heats[0]["effective_rank"]
            caption = f"{charts.name_of(variant)}: cosine {cosine:.2f}, rank {rank:.1f}"
            file = beside / f"similarity-{variant}.png"
            body.append(page.figure(charts.similarity(heats[0]["heat"], charts.name_of(variant), file), caption))
    if not body:
        return []
    note = (
        "Mean cosine between the output queries of an image, first seed; lower = more different. Effective rank below."
    )
    return [f"<h2>Query similarity</h2><p class=note>{note}</p><div class=figures>", *body, "</div>"]


def _cost(found: Collected, beside: Path) -> list[str]:
    cost: dict[str, Any] = found.cost
    if not cost:
        phases = {"stage 1": "stage1_seconds", "stage 2": "stage2_seconds", "evaluation": "evaluation_seconds"}
        cost = {"seconds": {t: sum(r["cost"].get(key, 0.0) for r in found.results) for t, key in phases.items()}}
    rows = [(name, duration(seconds)) for name, seconds in cost["seconds"].items()]
    body = ["<h2>Cost</h2>", page.plain_table(["time"], rows)]
    if text := saving(cost):
        body.append(f"<p>{escape(text)}</p>")
    elif "note" in cost:
        body.append(f"<p class=note>{escape(cost['note'])}</p>")
    return [
        *body,
        page.figure(charts.costs(cost["seconds"], beside / "cost.png"), "Minutes by phase, all runs together"),
    ]


def _settings(found: Collected, variants: list[str]) -> list[str]:
    first = {variant: next(r for r in found.results if r["variant"] == variant) for variant in variants}
    rows = []
    for variant, result in first.items():
        changes = ", ".join(f"{k}={v}" for k, v in result["changes"].items() if k != "model") or "-"
        trained = result["cost"].get("trainable", {})
        counts = " / ".join(f"{trained[s]:,}" if s in trained else "-" for s in ("stage1", "stage2"))
        rows.append((charts.name_of(variant), result["model"], changes, counts))
    made = found.results[0]["made_with"]
    text = json.dumps(made["settings"], indent=1)
    known: dict[str, list[str]] = {}  # every version that some run was made with
    for result in found.results:
        for name, value in (result["versions"] | {"code": str(result["made_with"].get("code", ""))[:12]}).items():
            if value and value not in known.setdefault(name, []):
                known[name].append(value)
    versions = ", ".join(f"{name} {' and '.join(values)}" for name, values in known.items() if values)
    return [
        "<h2>Systems, settings, versions</h2>",
        page.plain_table(["model", "changes", "trained in stage 1 / 2"], rows),
        f"<p class=note>{escape(versions or 'versions are not recorded')}</p>",
        f"<details><summary>All settings of {escape(charts.name_of(variants[0]))}, seed {found.results[0]['seed']}</summary>"
        f"<pre>{escape(text)}</pre></details>",
    ]  # fmt: skip
