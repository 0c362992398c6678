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


def shapes_options(corpus: Path, benchmark: str) -> list[str]:
    val = corpus / "val"
    if benchmark in ("vqav2", "okvqa"):
        return ["--questions", str(val / "vqa_questions.json"), "--annotations", str(val / "vqa_annotations.json")]
    if benchmark == "gqa":
        return ["--questions", str(val / "gqa_questions.json")]
    return ["--annotations", str(val / "captions.json")]


def test_gqa_and_its_baselines(features: Path, corpus: Path, stage2: Path, tmp_path: Path) -> None:
    line = ["eval", "gqa", "--checkpoint", str(stage2), "--features", str(features), *shapes_options(corpus, "gqa")]
    main([*line, "--limit", "9", "--prompt", "Q: {}", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "scores.json").read_text())
    assert list(report["scores"]) == [
        "constant answer", "blind LLM", "LLM given a true caption", "xformer with shuffled images", "xformer",
    ]  # fmt: skip
    assert report["n"] == 9 and report["eval"]["prompt"] == "Q: {}" and report["seconds"]["generation"] > 0
    given = json.loads((tmp_path / "results.json").read_text())
    assert set(given[0]) == {"questionId", "prediction"} and len(given) == 9
    shown = json.loads((tmp_path / "answers.json").read_text())
    assert {row["answers"]["xformer"] for row in shown} == {row["prediction"] for row in given}
    page = (tmp_path / "page.html").read_text()
    assert page.count('<img src="data:image/png') == 9
    assert all(f"By category: {kind}" in page for kind in ("structural", "semantic"))  # the paper's Figure 5


def test_captions_of_a_model(
    features: Path, corpus: Path, stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pycocoevalcap.cider.cider", reason="the extra `captions` is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))  # without Java, whose METEOR takes long to start
    line = ["eval", "coco-caption", "--checkpoint", str(stage2), "--features", str(features), "--limit", "4"]
    main([*line, *shapes_options(corpus, "coco-caption"), "--out", str(tmp_path), "--set", "eval.beams=1"])
    given = json.loads((tmp_path / "results.json").read_text())
    assert set(given[0]) == {"image_id", "caption"} and len(given) == 4
    report = json.loads((tmp_path / "scores.json").read_text())
    assert "LLM given a true caption" not in report["scores"] and report["eval"]["prompt"] == ""
    assert (report["eval"]["min_new_tokens"], report["eval"]["length_penalty"]) == (
        8,
        1.0,
    )  # not those of short answers


def test_a_killed_evaluation_goes_on_and_ends_the_same(
    features: Path, corpus: Path, stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xformer.evaluation import generate

    line = ["eval", "vqav2", "--checkpoint", str(stage2), "--features", str(features), *shapes_options(corpus, "vqav2")]
    line += ["--limit", "40", "--set", "eval.batch=8", "--no-blind", "--no-shuffled"]
    main([*line, "--out", str(tmp_path / "whole")])
    calls: list[int] = []
    complete = generate.complete

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(*arguments)

    monkeypatch.setattr(generate, "complete", killed)
    with pytest.raises(SystemExit) as caught:
        main([*line, "--out", str(tmp_path / "cut")])
    assert caught.value.code == 130 and not (tmp_path / "cut/scores.json").exists()
    (journal,) = (tmp_path / "cut/progress").glob("*.jsonl")
    assert len(journal.read_text().splitlines()) == 16
    content = journal.read_bytes()
    journal.write_bytes(content[:-20])  # as a kill in the middle of a line leaves it: that batch is done again
    main([*line, "--out", str(tmp_path / "cut")])
    assert len(calls) == 3 + 4  # two batches were done, of which one was cut: four of five remain
    whole, cut = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "cut"))
    assert whole == cut
    main([*line, "--out", str(tmp_path / "cut")])
    assert len(calls) == 7  # nothing left to ask
    main([*line, "--prompt", "Another {}", "--out", str(tmp_path / "cut")])
    assert len(calls) == 12  # another prompt shares no answers
    main([*line, "--set", "llm.autocast=bf16", "--out", str(tmp_path / "cut")])
    assert len(calls) == 17  # nor does another precision


