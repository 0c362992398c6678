"""Which pairs each step reads: a pure function of (seed, epoch, step), whatever the number of processes."""

import hashlib
from dataclasses import dataclass

import numpy as np

from xformer.errors import SettingsError


def generator(*key: object) -> np.random.Generator:
    """A Philox generator keyed by everything that may decide a draw."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


@dataclass(frozen=True)
class Schedule:
    """An epoch is one pass over all pairs; its incomplete last batch is left out.

    Args:
        pairs: in all.
        batch: pairs of one step, over all processes and accumulated parts.
        max_steps: 0 = no limit.
        sizes: pairs of each store, in their order; they sum to `pairs`.
        weights: share of each store in an epoch; () = proportional to its pairs. A store whose share is larger than it is
            comes again in a new order, of one whose share is smaller the next epoch reads on.
        block: 0 shuffles freely; else pairs that lie together in a store stay together, so many, and whole blocks are
            shuffled, then the pairs of every `window` blocks: for disks that hate random reads.
    """

    pairs: int
    batch: int
    epochs: int
    max_steps: int
    seed: int
    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    block: int = 0
    window: int = 1

    @property
    def per_epoch(self) -> int:
        return max(1, self.pairs // self.batch)

    @property
    def steps(self) -> int:
        total = self.epochs * self.per_epoch
        return min(total, self.max_steps) if self.max_steps else total

    def order(self, epoch: int) -> np.ndarray:
        """The pairs of one epoch in the order of reading, int32 (int64 from 2^31 on) [pairs]."""
        found = self._mixed(epoch) if self.weights else np.arange(self.pairs, dtype=_whole(self.pairs))
        draw = generator(self.seed, "order", epoch)
        if not self.block:
            draw.shuffle(found)
            return found
        if self.weights:
            found.sort()
        blocks = draw.permutation(-(-self.pairs // self.block))
        found = np.concatenate([found[b * self.block : (b + 1) * self.block] for b in blocks])
        for start in range(0, self.pairs, self.block * self.window):
            draw.shuffle(found[start : start + self.block * self.window])
        return found

    def shares(self) -> list[int]:
        """Pairs of each store in one epoch; they sum to `pairs`."""
        exact = np.array(self.weights) / sum(self.weights) * self.pairs
        found = np.floor(exact).astype(np.int64)
        found[np.argsort(found - exact, kind="stable")[: self.pairs - found.sum()]] += 1
        return found.tolist()

    def _mixed(self, epoch: int) -> np.ndarray:
        """As many pairs of each store as its share; over the epochs each store is read through, again and again."""
        parts, first = [], 0
        for store, (share, size) in enumerate(zip(self.shares(), self.sizes, strict=True)):
            at, end = epoch * share, (epoch + 1) * share
            while at < end:
                read, inside = divmod(at, size)
                order = generator(self.seed, "store", store, read).permutation(
                    np.arange(size, dtype=_whole(self.pairs))
                )
                parts.append(first + order[inside : inside + end - at])
                at += len(parts[-1])
            first += size
        return np.concatenate(parts)

    def numbers(self, order: np.ndarray, step: int, parts: int) -> np.ndarray:
        """The pairs of one step from the order of its epoch, [parts, batch / parts]: accumulated one after the other."""
        inside = step % self.per_epoch
        return order[inside * self.batch : (inside + 1) * self.batch].reshape(parts, -1)


def _whole(largest: int) -> type[np.signedinteger]:
    return np.int32 if largest < 2**31 else np.int64


def refuse_weights(weights: list[float], sizes: list[int]) -> None:
    """Raises SettingsError where the weights do not fit the stores."""
    if weights and len(weights) != len(sizes):
        raise SettingsError(
            f"data.weights: {len(weights)} given for {len(sizes)} --features; give each store one weight, in their order."
        )
    empty = any(weight and not size for weight, size in zip(weights, sizes, strict=False))
    if weights and (min(weights) < 0 or not 0 < sum(weights) < float("inf") or empty):
        raise SettingsError(
            "data.weights must be finite, not negative, not all 0, and 0 for a store without pairs of the training split."
        )
