"""The command line as a user meets it: quick help, one sentence per mistake, exit codes, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli import main


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Runs a command that must fail; returns its one sentence."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code not in (0, None)
    error = capsys.readouterr().err.strip().splitlines()
    assert error and "Traceback" not in " ".join(error)
    return error[-1]


def test_help_imports_neither_torch_nor_zarr() -> None:
    code = "import sys\nfrom cli import main\ntry:\n  main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'zarr', 'numpy', 'transformers', 'dask', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_mistakes_are_one_sentence(
    features: Path, stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    store, run = str(features), str(stage1)
    assert "no such file" in fails(capsys, "extract", "--encoder", "clip", "--corpus", "nowhere")
    assert "no pictures" in fails(capsys, "extract", "--encoder", "clip", "--corpus", "empty")
    assert "no feature store" in fails(capsys, "train", "--stage", "1", "--features", "nowhere.zarr")
    assert "stage-1 run" in fails(capsys, "train", "--stage", "2", "--features", store)
    assert "no checkpoint" in fails(capsys, "eval", "oc", "--questions", str(_oc(tmp_path)), "--features", store)
    assert "answers need one of stage 2" in fails(
        capsys, "eval", "oc", "--questions", str(_oc(tmp_path)), "--features", store, "--checkpoint", run
    )
    assert "lrr" in fails(capsys, "train", "--stage", "1", "--features", store, "--set", "train.lrr=1")
    assert not (tmp_path / "store.zarr").exists() and not (tmp_path / "runs").exists()


def _oc(folder: Path) -> Path:
    file = folder / "oc.json"
    file.write_text(json.dumps([{"image_id": 1, "text_in": "How many?", "text_out": "1", "n_obj_exist": 1}]))
    return file


def test_missing_weights_say_what_is_missing_and_how_to_get_it(
    corpus: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["extract", "--encoder", "clip", "--corpus", str(corpus)]
    assert "model.safetensors is missing" in fails(capsys, *line, "--weights", "nowhere")
    sentence = fails(capsys, *line, "--weights", "hub:someone/something@main")
    assert "model.safetensors" in sentence and "hf download someone/something" in sentence


def test_a_full_disk_is_one_sentence(
    features: Path, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xformer import publish

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(publish, "write_json", full)
    line = ["train", "--stage", "1", "--features", str(features), "--out", str(tmp_path / "run")]
    sentence = fails(capsys, *line, *[w for o in small for w in ("--set", o)])
    assert "No space left" in sentence and "run again" in sentence


def test_a_file_where_a_folder_must_be_is_one_sentence(
    features: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    for out in ("file", "file/x"):
        assert "file" in fails(capsys, "train", "--stage", "1", "--features", str(features), "--out", out)
        assert "file" in fails(capsys, "extract", "--encoder", "clip", "--corpus", str(corpus), "--store", out)
    assert Path("file").read_text() == "mine"


def test_ctrl_c_leaves_nothing_half_written(features: Path, tmp_path: Path) -> None:
    line = ["train", "--stage", "1", "--features", str(features), "--out", "run", "--set", "train.save_every=1",
            "--set", "train.batch=8", "--set", "stage1.max_steps=100000", "--set", "stage1.epochs=10000"]  # fmt: skip
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell may have ignored it
    )
    code += f"sys.path.insert(0, {str(Path.cwd())!r}); from cli import main; main({line!r})"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/step-*/state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in error
    assert "stopped; step" in error.splitlines()[-1] and "--resume" in error.splitlines()[-1]
    from xformer import checkpoint

    newest = checkpoint.newest(tmp_path / "run")
    assert checkpoint.read_tensors(newest, "model.safetensors")
    assert not [p for p in (tmp_path / "run/checkpoints").iterdir() if p.name.startswith(".")]


def test_extraction_on_a_local_dask_cluster_listens_on_this_machine_only(
    corpus: Path, tmp_path: Path, features: Path
) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path.cwd())!r})\nfrom cli import main\n"
        f"if __name__ == '__main__':\n    main(['extract', '--encoder', 'clip', '--corpus', {str(corpus)!r}, '--json', "
        "'report.json', '--workers', '2', '--shard-rows', '32', '--set', 'mae.draws=2'])\n"
    )
    (tmp_path / "run.py").write_text(code)
    child = subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    import psutil

    exposed: set[str] = set()
    while child.poll() is None:
        try:
            family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
            for process in family:
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.ip != "127.0.0.1":
                        exposed.add(f"{connection.laddr}")
        except psutil.Error:
            pass
        time.sleep(0.1)
    assert child.returncode == 0 and not exposed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 128 and report["dead"] == []
    from pipeline import store

    ours, theirs = (store.FeatureStore(p).complete("clip/5/tokens") for p in (tmp_path / "store.zarr", features))
    import numpy as np

    np.testing.assert_allclose(ours.read(list(range(128))), theirs.read(list(range(128))), rtol=2e-2, atol=2e-2)
