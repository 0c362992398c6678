"""Batches from the cache. Sample order is a pure function of (seed, epoch, step), the same for one or many processes."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.store import FeatureArray, FeatureStore, first_difference
from xformer.errors import StoreError
from xformer.local import Phase, local_tokens, mask_ratio
from xformer.model import Batch
from xformer.settings import Mae, Settings
from xformer.text import TextTokenizer


def generator(*key: object) -> np.random.Generator:
    """A Philox generator keyed by everything that may decide a draw."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


@dataclass
class Features:
    """What one image gives a model; fp16 as stored, `kept` bool [B, patches], `pixels` uint8 [B, 3, S, S]."""

    clip: np.ndarray
    mae: np.ndarray | None
    kept: np.ndarray | None
    pixels: np.ndarray | None


class Cache:
    """The arrays of one store that a model reads, checked against the settings before the first step.

    Raises: StoreError where an array is missing, incomplete, or was made in another way; the field is named.
    """

    def __init__(self, path: Path, settings: Settings, model: str, pixels: bool, phase: Phase = "stage1") -> None:
        self.store = FeatureStore(path)
        layer = settings.clip.layers[0]
        self.clip = self._open(f"clip/{layer}/tokens")
        self.mae: list[FeatureArray] = []
        self.kept: list[FeatureArray] = []
        self.clips: dict[int, FeatureArray] = {0: self.clip}  # by view
        self.pixels: dict[int, FeatureArray] = {}
        if self.clip.shape[-1] != settings.clip.width:
            raise StoreError(
                f"{path}: clip tokens are {self.clip.shape[-1]} wide, the settings say {settings.clip.width}."
            )
        self.local = local_tokens(settings, model)
        if self.local == "mae":
            ratio = mask_ratio(settings, model, phase)
            self._open_mae(path, settings.mae, ratio, settings.local.draws)
            if pixels and self.kept:
                self.pixels = {view: self._open(f"pixels/view-{view}") for view in set(self.views)}
            for view in set(self.views) - {0}:
                self.clips[view] = self._open(f"clip/{layer}/view-{view}/tokens")
            self._refuse_other_usage(settings.mae, ratio)
        elif self.local == "clip":
            self.mae = [self._open(f"clip/{settings.local.layer}/tokens")]
        arrays = [*self.clips.values(), *self.mae, *self.kept, *self.pixels.values()]
        self.dead = {row for array in arrays for row in array.dead}
        self.patches = (settings.image_size // settings.mae.patch) ** 2

    def _open(self, name: str) -> FeatureArray:
        return self.store.complete(name)

    def _open_mae(self, path: Path, mae: Mae, ratio: float, most: int | None) -> None:
        if ratio == 0:
            if "mae/full/tokens" not in self.store.names():
                raise StoreError(
                    f"{path} has no MAE features of whole images, which mask_ratio 0 asks for; run: "
                    f"xformer extract --encoder mae --mask-ratio 0 --store {path}"
                )
            self.mae = [self._open("mae/full/tokens")]
        else:
            names = [n for n in self.store.names() if n.startswith("mae/draw-") and n.endswith("/tokens")]
            if not names:
                raise StoreError(f"{path} has no mask draws; run: xformer extract --encoder mae --store {path}")
            for draw in range(len(names))[:most]:
                self.mae.append(self._open(f"mae/draw-{draw}/tokens"))
                self.kept.append(self._open(f"mae/draw-{draw}/kept"))
        if self.mae[0].shape[-1] != mae.width:
            raise StoreError(f"{path}: mae tokens are {self.mae[0].shape[-1]} wide, the settings say {mae.width}.")

    def _refuse_other_usage(self, mae: Mae, ratio: float) -> None:
        """Every draw must be masked as the settings ask, and C and M of a draw must show the same crop."""
        for draw, array in enumerate(self.mae):
            used, image = array.attributes["usage"], self.clips[self.views[draw]].attributes["usage"]
            masked = {"mask_ratio": ratio, "draw": draw, "mask_seed": mae.mask_seed}
            shown = {key: image.get(key) for key in ("view", "crop", "view_seed")}
            want = (masked if ratio else {}) | shown
            if difference := first_difference({key: used.get(key) for key in want}, want):
                raise StoreError(f"{self.store.path}: {array.name}: {difference}, as the settings and C ask.")

    @property
    def views(self) -> list[int]:
        """The augmentation view that each draw was made on; CLIP tokens and pixels of a draw are of the same view."""
        return [array.attributes["usage"]["view"] for array in self.mae]

    @property
    def draws(self) -> int:
        """K: epoch e reads draw e mod K. 0 where no local tokens are read, 1 where they do not depend on a mask."""
        return len(self.mae)

    def identities(self) -> dict[str, dict]:
        """What decides the features' values, by encoder; saved with a checkpoint and compared before step 0."""
        found = {"clip": self.clip.attributes["identity"]}
        name = "mae" if self.local == "mae" else "local clip"
        return found | ({name: self.mae[0].attributes["identity"]} if self.mae else {})

    def read(self, rows: np.ndarray, draw: int) -> Features:
        """The features of `rows` under one mask draw. Raises StoreError for any row that is not there."""
        mae = self.mae[draw].read(rows) if self.mae else None
        kept = None
        if self.kept:
            kept = np.unpackbits(self.kept[draw].read(rows), axis=-1, count=self.patches).astype(bool)
        view = self.views[draw] if self.mae else 0
        pixels = self.pixels[view].read(rows) if self.pixels else None
        return Features(self.clips[view].read(rows), mae, kept, pixels)


TextsOf = Callable[
    [Cache], tuple[np.ndarray, Any]
]  # a store's texts: the row of each, int64 [N], and each by its number


def captions_of(cache: Cache) -> tuple[np.ndarray, Any]:
    """The captions of a store."""
    return cache.store.index.captions()


class Pairs:
    """Image-text pairs of one split over one or several stores.

    Args:
        texts_of: a store's texts, each with its row; the captions unless a task has others.
    """

    def __init__(
        self, caches: list[Cache], split: str, tokenizer: TextTokenizer, settings: Settings,
        texts_of: TextsOf = captions_of,
    ) -> None:  # fmt: skip
        self.caches, self.tokenizer, self.settings = caches, tokenizer, settings
        stores, rows, texts, self._captions = [], [], [], []
        for number, cache in enumerate(caches):
            caption_rows, captions = texts_of(cache)
            self._captions.append(captions)
            table = cache.store.index.column("split", "status")
            usable = np.array(table["split"].to_numpy(zero_copy_only=False) == split)
            usable &= np.array(table["status"].to_numpy(zero_copy_only=False) == "ok")
            usable[sorted(cache.dead)] = False
            chosen = np.flatnonzero(usable[caption_rows]) if len(caption_rows) else np.empty(0, np.int64)
            stores.append(np.full(len(chosen), number, np.int16))
            rows.append(caption_rows[chosen])
            texts.append(chosen)
        self.stores, self.rows, self.texts = np.concatenate(stores), np.concatenate(rows), np.concatenate(texts)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> int:
        return len(np.unique(self.rows + self.stores.astype(np.int64) * 2**40))

    def captions(self, pairs: np.ndarray) -> list[str]:
        return [self._captions[self.stores[i]][int(self.texts[i])] for i in pairs]

    def batch(self, pairs: np.ndarray, draw: int) -> tuple[Batch, list[str]]:
        """The batch of the given pair numbers under one mask draw, and its captions."""
        parts, places = [], []
        for number in np.unique(self.stores[pairs]):
            place = np.flatnonzero(self.stores[pairs] == number)
            parts.append(self.caches[number].read(self.rows[pairs[place]], draw))
            places.append(place)
        back = np.argsort(np.concatenate(places), kind="stable")

        def joined(name: str) -> np.ndarray | None:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else (np.concatenate(arrays)[back] if len(arrays) > 1 else arrays[0])

        captions = self.captions(pairs)
        ids, mask = self.tokenizer(captions)
        hashes = [int.from_bytes(hashlib.blake2b(c.encode(), digest_size=7).digest(), "little") for c in captions]
        clip, mae, kept, pixels = joined("clip"), joined("mae"), joined("kept"), joined("pixels")
        assert clip is not None
        batch = Batch(
            rows=torch.from_numpy(self.rows[pairs] + self.stores[pairs].astype(np.int64) * 2**40),
            texts=torch.tensor(hashes),
            clip=torch.from_numpy(clip),
            mae=None if mae is None else torch.from_numpy(mae),
            kept=None if kept is None else torch.from_numpy(kept),
            pixels=None if pixels is None else normalised(pixels, self.settings.mae),
            ids=ids,
            mask=mask,
        )
        return batch, captions


def normalised(pixels: np.ndarray, mae: Mae) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float32, as the MAE was trained."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (mae.mean, mae.std))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


@dataclass(frozen=True)
class Schedule:
    """Which pairs each step reads. An epoch is one pass over all pairs; the incomplete last batch is left out."""

    pairs: int
    batch: int  # global
    epochs: int
    max_steps: int  # 0 = no limit
    seed: int

    @property
    def per_epoch(self) -> int:
        return max(1, self.pairs // self.batch)

    @property
    def steps(self) -> int:
        total = self.epochs * self.per_epoch
        return min(total, self.max_steps) if self.max_steps else total

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch, int64 [pairs]."""
        return generator(self.seed, "order", epoch).permutation(self.pairs)


def stream(
    pairs: Pairs, schedule: Schedule, start: int, rank: int, world: int, draws: int
) -> Iterator[tuple[int, int, int, Batch, list[str]]]:
    """Yields (step, epoch, draw, this rank's batch, captions) from step `start` on; reads ahead in two threads."""
    share = schedule.batch // world
    order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def load(step: int, numbers: np.ndarray):
        epoch = step // schedule.per_epoch
        draw = epoch % draws if draws else 0
        return step, epoch, draw, *pairs.batch(numbers, draw)

    with ThreadPoolExecutor(2) as pool:
        waiting: list = []
        for step in range(start, schedule.steps):
            epoch, inside = divmod(step, schedule.per_epoch)
            if order[0] != epoch:
                order = (epoch, schedule.order(epoch))
            begin = inside * schedule.batch + rank * share
            waiting.append(pool.submit(load, step, order[1][begin : begin + share]))
            if len(waiting) > 4:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
