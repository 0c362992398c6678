"""`xformer params` counts what the papers count, without weights or a network."""

import json

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
