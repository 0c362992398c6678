"""Every xformer line of the README: tiny ones run, all others are resolved against the command line."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from cli import app, main

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


def test_tiny_lines_run_in_an_empty_folder(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "small.yaml"
    config.write_text(
        "tiny:\n  corpus: {train: 64, val: 24}\n  store: {shard_rows: 32}\n  mae: {draws: 2}\n"
        "  eval: {beams: 2, max_new_tokens: 3}\n"
    )
    for arguments in lines("console"):
        more = [] if arguments[0] == "store" else ["--config", str(config)]
        if arguments[0] == "train":
            more += [word for override in small for word in ("--set", override)]
        if arguments[0] == "eval":
            more += ["--limit", "12"]
        main([*arguments, *more])
    for name in ("store.zarr/zarr.json", "runs/stage1/summary.json", "runs/qformer2/summary.json", "eval/vqav2/scores.json",
                 "eval/oc/scores.json", "eval/mci/results.json"):  # fmt: skip
        assert (tmp_path / name).is_file()
