"""Every xformer line of the README: tiny ones run, all others are resolved against the command line."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from cli import app, main
from xformer import settings

TEXT = Path("README.md").read_text(encoding="utf-8")


def lines(language: str) -> list[list[str]]:
    blocks = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    split = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [words[words.index("xformer") + 1 :] for words in split if "xformer" in words]


@pytest.mark.parametrize("arguments", lines("bash") + lines("console"), ids=" ".join)
def test_lines_resolve(arguments: list[str]) -> None:
    command = typer.main.get_command(app)
    rest = list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]  # type: ignore[attr-defined]
    command.make_context("xformer", rest)


def test_make_targets_exist() -> None:
    makefile = Path("Makefile").read_text()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        for target in re.findall(r"^make (\w+)", block, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_tiny_lines_run_exactly_as_typed_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a word is added; the defaults behind them are made small, so that the test takes seconds."""
    presets = yaml.safe_load(settings.stages_file().read_text())
    tiny, few = presets["tiny"], {"max_steps": 4, "warmup": 2, "batch": 16, "validate_batches": 1, "log_every": 1}
    tiny["corpus"] |= {"train": 64, "val": 24}
    tiny["store"] |= {"shard_rows": 32}
    tiny["mae"] |= {"draws": 2}
    tiny["stage1"] |= few
    tiny["stage2"] |= few
    tiny["eval"] |= {"beams": 1, "max_new_tokens": 3}
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(presets))
    monkeypatch.setattr(settings, "stages_file", lambda: tmp_path / "stages.yaml")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    typed = lines("console")
    assert [" ".join(words) for words in typed[:5]] == [
        "extract --encoder clip",
        "extract --encoder mae",
        "train --stage 1 --features store.zarr",
        "train --stage 2 --features store.zarr",
        "eval vqav2",
    ]
    for words in typed:
        main(words)
    for name in ("store.zarr/zarr.json", "runs/stage1/summary.json", "runs/qformer2/summary.json", "eval/vqav2/scores.json",
                 "eval/oc/scores.json", "eval/mci/results.json"):  # fmt: skip
        assert Path(name).is_file()
