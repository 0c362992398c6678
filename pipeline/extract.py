"""The offline job: a corpus through a frozen encoder into the store, shard by shard, on a Dask cluster.

One task = one whole shard of every array that is still missing there. Rerunning does only what is missing.
"""

import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import (
    cluster,
    encode,
    fidelity,
    images,
    int8,
    masks,
    objects,
    places,
    provenance,
    sources,
    store,
    upkeep,
)
from pipeline.corpora import Corpus
from pipeline.index import Index
from pipeline.write_index import write_index
from xformer.console import progress, say
from xformer.errors import CorpusError, SettingsError, StoreError, WeightsError
from xformer.settings import Settings

Spec = tuple[tuple[int, ...], str, dict]  # of one array: shape of a row, dtype, usage


def array_specs(kind: str, settings: Settings, whole: bool, clip_tokens: dict[int, int]) -> dict[str, Spec]:
    """The arrays that one encoder's extraction fills, in the order in which they are declared.

    Args:
        whole: MAE features of the whole image instead of mask draws.
        clip_tokens: tokens of one image by CLIP block (257 for ViT-g/14 at 224), class token and all.

    Raises: SettingsError where draws do not divide over the views.
    """
    views, mae, side = settings.store.views, settings.mae, settings.image_size
    patches, specs = (side // mae.patch) ** 2, {}

    def tokens(name: str, shape: tuple[int, int], usage: dict) -> None:
        if settings.store.dtype == "int8":
            specs[f"{name.rpartition('/')[0]}/scale"] = shape[:1], "float16", usage
        specs[name] = shape, "int8" if settings.store.dtype == "int8" else "float16", usage

    if kind == "clip":
        for view in range(views):
            for layer in settings.clip.layers:
                name = f"clip/{layer}/{f'view-{view}/' if view else ''}tokens"
                tokens(name, (clip_tokens[layer], settings.clip.width), _view(view, settings))
        return specs
    ratio = 0.0 if whole else mae.mask_ratio
    draws: dict[str, int | None] = {f"mae/draw-{d}": d for d in range(mae.draws)} if ratio else {"mae/full": None}
    if ratio and mae.draws % views:
        raise SettingsError(
            f"store.views {views} must divide mae.draws {mae.draws}: draw d is made on view d mod views."
        )
    for prefix, draw in draws.items():
        seed = mae.mask_seed if draw is not None else None
        usage = _view((draw or 0) % views, settings) | {"mask_ratio": ratio, "draw": draw, "mask_seed": seed}
        tokens(f"{prefix}/tokens", (1 + masks.kept_count(patches, ratio), mae.width), usage)
        if draw is not None:
            specs[f"{prefix}/kept"] = (-(-patches // 8),), "uint8", usage
    for view in range(views):
        specs[f"pixels/view-{view}"] = (3, side, side), "uint8", _view(view, settings)
    return specs


def wanted(kind: str, settings: Settings, whole: bool) -> dict[str, Spec]:
    """The arrays of one encoder, which is loaded for it. Raises WeightsError or SettingsError where it cannot be."""
    model = encode.encoder(kind, settings.model_dump_json())
    counts = {layer: model.tokens(layer) for layer in settings.clip.layers} if kind == "clip" else {}
    return array_specs(kind, settings, whole, counts)


def identity(name: str, settings: Settings) -> dict[str, Any]:
    """Everything that decides the values of an array under these settings; its encoder is loaded for it."""
    kind = name.split("/")[0]
    if kind == "pixels":
        return {"schema": 1, "encoder": "pixels", "image_size": settings.image_size}
    model = encode.encoder(kind, settings.model_dump_json())
    found = model.layer_identity(int(name.split("/")[1])) if kind == "clip" else model.identity
    quantised = settings.store.dtype == "int8" and not name.endswith("/kept")
    return found | ({"quantiser": "int8 * token * channel"} if quantised else {})


def declare(
    path: Path, index: Index, specs: dict[str, Spec], settings: Settings, corpus: Corpus, force: bool,
    finished: Container[str] = (),
) -> None:  # fmt: skip
    """Declares arrays, and says how they are made; of those that are `finished` that stays as it was said.

    Raises: StoreError where they exist and differ, or where int8 loses more than store.int8_max_rmse without `force`.
    """
    new = [name for name, (_, dtype, _) in specs.items() if dtype == "int8" and not store.committed(path, name)]
    scales = fidelity.calibrate(index, new, settings, corpus.root, force) if new else {}
    for name, (shape, dtype, usage) in specs.items():
        channels = [float(value) for value in scales.get(name, ())]
        more = {"channel_scale": channels, "channel_scale_sha256": int8.digest(channels)} if channels else {}
        store.create_array(path, name, index, shape, dtype, identity(name, settings), usage, more)
    provenance.record(path, list(specs), corpus, settings, finished)


def _view(view: int, settings: Settings) -> dict:
    if view == 0:
        return {"view": 0, "crop": "resize"}
    return {"view": view, "crop": images.CROP, "view_seed": settings.store.view_seed}


def plan_index(path: Path, corpus: Corpus, settings: Settings, limit: int | None) -> Index:
    """Makes the index, or opens the one that is there.

    Raises: StoreError where it belongs to another corpus, or is lost; one without a committed shard is planned anew.
    """
    store.refuse_foreign(path)
    if places.exists(path / "index" / "index.json"):
        index = Index(path / "index")
        have = index.description["corpus"]
        want = {
            "kind": corpus.kind, "identity": corpus.identity, "limit": limit,
            "val_fraction": settings.corpus.val_fraction,
        }  # fmt: skip
        difference = store.first_difference(have, want)
        if not difference:
            for name in store.array_names(path):
                store.refuse_mixed(path, name, index)
                if not places.exists(path / name / "zarr.json"):
                    at = places.shown(path)
                    raise StoreError(f"{at}: {name}/zarr.json is lost; run: xformer store verify {at} --repair")
            if lost := store.lost_features(path):
                raise StoreError(
                    f"{places.shown(path)}: {lost[0]} has features but neither zarr.json nor made.json, which said how "
                    "they are to be read; restore them from a copy, or remove that folder."
                )
            if index.shard_rows != settings.store.shard_rows:
                rows = f"{index.shard_rows} rows a shard, as it was planned, not {settings.store.shard_rows}"
                say(f"{places.shown(path)} keeps {rows}")
            return index
        names = store.array_names(path)
        if any(store.committed(path, name) for name in names):
            raise StoreError(
                f"{places.shown(path)} was planned for another corpus: {difference}; give another --store."
            )
    store.clear_index(path)
    store.create_group(path)
    say(f"planning {places.shown(path)}: reading every image once")
    with places.built_here(path, "index", last="index.json") as here:
        write_index(here / "index", corpus, settings.store.shard_rows, settings.corpus.val_fraction, limit)
    return Index(path / "index")


@contextmanager
def _taken_back(path: Path) -> Iterator[None]:
    """Where an extraction is refused that made the store and committed nothing, no store is left behind."""
    files, folders = places.children(path)
    fresh = not folders and set(files) <= {objects.LEASE_NAME}
    try:
        yield
    except (CorpusError, SettingsError, WeightsError):
        if fresh and not any(store.committed(path, name) for name in store.array_names(path)):
            places.remove_folder(path)
        raise


def extract(
    corpus: Corpus,
    path: Path,
    kinds: list[str],
    settings: Settings,
    limit: int | None = None,
    whole: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    gpus: bool = False,
    in_process: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Fills `path` with the features of a corpus. Returns what was done.

    Args:
        kinds: "clip", "mae", or both.
        whole: MAE features of the whole image (`mae/full`) instead of mask draws.
        in_process: no cluster; for temporary stores of a few images.

    Raises: CorpusError, StoreError, WeightsError.
    """
    started = time.perf_counter()
    report: dict[str, Any] = {"store": places.shown(path), "corpus": str(corpus.root), "encoders": {}}
    check_gpus(gpus, scheduler)
    specs = {kind: wanted(kind, settings, whole) for kind in kinds}  # refused before any image is read
    declared = {kind: list(arrays) for kind, arrays in specs.items()}
    with store.owner(path), _taken_back(path):
        index = plan_index(path, corpus, settings, limit)
        names = [name for kind in kinds for name in declared[kind]]
        done: dict[str, set[int]] = {name: set() for name in names}
        known: dict[int, dict[int, dict]] = {}  # by shard, for all arrays of this pass
        dead: dict[int, dict] = {letter["row"]: letter for letter in index.dead()}
        begun: set[int] = set()  # shards of which there are features
        for name in store.array_names(path):
            records = store.committed(path, name)
            index.bounds(max(records, default=0))  # refuses a record of a shard that there is not
            begun |= records.keys()
            dead |= {letter["row"]: letter for record in records.values() for letter in record["dead"]}
            if name in done:
                done[name] = set(records)
                for shard, record in records.items():
                    known.setdefault(shard, {}).update({letter["row"]: letter for letter in record["dead"]})
        _check_dead(dead, index.count, settings)
        most = settings.corpus.max_dead_fraction
        sources.check_sample(path, index, sorted(begun), corpus.root, dead, most)
        finished = {name for name in names if len(done[name]) == index.shards}
        for kind in kinds:
            declare(path, index, specs[kind], settings, corpus, force, finished)
        todo: cluster.Todo = {}
        for shard in range(index.shards):
            if missing := [n for n in names if shard not in done[n]]:
                pairs = {f"{n.rpartition('/')[0]}/tokens" for n in missing if n.endswith("/scale")}
                missing += sorted(pairs - {*missing})  # a scale is made with its tokens, which stay as they are
                todo[shard] = missing, list(known.get(shard, {}).values()), {}
        del done, known
        skipped = index.shards - len(todo)
        if skipped:
            say(f"{' + '.join(kinds)}: {skipped} of {index.shards} shards are committed already")
        began = time.perf_counter()
        rows = sum(index.bounds(s)[1] - index.bounds(s)[0] for s in todo)
        forward = 0.0
        with progress(f"extract {' + '.join(kinds)}", rows, "images") as bar:
            job = cluster.Job(str(places.absolute(path)), settings.model_dump_json(), str(corpus.root.resolve()), gpus)
            run = cluster.run_here if in_process else cluster.run_on_dask
            for result in run(job, todo, workers or settings.store.workers, scheduler):
                dead |= {letter["row"]: letter for letter in result["dead"]}
                _check_dead(dead, index.count, settings)
                forward += result["forward"]
                bar.advance(result["rows"], note=f"{len(dead)} dead letters" if dead else "")
        seconds = time.perf_counter() - began
        for kind in kinds:
            missing = sum(1 for left, *_ in todo.values() if set(left) & set(declared[kind]))
            report["encoders"][kind] = {
                "images": rows if missing else 0,
                "seconds": round(seconds, 2),
                "forward_seconds": round(forward, 2),
                "arrays": declared[kind],
                "shards done before": index.shards - missing,
            }
        upkeep.seal(path)
        description = store.describe(path)
    report |= {key: description[key] for key in ("images", "captions", "train", "val", "dead")}
    report["bytes"] = sum(array["bytes"] for array in description["arrays"].values())
    report["seconds"] = round(time.perf_counter() - started, 2)
    return report


def check_gpus(gpus: bool, scheduler: str | None) -> None:
    """Raises SettingsError where this machine is to use a GPU that it does not have."""
    import torch

    if gpus and scheduler is None and not torch.cuda.is_available():
        raise SettingsError("--gpus: this machine has no CUDA device; leave the option out.")


def _check_dead(letters: dict[int, dict], planned: int, settings: Settings) -> None:
    """Raises CorpusError for too many dead letters, whichever run found them."""
    dead = len(letters)
    if not dead or dead < planned and dead <= max(1, settings.corpus.max_dead_fraction * planned):
        return
    first = next(iter(letters.values()))
    if dead == planned:
        raise CorpusError(f"no image of {planned} is usable; the first: {first['id']}: {first['reason']}.")
    raise CorpusError(
        f"{dead} of {planned} images are unusable, more than corpus.max_dead_fraction = "
        f"{settings.corpus.max_dead_fraction}; the first: {first['id']}: {first['reason']}; mend them and take a new "
        "--store, or raise that setting to go on."
    )
