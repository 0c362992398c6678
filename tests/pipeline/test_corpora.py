"""The corpora of the paper: the same rows from every layout, and nothing from a hostile one."""

import io
import json
import struct
import tarfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import tars
from pipeline.captioned import Row
from pipeline.corpora import open_corpus, read_image
from pipeline.extract import extract
from pipeline.write_index import AHEAD, hashed, write_index
from tests.conftest import SHARED
from tests.pipeline.test_extract import shards
from xformer.errors import CorpusError
from xformer.settings import load_settings


def picture(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 12), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes, **more) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def img2dataset(path: Path, start: int, count: int, tar_format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for i in range(start, start + count):
            add(tar, f"{i:09d}.png", picture(i))
            add(tar, f"{i:09d}.json", json.dumps({"caption": f"json {i}", "status": "success"}).encode())
            if i % 2:
                add(tar, f"{i:09d}.txt", f"caption {i} ü".encode())
    return path


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_img2dataset_are_addressable_by_offset(tmp_path: Path, tar_format: int) -> None:
    img2dataset(tmp_path / "00000.tar", 0, 3, tar_format)
    img2dataset(tmp_path / "00001.tar", 3, 2, tar_format)
    for source in (tmp_path, tmp_path / "0000*.tar"):
        corpus = open_corpus(source)
        rows = list(corpus.rows())
        assert [r.id for r in rows] == [f"{i:09d}.png" for i in range(5)]
        assert [r.captions[0] for r in rows] == ["json 0", "caption 1 ü", "json 2", "caption 3 ü", "json 4"]
        assert [read_image(corpus.root, r.location) for r in rows] == [picture(i) for i in range(5)]
    assert len(list(open_corpus(tmp_path / "00001.tar").rows())) == 2


def test_long_names_are_read_in_both_dialects(tmp_path: Path) -> None:
    name = "/".join(["folder" * 5] * 6) + "/ü.png"
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
            add(tar, name, picture(1))
            add(tar, "b.png", picture(2))
        assert [m.name for m in tars.members(tmp_path / "a.tar")] == [name, "b.png"]


HOSTILE = {
    "parent": ({"name": "../out.png"}, "leads out"),
    "inner parent": ({"name": "a/../../out.png"}, "leads out"),
    "absolute": ({"name": "/etc/out.png"}, "leads out"),
    "symbolic link": ({"name": "a.png", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "no plain file"),
    "hard link": ({"name": "a.png", "type": tarfile.LNKTYPE, "linkname": "b.png"}, "no plain file"),
    "device": ({"name": "a.png", "type": tarfile.CHRTYPE}, "no plain file"),
    "pipe": ({"name": "a.png", "type": tarfile.FIFOTYPE}, "no plain file"),
    "sparse": ({"name": "a.png", "type": tarfile.GNUTYPE_SPARSE}, "no plain file"),
    "pax bomb": ({"name": "a.png", "pax_headers": {"comment": "x" * 2_000_000}}, "more header"),
    "pax path": ({"name": "a.png", "pax_headers": {"path": "../../out.png"}}, "leads out"),
    "long name bomb": ({"name": "x" * 1_000_000}, "more header"),
}


@pytest.mark.parametrize("which", HOSTILE)
def test_hostile_members_are_refused(tmp_path: Path, which: str) -> None:
    fields, words = HOSTILE[which]
    fields = dict(fields)
    form = tarfile.PAX_FORMAT if "pax_headers" in fields else tarfile.GNU_FORMAT
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        add(tar, "good.png", picture(1))
        add(tar, str(fields.pop("name")), b"", **fields)
    with pytest.raises(CorpusError, match=words):
        list(open_corpus(tmp_path).rows())
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_a_size_beyond_the_tar_and_a_wrong_checksum_are_refused(tmp_path: Path) -> None:
    content = bytearray(img2dataset(tmp_path / "a.tar", 0, 1).read_bytes())
    content[124:136] = struct.pack(">BxxxQ", 0x80, 2**62)
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(CorpusError, match="checksum"):
        list(tars.members(tmp_path / "a.tar"))
    total = sum(content[:148]) + sum(content[156:512]) + 8 * 32
    content[148:156] = f"{total:06o}\0 ".encode()
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(CorpusError, match="cut off"):
        list(tars.members(tmp_path / "a.tar"))


def test_a_tar_cut_anywhere_is_an_error_and_never_fewer_samples(tmp_path: Path) -> None:
    content = img2dataset(tmp_path / "a.tar", 0, 4).read_bytes()
    end = len(content.rstrip(b"\0"))
    for size in range(1, end, 300):
        (tmp_path / "a.tar").write_bytes(content[:size])
        with pytest.raises(CorpusError):
            list(tars.members(tmp_path / "a.tar"))
    for size in range(512, end, 512):
        (tmp_path / "a.tar").write_bytes(content[:size])
        with pytest.raises(CorpusError, match="cut off"):
            list(tars.members(tmp_path / "a.tar"))


def test_concatenated_tars_are_read_on_and_an_end_that_is_none_is_an_error(tmp_path: Path) -> None:
    parts = [img2dataset(tmp_path / f"{i}.tar", 3 * i, 3).read_bytes() for i in range(2)]
    data = parts[0].rstrip(b"\0")
    data += bytes(-len(data) % 512)
    record = data + bytes((1 << 16) - (len(data) + 1024) % (1 << 16) + 1024)  # as tar -b 128 ends it
    file = tmp_path / "a.tar"
    first, second = ([m.name for m in tars.members(tmp_path / f"{i}.tar")] for i in range(2))
    good = {b"".join(parts): first + second, parts[0] * 3: first * 3, data + bytes(512): first, record: first}
    for content, names in good.items():
        file.write_bytes(content)
        found = list(tars.members(file))
        assert [member.name for member in found] == names
        assert all(content[m.offset :].startswith(b"\x89PNG") for m in found if m.name.endswith(".png"))
    bad = {
        "a lone block of zeros": data + bytes(512) + parts[1],
        "which no tar ends with": data + bytes(20_000),
        "bytes of zeros or more": data + bytes(3 << 20) + parts[1],
        "is no number": parts[0] + b"x" * 512,
        "cut off": data + bytes(1024) + b"x" * 100,
    }
    for words, content in bad.items():
        file.write_bytes(content)
        with pytest.raises(CorpusError, match=f"{file}.*{words}"):
            list(tars.members(file))


def test_a_tar_whose_end_is_zeros_holds_fewer_pictures_than_img2dataset_says(tmp_path: Path) -> None:
    whole = img2dataset(tmp_path / "00000.tar", 0, 3).read_bytes()
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 5, "successes": 3}))
    assert len(list(open_corpus(tmp_path).rows())) == 3
    (tmp_path / "00000.tar").write_bytes(whole[:2048] + bytes(len(whole) - 2048))
    with pytest.raises(CorpusError, match="00000.tar: holds 1 pictures, its _stats.json says 3"):
        list(open_corpus(tmp_path).rows())


