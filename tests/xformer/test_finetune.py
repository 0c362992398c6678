"""Stage 2's texts and their labels by hand, and fine-tuning: the loss is on the answer only, and falls."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from cli import main
from xformer import checkpoint
from xformer.errors import CheckpointError, EvaluationError, SettingsError
from xformer.monitor import read_log
from xformer.questions import Question, read_questions
from xformer.settings import load_settings
from xformer.stage2 import FrozenLlm, caption_text, question_text, refuse_long_text
from xformer.train import train_stage2


@pytest.fixture(scope="module")
def llm() -> FrozenLlm:
    return FrozenLlm("embedded:llm", "fp32")


def spoken(llm: FrozenLlm, ids: torch.Tensor) -> str:
    return llm.tokenizer.decode(ids, skip_special_tokens=False)


def test_labels_of_questions_are_the_answer_and_the_line_break_and_nothing_else(llm: FrozenLlm) -> None:
    settings = load_settings()
    asked = ["How many circles are there?", "Is there a red square?"]
    ids, mask, labelled = question_text(llm, asked, ["3", "yes"], settings)
    for i, (question, answer) in enumerate(zip(asked, ("3", "yes"), strict=True)):
        assert spoken(llm, ids[i][mask[i]]) == f"</s>Question: {question} Short Answer: {answer}\n"
        assert spoken(llm, ids[i][labelled[i]]) == f" {answer}\n"
        assert spoken(llm, ids[i][mask[i] & ~labelled[i]]) == f"</s>Question: {question} Short Answer:"
    assert (ids[~mask] == llm.pad).all() and not labelled[~mask].any()
    # what training shows before the answer is, token by token, what evaluation asks
    prompt, seen = llm.encode([f"Question: {q} Short Answer:" for q in asked], None, newline=False, left=True)
    for i in range(2):
        assert torch.equal(prompt[i][seen[i]], ids[i][mask[i] & ~labelled[i]])


def test_labels_of_captions_are_everything_without_a_prompt_and_the_caption_with_one(llm: FrozenLlm) -> None:
    ids, mask, labelled = caption_text(llm, ["Two red circles."], load_settings())
    assert torch.equal(labelled, mask) and spoken(llm, ids[0]) == "</s>two red circles\n"
    for prompt in ("a photo of", "a photo of "):
        prompted = load_settings(overrides=[f"llm.prompt='{prompt}'"])
        ids, mask, labelled = caption_text(llm, ["two red circles", "one"], prompted)
        whole = [llm.begin, *llm.tokenizer.encode("a photo of two red circles\n", add_special_tokens=False)]
        assert ids[0].tolist() == whole
        assert [spoken(llm, ids[i][labelled[i]]) for i in range(2)] == [" two red circles\n", " one\n"]


def test_what_is_too_long_keeps_the_answer_and_the_line_break(llm: FrozenLlm) -> None:
    ids, mask, labelled = llm.encode_targets(["one two three four five six"], [" seven"], 6)
    assert ids.shape == (1, 6) and ids[0, 0] == llm.begin
    assert spoken(llm, ids[0][labelled[0]]) == " seven\n"
    ids, _, labelled = llm.encode_targets([""], [" one two three four five six seven eight nine ten"], 6)
    assert ids.shape == (1, 6) and ids[0, -1] == llm.newline and labelled.all()


def test_left_padding_changes_no_prediction(llm: FrozenLlm) -> None:
    """OPT's positions come from the attention mask, so that a prompt is continued the same however long its batch."""
    texts = ["Question: Is there a circle? Short Answer:", "Question: What color is the big square? Short Answer:"]
    ids, mask = llm.encode(texts, None, newline=False, left=True)
    together = llm.model(inputs_embeds=llm.embed(ids), attention_mask=mask.long()).logits[:, -1]
    for i, text in enumerate(texts):
        own, seen = llm.encode([text], None, newline=False, left=True)
        alone = llm.model(inputs_embeds=llm.embed(own), attention_mask=seen.long()).logits[0, -1]
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)


def test_answers_are_drawn_as_often_as_they_were_given() -> None:
    question = Question("7", "1", "how many?", ("2",) * 7 + ("3",) * 3)
    drawn = [question.drawn_answer(0, step) for step in range(1000)]
    assert drawn == [question.drawn_answer(0, step) for step in range(1000)]
    assert drawn != [question.drawn_answer(1, step) for step in range(1000)]
    assert abs(Counter(drawn)["2"] - 700) < 60 and question.frequent_answer() == "2"


@pytest.mark.parametrize(("section", "task"), [("stage2", None), ("finetune", "caption")])
def test_texts_longer_than_the_language_models_context_are_refused_before_the_first_step(
    features: Path, stage1: Path, stage2: Path, small: list[str], tmp_path: Path, section: str, task
) -> None:
    start = stage1 if task is None else stage2
    settings = load_settings(overrides=[*small, f"{section}.max_text=241"])
    with pytest.raises(SettingsError, match=rf"{section}\.max_text is 241 tokens, with 16 .* is 256: .* at most 240\."):
        train_stage2([features], start, tmp_path / "out", settings, None, False, task)
    assert not (tmp_path / "out").exists()
    refuse_long_text(FrozenLlm("embedded:llm", "fp32"), load_settings(overrides=["stage2.max_text=240"]), "stage2")


