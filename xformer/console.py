"""What a person sees: one table printer and one progress line, both quiet on request."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_quiet = False


def set_quiet(quiet: bool) -> None:
    global _quiet
    _quiet = quiet


def say(text: str = "") -> None:
    """A line for the person; silent with --quiet."""
    if not _quiet:
        print(text, flush=True)


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table: first column left, the others right aligned; floats with two decimals, None as a dash."""
    cells = [[_cell(v) for v in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *cells]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(padded).rstrip()

    say(f"\n{title}")
    say(line(header))
    say("  ".join("-" * w for w in widths))
    for row in cells:
        say(line(row))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Progress:
    """Counts done units: a rewritten line on a terminal, else a plain line every ten seconds."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.note = 0, ""
        self.started = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        now = time.monotonic()
        if now - self.shown >= (0.2 if self.terminal else 10):
            self.shown = now
            self._show(end="" if self.terminal else "\n")

    def close(self) -> None:
        self._show(end="\n")

    def _show(self, end: str) -> None:
        if _quiet:
            return
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        left = duration((self.total - self.done) / rate) if rate and self.done else "?"
        start = "\r\x1b[K" if self.terminal else ""
        text = f"{start}{self.title} {self.done:,}/{self.total:,} {self.unit} | {rate:,.1f} {self.unit}/s | {left} left"
        print(text + (f" | {self.note}" if self.note else ""), end=end, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Progress]:
    """A progress line that always ends with its last state."""
    bar = Progress(title, total, unit)
    try:
        yield bar
    finally:
        bar.close()
