"""Real photos and real questions, where they are there."""

import json
from pathlib import Path

import pytest

from cli import main
from tests.conftest import SHARED

COCO = SHARED / "coco_mini"


@pytest.mark.skipif(not COCO.is_dir(), reason="the real photos are not here")
def test_coco_from_photos_to_answers(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = ["--corpus", str(COCO / "captions.json"), "--images", str(COCO / "images"), "--store", "S"]
    main(["extract", "--encoder", "clip", *source, "--json", "clip.json"])
    main(["extract", "--encoder", "mae", "--draws", "2", *source])
    report = json.loads(Path("clip.json").read_text())
    assert (report["images"], report["captions"], report["dead"]) == (75, 375, [])
    few = [word for override in small for word in ("--set", override)]
    main(["train", "--stage", "1", "--features", "S", "--out", "R1", *few])
    main(["train", "--stage", "2", "--features", "S", "--init", "R1", "--out", "R2", *few])
    given = ["--questions", str(COCO / "vqa_questions.json"), "--annotations", str(COCO / "vqa_annotations.json")]
    main(["eval", "vqav2", "--checkpoint", "R2", "--images", str(COCO / "images"), *given, "--out", "E"])
    assert len(json.loads(Path("E/results.json").read_text())) == 8
    for name in ("oc", "mci"):
        questions = ["--questions", str(COCO / f"gvtbench_coco_{name}.json"), "--limit", "4"]
        main(["eval", name, "--checkpoint", "R2", "--images", str(COCO / "images"), *questions, "--out", name])


@pytest.mark.skipif(not (SHARED / "text/GVTBench").is_dir(), reason="GVTBench is not here")
def test_constants_on_the_whole_of_gvtbench(tmp_path: Path) -> None:
    for name, constant in (("coco_oc", 54.27), ("vcr_oc", 36.17), ("coco_mci", 50.35), ("vcr_mci", 50.42)):
        benchmark = name.partition("_")[2]
        answer = "1" if benchmark == "oc" else "yes" if name == "vcr_mci" else "no"
        given = tmp_path / f"{name}.json"
        given.write_text(json.dumps([{"question_id": i, "answer": answer} for i in range(10_000)]))
        questions = SHARED / "text/GVTBench" / f"{name}.json.gz"
        main(["eval", benchmark, "--results", str(given), "--questions", str(questions), "--out", str(tmp_path / name)])
        scores = json.loads((tmp_path / name / "scores.json").read_text())["scores"]
        assert scores["constant answer"]["official"]["overall"] == constant
        assert scores[str(given)]["strict"]["overall"] in (constant, round(100 - constant, 2))


@pytest.mark.skipif(not (SHARED / "text").is_dir(), reason="the real questions are not here")
def test_made_up_predictions_score_by_both_scorers(tmp_path: Path) -> None:
    """Real questions and answers, predictions from a seed; every question against a second implementation of the rules."""
    from benchmarks.predictions import make_up
    from tests.xformer.test_vqa_rules import score
    from xformer.evaluation import vqav2

    truth = SHARED / "text/vqa2_subset_annotations.json.gz"
    questions = SHARED / "text/vqa2_subset_questions.json.gz"
    given = tmp_path / "made-up.json"
    make_up(truth, given)
    line = ["eval", "vqav2", "--results", str(given), "--questions", str(questions), "--annotations", str(truth)]
    main([*line, "--out", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out/scores.json").read_text())
    assert report["n"] == 8972
    answers = [row["answer"] for row in json.loads(given.read_text())]
    for scorer in ("official", "lavis"):
        pairs = zip(answers, vqav2.load(questions, truth), strict=True)
        plain = [score(answer, row["answers"], scorer) for answer, row in pairs]
        assert report["scores"][str(given)][scorer]["overall"] == pytest.approx(100 * sum(plain) / 8972, abs=0.005)