@pytest.mark.parametrize(
    "answer", ["", "  ", None, [], ["red", ""], ["red", None], [["red"]], {"answer": "red"}, True, 1.5]
)
def test_an_answer_that_is_no_text_is_refused_with_its_entry(tmp_path: Path, answer) -> None:
    rows = [{"image_id": 1, "question": "What?", "answer": a} for a in ("red", answer)]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    with pytest.raises(EvaluationError, match=r"qa\.json: entry 1: answer is .*leave the question out\.$"):
        read_questions(tmp_path / "qa.json", None)


def test_a_question_that_is_no_text_is_refused_with_its_entry(tmp_path: Path) -> None:
    (tmp_path / "qa.json").write_text(json.dumps([{"image_id": 1, "question": None, "answer": "red"}]))
    with pytest.raises(EvaluationError, match=r"entry 0: question is null, not a text"):
        read_questions(tmp_path / "qa.json", None)


def test_a_list_of_answers_is_what_each_annotator_said(tmp_path: Path) -> None:
    rows = [{"image_id": 1, "question": "What?", "answer": a} for a in (["red", "blue", "red"], 3)]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    several, number = read_questions(tmp_path / "qa.json", None)
    assert several.answers == ("red", "blue", "red") and several.frequent_answer() == "red" and number.answers == ("3",)


QUICK = ["train.max_steps=25", "train.batch=24", "train.lr=3e-3", "train.warmup=2", "train.log_every=5",
         "train.validate_every=25", "train.save_every=25", "corpus.val_fraction=0.2", "eval.beams=1",
         "finetune.validate_batches=1"]  # fmt: skip


@pytest.fixture(scope="module")
def tuned(features: Path, corpus: Path, stage2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tuned") / "vqa"
    line = [
        "train",
        "--stage",
        "2",
        "--task",
        "vqa",
        "--init",
        str(stage2),
        "--features",
        str(features),
        "--out",
        str(run),
    ]
    main([*line, "--questions", str(corpus / "train/qa.json"), *(w for o in QUICK for w in ("--set", o)), "--quiet"])
    return run


def test_the_answer_loss_falls_and_the_run_answers_questions(tuned: Path, features: Path, corpus: Path) -> None:
    lines = read_log(tuned)
    losses = [line["lm"] for line in lines if line["event"] == "train"]
    assert np.mean(losses[-2:]) < 0.8 * losses[0]
    (validated,) = [line for line in lines if line["event"] == "validate"]
    assert validated["lm"] > 0 and "lm_of_another_image" in validated
    state = checkpoint.read_state(checkpoint.newest(tuned))
    assert state["task"] == "vqa" and state["stage"] == 2 and state["settings"]["stage2"]["batch"] == 24
    out = tuned.parent / "eval"
    line = ["eval", "vqav2", "--checkpoint", str(tuned), "--features", str(features), "--out", str(out), "--limit", "8"]
    for name in ("questions", "annotations"):
        line += [f"--{name}", str(corpus / f"val/vqa_{name}.json")]
    main([*line, "--no-blind", "--no-shuffled"])
    answers = [row["answers"]["xformer"] for row in json.loads((out / "answers.json").read_text())]
    known = {str(row["answer"]) for row in json.loads((corpus / "train/qa.json").read_text())}
    assert len(answers) == 8 and set(answers) <= known


def test_questions_of_vqav2_and_captions_fine_tune_too(
    features: Path, corpus: Path, stage2: Path, small: list[str], tmp_path: Path
) -> None:
    settings = load_settings(overrides=small)
    files = (corpus / "val/vqa_questions.json", corpus / "val/vqa_annotations.json")
    with pytest.raises(EvaluationError, match="none of the .* training split"):
        train_stage2([features], stage2, tmp_path / "val", settings, None, False, "vqa", *files)
    asked = read_questions(*files)
    assert len(asked[0].answers) == 10
    train_stage2([features], stage2, tmp_path / "caption", settings, None, False, "caption")
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "caption"))["task"] == "caption"


def test_what_cannot_be_fine_tuned_is_refused_before_the_first_step(
    features: Path, corpus: Path, stage1: Path, stage2: Path, small: list[str], tmp_path: Path
) -> None:
    settings, out = load_settings(overrides=small), tmp_path / "out"
    questions = corpus / "train/qa.json"
    with pytest.raises(SettingsError, match="--task vqa needs --questions"):
        train_stage2([features], stage2, out, settings, None, False, "vqa")
    with pytest.raises(CheckpointError, match="is a run of stage 1; --task starts from one of stage 2"):
        train_stage2([features], stage1, out, settings, None, False, "vqa", questions)
    with pytest.raises(SettingsError, match="holds no answers; give its --annotations"):
        train_stage2([features], stage2, out, settings, None, False, "vqa", corpus / "val/vqa_questions.json")
    rows = json.loads(questions.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps([*rows, {"image_id": 999999999, "question": "What?", "answer": "no"}]))
    with pytest.raises(
        EvaluationError, match=r"1 of .* questions are about images that .* lacks \(first: image 999999999"
    ):
        train_stage2([features], stage2, out, settings, None, False, "vqa", other)
    other.write_text("[]")
    with pytest.raises(EvaluationError, match="holds no questions"):
        train_stage2([features], stage2, out, settings, None, False, "vqa", other)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stage", "1", "--task", "vqa"], "--task fine-tunes a stage-2 run; give --stage 2"),
        (["--stage", "2", "--questions", "qa.json"], "are read by --stage 2 --task vqa only"),
        (["--stage", "2", "--task", "caption", "--annotations", "a.json"], "are read by --stage 2 --task vqa only"),
    ],
)
def test_options_that_would_not_be_read_are_refused(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *words, "--features", str(features), "--out", str(tmp_path / "run")])
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and says in told and not (tmp_path / "run").exists()