def test_one_bad_caption_in_a_tar_is_one_dead_letter(tmp_path: Path) -> None:
    captions = {"a.json": b"{", "b.txt": b"\xff\xfe", "c.json": b'{"caption": 5}', "d.txt": b"x" * (2 << 20),
                "e.json": b"[1]", "f.json": b'{"caption": "cut \\ud83d"}', "g.txt": b"whole"}  # fmt: skip
    with tarfile.open(tmp_path / "A.TAR", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, text in captions.items():
            add(tar, f"{name[0]}.png", picture(1))
            add(tar, name, text)
        add(tar, "\udcff.png", picture(2))
    corpus = open_corpus(tmp_path)
    rows = list(corpus.rows())
    assert [row.reason[:8] for row in rows] == [
        "its .jso", "its .txt", "the capt", "its .txt", "its .jso", "", "", "its file"
    ]  # fmt: skip
    assert [row.captions for row in rows[5:7]] == [("cut",), ("whole",)] and rows[-1].id == r"\udcff.png"
    assert read_image(corpus.root, rows[0].location) == picture(1)  # of a tar in capital letters
    index = write_index(tmp_path / "s.zarr/index", corpus, 100, 0.1, None)
    assert (index["images"], index["dead"], index["captions"]) == (8, 6, 2)


def test_parquet_lists_are_several_captions_and_a_missing_path_names_its_row(tmp_path: Path) -> None:
    def rows(images: list, captions: list) -> list:
        pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "t.parquet")
        return [(row.location, row.captions) for row in open_corpus(tmp_path / "t.parquet").rows()]

    assert rows(["1.jpg", "2.jpg", "3.jpg"], [["a cat", "a dog", None], None, []]) == [
        ("1.jpg", ("a cat", "a dog")), ("2.jpg", ()), ("3.jpg", ())
    ]  # fmt: skip
    with pytest.raises(CorpusError, match="row 1: its image path"):
        rows(["1.jpg", None], ["a", "b"])
    with pytest.raises(CorpusError, match="row 0: its caption"):
        rows(["1.jpg"], [[3]])


def test_a_folder_of_pictures_and_tars_is_ambiguous(tmp_path: Path) -> None:
    img2dataset(tmp_path / "x.tar", 0, 1)
    (tmp_path / "a.png").write_bytes(picture(1))
    with pytest.raises(CorpusError, match="1 tars and 1 pictures"):
        open_corpus(tmp_path)
    assert len(list(open_corpus(tmp_path / "*.tar").rows())) == 1


