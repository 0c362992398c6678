"""What a model reads: the arrays of one store, and the image-text pairs of one split over one or several stores.

Reading is NumPy's and knows no torch, whose import alone takes 500 MB: only batches of tensors ask for it.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.store import FeatureArray, FeatureStore, LocalCache, first_difference
from xformer.errors import StoreError
from xformer.local import Phase, local_tokens, mask_ratio
from xformer.settings import Mae, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from xformer.model import Batch
    from xformer.text import TextTokenizer


@dataclass
class Features:
    """What one image gives a model; fp16 as stored, `kept` bool [B, patches], `pixels` uint8 [B, 3, S, S]."""

    clip: np.ndarray
    mae: np.ndarray | None
    kept: np.ndarray | None
    pixels: np.ndarray | None


IN_THREADS = 1 << 16  # bytes of a row from which on handing rows to threads pays


class Cache:
    """The arrays of one store that a model reads, checked against the settings before the first step.

    Args:
        most: read only so many of the mask draws; a run that goes on reads those that it was started with, whatever has
            been added or begun since. None: all that `local.draws` allows.

    Raises: StoreError where an array is missing, incomplete, or was made in another way; the field is named.
    """

    def __init__(
        self, path: Path, settings: Settings, model: str, pixels: bool, phase: Phase = "stage1", most: int | None = None
    ) -> None:
        folder = Path(settings.store.cache_dir) if settings.store.cache_dir else None
        self.store = FeatureStore(path, LocalCache(folder, settings.store.cache_bytes))
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
        self._refuse_other_tokens(self.clip, layer, settings)
        self.local = local_tokens(settings, model)
        if self.local == "mae":
            ratio = mask_ratio(settings, model, phase)
            self._open_mae(path, settings.mae, ratio, settings.local.draws if most is None else most)
            if pixels and self.kept:
                self.pixels = {view: self._open(f"pixels/view-{view}") for view in set(self.views)}
            for view in set(self.views) - {0}:
                self.clips[view] = self._open(f"clip/{layer}/view-{view}/tokens")
            self._refuse_other_usage(settings.mae, ratio)
        elif self.local == "clip":
            self.mae = [self._open(f"clip/{settings.local.layer}/tokens")]
            self._refuse_other_tokens(self.mae[0], settings.local.layer, settings)
        arrays = [*self.clips.values(), *self.mae, *self.kept, *self.pixels.values()]
        self.dead = {row for array in arrays for row in array.dead_rows.tolist()}
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
                try:
                    self.mae.append(self._open(f"mae/draw-{draw}/tokens"))
                    self.kept.append(self._open(f"mae/draw-{draw}/kept"))
                except StoreError as error:
                    way_out = f" Or read the {draw} draws before it with --set local.draws={draw}." if draw else ""
                    raise StoreError(f"{error}{way_out}") from None
        if self.mae[0].shape[-1] != mae.width:
            raise StoreError(f"{path}: mae tokens are {self.mae[0].shape[-1]} wide, the settings say {mae.width}.")

    def _refuse_other_tokens(self, array: FeatureArray, layer: int, settings: Settings) -> None:
        """C may be cached without its patches (`clip.tokens: global`), the local tokens of a CLIP block never."""
        held, first = array.attributes["identity"].get("tokens", "all"), settings.clip.layers[0]
        wanted = "global" if settings.clip.only_global(layer) else "all"
        if held != wanted:
            layers = f"{first},{layer}" if layer != first else f"{layer}"
            raise StoreError(
                f"{self.store.path}: {array.name} holds {held} tokens, the settings ask for {wanted} tokens; extract into "
                f"another store with --layers {layers} (clip.tokens applies to the first)."
            )

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

    def read(
        self, rows: np.ndarray, draw: int, out: Features | None = None, pool: ThreadPoolExecutor | None = None
    ) -> Features:
        """The features of `rows` under one mask draw. Raises StoreError for any row that is not there.

        Args:
            out: buffers of exactly that size to read into; pool: reads in its threads.
        """
        if self.mae and not 0 <= draw < self.draws:
            raise StoreError(
                f"{self.store.path} holds the mask draws 0 to {self.draws - 1}, not {draw}; run: xformer extract "
                f"--encoder mae --draws {draw + 1} --store {self.store.path}"
            )

        def read(array: FeatureArray | None, name: str) -> np.ndarray | None:
            if array is None:
                return None
            in_threads = pool if array.row_bytes >= IN_THREADS else None
            return array.read(rows, None if out is None else getattr(out, name), in_threads)

        view = self.views[draw] if self.mae else 0
        clip = read(self.clips[view], "clip")
        assert clip is not None
        kept = self.kept[draw].read(rows) if self.kept else None
        if kept is not None:
            kept = np.unpackbits(kept, axis=-1, count=self.patches).astype(bool)
        return Features(
            clip, read(self.mae[draw] if self.mae else None, "mae"), kept, read(self.pixels.get(view), "pixels")
        )

    def buffers(self, rows: int, pinned: bool) -> Features:
        """Memory that batches of `rows` are read into again and again, touched once; pinned for copies to a GPU."""
        import torch

        def room(array: FeatureArray | None) -> np.ndarray | None:
            if array is None:
                return None
            dtype = torch.uint8 if array.dtype == np.uint8 else torch.float16
            return torch.zeros((rows, *array.shape), dtype=dtype, pin_memory=pinned).numpy()

        local, pixels = next(iter(self.mae), None), next(iter(self.pixels.values()), None)
        clip = room(self.clip)
        assert clip is not None
        return Features(clip, room(local), None, room(pixels))


TextsOf = Callable[[Cache], tuple[np.ndarray, Any]]  # the row of each text of a store, [N], and each by its number


def captions_of(cache: Cache) -> tuple[np.ndarray, Any]:
    """The captions of a store."""
    return cache.store.index.captions()


class Pairs:
    """Image-text pairs of one split over one or several stores; a few bytes of memory for each.

    Args:
        texts_of: a store's texts, each with its row; the captions unless a task has others.
    """

    def __init__(
        self, caches: list[Cache], split: str, tokenizer: "TextTokenizer", settings: Settings,
        texts_of: TextsOf = captions_of,
    ) -> None:  # fmt: skip
        self.caches, self.tokenizer, self.settings = caches, tokenizer, settings
        self._rows, self._texts, self._captions = [], [], []  # the row of every text; which are usable; the texts
        for cache in caches:
            rows, captions = texts_of(cache)
            usable = cache.store.index.usable(split)
            usable[sorted(cache.dead)] = False
            self._rows.append(rows)
            self._texts.append(_places(rows, usable))
            self._captions.append(captions)
        self.sizes = [len(texts) for texts in self._texts]
        self._starts = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def images(self) -> int:
        """Images that have a pair."""
        return len(self.one_per_image())

    def one_per_image(self) -> np.ndarray:
        """The number of the first pair of every image, int64 [images]."""
        found = []
        for texts, rows, start in zip(self._texts, self._rows, self._starts, strict=False):
            own = rows[texts]
            if (own[1:] >= own[:-1]).all():  # captions lie in row order
                found.append(start + np.flatnonzero(np.concatenate([[True], own[1:] != own[:-1]])[: len(own)]))
            else:
                found.append(start + np.sort(np.unique(own, return_index=True)[1]))
        return np.concatenate(found)

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Store, row and caption of each pair, int64 [B] each."""
        numbers = np.asarray(numbers, np.int64)
        stores = np.searchsorted(self._starts, numbers, side="right") - 1
        texts, rows = np.empty_like(numbers), np.empty_like(numbers)
        for store in np.unique(stores):
            at = stores == store
            texts[at] = self._texts[store][numbers[at] - self._starts[store]]
            rows[at] = self._rows[store][texts[at]]
        return stores, rows, texts

    def samples(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """Store, id, row and caption of each pair, for a person who looks for them."""
        return [
            {
                "store": str(self.caches[store].store.path),
                "id": self.caches[store].store.index.id_of(int(row)),
                "row": int(row),
                "caption": self._captions[store][int(text)],
            }
            for store, row, text in zip(*self.places(numbers.ravel()), strict=True)
        ]

    def read(
        self, numbers: np.ndarray, draw: int, out: Features | None = None, pool: ThreadPoolExecutor | None = None
    ) -> tuple[np.ndarray, Features, list[str]]:
        """The given pairs under one mask draw: a number for each image (Index.image_keys), its features, its caption.

        Args:
            out: buffers that become their memory (Cache.buffers); left out, new memory. pool: reads in its threads.
        """
        stores, rows, texts = self.places(numbers)
        keys = np.empty_like(rows)
        parts, places = [], []
        for store in np.unique(stores):
            at = np.flatnonzero(stores == store)
            cache = self.caches[store]
            keys[at] = cache.store.index.image_keys(rows[at])
            if len(at) == len(rows):
                parts.append(cache.read(rows, draw, out, pool))
            else:
                parts.append(cache.read(rows[at], draw, None, pool))
            places.append(at)

        def joined(name: str) -> Any:
            arrays = [getattr(part, name) for part in parts]
            if len(arrays) == 1 or arrays[0] is None:
                return arrays[0]
            whole = None if out is None else getattr(out, name)
            if whole is None:
                whole = np.empty((len(rows), *arrays[0].shape[1:]), arrays[0].dtype)
            for at, array in zip(places, arrays, strict=True):
                whole[at] = array
            return whole

        features = Features(joined("clip"), joined("mae"), joined("kept"), joined("pixels"))
        captions = [self._captions[store][int(text)] for store, text in zip(stores, texts, strict=True)]
        return keys, features, captions

    def batch(
        self, numbers: np.ndarray, draw: int, out: Features | None = None, pool: ThreadPoolExecutor | None = None
    ) -> "tuple[Batch, list[str]]":
        """What `read` reads as a batch of tensors, and its captions."""
        import torch

        from xformer.model import Batch

        keys, features, captions = self.read(numbers, draw, out, pool)
        ids, mask = self.tokenizer(captions)
        read = [row[seen].numpy().tobytes() for row, seen in zip(ids, mask, strict=True)]  # what differs for the model
        hashes = [int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little") for text in read]
        batch = Batch(
            rows=torch.from_numpy(keys),
            texts=torch.tensor(hashes),
            clip=torch.from_numpy(features.clip),
            mae=None if features.mae is None else torch.from_numpy(features.mae),
            kept=None if features.kept is None else torch.from_numpy(features.kept),
            pixels=None if features.pixels is None else normalised(features.pixels, self.settings.mae),
            ids=ids,
            mask=mask,
        )
        return batch, captions


def _places(rows: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """The captions whose image is usable; in pieces, so that no array of their whole number is made in between."""
    kind = np.int32 if len(rows) < 2**31 else np.int64
    pieces = range(0, len(rows), 1 << 20)
    found = [np.flatnonzero(usable[rows[at : at + (1 << 20)]]).astype(kind) + kind(at) for at in pieces]
    return np.concatenate(found) if found else np.empty(0, kind)


def normalised(pixels: "np.ndarray | Tensor", mae: Mae) -> "Tensor":
    """uint8 [B, 3, S, S] -> float32, as the MAE was trained."""
    import torch

    mean, std = (torch.tensor(v)[:, None, None] for v in (mae.mean, mae.std))
    return torch.as_tensor(pixels).float().div_(255).sub_(mean).div_(std)
