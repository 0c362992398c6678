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
from xformer.lab import charts
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
                    "cost": {"stage1_seconds": 60.0, "stage2_seconds": 9.0, "evaluation_seconds": 9.0,
                             "stage1_run": f"{variant}-seed{seed}-stage1"},
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
    made = {file.name for file in (tmp_path / "report-files").iterdir()}
    assert {"claims.csv", "scores.csv", "claims.png", "figure2.png", "curve-stage1-itc.png", "cost.png"} <= made
    rows = list(csv.DictReader((tmp_path / "report-files/claims.csv").open()))
    first = next(row for row in rows if row["benchmark"] == "vqav2" and row["better"] == "xformer")
    assert first["verdict"] == "holds" and float(first["difference"]) > 10
    assert html.count("data:image/png") >= len(list((tmp_path / "report-files").glob("*.png")))
    assert "GQA query (structural)" in html and "Not predefined, so without verdicts" in html
    assert "the interval lies above 0, corrected p" in html  # why stands in the page, not in a hover


def test_a_report_is_made_of_committed_results_too(tmp_path: Path) -> None:
    folder = written(tmp_path / "lab", seeds=1)
    report([folder / "results"], tmp_path / "page.html")
    assert "1 of the 5 seeds" in (tmp_path / "page.html").read_text()
    with pytest.raises(EvaluationError, match="stands twice"):
        report([folder, folder / "results"], tmp_path / "page.html")
    with pytest.raises(EvaluationError, match="holds no finished run"):
        report([tmp_path / "report"] if (tmp_path / "report").mkdir() is None else [], tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


def test_runs_that_were_not_made_alike_are_refused_by_name(tmp_path: Path) -> None:
    folder = written(tmp_path / "lab", seeds=2)
    file = folder / "results/qformer-seed1.json"
    content = json.loads(file.read_text())

    def with_made(made: dict, **more) -> None:
        write_result(file, {k: v for k, v in content.items() if k != "format"} | {"made_with": made} | more)

    made = content["made_with"]
    other = made["settings"] | {"stage1": {"lr": 0.5}, "seed": 1}
    with_made(made | {"code": "f" * 64})
    with pytest.raises(
        EvaluationError, match=r"concat-seed0.json and .*qformer-seed1.json.*code is cccccccccccc in the f"
    ):
        report([folder], tmp_path / "report.html")
    with_made(made | {"settings": made["settings"] | {"note": "other"}})
    with pytest.raises(
        EvaluationError, match=r"settings.note is '<script>alert\(1\)</script>' .*'other' in the second"
    ):
        report([folder], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    with_made(made | {"settings": other}, changes={"stage1.lr": 0.5, "model": "qformer"}, versions={"torch": "1.0"})
    report([folder], tmp_path / "report.html")  # what a variant changes may differ, and versions are all shown
    assert "torch 2.x and 1.0" in (tmp_path / "report.html").read_text()
    write_result(file, {k: v for k, v in content.items() if k not in ("format", "made_with")})
    with pytest.raises(EvaluationError, match=r"qformer-seed1.json: does not say what it was made with"):
        report([folder], tmp_path / "report.html")


def test_the_cost_is_that_of_all_runs_of_the_folder(tmp_path: Path) -> None:
    found = collect([written(tmp_path / "lab", seeds=2)])
    assert found.cost["runs"] == 8 and found.cost["seconds"]["stage 1"] == 8 * 60
    assert "encoding is not counted" in found.cost["note"]


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
    assert " / " in html and "trained in stage 1 / 2" in html
    assert "As in Figure 6" in html and html.count("class=card>") == 6 and "masked MSE" in html
    assert (tmp_path / "report-files/reconstructions.png").stat().st_size > 5000


def test_runs_are_found_from_any_folder_and_never_another_folders(
    stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = tmp_path / "a/demo"
    shutil.copytree(stage2, demo / "runs/xformer-stage2")
    about = json.loads((demo / "runs/xformer-stage2/settings.json").read_text())
    for file, content in {
        "runs/xformer-stage2/settings.json": about | {"init": "demo/runs/none", "features": ["demo/store.zarr"]},
        "eval/xformer-oc/scores.json": {
            "benchmark": "oc", "checkpoint": "demo/runs/xformer-stage2", "seconds": {"a": 1.0},
            "scores": {"xformer": {"official": {"overall": 50.0, "interval": [0, 100]}}},
        },
        "eval/xformer-oc/answers.json": [
            {"question_id": 1, "image_id": 1, "category": "0-2", "question": "?", "truth": "1", "answers": {"xformer": "1"},
             "scores": {"xformer": 1.0}}
        ],
    }.items():  # fmt: skip
        (demo / file).parent.mkdir(parents=True, exist_ok=True)
        (demo / file).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    (result,) = collect([demo]).results
    assert result["scores"]["oc"]["overall"] == 50.0 and result["cost"]["trainable"]["stage2"] > 0
    shutil.copytree(demo / "eval", tmp_path / "b/c/eval")
    monkeypatch.chdir(tmp_path / "a")  # here a folder demo lies by chance
    with pytest.raises(EvaluationError, match=r"scores the run demo/runs/xformer-stage2, which does not lie in"):
        collect([tmp_path / "b/c"])


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(width: int, tmp_path: Path) -> None:
    report([written(tmp_path / "lab", seeds=2)], tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    # A page forbids scripts; the copy that is measured tells the frame around it how wide its content is. Headless Chromium
    # is never narrower than 500 pixels, but a frame is.
    measure = "<script>onload=()=>parent.postMessage([document.documentElement.scrollWidth,document.images.length," \
              "[...document.images].filter(i=>!i.naturalWidth).length].join(' '),'*')</script>"  # fmt: skip
    inner, frame = tmp_path / "inner.html", tmp_path / "measured.html"
    inner.write_text(
        re.sub(r"<meta http-equiv=Content-Security-Policy[^>]*>", "", source).replace("</body>", measure + "</body>")
    )
    frame.write_text(
        f"<script>onmessage=e=>document.title=e.data</script><iframe src={inner.name} width={width} height=900 "
        "style='border:0'></iframe>"
    )
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000", "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=240)
    shown = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert shown is not None, done.stderr[-500:]
    content, images, broken = map(int, shown.groups())
    assert images >= 8 and broken == 0
    assert content <= width


def test_bars_and_their_intervals_stay_where_accuracies_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(charts, "_saved", lambda figure, file: drawn.append(figure.axes[0]) or b"")
    charts.grouped_bars({"oc": {"xformer": {"mean": 40.0, "half": 20.0}}}, ["xformer"], tmp_path / "a.png")
    charts.grouped_bars({"oc": {"xformer": {"mean": 40.0, "half": 300.0}}}, ["xformer"], tmp_path / "b.png")
    assert drawn[0].get_ylim()[1] > 60 and not drawn[0].get_xlabel()
    assert 100 < drawn[1].get_ylim()[1] < 110 and "cut at 0 and 100" in drawn[1].get_xlabel()