def test_two_runs_are_compared(
    features: Path, corpus: Path, stage1: Path, stage2: Path, small: list[str], tmp_path: Path
) -> None:
    from xformer.settings import load_settings
    from xformer.train import train_stage1, train_stage2

    first, second = tmp_path / "q1", tmp_path / "q2"
    train_stage1([features], first, load_settings(overrides=small), "qformer", resume=False)
    train_stage2([features], first, second, load_settings(overrides=small), None, resume=False)
    line = ["--features", str(features), "--limit", "10", "--no-blind", "--no-shuffled"]
    options = shapes_options(corpus, "okvqa")
    main(
        [
            "eval",
            "okvqa",
            *line,
            *options,
            "--checkpoint",
            str(stage2),
            "--against",
            str(second),
            "--out",
            str(tmp_path / "a"),
        ]
    )
    report = json.loads((tmp_path / "a/scores.json").read_text())
    assert {"xformer", "qformer"} <= set(report["scores"]) and report["against"]["official"]["than"] == "qformer"
    assert len(json.loads((tmp_path / "a/results-against.json").read_text())) == 10
    main(
        [
            "eval",
            "diversity",
            *line,
            "--checkpoint",
            str(stage1),
            "--against",
            str(second),
            "--out",
            str(tmp_path / "d"),
        ]
    )
    report = json.loads((tmp_path / "d/scores.json").read_text())
    assert set(report["scores"]) == {"xformer", "qformer"} and report["n"] == 10
    assert len(report["scores"]["xformer"]["heat"]) == 16 and "<svg" in (tmp_path / "d/page.html").read_text()


def test_retrieval_with_a_model(features: Path, corpus: Path, stage1: Path, tmp_path: Path, capsys) -> None:
    line = ["eval", "retrieval", *shapes_options(corpus, "retrieval"), "--limit", "12", "--out", str(tmp_path)]
    main([*line, "--checkpoint", str(stage1), "--features", str(features)])
    report = json.loads((tmp_path / "scores.json").read_text())
    assert list(report["scores"]) == ["chance", "xformer, ITC alone", "xformer with shuffled images", "xformer"]
    again = [
        "eval",
        "retrieval",
        *shapes_options(corpus, "retrieval"),
        "--limit",
        "12",
        "--out",
        str(tmp_path / "again"),
    ]
    main([*again, "--results", str(tmp_path / "results.json")])  # the rankings it wrote score the same
    scored = json.loads((tmp_path / "again/scores.json").read_text())["scores"][str(tmp_path / "results.json")]
    assert scored == report["scores"]["xformer"]


@pytest.mark.parametrize("name", ["xformer", "qformer", "concat", "early"])
def test_matching_is_what_training_scores(name: str) -> None:
    """Every system: one image beside several texts gives the ITM logits of the same pairs one by one."""
    import torch

    from xformer.evaluation.rank import match
    from xformer.model import Stage1, build_xformer
    from xformer.settings import load_settings

    torch.manual_seed(0)
    stage1 = Stage1(build_xformer(load_settings(), name, 60), None, 96, 64, 0, "layerwise", 0.0).eval()
    clip, local = torch.randn(1, 17, 96), None if name == "qformer" else torch.randn(1, 17, 96)
    ids, mask = torch.randint(1, 60, (3, 5)), torch.ones(3, 5, dtype=torch.bool)
    with torch.inference_mode():
        found = match(stage1, clip, local, ids, mask)
        for i in range(3):
            image = stage1.xformer.image_keys_values(clip, local)
            queries = stage1.xformer.qformer.joint(image, stage1.xformer.qformer.words(ids[i : i + 1]), mask[i : i + 1])
            want = stage1.itm_head(stage1.xformer.enhance(queries, local)[0])[0, :, 1].mean()
            torch.testing.assert_close(found[i], want)


