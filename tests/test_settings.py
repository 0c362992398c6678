"""Settings: one strict file, precedence, and a sentence that names the key."""

from pathlib import Path

import pytest

from xformer.errors import SettingsError
from xformer.settings import load_settings, parse_yaml


def test_both_presets_load_and_the_paper_has_the_papers_values() -> None:
    paper = load_settings("paper")
    assert (paper.qformer.queries, paper.stage1.batch, paper.stage1.epochs, paper.clip.layers) == (32, 1680, 9, [39])
    assert load_settings().preset == "tiny"


def test_precedence_and_numbers(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("tiny:\n  stage1:\n    lr: 1e-4\n    batch: 24\n")
    settings = load_settings(config=file, overrides=["train.lr=2e-4", "stage2.batch=12"], seed=7)
    assert (settings.stage1.lr, settings.stage2.lr, settings.stage1.batch, settings.stage2.batch, settings.seed) == (
        2e-4, 2e-4, 24, 12, 7,
    )  # fmt: skip
    assert load_settings(config=file).stage1.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", "lrr.*allowed here.*lr"),
        ("train.lr=abc", "stage1.lr.*number.*abc"),
        ("mae.draws=0", "mae.draws"),
        ("mae.mask_ratio=1.0", "mae.mask_ratio"),
        ("qformer.heads=5", "heads.*width"),
        ("stage1.precision=fp8", "precision.*fp32"),
        ("eval.prompt=hello", "prompt"),
        ("clip.layers=[]", "clip.layers"),
        ("stage1=3", "section"),
        ("nothing", "key=value"),
        ("image_size=65", "patch"),
        ("stage1.min_lr=0.5", "min_lr"),
        ("eval.length_penalty=.nan", "length_penalty.*finite"),
        ("stage1.clip_norm=.inf", "clip_norm.*finite"),
        ("seed=99999999999999999999999", "seed.*less than"),
        ("clip.mean=[.nan,0,0]", "clip.mean.*finite"),
        ("clip.std=[0,1,1]", "clip.std.*greater than 0"),
        ("train.betas=[0.9,1]", "betas.*less than 1"),
        ("train.lr=true", "stage1.lr.*number.*True"),
        ("seed=true", "seed.*integer.*True"),
        ("train.batch=2.0", "stage1.batch.*integer"),
        ("train.batch='3'", "stage1.batch.*integer"),
        ("clip.layers=[5,5]", "layers.*once"),
    ],
)
def test_mistakes_name_the_key(override: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        load_settings(overrides=[override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tiny: {seed: 1, seed: 2}", "stands twice"),
        ("tiny: &a [*a]", "alias"),
        ("tiny: !!python/object:os.system x", "not valid YAML"),
        ("[" * 200_000, "nested|not valid"),
        ("other: 1", "top level"),
        ("tiny: [", "not valid YAML"),
        ("tiny: 3", "tiny is a section"),
        ("tiny: []", "tiny is a section"),
        ("paper: {bogus: 1}", "paper: unknown key 'bogus'"),
        ("paper: {seed: true}", "seed.*True"),
        (f"tiny: {{seed: {'9' * 5000}}}", "not valid YAML"),
        ("a" * 1_000_001, "larger"),
    ],
)
def test_hostile_files_are_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=words):
        load_settings(config=file)


def test_numbers_are_numbers() -> None:
    assert parse_yaml("[1e-4, 1, 1.5, 1.0e-3, abc, 2e3]", "here") == [1e-4, 1, 1.5, 1e-3, "abc", 2000.0]
