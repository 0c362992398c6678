"""Features made in another way than a checkpoint's: every field of every fingerprint, changed once, is named."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline import commits, store
from tests.faults.report import line
from xformer import checkpoint
from xformer.data import Cache
from xformer.errors import StoreError
from xformer.settings import Settings, load_settings
from xformer.train import compare_identities, train_stage2


def changed(value: object) -> object:
    return value + 1 if isinstance(value, int | float) and not isinstance(value, bool) else f"{value} changed"


def rewrite(path: Path, name: str, part: str, field: str) -> None:
    """Changes one field in an array's zarr.json, with a fingerprint that fits it."""
    file = path / name / "zarr.json"
    content = json.loads(file.read_text())
    attributes = content["attributes"]
    attributes[part][field] = changed(attributes[part][field])
    before, attributes["fingerprint"] = attributes["fingerprint"], store.fingerprint(attributes["identity"])
    file.write_text(json.dumps(content))
    records = commits.committed(path, name)
    assert {record["fingerprint"] for record in records.values()} == {before}
    renamed = {shard: record | {"fingerprint": attributes["fingerprint"]} for shard, record in records.items()}
    commits._write(path, name, renamed)


def test_every_identity_field_changed_once_is_named(
    features: Path, stage1: Path, settings: Settings, small: list[str], tmp_path: Path
) -> None:
    trained = checkpoint.read_state(checkpoint.newest(stage1))["identities"]
    names = {"clip": "clip/5/tokens", "mae": "mae/draw-0/tokens"}
    fields = [(kind, field) for kind in trained for field in trained[kind]]
    refused = 0
    for kind, field in fields:
        path = Path(shutil.copytree(features, tmp_path / f"{kind}-{field}.zarr"))
        rewrite(path, names[kind], "identity", field)
        # which tokens of C are cached is a setting too, and refused by it before any checkpoint is read
        named = (
            "clip/5/tokens holds global changed tokens"
            if (kind, field) == ("clip", "tokens")
            else f"{kind} {field} is "
        )
        with pytest.raises(StoreError, match=named):
            cache = Cache(path, settings, "xformer", pixels=False)
            compare_identities(trained, cache.identities(), "run", "store")
        refused += 1
        if field in ("weights_sha256", "mask_algorithm"):  # and through the trainer itself, before its first step
            with pytest.raises(StoreError, match=field):
                train_stage2([path], stage1, tmp_path / "run2", load_settings(overrides=small), None, resume=False)
            assert not (tmp_path / "run2/log.jsonl").exists()
        shutil.rmtree(path)
    line("a fingerprint field changed: identity", len(fields), refused)


def test_every_usage_field_changed_once_is_named(features: Path, settings: Settings, tmp_path: Path) -> None:
    usages = {name: store.attributes(features, name)["usage"] for name in ("clip/5/tokens", "mae/draw-1/tokens")}
    fields = [(name, field) for name, usage in usages.items() for field in usage]
    refused = 0
    for name, field in fields:
        path = Path(shutil.copytree(features, tmp_path / f"{len(name)}-{field}.zarr"))
        rewrite(path, name, "usage", field)
        with pytest.raises(StoreError, match=field):
            Cache(path, settings, "xformer", pixels=True)
        refused += 1
        shutil.rmtree(path)
    line("a fingerprint field changed: usage", len(fields), refused)
