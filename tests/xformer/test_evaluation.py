"""Answers of a model: one path for cached features and for pictures, baselines, interruption, two runs compared."""

import json
from pathlib import Path

import pytest

from cli import main
from xformer.errors import EvaluationError
from xformer.evaluation.run import Request, evaluate
from xformer.evaluation.suite import Files


def test_answers_from_features_and_from_pictures_are_the_same(
    features: Path, corpus: Path, stage2: Path, tmp_path: Path
) -> None:
    val = corpus / "val"
    common = ["eval", "vqav2", "--checkpoint", str(stage2), "--questions", str(val / "vqa_questions.json"),
              "--annotations", str(val / "vqa_annotations.json"), "--no-blind", "--no-shuffled", "--quiet"]  # fmt: skip
    main([*common, "--features", str(features), "--out", str(tmp_path / "a")])
    main([*common, "--images", str(val / "images"), "--out", str(tmp_path / "b")])
    first, second = (json.loads((tmp_path / n / "results.json").read_text()) for n in "ab")
    assert len(first) > 100
    agree = sum(a["answer"] == b["answer"] for a, b in zip(first, second, strict=True))
    assert agree / len(first) > 0.98  # other batch sizes in the encoder move a feature's last bit
    scores = json.loads((tmp_path / "a/scores.json").read_text())
    assert set(scores["scores"]) == {"constant answer", "xformer"} and scores["n"] == len(first)
    assert set(scores["scores"]["xformer"]) == {"official", "lavis"}


def test_a_question_about_an_image_that_is_not_there(features: Path, stage2: Path, tmp_path: Path) -> None:
    file = tmp_path / "oc.json"
    file.write_text(json.dumps([{"image_id": 77, "text_in": "How many?", "text_out": "1", "n_obj_exist": 1}]))
    missing = tmp_path / "missing.json"
    missing.write_text(json.dumps([{"image_id": 7777777, "text_in": "How many?", "text_out": "1", "n_obj_exist": 1}]))
    common = {"benchmark": "oc", "checkpoint": stage2, "blind": False, "shuffled": False}
    found = evaluate(Request(out=tmp_path / "ok", files=Files(file), **common), lambda *_: features)
    assert found["n"] == 1
    with pytest.raises(EvaluationError, match="first: 7777777"):
        evaluate(Request(out=tmp_path / "no", files=Files(missing), **common), lambda *_: features)
    assert not (tmp_path / "no").exists()
