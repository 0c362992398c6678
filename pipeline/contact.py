"""`xformer store show`: a contact sheet of rows: the image as it was encoded, what the MAE saw, and what is cached.

The picture is the cached one; of a store without pixels it is decoded again from where the extraction had it.
"""

import json
from pathlib import Path

import numpy as np

from pipeline import images, masks, provenance
from pipeline.encode import planned_image
from pipeline.reader import FeatureArray
from pipeline.store import FeatureStore
from xformer.errors import StoreError


def contact_sheet(path: Path, ids: list[str], count: int, out: Path) -> list[str]:
    """Draws one line per row into a PNG: source picture, each draw's mask over it, and the norm of every cached token.
    Where the source picture is gone, its cell says so.

    Args:
        ids: image ids; left empty, `count` rows spread over the store.

    Returns the ids that were drawn. Raises StoreError for unknown ids and rows that are not readable.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    opened = FeatureStore(path)
    names = [n for n in opened.names() if n.endswith("/tokens")]
    arrays = {n: opened.array(n) for n in names if not opened.array(n).missing_shards}
    if not arrays:
        raise StoreError(f"{path} has no finished array to show.")
    alive = np.ones(opened.index.count, bool)
    for dead in ([letter["row"] for letter in opened.index.dead()], *(array.dead_rows for array in arrays.values())):
        alive[np.array(dead, np.int64)] = False
    usable = np.flatnonzero(alive)
    spread = np.linspace(0, len(usable) - 1, min(count, len(usable))).astype(int)
    rows = rows_of(path, ids) if ids else usable[spread]
    if not len(rows):
        raise StoreError(f"{path} has no row to show: all are dead letters.")
    figure, axes = plt.subplots(
        len(rows), 1 + len(arrays), figsize=(1.9 * (1 + len(arrays)), 2.1 * len(rows)), squeeze=False
    )
    shown = []
    for line, row in zip(axes, rows, strict=True):
        shard, inner = divmod(int(row), opened.index.shard_rows)
        record = opened.index.shard(shard)[inner]
        shown.append(record["id"])
        pixels = _pixels(opened, 0, int(row))
        pixels = _decoded(path, next(iter(arrays)), record) if pixels is None else pixels
        line[0].set_title(f"row {row}, id {record['id']}"[:28], fontsize=7)
        if isinstance(pixels, str):
            line[0].text(0.5, 0.5, pixels, ha="center", va="center", fontsize=6, wrap=True)
        else:
            line[0].imshow(pixels)
        for axis, (name, array) in zip(line[1:], arrays.items(), strict=True):
            _draw(axis, opened, name, array, int(row))
            axis.set_title(name.removesuffix("/tokens"), fontsize=7)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return shown


def _pixels(opened: FeatureStore, view: int, row: int) -> np.ndarray | None:
    """uint8 [S, S, 3]; None where pixels are not cached, or not for every row."""
    name = f"pixels/view-{view}"
    array = opened.array(name) if name in opened.names() else None
    return array.read([row])[0].transpose(1, 2, 0) if array and not array.missing_shards else None


def _decoded(path: Path, name: str, record: dict) -> np.ndarray | str:
    """The picture of a row from where an array's extraction had it, uint8 [S, S, 3], or why there is none."""
    try:
        settings, root = provenance.how(path, name, None)
        image = images.decode(planned_image(root, record), settings.corpus.max_image_pixels)
        return images.evaluation_view(image, settings.image_size).transpose(1, 2, 0)
    except OSError as error:
        return f"no picture: {error.strerror}"
    except (images.BadImage, StoreError) as error:
        return f"no picture: {error}"


def _draw(axis, opened: FeatureStore, name: str, array: FeatureArray, row: int) -> None:
    """The token norms as a square map; for a mask draw the picture where it was visible, grey elsewhere."""
    norms = np.linalg.norm(array.read([row])[0].astype(np.float32), axis=-1)[1:]  # without [CLS]
    kept_name = f"{name.removesuffix('tokens')}kept"
    if kept_name not in opened.names():
        side = int(len(norms) ** 0.5)
        square = norms.reshape(side, side) if side * side == len(norms) else norms[None]  # tokens without a place
        axis.imshow(square, cmap="magma")
        return
    packed = opened.array(kept_name).read([row])[0]
    patches = len(packed) * 8
    side = int(patches**0.5)
    kept = masks.unpack(packed, side * side).reshape(side, side)
    pixels = _pixels(opened, array.attributes["usage"]["view"], row)
    if pixels is None:
        axis.imshow(kept, cmap="gray")
        return
    grown = np.kron(kept, np.ones((pixels.shape[0] // side, pixels.shape[0] // side), bool))
    axis.imshow(np.where(grown[..., None], pixels, 128))


def rows_of(store: Path, ids: list[str]) -> np.ndarray:
    """The rows of image ids, int64. Raises StoreError for an id that is not there."""
    rows = FeatureStore(store).index.find(ids)
    if unknown := [key for key, row in zip(ids, rows.tolist(), strict=True) if row < 0]:
        raise StoreError(f"{store}: no image has the id {json.dumps(unknown[0])}.")
    return rows
