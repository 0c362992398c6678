"""The contact sheet shows the picture of every row, or says why there is none."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import contact
from pipeline.corpora import open_corpus
from pipeline.extract import extract
from xformer.settings import load_settings


def test_a_store_without_pixels_shows_the_source_or_says_that_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, colour in enumerate(("red", "lime")):
        Image.new("RGB", (20, 30), colour).save(tmp_path / f"{i}.png")
    extract(open_corpus(tmp_path), tmp_path / "s.zarr", ["clip"], load_settings(), in_process=True)
    drawn, real = [], contact._decoded
    monkeypatch.setattr(contact, "_decoded", lambda *given: drawn.append(real(*given)) or drawn[-1])
    (tmp_path / "1.png").unlink()
    assert contact.contact_sheet(tmp_path / "s.zarr", [], 2, tmp_path / "rows.png") == ["0.png", "1.png"]
    assert (drawn[0] == (255, 0, 0)).all() and drawn[1] == "no picture: No such file or directory"
    (tmp_path / "s.zarr/clip/5/tokens/made.json").unlink()
    contact.contact_sheet(tmp_path / "s.zarr", ["1.png"], 1, tmp_path / "none.png")
    assert "nobody knows how clip/5/tokens was made" in drawn[2]
    sheet = np.asarray(Image.open(tmp_path / "rows.png").convert("RGB"))
    assert (sheet == (255, 0, 0)).all(-1).sum() > 1000  # the picture is on the sheet
