"""Scoring rules to the letter, refusals, and one path for cached features and for pictures."""

import json
from pathlib import Path

import pytest

from cli import main
from xformer.errors import EvaluationError
from xformer.evaluation import counting, vqa
from xformer.evaluation.run import evaluate


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a red, white dog.", "a red white dog"),
        ("1,000 people!", "1000 people"),
        ("left/right", "left right"),
        ("3.5", "3.5"),
        ("what ?", "what "),
        ("." * 40, "." * 8),
    ],
)
def test_punctuation(text: str, want: str) -> None:
    assert vqa.strip_punctuation(text) == want


def test_words() -> None:
    assert vqa.normalise_words("The two dogs dont see A cat") == "2 dogs don't see cat"
    assert vqa.normalise_words("somebody'd id've wouldnt've") == "somebodyd id've wouldn't've"
    assert len(vqa.CONTRACTIONS) == 120


def test_a_question_scores_by_the_other_nine() -> None:
    for matches, want in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        answers = ["yes"] * matches + [f"other{i}" for i in range(10 - matches)]
        assert vqa.score_question("yes", answers, "official") == pytest.approx(want)


def test_the_two_scorers_differ_where_the_truth_says_so() -> None:
    same = ["two"] * 10  # official normalises neither side here, lavis the prediction only
    assert vqa.score_question("two", same, "official") == 1.0 and vqa.score_question("two", same, "lavis") == 0.0
    mixed = ["two"] * 9 + ["3"]
    assert vqa.score_question("2", mixed, "official") == 1.0 and vqa.score_question("2", mixed, "lavis") == 0.0


def truths() -> list[dict]:
    rows = []
    for i, (kind, answer) in enumerate([("number", "2"), ("yes/no", "yes"), ("yes/no", "no"), ("other", "red")]):
        rows.append(
            {
                "question_id": i, "image_id": 1, "question_type": "x", "answer_type": kind,
                "multiple_choice_answer": answer, "answers": [{"answer": answer}] * 10,
            }
        )  # fmt: skip
    return rows


def test_scores_per_type_and_refusals() -> None:
    given = [{"question_id": i, "answer": a} for i, a in enumerate(["2", "yes", "yes", "blue"])]
    found = vqa.score(given, truths(), "official")
    assert found["overall"] == 50.0 and found["per_answer_type"] == {"number": 100.0, "other": 0.0, "yes/no": 50.0}
    for wrong, words in (
        (given[:3], "1 of 4 questions have no answer"),
        ([*given, given[0]], "more than once"),
        ([*given, {"question_id": 9, "answer": ""}], "belong to no question"),
    ):
        with pytest.raises(EvaluationError, match=words):
            vqa.score(wrong, truths(), "official")


def test_counting_rules() -> None:
    assert [counting.count_official(t) for t in ("two dogs", "Two", "someone 3", "none", "12 or 13", "")] == [
        2,
        0,
        1,
        0,
        12,
        0,
    ]
    assert [counting.count_strict(t) for t in ("two dogs", "Two", "someone 3", "", "12")] == [2, 2, 3, None, 12]
    rows = [{"text_out": t, "n_obj_exist": n} for t, n in (("4", 5), ("1", 12), ("2", 30))]
    found = counting.score_oc(["4", "3", "two"], rows, counting.count_official)
    assert (found["overall"], found["mae"], found["per_count"]) == (66.67, 0.6667, {"0-2": 50.0, "3-5": 100.0})
    truth = [{"text_out": t, "n_obj_exist": n} for t, n in (("Yes.", 5), ("No.", 12), ("No.", 30))]
    answers = ["Yes, it is", "I do not know", "yes"]
    assert counting.score_mci(answers, truth, counting.yes_official)["overall"] == 66.67
    assert counting.score_mci(answers, truth, counting.yes_strict)["overall"] == 33.33


def test_results_files_are_scored_without_a_model(tmp_path: Path) -> None:
    rows = truths()
    (tmp_path / "q.json").write_text(
        json.dumps({"questions": [{"question_id": r["question_id"], "image_id": 1, "question": "?"} for r in rows]})
    )
    (tmp_path / "a.json").write_text(json.dumps({"annotations": rows}))
    part = [{"question_id": i, "answer": r["multiple_choice_answer"]} for i, r in enumerate(rows)][:3]
    (tmp_path / "r.json").write_text(json.dumps(part))
    files = tmp_path / "q.json", tmp_path / "a.json", tmp_path / "r.json"
    with pytest.raises(EvaluationError, match="1 of 4"):
        evaluate("vqav2", tmp_path, tmp_path, *files, tmp_path / "out", [])
    assert not (tmp_path / "out").exists()
    found = evaluate("vqav2", tmp_path, tmp_path, *files, tmp_path / "out", [], allow_partial=True)
    assert found["n"] == 3 and found["scores"][str(files[2])]["official"]["overall"] == 100.0


def test_answers_from_features_and_from_pictures_are_the_same(
    features: Path, corpus: Path, stage2: Path, tmp_path: Path
) -> None:
    val = corpus / "val"
    common = ["eval", "vqav2", "--checkpoint", str(stage2), "--questions", str(val / "vqa_questions.json"),
              "--annotations", str(val / "vqa_annotations.json"), "--no-blind", "--quiet"]  # fmt: skip
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
    assert evaluate("oc", stage2, features, file, None, None, tmp_path / "ok", [])["n"] == 1
    with pytest.raises(EvaluationError, match="first: 7777777"):
        evaluate("oc", stage2, features, missing, None, None, tmp_path / "no", [])
    assert not (tmp_path / "no").exists()
