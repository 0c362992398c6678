"""Score-only mode: anyone's predictions, without a model and without torch; every bad file is one sentence and no score."""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli import main

CAPTIONS = {
    "images": [{"id": 1, "domain": "in-domain"}, {"id": 2, "domain": "out-domain"}],
    "annotations": [
        {"image_id": i, "caption": text}
        for i, texts in ((1, ["a red dog runs", "the dog is red"]), (2, ["two cats on a mat", "cats sit on mats"]))
        for text in texts
    ],
}
KINDS = {"mci": ("Yes.", "No."), "oc": ("1", "3")}
RIGHT = {"vqav2": ["yes", "2"], "okvqa": ["yes", "2"], "gqa": ["yes", "red"], "oc": ["1", "3"], "mci": ["Yes.", "No."]}


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def truth(folder: Path, benchmark: str) -> list[str]:
    """Two questions of a benchmark in its own format, as command-line options."""
    if benchmark in ("vqav2", "okvqa"):
        questions = [{"question_id": i, "image_id": i, "question": "?"} for i in (1, 2)]
        rows = [
            {"question_id": i, "image_id": i, "answer_type": "other", "question_type": "one",
             "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]}
            for i, a in ((1, "yes"), (2, "2"))
        ]  # fmt: skip
        q = write(folder / "q.json", {"questions": questions})
        return ["--questions", q, "--annotations", write(folder / "a.json", {"annotations": rows})]
    if benchmark == "gqa":
        types = {"structural": "verify", "semantic": "obj", "detailed": "exist"}
        row = {
            "question": "?",
            "imageId": "n1",
            "isBalanced": True,
            "types": types,
            "groups": {"global": None},
            "entailed": [],
        }
        return ["--questions", write(folder / "q.json", {"1": row | {"answer": "yes"}, "2": row | {"answer": "red"}})]
    if benchmark in KINDS:
        rows = [
            {"image_id": i, "text_in": "?", "text_out": t, "n_obj_exist": 3} for i, t in enumerate(KINDS[benchmark])
        ]
        return ["--questions", write(folder / "q.json", rows)]
    return ["--annotations", write(folder / "a.json", CAPTIONS)]


def results(benchmark: str, answers: list[Any]) -> list[dict]:
    """The same in the results format of a benchmark."""
    if benchmark == "gqa":
        return [{"questionId": str(i + 1), "prediction": a} for i, a in enumerate(answers)]
    first = 0 if benchmark in KINDS else 1
    return [{"question_id": i + first, "answer": a} for i, a in enumerate(answers)]


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["eval", *arguments])
    assert caught.value.code not in (0, None)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("benchmark", list(RIGHT))
def test_every_benchmark_scores_a_results_file(benchmark: str, tmp_path: Path) -> None:
    given = write(tmp_path / "r.json", results(benchmark, [RIGHT[benchmark][0], "something else"]))
    out = tmp_path / "out"
    main(["eval", benchmark, *truth(tmp_path, benchmark), "--results", given, "--out", str(out)])
    scores = json.loads((out / "scores.json").read_text())
    for found in scores["scores"][given].values():
        assert found["overall"] == 50.0 and len(found["interval"]) == 2
    assert "constant answer" in scores["scores"] and "not measured here" in scores["paper"]["note"]
    assert json.loads((out / "results.json").read_text()) == results(benchmark, [RIGHT[benchmark][0], "something else"])
    main(["eval", benchmark, *truth(tmp_path, benchmark), "--results", str(out / "results.json"), "--out", str(out)])