def test_pictures_are_hashed_by_several_threads_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, seen, asked = threading.Barrier(4), set(), []

    def slow(root: Path, location: str, forget: bool) -> tuple[bytes, int]:
        if int(location) < 4:
            waiting.wait(30)  # four at once, or it never goes on
        seen.add(threading.get_ident())
        return location.zfill(32).encode(), 1

    def rows():
        for i in range(1000):
            asked.append(i)
            yield Row(str(i), str(i), ())

    monkeypatch.setattr("pipeline.write_index.hash_image", slow)
    most = 0
    for number, (row, digest, size, reason) in enumerate(hashed(tmp_path, rows())):
        assert (int(row.id), int(digest), size, reason) == (number, number, 1, "")
        most = max(most, len(asked) - number)
    assert number == 999 and len(seen) >= 4 and most <= AHEAD


def test_tables_and_visual_genome_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "VG_100K_2").mkdir()
    for i in (1, 2):
        (tmp_path / f"VG_100K_2/{i}.jpg").write_bytes(picture(i))
    lines = [("VG_100K_2/1.jpg", 'a "quoted", cat'), ("VG_100K_2/1.jpg", "ein Kätzchen"), ("VG_100K_2/2.jpg", "a dog")]
    for name, mark in (("t.csv", ","), ("t.tsv", "\t")):
        text = "".join(f'{p}{mark}"{c.replace(chr(34), chr(34) * 2)}"\n' for p, c in lines)
        (tmp_path / name).write_text(f"image{mark}caption\n" + text, encoding="utf-8")
    table = pa.table({"caption": [c for _, c in lines], "image_path": [p for p, _ in lines]})
    pq.write_table(table, tmp_path / "t.parquet")
    phrases = [{"phrase": c, "region_id": n} for n, (_, c) in enumerate(lines)]
    regions = [{"id": 1, "regions": phrases[:2]}, {"id": 2, "regions": phrases[2:]}]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(regions))
    want = [("VG_100K_2/1.jpg", (lines[0][1], lines[1][1])), ("VG_100K_2/2.jpg", ("a dog",))]
    for name in ("t.csv", "t.tsv", "t.parquet", "region_descriptions.json"):
        corpus = open_corpus(tmp_path / name, tmp_path)
        assert [(r.location, r.captions) for r in corpus.rows()] == want, name
    assert [r.id for r in corpus.rows()] == ["1", "2"]


def test_damaged_tables_and_lists_are_one_sentence(tmp_path: Path) -> None:
    cases = {
        "no.csv": ("caption,url\nx,y\n", "none of its columns"),
        "cells.csv": ("image,caption\na.jpg\n", "1 cells"),
        "out.tsv": ("image\tcaption\n../a.jpg\tx\n", "leads out"),
        "huge.csv": ("image,caption\na.jpg," + "x" * 2_000_000 + "\n", "field"),
        "no.parquet": ("text", "as Parquet"),
        "cut.json": ('[{"id": 1, "regions": []}, {"id": 2', "cut-off"),
        "deep.json": ("[" * 200_000, "damaged"),
        "other.json": ('[{"x": 1}]', "Visual Genome"),
        "infinite.json": ('[{"id": Infinity, "regions": []}]', "Visual Genome"),
        "null.json": ('[{"id": 1, "regions": [{"phrase": null}]}]', "phrase of image 1 is null"),
    }
    for name, (text, words) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(CorpusError, match=words):
            list(open_corpus(tmp_path / name, tmp_path).rows())


@pytest.mark.skipif(not (SHARED / "coco_mini").is_dir(), reason="../shared/data/coco_mini is not here")
def test_a_tar_of_real_photos_gives_the_same_features_byte_for_byte(tmp_path: Path) -> None:
    mini = SHARED / "coco_mini"
    rows = list(open_corpus(mini / "captions.json", mini / "images").rows())
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for row in rows:
            stem = Path(row.location).stem
            add(tar, f"{stem}.jpg", (mini / "images" / row.location).read_bytes())
            add(tar, f"{stem}.txt", row.captions[0].encode())
    settings = load_settings(overrides=["store.shard_rows=16", "mae.draws=2"])
    sources = {"json": open_corpus(mini / "captions.json", mini / "images"), "tar": open_corpus(tmp_path)}
    for name, source in sources.items():
        report = extract(source, tmp_path / f"{name}.zarr", ["clip", "mae"], settings, in_process=True)
        assert report["images"] == 75 and not report["dead"]
    assert shards(tmp_path / "json.zarr") == shards(tmp_path / "tar.zarr")
