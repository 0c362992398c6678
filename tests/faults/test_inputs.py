"""What a corpus may throw at an extraction: doubled ids, blank and hostile captions, bombs, nesting, pickles."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as given_settings
from PIL import Image

from cli import main
from pipeline.captioned import Row
from pipeline.corpora import Corpus, open_corpus
from pipeline.extract import extract, plan_index
from pipeline.index import Index
from pipeline.write_index import hashed, write_index
from tests.faults.report import ROOT, line
from xformer.errors import CorpusError
from xformer.settings import load_settings


def fails(capsys: pytest.CaptureFixture, *words: str) -> str:
    """The one sentence of a command that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    error = capsys.readouterr().err
    assert stop.value.code not in (0, None) and "Traceback" not in error
    return error.strip().splitlines()[-1]


def coco(folder: Path, captions: list[str], names: list[str] | None = None) -> Path:
    """One small picture for each caption."""
    folder.mkdir(exist_ok=True)
    names = names or [f"{i}.png" for i in range(len(captions))]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(folder / name)
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    annotations = [{"image_id": i, "id": i, "caption": text} for i, text in enumerate(captions)]
    file = folder / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")
    return file


def test_three_doubled_ids_in_a_thousand_are_all_listed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    ids = [str(i) for i in range(997)] + ["5", "77", "996"]
    corpus = Corpus("test", tmp_path, tmp_path, "", lambda: (Row(key, "a.png", ("a cat",)) for key in ids))
    with pytest.raises(CorpusError) as caught:
        write_index(tmp_path / "s.zarr" / "index", corpus, 100, 0.1, None)
    assert not (tmp_path / "s.zarr/index/index.json").exists()
    listed = str(caught.value).partition(": ")[2].partition(";")[0].split(", ")
    line("doubled ids, 3 in 1,000: listed", 3, len(set(listed) & {"5", "77", "996"}))


