"""`ask`, `caption` and `show` as a user types them, the same in Python, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli import main

QUICK = ["--set", "eval.beams=1", "--set", "eval.max_new_tokens=4"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code not in (0, None)
    error = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in " ".join(error)
    return error[-1]


def test_ask_is_what_eval_and_python_answer(corpus: Path, stage2: Path, tmp_path: Path, capsys) -> None:
    from pipeline.processor import XFormerProcessor
    from xformer.pretrained import XFormerForConditionalGeneration

    picture = next((corpus / "val/images").iterdir())
    question = "How many circles are there?"
    capsys.readouterr()
    main(["ask", str(picture), question, "--checkpoint", str(stage2)])
    said = capsys.readouterr().out.strip()
    model = XFormerForConditionalGeneration.from_pretrained(stage2)
    processor = XFormerProcessor.from_pretrained(stage2)
    assert model.ask(**processor([picture]), questions=[question]) == [said]
    main(["caption", str(picture), "--checkpoint", str(stage2)])
    assert capsys.readouterr().out == f"{picture}: {model.generate(**processor([picture]))[0]}\n"
    model.save_pretrained(tmp_path / "saved")  # the saved model alone is enough for both
    processor.save_pretrained(tmp_path / "processor")
    tokens = XFormerProcessor.from_pretrained(tmp_path / "processor")([picture])
    assert torch.equal(XFormerProcessor.from_pretrained(tmp_path / "saved")([picture])["local"], tokens["local"])
    assert torch.equal(tokens["clip"], processor([picture])["clip"]) and tokens["local"].shape == (1, 17, 96)
    questions = [{"image_id": 1, "question_id": 1, "question": question}]
    answers = [{"question_id": 1, "image_id": 1, "multiple_choice_answer": "1", "answer_type": "number",
                "question_type": "how many", "answers": [{"answer": "1"}] * 10}]  # fmt: skip
    image_id = int(picture.stem)
    for row in (*questions, *answers):
        row["image_id"] = image_id
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answers}))
    main(["eval", "vqav2", "--checkpoint", str(stage2), "--images", str(picture.parent), "--questions",
          str(tmp_path / "q.json"), "--annotations", str(tmp_path / "a.json"), "--no-blind",
          "--out", str(tmp_path / "e")])  # fmt: skip
    assert json.loads((tmp_path / "e/results.json").read_text())[0]["answer"] == said


def test_what_was_trained_on_int8_features_answers_about_pictures(
    corpus: Path, photo: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = [word for override in [*small, "mae.draws=1"] for word in ("--set", override)]
    line = ["extract", "--encoder", "clip", "--encoder", "mae", "--corpus", str(corpus), "--dtype", "int8", "--force"]
    main([*line, "--set", "mae.draws=1"])
    main(["train", "--stage", "1", "--features", "store.zarr", *more])
    main(["train", "--stage", "2", "--features", "store.zarr", *more])
    main(["ask", str(photo), "How many?", *QUICK])  # encoded as fp16, which is what int8 approximates


def test_caption_of_files_is_text_and_of_a_folder_json_lines(photo: Path, stage2: Path, capsys) -> None:
    capsys.readouterr()
    main(["caption", str(photo), "--checkpoint", str(stage2), *QUICK])
    assert capsys.readouterr().out.startswith(f"{photo}: ")
    (photo.parent / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        main(["caption", str(photo.parent), "--checkpoint", str(stage2), *QUICK])
    shown = capsys.readouterr()
    (line,) = shown.out.strip().splitlines()
    assert json.loads(line)["image"] == str(photo) and "1 of 2 files are no pictures" in shown.err


@pytest.mark.parametrize("run", ["stage1", "stage2"])
def test_show_draws_a_picture(run: str, photo: Path, request, tmp_path: Path) -> None:
    main(["show", str(photo), "--checkpoint", str(request.getfixturevalue(run)), "--out", str(tmp_path / "out")])
    with Image.open(tmp_path / "out/photo-xformer.png") as drawn:
        assert drawn.width > 1000 and len(np.unique(np.asarray(drawn.convert("L")))) > 50


@pytest.mark.parametrize("model", ["xformer", "qformer", "concat", "early"])
def test_attention_maps_are_weights_over_the_tokens_that_a_model_reads(model: str) -> None:
    from xformer.attention import attention_maps, query_similarity
    from xformer.model import build_xformer
    from xformer.settings import load_settings
    from xformer.show import grids, seen

    bridge = build_xformer(load_settings(), model, 0).eval()
    clip, local = torch.randn(2, 17, 96), None if model == "qformer" else torch.randn(2, 9, 96)
    maps, enhanced, _ = attention_maps(bridge, clip, local)
    assert torch.equal(enhanced, bridge(clip, local)[0])
    assert maps["clip"].shape == (2, 16, 17) and set(maps) == ({"clip"} if local is None else {"clip", "local"})
    total = sum(m.sum(-1) for m in maps.values()) if model == "concat" else maps["clip"].sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    kept = torch.zeros(16, dtype=torch.bool)
    kept[:8] = True
    if local is not None:
        grid = grids(maps["local"][0], 16, kept)
        assert grid.shape == (16, 4, 4) and np.isnan(grid[:, 2:]).all() and (grid[:, :2] >= 0).all()
        np.testing.assert_array_equal(seen(maps["local"][0], True, kept), grid)
    registers = torch.rand(16, 8 + 16)  # class token, 7 registers, 16 patches
    np.testing.assert_array_equal(seen(registers, True, None), registers[:, 8:].reshape(16, 4, 4).numpy())
    # class token and registers have no place in the picture: their weights stay a table, none left out
    np.testing.assert_array_equal(seen(maps["clip"][0], False, None), maps["clip"][0].numpy())
    torch.testing.assert_close(query_similarity(enhanced).diagonal(dim1=1, dim2=2), torch.ones(2, 16))


def test_what_is_refused_is_one_sentence(
    photo: Path, stage1: Path, stage2: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    run = ["--checkpoint", str(stage2)]
    assert "qformer.heads is 2 here" in fails(capsys, "show", str(photo), *run, "--set", "qformer.heads=2")
    for command in (["ask", str(text), "What?"], ["caption", str(text)], ["show", str(text)]):
        assert "text.jpg: not a picture" in fails(capsys, *command, *run)
    assert "no such picture" in fails(capsys, "ask", str(tmp_path / "none.png"), "What?", *run)
    assert "stage-1 run" in fails(capsys, "ask", str(photo), "What?", "--checkpoint", str(stage1))
    sentence = fails(capsys, "ask", str(photo), "why " * 300, *run)
    assert "context (max_position_embeddings) is 256" in sentence and "tokens" in sentence
    sentence = fails(capsys, "ask", str(photo), "What?", *run, "--set", "qformer.queries=32")
    assert "qformer.queries is 32 here and 16" in sentence
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint" in fails(capsys, "ask", str(photo), "What?")
