"""Two runs side by side, and a run against the band of a recorded reference."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli import main
from xformer.compare import band, compare, differences, inside, read_record
from xformer.errors import CheckpointError, SettingsError
from xformer.reference import _recorded, record
from xformer.settings import load_settings
from xformer.train import train_stage1

RECORDED = Path(__file__).parents[2] / "reference/tiny"


@pytest.fixture(scope="module")
def seeds(features: Path, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds of a run of four steps."""
    folder = tmp_path_factory.mktemp("seeds")
    for seed in range(3):
        settings = load_settings(overrides=small, seed=seed)
        train_stage1([features], folder / str(seed), settings, "xformer", resume=False)
    return [folder / str(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def reference(seeds: list[Path], small: list[str]) -> Path:
    file = seeds[0].parent / "stage1.json"
    file.write_text(json.dumps(_recorded(1, seeds[:2], small)))
    return file


def test_the_band_is_the_prediction_interval_of_one_more_seed() -> None:
    low, high = band([1.0, 2.0, 3.0])  # mean 2, s 1, t(2) 4.303
    assert high - 2 == pytest.approx(2 - low) == pytest.approx(4.303 * math.sqrt(4 / 3))
    assert band([5.0, 5.0]) == pytest.approx((4.95, 5.05))
    draws = np.random.default_rng(0).standard_normal((2000, 4))
    covered = np.mean([low <= one <= high for *three, one in draws.tolist() for low, high in [band(three)]])
    assert 0.93 < covered < 0.97


def test_two_runs_are_compared_by_settings_figures_and_picture(stage1: Path, seeds: list[Path], tmp_path: Path) -> None:
    main(["compare", str(seeds[0]), str(seeds[1]), "--out", str(tmp_path)])
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report["settings"] == {"seed": [0, 1]} and "band" not in report
    figures = {(row["event"], row["name"]): row for row in report["figures"]}
    assert {
        ("train", "itc"),
        ("train", "reconstruction"),
        ("validate", "itm"),
        ("validate", "recall1_image_to_text"),
    } <= set(figures)
    row = figures["train", "itc"]
    last = [
        line for line in map(json.loads, (seeds[1] / "log.jsonl").read_text().splitlines()) if line["event"] == "train"
    ]
    assert row["step"] == 4 and row["second"] == last[-1]["itc"] and row["difference"] == row["second"] - row["first"]
    assert np.asarray(Image.open(tmp_path / "compare.png").convert("RGB")).std() > 10
    same = compare(stage1, seeds[0], tmp_path / "same")
    assert all(row["difference"] == 0 for row in same["figures"]) and not same["settings"]


def test_a_run_of_the_same_recipe_lies_in_the_band_and_another_does_not(
    reference: Path, seeds: list[Path], features: Path, small: list[str], tmp_path: Path
) -> None:
    found = compare(seeds[2], reference, tmp_path / "a")
    assert found["band"]["points"] > 20 and found["band"]["inside"] and not found["band"]["other_settings"]
    settings = load_settings(overrides=[*small, "train.lr=0.1", "train.warmup_lr=0.1", "train.clip_norm=100"])
    train_stage1([features], tmp_path / "wild", settings, "xformer", resume=False)
    found = compare(tmp_path / "wild", reference, tmp_path / "b")
    assert not found["band"]["inside"]
    assert set(found["band"]["other_settings"]) == {"stage1.lr", "stage1.warmup_lr", "stage1.clip_norm"}
    # the folder of a reference stands for its file of the same stage, in either place
    assert compare(reference.parent, seeds[2], tmp_path / "c")["band"]["inside"]


def test_constants_of_the_data_are_no_points_and_a_band_at_the_constant_predictor_says_so(
    reference: Path, seeds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = json.loads(reference.read_text())
    constants = {"reconstruction_of_mean", "itm_constant", "recall1_of"}
    old = content["curves"]["validate"]  # as recorded before they were left out
    old |= {name: {"steps": [4], "values": [[0.3, 0.3]]} for name in constants}
    content["curves"]["train"]["itm"] = {
        "steps": [1, 2, 3, 4],
        "values": [[0.65, 0.64], [0.637, 0.636], [0.6, 0.5], [0.4, 0.4]],
    }
    old["itm"] = {"steps": [4], "values": [[0.4, 0.4]]}
    file = tmp_path / "stage1.json"
    file.write_text(json.dumps(content))
    found = compare(seeds[2], file, tmp_path / "out")["band"]
    assert not {name for figure in found["by_figure"] for name in constants if figure.endswith("/" + name)}
    assert found["itm_at_constant"] == [1, 2]
    assert "At steps 1 to 2 the recorded ITM is itself at the loss of a constant guess" in capsys.readouterr().out
    old["itm"]["values"] = content["curves"]["train"]["itm"]["values"] = [[0.4, 0.4]]
    content["curves"]["train"]["itm"]["steps"] = [4]
    file.write_text(json.dumps(content))
    assert compare(seeds[2], file, tmp_path / "out")["band"]["itm_at_constant"] == []
    assert "constant guess" not in capsys.readouterr().out


def test_a_value_off_the_band_is_found() -> None:
    curve = {10: [1.0, 1.1, 0.9], 20: [0.5, 0.52, 0.48]}
    assert inside({10: [1.05], 20: [0.9], 30: [7.0]}, curve) == [True, False]


def test_what_is_no_run_is_one_sentence(
    stage1: Path, stage2: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"a": 1}')
    torn = Path(shutil.copytree(stage1, tmp_path / "torn"))
    (torn / "settings.json").write_text("{")
    unstarted = Path(shutil.copytree(stage1, tmp_path / "unstarted"))
    (unstarted / "log.jsonl").write_text("")
    for path, words in ((empty, "is no run"), (tmp_path / "none", "is no run"), (wrong, "is no recorded reference"),
                        (torn, "is no run"), (unstarted, "no step yet")):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            compare(stage1, path, tmp_path / "out")
    with pytest.raises(SettingsError, match="of stage 1 and .* of stage 2"):
        compare(stage1, stage2, tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["compare", str(stage1), str(empty), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith("xformer: ") and not (tmp_path / "out").exists()


def test_one_seed_is_no_reference(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at least two seeds"):
        record(tmp_path, load_settings(), 1, 10, None, [], main)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_recorded_reference_is_of_todays_recipe(stage: int) -> None:
    """Whoever changes the recipe, or the embedded encoders, records it again: xformer reference --out reference/tiny."""
    found = read_record(RECORDED / f"stage{stage}.json")
    content = json.loads((RECORDED / f"stage{stage}.json").read_text())
    words = content["command"].split()
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    ours = load_settings(overrides=overrides).dump()
    for key, value in found.settings.items():
        if not key.startswith("features.") and key not in ("preset",):
            here = ours
            for part in key.split("."):
                here = here[part]
            assert here == value, key
    assert len(found.seeds) >= 3 and (RECORDED / f"stage{stage}.png").is_file()


@pytest.mark.slow
def test_a_replay_lies_in_the_recorded_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["extract", "--encoder", "clip", "--encoder", "mae"])
    for stage in (1, 2):
        line = json.loads((RECORDED / f"stage{stage}.json").read_text())["command"].split()
        main([*line[1:], "--seed", "7"])
        found = compare(Path(f"runs/stage{stage}"), RECORDED, tmp_path / "compare")
        assert found["band"]["inside"], found["band"]
        assert not found["band"]["other_settings"]


def test_differences_name_the_encoder(reference: Path, seeds: list[Path]) -> None:
    one, other = read_record(seeds[0]), read_record(seeds[1])
    key = next(k for k in one.settings if k.startswith("features.clip") and "sha256" in k)
    other.settings[key] = "0"
    assert key in differences(one, other)
    for name in [k for k in other.settings if k.startswith("features.mae.")]:
        del other.settings[name]
    found = differences(one, other)
    assert found["features.mae"] == ("read", None) and not any(k.startswith("features.mae.") for k in found)
