"""Sample order: permutations, mixtures of stores, blocks, and the same pairs on any number of processes."""

import numpy as np
import pytest

from xformer.errors import SettingsError
from xformer.order import Schedule, refuse_weights


def mixed(**changes) -> Schedule:
    return Schedule(**{"pairs": 130, "batch": 8, "epochs": 9, "max_steps": 0, "seed": 3, "sizes": (100, 30)} | changes)


def test_an_order_is_a_pure_function_of_seed_and_epoch() -> None:
    for changes in ({}, {"block": 4, "window": 3}, {"weights": (1.0, 1.0)}, {"weights": (1.0, 3.0), "block": 4}):
        orders = [mixed(**changes).order(epoch) for epoch in range(3)]
        np.testing.assert_array_equal(orders[1], mixed(epochs=2, max_steps=1, batch=4, **changes).order(1))
        assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(
            orders[0], mixed(**changes | {"seed": 4}).order(0)
        )
        if "weights" not in changes:
            assert all(sorted(order) == list(range(130)) for order in orders)


def test_weights_decide_each_stores_share_and_read_it_through() -> None:
    schedule = mixed(weights=(1.0, 1.0))
    assert schedule.shares() == [65, 65] and mixed(weights=(0.0, 1.0)).shares() == [0, 130]
    drawn = np.concatenate([schedule.order(epoch) for epoch in range(6)])
    assert [(o < 100).sum() for o in drawn.reshape(6, 130)] == [65] * 6
    counts = np.bincount(drawn, minlength=130)
    assert set(counts[:100]) == {3, 4} and set(counts[100:]) == {13}  # 390 draws of 100 pairs, 390 of 30


def test_blocks_stay_together_within_their_window() -> None:
    schedule = mixed(pairs=128, sizes=(128,), block=4, window=2)
    order = schedule.order(0)
    for start in range(0, 128, 8):
        blocks = np.unique(order[start : start + 8] // 4, return_counts=True)
        assert len(blocks[0]) == 2 and (blocks[1] == 4).all()
    assert not np.array_equal(order // 4, np.sort(order // 4))
    assert sorted(mixed(pairs=130, sizes=(130,), block=4, window=2).order(0)) == list(
        range(130)
    )  # the last one is short


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_pairs_of_a_step_do_not_depend_on_the_number_of_processes(parts: int) -> None:
    schedule = mixed(batch=16)
    order = schedule.order(0)
    numbers = schedule.numbers(order, 2, parts)
    np.testing.assert_array_equal(numbers.ravel(), order[32:48])
    for world in (1, 2, 4):  # each part, put together again from the processes' shares, is the same
        shares = [numbers.reshape(parts, world, -1)[:, rank] for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(shares, 1), numbers)


def test_weights_that_do_not_fit_are_refused() -> None:
    refuse_weights([], [3, 4])
    for weights in ([1.0], [-1.0, 2.0], [0.0, 0.0], [1.0, float("inf")]):
        with pytest.raises(SettingsError, match=r"data\.weights"):
            refuse_weights(weights, [3, 4])
    with pytest.raises(SettingsError, match="without pairs"):
        refuse_weights([1.0, 1.0], [3, 0])