def test_reranking_by_hand(features: Path, stage1: Path) -> None:
    """The order of the texts for one image is that of ITM + ITC computed pair by pair, in the plain formula."""
    import torch

    from xformer.data import Cache
    from xformer.evaluation import rank
    from xformer.evaluation.load import load_stage1

    model, tokenizer, state, settings = load_stage1(stage1, [])
    cache = Cache(features, settings, state["model"], pixels=False)
    import numpy as np

    rows = np.arange(6)
    texts = [f"{n} {c} circles" for n in ("one", "two", "three") for c in ("red", "blue", "green", "yellow")]
    ids, mask = tokenizer(texts)
    plain, full = rank.rank(model, cache, rows, ids, mask, settings)
    with torch.inference_mode():
        clip, local = rank._features(cache, rows, settings, ids.device)
        enhanced, _ = model.xformer(clip, local)
        images, words = model.embed(enhanced, model.xformer.qformer.words(ids), mask)
        itc = torch.stack([(images[i] @ words.T).amax(0) for i in range(6)])
        itm = torch.empty(6, len(texts))
        for i in range(6):
            for t in range(len(texts)):
                keys = model.xformer.image_keys_values(clip[i : i + 1])
                joint = model.xformer.qformer.joint(keys, model.xformer.qformer.words(ids[t : t + 1]), mask[t : t + 1])
                together, _ = model.xformer.enhance(joint, None if local is None else local[i : i + 1])
                itm[i, t] = model.itm_head(together)[0, :, 1].mean()
    for i in range(6):
        assert plain["image_to_text"][i] == itc[i].argsort(descending=True)[:10].tolist()
        assert full["image_to_text"][i] == (itc + itm)[i].argsort(descending=True)[:10].tolist()
    for t in range(len(texts)):
        assert full["text_to_image"][t] == (itc + itm)[:, t].argsort(descending=True).tolist()


def test_a_question_beyond_the_language_models_context_is_refused_before_the_first_answer(
    features: Path, corpus: Path, stage2: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from xformer.evaluation.generate import refuse_long_prompts
    from xformer.settings import load_settings
    from xformer.stage2 import FrozenLlm

    content = json.loads((corpus / "val/vqa_questions.json").read_text())
    content["questions"][-1]["question"] = "why " * 230  # with the image it is too long, without it is not
    (tmp_path / "q.json").write_text(json.dumps(content))
    line = ["eval", "vqav2", "--checkpoint", str(stage2), "--features", str(features), "--out", str(tmp_path / "out")]
    line += ["--questions", str(tmp_path / "q.json"), "--annotations", str(corpus / "val/vqa_annotations.json")]
    with pytest.raises(SystemExit) as stopped:
        main(line)
    shown = capsys.readouterr().err
    assert stopped.value.code not in (0, None) and "blind LLM" not in shown  # nothing was answered yet
    told = shown.strip().splitlines()[-1]
    assert "'Question: why why" in told and "16 image tokens" in told and "is 256" in told
    llm, settings = FrozenLlm("embedded:llm", "fp32"), load_settings().eval
    long = "why is it so? " * 15
    room = 256 - 16 - llm.encode([long], None, newline=False, left=True)[0].shape[1]
    refuse_long_prompts(llm, [long], 16, settings.model_copy(update={"max_new_tokens": room}))
    with pytest.raises(EvaluationError, match="needs 257 with 16 image tokens"):
        refuse_long_prompts(llm, [long], 16, settings.model_copy(update={"max_new_tokens": room + 1}))


def test_shuffled_images_are_never_the_own() -> None:
    import numpy as np

    from xformer.evaluation.answers import other_images

    places = np.array([5, 3, 5, 9, 3, 12])
    other = other_images(places, seed=0)
    assert (other != places).all() and sorted(set(other)) == [3, 5, 9, 12]
    assert other[0] == other[2] and other[1] == other[4]


def test_two_processes_answer_one_benchmark(features: Path, corpus: Path, stage2: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    line = ["eval", "vqav2", "--checkpoint", str(stage2), "--features", str(features), *shapes_options(corpus, "vqav2")]
    line += ["--limit", "24", "--set", "eval.batch=8", "--no-blind", "--no-shuffled"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cli"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    both = [*launch, *line, "--out", str(tmp_path / "two")]
    subprocess.run(both, check=True, capture_output=True, env=environment, timeout=300)
    main([*line, "--out", str(tmp_path / "one")])
    assert len(list((tmp_path / "two/progress").glob("*.jsonl"))) == 2
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert one == two
