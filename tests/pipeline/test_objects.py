"""A store in an object store: moto speaks S3 on 127.0.0.1, and a layer before it fails, waits or lies when told to."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cli import main
from pipeline import audit, cache, objects, places, reader, store, upkeep
from pipeline.cache import LocalCache
from pipeline.corpora import open_corpus
from pipeline.extract import extract, plan_index
from pipeline.redo import repair, retry
from pipeline.store import FeatureStore
from tests.pipeline.test_extract import shards
from xformer.errors import CorpusError, StoreError
from xformer.settings import Settings

pytest.importorskip("obstore")
pytest.importorskip("moto")
NAME = "clip/5/tokens"


class Server:
    """moto behind a layer that answers the next requests that match with 503, or too late, and counts requests."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Silent(WSGIRequestHandler):
            def log(self, *_: object) -> None:
                pass

        self.inner, self.faults, self.seen = DomainDispatcherApplication(create_backend_app), [], []
        self.http = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Silent)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def fail(self, what: str, kind: str, times: int = 1 << 30) -> None:
        """The next `times` requests whose "METHOD /path" matches get: "503", "late", or "lost" (done, but no answer)."""
        self.faults.append([re.compile(what), kind, times])

    def __call__(self, environ: dict, start_response):
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.seen.append(request)
        for fault in self.faults:
            if fault[2] and fault[0].search(request):
                fault[2] -= 1
                if fault[1] == "late":
                    time.sleep(3)
                if fault[1] == "lost":
                    list(self.inner(environ, lambda *_: None))
                start_response("503 Slow Down", [("Content-Length", "0")])
                return [b""]
        return self.inner(environ, start_response)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A bucket called "bucket"; the environment leads every client of this test process to it."""
    made = Server()
    given = {
        "AWS_ENDPOINT_URL": made.url, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for key, value in given.items():
            patch.setenv(key, value)
        import boto3

        boto3.client("s3", endpoint_url=made.url).create_bucket(Bucket="bucket")
        yield made
    made.http.shutdown()


@pytest.fixture(autouse=True)
def calm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No faults left over; a cache of its own for each test."""
    if "server" in request.fixturenames:
        made = request.getfixturevalue("server")
        made.faults.clear()
        made.seen.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives up after two seconds instead of half a minute."""
    monkeypatch.setattr(objects, "PATIENCE", 2.0)
    monkeypatch.setattr(objects, "TIMEOUT", 1.0)
    objects._client.cache_clear()
    yield
    objects._client.cache_clear()


@pytest.fixture(scope="module")
def remote(server: Server, corpus: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same extraction as the fixture `features`, into an object store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        path = Path("s3://bucket/made/store.zarr")
        extract(open_corpus(corpus), path, ["clip", "mae"], settings, in_process=True)
    return path


def copy_of(remote: Path, name: str) -> Path:
    """The store under another name; its objects may be spoilt."""
    copy = Path("s3://bucket") / name / "store.zarr"
    for place in places.walk(remote):
        places.write(copy / place.relative_to(remote), places.read(place))
    return copy


def test_extraction_into_an_object_store_writes_the_bytes_of_a_local_one(remote: Path, features: Path) -> None:
    ours = {
        place.relative_to(remote).as_posix(): hashlib.sha256(places.read(place)).hexdigest()
        for place in places.walk(remote)
        if "/c/" in place.as_posix() and "index" not in place.parts
    }
    theirs = {name: digest for name, digest in shards(features).items() if not name.startswith("index")}
    assert ours == theirs and len(ours) == 24
    assert not places.exists(remote / objects.LEASE_NAME)
    assert places.children(remote / NAME / "commits")[0] == ["sealed.copy.parquet", "sealed.parquet"]


def test_info_verify_and_training_from_it(
    remote: Path, features: Path, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    url = "s3://bucket/made/store.zarr"
    main(["store", "info", url, "--json", str(tmp_path / "info.json")])
    main(["store", "verify", url])
    assert f"{url}: every committed shard is intact" in capsys.readouterr().out
    arrays = json.loads((tmp_path / "info.json").read_text())["arrays"]
    assert arrays[NAME]["shards"] == "4/4" and arrays == upkeep.info(features)["arrays"] | {
        name: upkeep.info(features)["arrays"][name] | {"seconds": array["seconds"]} for name, array in arrays.items()
    }
    few = [word for override in small for word in ("--set", override)]
    for place, out in ((url, "far"), (str(features), "near")):
        main(["train", "--stage", "1", "--features", place, "--out", str(tmp_path / out), *few])
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / out / "log.jsonl").read_text().splitlines()
            if '"loss"' in line
        ]
        for out in ("far", "near")
    ]
    assert losses[0] == losses[1] and len(losses[0]) >= 4


def test_merging_there_and_back_gives_the_same_bytes(remote: Path, features: Path, tmp_path: Path) -> None:
    there, back = "s3://bucket/merged/store.zarr", tmp_path / "back.zarr"
    main(["store", "merge", there, str(features), "s3://bucket/made/store.zarr"])
    main(["store", "merge", str(back), there])
    assert audit.verify(Path(there)) == [] and shards(back) == shards(features)


def test_a_refused_extraction_leaves_no_object(server: Server, tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "pictures").mkdir()
    for name in "abc":
        (tmp_path / f"pictures/{name}.png").write_bytes(b"")
    with pytest.raises(CorpusError, match="no image of 3 is usable"):
        extract(open_corpus(tmp_path / "pictures"), Path("s3://bucket/no.zarr"), ["clip"], settings, in_process=True)
    assert not places.walk(Path("s3://bucket/no.zarr"))


def test_rows_come_by_range_and_then_from_the_cache(
    remote: Path, features: Path, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cache, "WHOLE", 1000)
    want = FeatureStore(features).complete(NAME)
    rows = np.random.default_rng(0).permutation(128)[:40]
    kept = LocalCache(tmp_path / "kept")
    array = FeatureStore(remote, kept).complete(NAME)
    server.seen.clear()
    np.testing.assert_array_equal(array.read(rows), want.read(rows))
    assert 40 <= sum(request.startswith("GET") for request in server.seen) <= 40 + 32 * 4
    server.seen.clear()
    np.testing.assert_array_equal(array.read(rows), want.read(rows))
    again = FeatureStore(remote, LocalCache(tmp_path / "kept")).complete(NAME)
    server.seen.clear()
    np.testing.assert_array_equal(again.read(rows), want.read(rows))
    assert server.seen == []
    for file in (tmp_path / "kept/shards").iterdir():  # a disk that forgets or a process that was killed
        content = bytearray(file.read_bytes())
        content[100:4000] = bytes(3900)
        file.write_bytes(content)
    every = np.arange(128)
    np.testing.assert_array_equal(again.read(every), want.read(every))


def test_the_cache_keeps_its_budget_and_evicts_what_was_opened_longest_ago(
    remote: Path, features: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cache, "WHOLE", 1000)
    kept, want = LocalCache(tmp_path / "kept", budget=120_000), FeatureStore(features).complete(NAME)
    array, rows = FeatureStore(remote, kept).complete(NAME), np.arange(128)
    for _ in range(2):
        for part in np.split(rows, 16):
            np.testing.assert_array_equal(array.read(part), want.read(part))
            used = sum(f.stat().st_blocks * 512 for f in (tmp_path / "kept/shards").iterdir())
            assert used <= 120_000 + 8 * 4096  # a file system counts in blocks
    newest = {array._shard(3).file.name, array._shard(2).file.name}
    assert newest <= {f.name for f in (tmp_path / "kept/shards").iterdir()} and len(newest) == 2


@pytest.mark.parametrize("whole", [True, False])
def test_missing_cut_and_changed_objects_are_errors_and_never_zeros(
    remote: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WHOLE", 1 << 20 if whole else 1000)
    path = copy_of(remote, f"spoilt-{whole}")
    places_of = [store.shard_file(path, NAME, shard, 3) for shard in range(4)]
    content = places.read(places_of[1])
    places.remove(places_of[0])
    places.write(places_of[1], content[:-100])
    changed = bytearray(content)
    changed[40 * 32] ^= 1
    places.write(places_of[1 + 1], bytes(changed))
    array = FeatureStore(path).complete(NAME)
    for row in (3, 40, 64):
        with pytest.raises(StoreError, match=r"s3://bucket.* is damaged"):
            array.read([row])
    assert np.isfinite(array.read([100])).all()
    assert len(audit.verify(path)) == 3
    if whole:
        sealed, content = path / NAME / "commits/sealed.parquet", places.read(path / NAME / "commits/sealed.parquet")
        places.write(sealed, content[:-1])
        with pytest.raises(StoreError, match="damaged commit records"):
            FeatureStore(path).array(NAME)
        repaired, left = repair(path, in_process=True)
        assert len(repaired) == 4 and left == [] and audit.verify(path) == []
        assert [hashlib.sha256(places.read(p)).digest() for p in [*places_of, sealed]] == [
            hashlib.sha256(c).digest()
            for c in [*(places.read(remote / p.relative_to(path)) for p in places_of), content]
        ]


def test_a_retry_there_makes_only_the_shard_of_the_picture_that_came_back(
    remote: Path, server: Server, corpus: Path, settings: Settings, tmp_path: Path
) -> None:
    path, source = Path("s3://bucket/retried/store.zarr"), open_corpus(corpus)
    plan_index(path, source, settings, None)
    picture = corpus / FeatureStore(path).index.shard(2)[3]["location"]
    os.rename(picture, tmp_path / "away.png")
    try:
        extract(source, path, ["clip"], settings, in_process=True)
    finally:
        os.rename(tmp_path / "away.png", picture)
    assert FeatureStore(path).complete(NAME).dead_rows.tolist() == [67]
    opened = FeatureStore(path, LocalCache(tmp_path / "other")).complete(NAME)  # before; its cache is empty
    server.seen.clear()
    assert retry(path, in_process=True) == {"looked at": 1, "tried": 1, "dead": 0}
    assert {request for request in server.seen if "PUT" in request and "/c/" in request} == {
        f"PUT /bucket/retried/store.zarr/{NAME}/c/2/0/0"
    }
    want = [places.read(store.shard_file(remote, NAME, shard, 3)) for shard in range(4)]
    assert [places.read(store.shard_file(path, NAME, shard, 3)) for shard in range(4)] == want
    rows = [66, 67]  # of the new object, the one unchanged
    np.testing.assert_array_equal(opened.read(rows[:1]), FeatureStore(remote).complete(NAME).read(rows[:1]))
    np.testing.assert_array_equal(opened.read(rows), FeatureStore(remote).complete(NAME).read(rows))
    assert audit.verify(path) == [] and not places.exists(path / objects.LEASE_NAME)


def test_two_503_or_a_late_answer_and_then_success(remote: Path, server: Server, hasty: None) -> None:
    place = store.shard_file(remote, NAME, 0, 3)
    content = places.read(place)
    for kind, times in (("503", 2), ("late", 1)):
        server.fail("GET .*/c/0/0/0", kind, times)
        assert places.read(place) == content
    server.fail("PUT .*/new", "503", 2)
    places.write(remote.parent / "new", b"x" * 100)
    assert places.read(remote.parent / "new") == b"x" * 100


def test_a_store_that_stays_away_is_one_error_in_bounded_time(remote: Path, server: Server, hasty: None) -> None:
    for kind in ("503", "late"):
        server.faults.clear()
        server.fail("GET .*/c/", kind)
        array = FeatureStore(remote).complete(NAME)
        with pytest.raises(StoreError, match=r"s3://bucket/made.*the object store does not do what it is asked"):
            array.read([0])
    server.faults.clear()
    server.fail("", "503")
    with pytest.raises(SystemExit):
        main(["store", "info", "s3://bucket/made/store.zarr"])
    assert objects.PATIENCE < 60
    objects._client.cache_clear()


def test_exactly_one_put_of_a_commit_wins(server: Server) -> None:
    place = Path("s3://bucket/commits/7.json")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: objects.create(place, f"{i}".encode()), range(8)))
    assert sum(won) == 1 and places.read(place) == f"{won.index(True)}".encode()
    server.fail("PUT .*/8.json", "lost", 1)  # the first try is done, its answer is lost, the second finds it there
    assert objects.create(Path("s3://bucket/commits/8.json"), b"mine")


def test_one_writer_at_a_time(server: Server) -> None:
    path, ran = Path("s3://bucket/owned/store.zarr"), threading.Barrier(6)

    def race(_: int) -> str:
        ran.wait()
        try:
            with store.owner(path):
                time.sleep(1)
            return "owner"
        except StoreError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        ends = list(pool.map(race, range(6)))
    assert ends.count("owner") == 1
    assert all("another extraction is writing it" in end for end in ends if end != "owner")
    code = (
        "import os, sys; from pathlib import Path; from pipeline import store\n"
        "with store.owner(Path(sys.argv[1])): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, "s3://bucket/owned/store.zarr"], env=os.environ, check=False)
    assert places.exists(path / objects.LEASE_NAME)
    with store.owner(path):  # its process is gone
        pass
    assert not places.exists(path / objects.LEASE_NAME)


def test_what_is_no_store(server: Server) -> None:
    with pytest.raises(StoreError, match=r"s3://bucket/nothing.zarr is no feature store"):
        FeatureStore(Path("s3://bucket/nothing.zarr"))
    with pytest.raises(StoreError, match="write s3://BUCKET/PATH"):
        FeatureStore(Path("s3://"))
    assert reader.REQUESTS > 1


def test_a_bucket_that_is_missing_and_a_lease_that_is_damaged_are_told(server: Server, settings: Settings) -> None:
    for ask in (lambda path: objects.put(path, b"x"), objects.children, objects.walk):
        with pytest.raises(StoreError, match=r"^s3://nowhere/s.zarr: there is no bucket nowhere; make it") as caught:
            ask(Path("s3://nowhere/s.zarr"))
        assert "<" not in str(caught.value)
    with pytest.raises(StoreError, match="there is no bucket nowhere"):
        FeatureStore(Path("s3://nowhere/s.zarr"))
    path = Path("s3://bucket/torn.zarr")
    objects.put(path / objects.LEASE_NAME, b"{")
    with pytest.raises(StoreError, match="another extraction is writing it"), store.owner(path):
        pass
    objects.delete([path / objects.LEASE_NAME])
