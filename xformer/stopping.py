"""Ctrl-C and SIGTERM (a cluster's notice) during training: the step at work is finished and saved, then the run stops."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AGAIN = 2.0  # seconds after which a second Ctrl-C is one of a person


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether a stop was asked for; a second Ctrl-C, seconds later, stops at once.

    A launcher forwards the signals that its processes get as well, so one request may come twice.
    Outside the main thread, where no signal can be caught, nothing is ever asked.
    """
    asked: list[float] = []

    def remember(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT and time.monotonic() > asked[0] + AGAIN:
            raise KeyboardInterrupt
        asked.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
