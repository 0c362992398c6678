"""The report: one page that needs nothing else, from an ablation, from committed JSONs, or from single runs."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cli import main
from xformer.errors import EvaluationError
from xformer.lab.collect import collect
from xformer.lab.report import report
from xformer.lab.results import pack, write_result

PARTS = {"vqav2": ("yes/no", "number", "other"), "gqa": ("query/attr", "verify/obj"), "oc": ("0-2", "3-5")}


def written(folder: Path, seeds: int = 5) -> Path:
    """Results of four systems, of which one is clearly better, without any run."""
    for number, (variant, level) in enumerate({"qformer": 0.5, "concat": 0.5, "early": 0.5, "xformer": 0.65}.items()):
        for seed in range(seeds):
            rng = np.random.default_rng([number, seed])
            scores = {}
            for benchmark, parts in PARTS.items():
                each = {part: (rng.random(400) < level).astype(float) for part in parts}
                overall = round(100 * float(np.mean(list(each.values()))), 2)
                packed = {part: pack(values.tolist()) for part, values in each.items()}
                scores[benchmark] = {"overall": overall, "interval": [0, 1], "n": 400 * len(parts), "parts": packed}
            heat = np.eye(8).tolist()
            scores["diversity"] = {"overall": 9.0, "interval": [8, 10], "n": 20, "heat": heat, "effective_rank": 6.0,
                                   "parts": {"all": pack(rng.normal(0.1, 0.01, 20).tolist())}}  # fmt: skip
            train = {"step": [1, 2, 3], "itc": [3.0, 2.0, 1.0 + rng.random()], "itm": [0.64, 0.6, 0.5]}
            write_result(
                folder / "results" / f"{variant}-seed{seed}.json",
                {
                    "variant": variant, "seed": seed, "model": variant, "changes": {"model": variant}, "scores": scores,
                    "losses": {}, "versions": {"torch": "2.x"},
                    "curves": {"stage1": {"train": train, "validate": {"step": []}}},
                    "cost": {"stage1_seconds": 60.0, "stage2_seconds": 9.0, "evaluation_seconds": 9.0, "stage1_run": ""},
                    "made_with": {"settings": {"note": "<script>alert(1)</script>"}, "code": "c" * 64},
                },
            )  # fmt: skip
    return folder


def test_the_page_holds_claims_charts_costs_and_settings(tmp_path: Path) -> None:
    main(["report", str(written(tmp_path / "lab")), "--out", str(tmp_path / "report.html"), "--quiet"])
    html = (tmp_path / "report.html").read_text()
    assert "class=holds" in html and "X-Former above the Q-Former on VQAv2" in html and "51.3 / 49.9" in html
    for heading in (
        "Claims",
        "Scores",
        "As in Figure 5: GQA by structural type",
        "Learning curves",
        "Query similarity",
        "Cost",
    ):
        assert f"<h2>{heading}</h2>" in html
    assert "<script" not in html and "&lt;script&gt;" in html and not re.search(r'(src|href)="(?!data:)', html)
    assert "width=device-width" in html and "not run: wide-qformer" in html
    made = {file.name for file in (tmp_path / "report").iterdir()}
    assert {"claims.csv", "scores.csv", "claims.png", "figure2.png", "curve-stage1-itc.png", "cost.png"} <= made
    rows = list(csv.DictReader((tmp_path / "report/claims.csv").open()))
    first = next(row for row in rows if row["benchmark"] == "vqav2" and row["better"] == "xformer")
    assert first["verdict"] == "holds" and float(first["difference"]) > 10
    assert (
        html.count("data:image/png") >= len(list((tmp_path / "report").glob("*.png"))) - 2
    )  # figure 5 is drawn in HTML


def test_a_report_is_made_of_committed_results_too(tmp_path: Path) -> None:
    folder = written(tmp_path / "lab", seeds=1)
    report([folder / "results"], tmp_path / "page.html")
    assert "1 of the 5 seeds" in (tmp_path / "page.html").read_text()
    with pytest.raises(EvaluationError, match="stands twice"):
        report([folder, folder / "results"], tmp_path / "page.html")
    with pytest.raises(EvaluationError, match="holds no finished run"):
        report([tmp_path / "report"] if (tmp_path / "report").mkdir() is None else [], tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


def test_runs_that_eval_scored_are_reported_with_pictures(
    features: Path, corpus: Path, stage2: Path, tmp_path: Path
) -> None:
    val, out = corpus / "val", tmp_path / "demo" / "eval" / "xformer-oc"
    main(["eval", "oc", "--checkpoint", str(stage2), "--features", str(features), "--questions",
          str(val / "gvtbench_oc.json"), "--limit", "6", "--no-shuffled", "--out", str(out), "--quiet"])  # fmt: skip
    shutil.copytree(val / "images", tmp_path / "demo/shapes/val/images")
    found = collect([tmp_path / "demo"])
    (result,) = found.results
    assert result["variant"] == "xformer" and result["scores"]["oc"]["n"] == 6 and "blind LLM" in found.systems
    scores = json.loads((out / "scores.json").read_text())["scores"]["xformer"]["official"]
    assert result["scores"]["oc"]["overall"] == scores["overall"]
    report([tmp_path / "demo"], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "As in Figure 6" in html and html.count("class=card>") == 6 and "masked MSE" in html
    assert (tmp_path / "report/reconstructions.png").stat().st_size > 5000


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(width: int, tmp_path: Path) -> None:
    report([written(tmp_path / "lab", seeds=2)], tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    # A page forbids scripts; the copy that is measured says how wide its content is in its title.
    measure = "<script>onload=()=>{document.title=[document.documentElement.scrollWidth,document.images.length," \
              "[...document.images].filter(i=>!i.naturalWidth).length].join(' ')}</script>"  # fmt: skip
    frame = tmp_path / "measured.html"
    frame.write_text(
        re.sub(r"<meta http-equiv=Content-Security-Policy[^>]*>", "", source).replace("</body>", measure + "</body>")
    )
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=240)
    shown = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert shown is not None, done.stderr[-500:]
    content, images, broken = map(int, shown.groups())
    assert images >= 8 and broken == 0
    assert content <= max(width, 500)  # headless Chromium is never narrower than 500 pixels
