"""A built wheel is complete: it runs from an empty directory in a clean environment."""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest


def test_the_wheel_has_settings_and_weights_and_runs(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), "."],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("xformer_mllm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"xformer/stages.yaml", "cli.py", "xformer/tiny/mae/model.safetensors", "pipeline/store.py"} <= names
    assert not any(name.startswith("tests/") for name in names)
    venv.create(tmp_path / "env", with_pip=True)
    bin_folder = tmp_path / "env/bin"
    subprocess.run([bin_folder / "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    site = next((tmp_path / "env/lib").glob("python3*/site-packages"))
    parents = [p for p in sys.path if p.endswith("site-packages")]
    (site / "parent.pth").write_text("\n".join(parents) + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    shown = subprocess.run([bin_folder / "xformer", "--help"], cwd=empty, capture_output=True, text=True, check=True)
    assert "extract" in shown.stdout and "frozen encoders" in shown.stdout
    where = "import xformer, xformer.settings as s, xformer.weights as w; print(xformer.__file__); "
    where += "s.load_settings('paper'); print(w.resolve('embedded:llm', ('model.safetensors',)))"
    found = subprocess.run(
        [bin_folder / "python", "-I", "-c", where], cwd=empty, capture_output=True, text=True, check=True
    )
    assert all(str(site) in line for line in found.stdout.splitlines()), found.stdout


def test_setup_takes_the_first_python_that_is_new_enough_or_says_that_there_is_none(tmp_path: Path) -> None:
    """Only the choice: the stand-ins for Python make no environment."""
    make, env = shutil.which("make"), tmp_path / "bin"
    if make is None:
        pytest.skip("there is no make here")
    env.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(name, tmp_path)
    (env / "sh").symlink_to(shutil.which("sh") or "/bin/sh")

    def setup(**pythons: str) -> subprocess.CompletedProcess[str]:
        for name, body in pythons.items():
            (env / name.replace("_", ".")).write_text(f"#!/bin/sh\n{body}\n")
            (env / name.replace("_", ".")).chmod(0o755)
        return subprocess.run([make, "setup"], cwd=tmp_path, env={"PATH": str(env)}, capture_output=True, text=True)

    old = setup(python3="exit 1")
    assert old.returncode != 0 and "needs Python 3.12 or newer" in old.stderr and "Traceback" not in old.stderr
    chosen = setup(python3_12='[ "$1" = -c ] && exit 0; [ "$1" = --version ] && echo Python 3.12.99; exit 0')
    assert "with Python 3.12.99" in chosen.stdout and not (tmp_path / ".venv/ready").exists()