@pytest.mark.parametrize("benchmark", list(RIGHT))
def test_wrong_answers_get_no_score(benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options, good = truth(tmp_path, benchmark), results(benchmark, RIGHT[benchmark])
    key, value = next(iter(good[0])), list(good[0])[1]
    cases = {
        "1 of 2 questions have no answer": good[:1],
        "1 answers belong to no question (first: 77)": [*good, good[0] | {key: 77}],
        "1 questions are answered more than once": [*good, good[0]],
        f"the {value} of {key}": [good[0], good[1] | {value: 5}],
        "holds no answers": [],
        "in the format of captions": [{"image_id": 1, "caption": "a"}],
        "must be a list of objects": {"answers": good},
        "in the format of retrieval": {"image_to_text": {}, "text_to_image": {}},
        "neither a number nor text": [good[0] | {key: None}, good[1]],
    }
    for words, content in cases.items():
        given = write(tmp_path / "r.json", content)
        assert words in fails(capsys, benchmark, *options, "--results", given, "--out", str(tmp_path / "out")), words
    assert not (tmp_path / "out").exists()


def test_wrong_files_get_no_score(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = truth(tmp_path, "vqav2")
    file = tmp_path / "r.json"
    packed = gzip.compress(json.dumps(results("vqav2", ["yes", "2"])).encode())
    cases = {
        "not a JSON file: it is not UTF-8": b"\x89PNG\r\n\x1a\n",
        "not valid JSON": b"question_id,answer\n1,yes\n",
        "nested too deep": b"[" * 200_000,
        "a damaged gzip file": packed[:40],
    }
    for words, content in cases.items():
        file.write_bytes(content)
        assert words in fails(capsys, "vqav2", *options, "--results", str(file), "--out", str(tmp_path / "out")), words
    assert "no such file" in fails(capsys, "vqav2", *options, "--results", str(tmp_path / "none.json"))
    assert "no such file" in fails(capsys, "vqav2", *options, "--results", str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_wrong_truths_get_no_score(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = truth(tmp_path, "vqav2")
    given = ["--results", write(tmp_path / "r.json", results("vqav2", ["yes", "2"])), "--out", str(tmp_path / "out")]
    rows = json.loads(Path(options[3]).read_text())["annotations"]
    for words, changed in (
        ("question 1 needs ten answers", [rows[0] | {"answers": rows[0]["answers"][:9]}, rows[1]]),
        ("question 2 needs ten answers", [rows[0], rows[1] | {"answers": []}]),
        ("question 1 needs ten answers", [rows[0] | {"answers": [{"answer": 3}] * 10}, rows[1]]),
        ("answers is missing", [{k: v for k, v in rows[0].items() if k != "answers"}, rows[1]]),
        ("do not hold the same questions", rows[:1]),
        ("1 question ids stand twice", [*rows, rows[0]]),
    ):
        write(tmp_path / "a.json", {"annotations": changed})
        assert words in fails(capsys, "vqav2", *options, *given), words
    write(tmp_path / "a.json", {"annotations": rows})
    assert "questions is missing" in fails(capsys, "vqav2", "--questions", options[3], *options[2:], *given)
    assert "give its --annotations" in fails(capsys, "vqav2", *options[:2], *given)
    assert "not in GQA's format" in fails(capsys, "gqa", *options[:2], *given)
    assert "not in GVTBench's" in fails(capsys, "oc", *options[:2], *given)
    assert "images is missing" in fails(capsys, "coco-caption", "--annotations", options[3], *given)
    assert "lavis" in fails(capsys, "vqav2", *options, *given, "--scorer", "strict")
    assert not (tmp_path / "out").exists()


def test_byte_order_marks_and_gzip_are_read(tmp_path: Path) -> None:
    options = truth(tmp_path, "vqav2")
    content = json.dumps(results("vqav2", ["yes", "2"]))
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + content.encode())
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + content.encode()))
    for name in ("bom.json", "packed.json.gz"):
        out = tmp_path / name.partition(".")[0]
        main(["eval", "vqav2", *options, "--results", str(tmp_path / name), "--out", str(out)])
        scores = json.loads((out / "scores.json").read_text())["scores"][str(tmp_path / name)]
        assert scores["official"]["overall"] == scores["lavis"]["overall"] == 100.0


def test_a_part_is_scored_only_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = write(tmp_path / "r.json", results("vqav2", ["yes"]))
    line = ["vqav2", *truth(tmp_path, "vqav2"), "--results", given, "--out", str(tmp_path / "out")]
    assert "--allow-partial" in fails(capsys, *line)
    main(["eval", *line, "--allow-partial"])
    assert "partial: n=1/2" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/scores.json").read_text())["n"] == 1


def test_two_results_files_are_compared(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours.json", results("vqav2", ["yes", "2"]))
    theirs = write(tmp_path / "theirs.json", results("vqav2", ["yes", "3"]))
    line = ["eval", "vqav2", *truth(tmp_path, "vqav2"), "--results", ours, "--against", theirs, "--scorer", "official"]
    main([*line, "--out", str(tmp_path / "out")])
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["against"]["official"]["difference"] == 50.0 and set(scores["scores"][ours]) == {"official"}
    assert (scores["against"]["official"]["better"], scores["against"]["official"]["worse"]) == (1, 0)


def test_retrieval_rankings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = truth(tmp_path, "retrieval")
    good = {"image_to_text": {"1": [0, 1, 2, 3], "2": [1, 2, 3, 0]},
            "text_to_image": {"0": ["1", "2"], "1": [1, 2], "2": ["2", "1"], "3": ["1", "2"]}}  # fmt: skip
    given = write(tmp_path / "r.json", good)
    main(["eval", "retrieval", *options, "--results", given, "--out", str(tmp_path / "out")])
    scores = json.loads((tmp_path / "out/scores.json").read_text())["scores"]
    assert scores[given]["image_to_text"]["R@1"] == 50.0 and scores[given]["text_to_image"]["R@1"] == 75.0
    assert scores["chance"]["text_to_image"]["R@1"] == 50.0
    to_text = good["image_to_text"]
    for words, changed in (
        ("1 of 2 queries have no ranking", {"1": to_text["1"]}),
        ("belong to no query", to_text | {"3": [0, 1, 2, 3]}),
        ("at least 4 entries", to_text | {"1": [0, 1]}),
        ("names something twice", to_text | {"1": [0, 0, 1, 2]}),
        ("not in the annotations", to_text | {"1": [0, 1, 2, 9]}),
    ):
        write(tmp_path / "r.json", good | {"image_to_text": changed})
        assert words in fails(capsys, "retrieval", *options, "--results", given, "--out", str(tmp_path / "no"))
    write(tmp_path / "r.json", results("vqav2", ["a"]))
    assert "in the format of VQAv2" in fails(capsys, "retrieval", *options, "--results", given)
    assert "no results file" in fails(capsys, "diversity", "--results", given)


@pytest.mark.parametrize("java", [pytest.param(True, marks=pytest.mark.slow), False])
def test_captions(java: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap.cider.cider", reason="the extra `captions` is not installed")
    import shutil

    if java and not shutil.which("java"):
        pytest.skip("there is no java here")
    if not java:
        monkeypatch.setenv("PATH", str(tmp_path))
    given = write(
        tmp_path / "r.json", [{"image_id": 1, "caption": "A red dog runs."}, {"image_id": 2, "caption": "a dog"}]
    )
    main(["eval", "nocaps", *truth(tmp_path, "nocaps"), "--results", given, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/scores.json").read_text())["scores"][given]["pycocoevalcap"]
    # 4 of 6 words are in the references (`a` in both, 5), and the second caption is 2 words against 4: exp(1 - 8 / 6)
    assert found["metrics"]["BLEU-1"] == pytest.approx(100 * 5 / 6 * 0.7165, abs=0.01)
    assert ("PTB" in found["tokeniser"]) is java and isinstance(found["metrics"]["METEOR"], float) is java
    assert (
        set(found["per_domain"]) == {"in-domain", "out-domain", "entire"}
        and "not available" in found["metrics"]["SPICE"]
    )
    assert java or found["tokeniser_reason"] == "java is not on the PATH"


def test_captions_without_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    given = write(tmp_path / "r.json", [{"image_id": i, "caption": "a"} for i in (1, 2)])
    sentence = fails(capsys, "coco-caption", *truth(tmp_path, "coco-caption"), "--results", given)
    assert "pip install 'xformer-mllm[captions]'" in sentence


def test_scoring_imports_no_torch(tmp_path: Path) -> None:
    """Every benchmark that can be scored from a results file, in one fresh process."""
    lines = []
    rankings = {"image_to_text": {"1": [0, 1, 2, 3], "2": [1, 2, 3, 0]},
                "text_to_image": {str(i): ["1", "2"] for i in range(4)}}  # fmt: skip
    given: dict[str, Any] = {name: results(name, answers) for name, answers in RIGHT.items()}
    given |= {"retrieval": rankings, "coco-caption": [{"image_id": i, "caption": "a dog"} for i in (1, 2)]}
    for name, content in given.items():
        folder = tmp_path / name
        folder.mkdir()
        file = write(folder / "r.json", content)
        if name != "coco-caption" or importlib.util.find_spec("pycocoevalcap"):
            lines.append(["eval", name, *truth(folder, name), "--results", file, "--out", str(folder / "out")])
    code = f"""import os, sys
os.environ["PATH"] = ""  # without Java, which takes long to start
from cli import main
for line in {lines!r}:
    main([*line, "--quiet"])
print([m for m in ("torch", "zarr", "transformers", "timm", "accelerate") if m in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all((tmp_path / line[1] / "out/scores.json").is_file() for line in lines)


def test_files_that_a_benchmark_does_not_read_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = truth(tmp_path, "oc")
    given = ["--results", write(tmp_path / "r.json", results("oc", RIGHT["oc"]))]
    assert "oc reads --questions" in fails(capsys, "oc", *options, "--annotations", options[1], *given)
    assert "reads --annotations" in fails(capsys, "coco-caption", *options, *given)
    assert "diversity reads no file" in fails(capsys, "diversity", *options)
    assert "only one scorer" in fails(capsys, "retrieval", "--scorer", "official")


def test_a_limit_scores_the_first_questions(tmp_path: Path) -> None:
    given = write(tmp_path / "r.json", results("vqav2", ["yes", "wrong"]))
    line = ["eval", "vqav2", *truth(tmp_path, "vqav2"), "--results", given, "--limit", "1"]
    main([*line, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/scores.json").read_text())
    assert (found["n"], found["of"], found["scores"][given]["official"]["overall"]) == (1, 2, 100.0)


def test_gqa_without_a_balanced_question(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = truth(tmp_path, "gqa")
    rows = {key: row | {"isBalanced": False} for key, row in json.loads(Path(options[1]).read_text()).items()}
    write(tmp_path / "q.json", rows)
    given = write(tmp_path / "r.json", results("gqa", RIGHT["gqa"]))
    assert "no balanced question" in fails(capsys, "gqa", *options, "--results", given, "--out", str(tmp_path / "out"))


def test_the_page_escapes_what_is_not_ours(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    options = truth(tmp_path, "vqav2")
    given = write(tmp_path / 'r"><img src=x>.json', results("vqav2", [attack, '"><img src=x onerror=alert(2)>']))
    main(["eval", "vqav2", *options, "--results", given, "--out", str(tmp_path / "out")])
    page = (tmp_path / "out/page.html").read_text()
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert "default-src 'none'" in page and "http://" not in page and "https://" not in page


def test_the_page_sorts_by_disagreement_of_the_models() -> None:
    from xformer.evaluation.page import by_disagreement

    def row(name: str, ours: float, theirs: float, baseline: float) -> dict:
        scores = {"constant answer": baseline, "a with shuffled images": baseline, "a": ours, "b": theirs}
        return {"question": name, "scores": scores, "answers": {k: str(v) for k, v in scores.items()}}

    rows = [row("agree", 1, 1, 0), row("differ", 0, 1, 1), row("half", 0.6, 1, 0), row("wrong", 0, 0, 1)]
    assert [r["question"] for r in by_disagreement(rows)] == ["differ", "half", "agree", "wrong"]