def test_five_blank_captions_in_a_hundred_are_dead_letters(tmp_path: Path) -> None:
    blank = ["", " \n\t", "\0", "\0 \0", "\u2003"]
    captions = [blank[i // 20] if i % 20 == 3 else f"a caption of {i}" for i in range(100)]
    source = open_corpus(coco(tmp_path / "p", captions), tmp_path / "p")
    few = load_settings(overrides=["store.shard_rows=50"])
    report = extract(source, tmp_path / "s.zarr", ["clip"], few, in_process=True)
    dead = [d["id"] for d in report["dead"] if "blank" in d["reason"]]
    assert report["captions"] == 95 and sorted(map(int, dead)) == [3, 23, 43, 63, 83]
    line("blank or NUL captions, 5 in 100: dead letters", 5, len(dead))


HALVES = strategies.characters(categories=["Cs"])  # of a surrogate pair, as a cut emoji leaves them in JSON
TEXT = strategies.text(strategies.characters() | HALVES, min_size=1)


def unicode_captions(folder: Path, count: int) -> None:
    """Captions through a COCO file and the index, and back; exact but for white space and NUL, which end as one space,
    and for unpaired surrogates, which no UTF-8 can hold."""
    (folder / "a.png").write_bytes(b"x")
    tried = []

    @given_settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategies.lists(TEXT, min_size=1, max_size=5))
    def exact(texts: list[str]) -> None:
        place = folder / str(len(tried))
        place.mkdir()
        images = [{"id": 1, "file_name": "a.png"}]
        content = {"images": images, "annotations": [{"image_id": 1, "caption": text} for text in texts]}
        text = json.dumps(content, ensure_ascii=len(tried) % 2 == 0).encode("utf-8", "surrogatepass")
        (place / "c.json").write_bytes(text)
        write_index(place / "s.zarr/index", open_corpus(place / "c.json", folder), 10, 0.1, None)
        _, captions = Index(place / "s.zarr/index").captions()
        whole = [row["caption"] for row in json.loads(text)["annotations"]]
        whole = ["".join(c for c in text if not "\ud800" <= c <= "\udfff") for text in whole]
        want = [" ".join(text.replace("\0", " ").split()) for text in whole]
        assert [captions[i] for i in range(len(captions))] == [text for text in want if text]
        tried.append(len(texts))
        shutil.rmtree(place)

    exact()
    line("unicode captions, drawn by hypothesis", max(count, len(tried)), len(tried))


def test_unicode_captions_are_exact(tmp_path: Path) -> None:
    unicode_captions(tmp_path, 15)


@pytest.mark.slow
def test_two_hundred_unicode_captions_are_exact(tmp_path: Path) -> None:
    unicode_captions(tmp_path, 200)


def test_a_file_name_that_is_no_unicode_is_a_dead_letter(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """From JSON and from the disk, and the same for `corpus info` as for an extraction."""
    file = coco(tmp_path / "json", [f"{i}" for i in range(3)])
    content = json.loads(file.read_text())
    content["images"][1]["file_name"] = "\ud83d.png"
    file.write_text(json.dumps(content))
    coco(tmp_path / "disk", ["1", "2"]).unlink()
    shutil.copy(tmp_path / "disk/0.png", os.fsencode(tmp_path / "disk") + b"/\xff.png")
    few = load_settings(overrides=["corpus.max_dead_fraction=0.5"])
    for name, source, root in (("json", file, tmp_path / "json"), ("disk", tmp_path / "disk", None)):
        report = extract(open_corpus(source, root), tmp_path / f"{name}.zarr", ["clip"], few, in_process=True)
        assert [d["reason"] for d in report["dead"]] == ["its file name is no Unicode text"]
        told = tmp_path / "told.json"
        main(["corpus", "info", str(source), "--json", str(told), *(["--images", str(root)] if root else [])])
        assert [d["reason"] for d in json.loads(told.read_text())["dead"]] == ["its file name is no Unicode text"]
    line("a file name that is no Unicode text: a dead letter", 2, 2)


def test_pipes_and_devices_are_dead_letters_and_are_never_read(tmp_path: Path) -> None:
    coco(tmp_path / "p", ["a", "b"]).unlink()
    os.mkfifo(tmp_path / "p/pipe.jpg")
    (tmp_path / "p/zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "p/folder.jpg").mkdir()
    held = os.open(tmp_path / "p/pipe.jpg", os.O_RDWR)  # so that a failing test does not wait for ever
    rows = list(hashed(tmp_path / "p", open_corpus(tmp_path / "p").rows()))
    os.close(held)
    dead = [reason for *_, reason in rows if reason]
    assert len(rows) == 5 and dead == ["cannot be read: it is no regular file"] * 3
    os.mkfifo(tmp_path / "pipe.json")
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("pipe.json", "pipe.tar"):
        with pytest.raises(CorpusError, match="neither a file nor a folder"):
            open_corpus(tmp_path / name, tmp_path if name == "pipe.json" else None)
    line("pipes, devices and folders among the pictures", 3, len(dead))


def test_another_number_of_rows_a_shard_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = open_corpus(coco(tmp_path / "p", ["a", "b", "c"]), tmp_path / "p")
    for rows in (2, 3):
        plan_index(tmp_path / "s.zarr", source, load_settings(overrides=[f"store.shard_rows={rows}"]), None)
    assert "keeps 2 rows a shard, as it was planned, not 3" in capsys.readouterr().out


BOMB = """
import re, struct, sys, zlib
from pathlib import Path
from pipeline.images import BadImage, decode
from xformer.settings import load_settings
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
side = 14_000
packer = zlib.compressobj(9)
rows = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()
header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
bomb = b"\\x89PNG\\r\\n\\x1a\\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
Path("/proc/self/clear_refs").write_text("5")
icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(bomb), 22) + bomb
before = peak()
for preset, content in (("tiny", bomb), ("paper", bomb), ("paper", icon)):
    try:
        decode(content, load_settings(preset).corpus.max_image_pixels)
        print("decoded")
    except BadImage as error:
        print("refused:", error)
print("more", peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_whole_bomb_of_14000_pixels_costs_no_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOMB],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    *refused, more = done.stdout.splitlines()
    assert all(text.startswith("refused: ") for text in refused), done.stdout
    assert ["pixels" in text for text in refused] == [True, True, False] and float(more.split()[1]) < 50
    line("a decompression bomb of 14,000 x 14,000 (two presets, and in an icon), MiB more below 50", 3, len(refused))


def test_too_many_bad_pictures_stop_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    coco(tmp_path / "p", [f"{i}" for i in range(30)])
    for i in range(3):
        (tmp_path / f"p/{i}.png").write_bytes(b"")
    words = ["extract", "--encoder", "clip", "--corpus", "p"]
    assert "max_dead_fraction" in fails(capsys, *words)
    line("too many bad pictures: the command stops", 1, 1)


NEST = "[" * 200_000
HOSTILE_JSON = {
    "nesting": NEST,
    "nested images": '{"images": ' + NEST,
    "nested objects": '{"a":' * 200_000,
    "cut off": '{"images": [{"id": 1, "file_name": "a',
    "not UTF-8": '{"images": [], "annotations": []}\udcff',
    "a huge number": '{"images": [{"id": ' + "9" * 5000 + ', "file_name": "a.png"}], "annotations": []}',
    "not a number": '{"images": [{"id": NaN, "file_name": "a.png"}], "annotations": []}',
    "infinite": '{"images": [{"id": Infinity, "file_name": "a.png"}], "annotations": []}',
    "a list of numbers": '{"images": [1, 2], "annotations": []}',
    "another type": '{"images": {"id": 1}, "annotations": 7}',
    "an unknown image": '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 2, "caption": "x"}]}',
}


def test_hostile_json_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    refused = 0
    for name, text in HOSTILE_JSON.items():
        file = tmp_path / "captions.json"
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
        sentence = fails(capsys, "corpus", "info", str(file), "--images", str(tmp_path))
        assert sentence.startswith("xformer: ") and len(sentence) < 1000, (name, sentence)
        refused += "captions.json" in sentence
    line("hostile JSON", len(HOSTILE_JSON), refused)


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_hostile_pickles_are_never_executed(
    corpus: Path, stage1: Path, features: Path, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As a file to import, as an encoder's safetensors, as MAE and OPT .bin weights, as a run's checkpoint."""
    marker = tmp_path / "executed"
    hostile = pickle.dumps({"model": Bomb(marker)})
    (tmp_path / "blip2.pth").write_bytes(hostile)
    folders = {}
    for kind, name in (("clip", "model.safetensors"), ("mae", "pytorch_model.bin"), ("llm", "pytorch_model.bin")):
        folders[kind] = Path(shutil.copytree(ROOT / "xformer/tiny" / kind, tmp_path / kind))
        (folders[kind] / "model.safetensors").unlink()
        (folders[kind] / name).write_bytes(hostile)
    run = Path(shutil.copytree(stage1, tmp_path / "run"))
    for file in run.rglob("*.safetensors"):
        file.write_bytes(hostile)
    few = [word for override in small for word in ("--set", override)]
    extraction = ["extract", "--corpus", str(corpus), "--store", str(tmp_path / "s.zarr")]
    commands = [
        ["import", str(tmp_path / "blip2.pth"), "--out", str(tmp_path / "imported")],
        [*extraction, "--encoder", "clip", "--weights", str(folders["clip"])],
        [*extraction, "--encoder", "mae", "--weights", str(folders["mae"])],
        ["train", "--stage", "2", "--features", str(features), "--init", str(stage1), "--out", str(tmp_path / "run2"),
         "--llm", str(folders["llm"]), *few],
        ["train", "--stage", "2", "--features", str(features), "--init", str(run), "--out", str(tmp_path / "run3"), *few],
    ]  # fmt: skip
    refused = 0
    for words in commands:
        sentence = fails(capsys, *words)
        assert sentence.startswith("xformer: ") and not marker.exists(), (words, sentence)
        refused += 1
    line("hostile pickles", len(commands), refused)
