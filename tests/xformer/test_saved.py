"""What --checkpoint and `from_pretrained` take, what they refuse, and what `generate` and `ask` refuse in Python."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import main
from tests.xformer.test_ask import QUICK, fails, photo  # noqa: F401 (a fixture)
from xformer import checkpoint
from xformer.errors import CheckpointError, EvaluationError
from xformer.pretrained import XFormerForConditionalGeneration
from xformer.saved import opened, read_config


@pytest.fixture(scope="module")
def model(stage2: Path) -> XFormerForConditionalGeneration:
    return XFormerForConditionalGeneration.from_pretrained(stage2)


@pytest.fixture(scope="module")
def saved(model: XFormerForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


def test_a_run_its_checkpoint_and_a_saved_model_answer_the_same(
    photo: Path, stage2: Path, saved: Path, features: Path, corpus: Path, tmp_path: Path, capsys  # noqa: F811
) -> None:  # fmt: skip
    found: dict[str, list] = {}
    for name, path in (("run", stage2), ("checkpoint", checkpoint.newest(stage2)), ("saved", saved)):
        capsys.readouterr()
        main(["ask", str(photo), "How many?", "--checkpoint", str(path), *QUICK])
        main(["caption", str(photo), "--checkpoint", str(path), *QUICK])
        found[name] = [capsys.readouterr().out]
        main(["show", str(photo), "--checkpoint", str(path), "--out", str(tmp_path / name)])
        found[name] += [(tmp_path / name / "photo-xformer.png").read_bytes()]
        questions = ["--questions", str(corpus / "val/gvtbench_oc.json"), "--no-blind", "--no-shuffled", *QUICK]
        out = tmp_path / "eval" / name
        main(["eval", "oc", "--checkpoint", str(path), "--features", str(features), "--limit", "4", *questions,
              "--out", str(out)])  # fmt: skip
        found[name] += [(out / "results.json").read_bytes()]
        main(["eval", "diversity", "--checkpoint", str(path), "--features", str(features), "--out", str(out)])
        found[name] += [json.loads((out / "scores.json").read_text())["scores"]["xformer"]["overall"]]
    assert found["run"] == found["checkpoint"] == found["saved"]


def test_an_older_checkpoint_of_a_run_is_the_one_that_is_used(stage2: Path) -> None:
    older, newer = checkpoint.checkpoints(stage2)[-2:]
    assert opened(older)[1]["step"] < opened(newer)[1]["step"] == opened(stage2)[1]["step"]


def test_a_folder_that_cannot_serve_is_one_sentence(
    photo: Path, corpus: Path, stage1: Path, stage2: Path, saved: Path, tmp_path: Path, capsys  # noqa: F811
) -> None:  # fmt: skip
    def ask(path: Path) -> str:
        return fails(capsys, "ask", str(photo), "What?", "--checkpoint", str(path), *QUICK)

    assert "no language model" in ask(checkpoint.newest(stage1))
    assert "there is no such folder" in ask(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in ask(tmp_path / "empty")
    (tmp_path / "processor").mkdir()
    shutil.copy(saved / "config.json", tmp_path / "processor/config.json")
    assert "holds no model.safetensors" in ask(tmp_path / "processor")
    copy = tmp_path / "step-00000004"
    shutil.copytree(checkpoint.newest(stage2), copy)
    state = load_file(copy / "model.safetensors")
    state["llm_proj.bias"] += 1
    save_file(state, copy / "model.safetensors")
    assert "its sha256 differs" in ask(copy)
    with pytest.raises(CheckpointError, match="its sha256 differs"):
        XFormerForConditionalGeneration.from_pretrained(copy)
    (copy / "SHA256SUMS").unlink()
    assert "holds no SHA256SUMS" in ask(copy)
    sentence = fails(capsys, "eval", "retrieval", "--checkpoint", str(saved), "--annotations",
                     str(corpus / "val/captions.json"))  # fmt: skip
    assert "stage-2" in sentence and "stage-1" in sentence
    assert "question is ' '" in fails(capsys, "ask", str(photo), " ", "--checkpoint", str(saved))


def test_what_else_a_config_holds_changes_nothing(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "m")
    config = json.loads((saved / "config.json").read_text())
    foreign = {"dtype": "banana", "id2label": 3, "num_labels": "x", "_attn_implementation": "banana"}
    (tmp_path / "m/config.json").write_text(json.dumps(config | foreign))
    XFormerForConditionalGeneration.from_pretrained(tmp_path / "m")


CONFIGS = {
    "not JSON": ("{", "config.json cannot be read"),
    "a list": ("[]", "holds a list"),
    "another model": ({"model_type": "bert"}, "model_type is 'bert', not 'xformer'"),
    "no stage": ({"stage": None}, "stage is None, not 1 or 2"),
    "another variant": ({"variant": "former"}, "variant is 'former', not 'xformer' or"),
    "unhashable": ({"variant": ["xformer"]}, "variant is "),
    "settings": ({"settings": []}, "settings is "),
    "a setting": ({"settings": {"seed": "x"}}, "config.json: "),
    "identities": ({"identities": {"clip": 3}}, "identities.clip is 3"),
    "nothing frozen": ({"frozen": {}}, "frozen.llm is None"),
    "no sha256": ({"frozen": {"llm": {"weights": "embedded:llm", "width": 128}}}, "frozen.llm.sha256 is missing"),
    "width": ({"frozen": {"llm": {"weights": "a", "sha256": None, "width": "x"}}}, "frozen.llm.width is 'x'"),
    "huge": (
        {"frozen": {"llm": {"weights": "embedded:llm", "sha256": None, "width": 10**13}}},
        "width is 128 here and 1",
    ),
    "two places": (
        {"frozen": {"llm": {"weights": "a", "sha256": None, "width": 128}}},
        "weights is 'a' and .*embedded:",
    ),
    "no place": ({"frozen": {"llm": {"weights": None, "sha256": None, "width": 8}}}, "frozen.llm.weights is None"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_or_foreign_config_names_the_field(name: str, saved: Path, tmp_path: Path) -> None:
    change, words = CONFIGS[name]
    shutil.copytree(saved, tmp_path / "m")
    config = json.loads((saved / "config.json").read_text())
    text = change if isinstance(change, str) else json.dumps(config | change)
    (tmp_path / "m/config.json").write_text(text)
    reads = (XFormerForConditionalGeneration.from_pretrained, opened, read_config)
    for read in reads[:1] if name == "huge" else reads:
        with pytest.raises(CheckpointError, match=words) as caught:
            read(tmp_path / "m")
        assert "\n" not in str(caught.value)


def test_values_are_checked_in_the_type_that_the_model_has() -> None:
    layer = torch.nn.Linear(1, 1).half()
    good = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    checkpoint.fill(layer, good, "folder")
    for value, words in ((torch.full((1,), 1e5), "bias .*infinite in torch.float16"), (torch.ones(1).long(), "int64")):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.fill(layer, good | {"bias": value}, "folder")


def test_generate_and_ask_refuse_what_does_not_belong_together(model: XFormerForConditionalGeneration) -> None:
    clip, local = torch.randn(2, 17, 96), torch.randn(2, 9, 96)
    holed = local.clone()
    holed[1, 2, 3] = torch.nan
    for arguments, words in (
        ((clip, local, ["a"]), "prompts holds 1 texts and clip 2 images"),
        ((clip, local, []), "prompts holds 0 texts and clip 2 images"),
        ((clip, local, "ab"), "prompts is 'ab'"),
        ((clip, local, [None, "a"]), "prompts is"),
        ((clip, None, ["a", "b"]), "local is None; the variant 'xformer' reads"),
        ((clip[..., :95], local, ["a", "b"]), r"clip is torch.float32 \(2, 17, 95\).*tokens, 96\]"),
        ((clip, local[..., :5], ["a", "b"]), r"local is torch.float32 \(2, 9, 5\).*tokens, 96\]"),
        ((clip[0], local, ["a", "b"]), r"clip is torch.float32 \(17, 96\)"),
        ((clip.long(), local, ["a", "b"]), "clip is torch.int64"),
        ((clip[:0], local[:0], []), r"clip is torch.float32 \(0, 17, 96\)"),
        ((clip, local[:1], ["a", "b"]), "local holds 1 images and clip 2"),
        ((clip, holed, ["a", "b"]), "local holds values that are NaN or infinite .first: image 1"),
        (([1.0], local, ["a", "b"]), "clip is list"),
    ):
        with pytest.raises(EvaluationError, match=words):
            model.generate(*arguments)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="questions holds 1 texts and clip 2"):
        model.ask(clip, local, ["What?"])
    with pytest.raises(EvaluationError, match=r"questions\[1\] is '  '"):
        model.ask(clip, local, ["What?", "  "])
