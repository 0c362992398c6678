"""`xformer params` counts what the papers count, without weights or a network."""

import json
from pathlib import Path

import pytest

from cli import main


def counted(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    capsys.readouterr()
    main(["params", "--json", *arguments])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("llm", "qformer", "xformer", "early", "with_text", "frozen"),
    [
        ("opt-2.7b", 107_133_696, "129M", 126, 182.7, 2_651_596_800),
        ("opt-6.7b", 108_314_880, "130M", 127, 183.9, 6_658_473_984),
    ],
)
def test_the_papers_sizes(
    llm: str, qformer: int, xformer: str, early: int, with_text: float, frozen: int, capsys: pytest.CaptureFixture
) -> None:
    report = counted(capsys, "--preset", "paper", "--llm", llm)
    trained = report["trainable"]
    assert trained["qformer"]["stage2"] == qformer
    assert f"{trained['xformer']['stage2'] / 1e6:.0f}M" == xformer == trained["xformer"]["paper"]
    assert round(trained["early"]["stage2"] / 1e6) == early
    assert round(trained["early"]["stage2_with_text_feed_forwards"] / 1e6, 1) == with_text
    assert report["frozen"]["OPT"] == frozen and report["frozen"]["CLIP to block 39"] == 985_894_528
    assert all(sum(t["parts"].values()) == t["stage2"] for t in trained.values())


def test_the_table_names_the_paper_and_the_note_says_why(capsys: pytest.CaptureFixture) -> None:
    main(["params"])
    shown = capsys.readouterr().out
    assert "dual cross-attention" in shown and "text feed-forwards stay counted" in shown
    with pytest.raises(SystemExit):
        main(["params", "--llm", "opt-3b"])
    assert "opt-3b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "give --llm a folder"),
        ("{", "cannot be read"),
        ("[]", "model_type is 'list' in config.json, not 'opt'"),
        ('{"model_type": "bert"}', "model_type is 'bert' in config.json, not 'opt'"),
        ('{"model_type": "opt", "hidden_size": "x"}', "hidden_size"),
        ('{"model_type": "opt", "hidden_size": -4}', "cannot be read"),
        ('{"model_type": "opt", "vocab_size": -1}', "cannot be read"),
        ('{"model_type": "opt", "num_attention_heads": 0}', "cannot be read"),
        ('{"model_type": "opt", "hidden_size": 100, "num_attention_heads": 7}', "divisible"),
    ],
)
def test_a_folder_that_is_no_opt_is_one_sentence(text: str | None, words: str, tmp_path: Path, capsys) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit):
        main(["params", "--llm", str(tmp_path)])
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said
