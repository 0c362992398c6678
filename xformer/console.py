"""What a person sees: one table printer, one progress line, one view of a training run; all quiet on request."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_quiet = False


def set_quiet(quiet: bool) -> None:
    global _quiet
    _quiet = quiet


@contextmanager
def quietly() -> Iterator[None]:
    """Nothing is said inside, for work that is only a means."""
    before = _quiet
    set_quiet(True)
    try:
        yield
    finally:
        set_quiet(before)


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


class RunView:
    """A training run as a live table on a terminal (rich), elsewhere as plain lines, at most one in ten seconds."""

    ROWS = 8  # latest lines of the log that stay on the screen

    def __init__(self, title: str, steps: int) -> None:
        from rich.console import Console

        self.title, self.steps = title, steps
        self.done, self.loss, self.left = 0, 0.0, None
        self.lines: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.console = Console(stderr=True)
        self.live: Any = None
        self.shown = -10.0

    def start(self) -> None:
        if self.console.is_terminal and not _quiet:
            from rich.live import Live

            self.live = Live(get_renderable=self.render, console=self.console, refresh_per_second=2)
            self.live.start()

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()

    def step(self, done: int, loss: float) -> None:
        self.done, self.loss = done, loss

    def line(self, line: dict[str, Any]) -> None:
        """A line of log.jsonl."""
        if line["event"] == "alarm":
            self.warnings.append(f"step {line['step']:,}: {line['says']}")
        elif line["event"] in ("train", "validate"):
            self.lines.append(line)
            self.left = line.get("seconds_left", self.left)
        else:
            return
        if self.live is None and not _quiet:
            self._plain(line)

    def _plain(self, line: dict[str, Any]) -> None:
        now = time.monotonic()
        if line["event"] == "alarm":
            print(f"ALARM {self.warnings[-1]}", file=sys.stderr, flush=True)
        elif line["event"] == "validate" or now - self.shown >= 10 or line["step"] == self.steps:
            if line["event"] == "train":
                self.shown = now
            step, *cells = (f"{name} {text}" for name, text in _figures(line).items())
            print(" | ".join([f"{self.title}{_WHAT[line['event']]} {step}/{self.steps:,}", *cells]),
                  file=sys.stderr, flush=True)  # fmt: skip

    def render(self) -> Any:
        """The table, the line below it, and the alarms, as something that rich can draw."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        shown = self.lines[-self.ROWS :]
        cells = [_figures(line) | {"left": ""} for line in shown]
        names = list(
            dict.fromkeys(n for line, c in zip(shown, cells, strict=True) if line["event"] == "train" for n in c)
        )
        names = [name for name in names if name != "left"] or ["step"]
        widths = {name: max(len(name), *(len(c.get(name, "")) for c in cells)) + 3 for name in names if cells}
        gone = []
        for name in _FIRST_TO_GO:  # on a narrow terminal: these stand in the line below
            if sum(widths.values()) > self.console.width and widths.pop(name, None):
                names.remove(name)
                gone.append(name)
        drawn = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for name in names:
            drawn.add_column(name, justify="right", no_wrap=True)
        for line, found in zip(shown, cells, strict=True):
            style = "cyan" if line["event"] == "validate" else None
            drawn.add_row(*[found.get(name, "") for name in names], style=style)
        left = "?" if self.left is None else duration(self.left)
        share = self.done / max(1, self.steps)
        state = [f"step {self.done:,}/{self.steps:,} ({share:.0%})", f"loss {self.loss:.3f}", f"{left} left"]
        trained = next((c for line, c in zip(shown[::-1], cells[::-1], strict=True) if line["event"] == "train"), {})
        state += [f"{name} {trained[name]}" for name in reversed(gone) if name in trained]
        below = [Text(" | ".join(state))]
        if validated := [line for line in self.lines if line["event"] == "validate"]:
            step, *more = ((n, text) for n, text in _figures(validated[-1]).items() if n not in names or n == "step")
            told = " | ".join(f"{name} {text}" for name, text in more)
            below.append(Text(f"validation at step {step[1]} (cyan): {told}", style="cyan"))
        alarms = [Text(f"ALARM {text}", style="bold yellow") for text in self.warnings[-4:]]
        return Group(drawn, *below, *alarms)


_WHAT = {"train": "", "validate": " validation"}
_SHORT = {
    "reconstruction": "recon", "gradient_norm": "grad", "itm_accuracy": "itm acc", "lm_of_another_image": "lm, wrong image",
    "reconstruction_of_mean": "recon of mean", "effective_rank": "query rank", "recall1_image_to_text": "image to text R@1",
    "recall1_text_to_image": "text to image R@1",
}  # fmt: skip
_FIRST_TO_GO = ("grad", "itm acc", "MiB", "lr")
_UNSEEN = {
    "event",
    "epoch",
    "draw",
    "pairs",
    "temperature",
    "itm_constant",
    "recall1_of",
}  # of a line; log.jsonl has them


def _figures(line: dict[str, Any]) -> dict[str, str]:
    """A line of log.jsonl as the words and numbers of a screen, in order; step first, speed last."""
    found = {"step": f"{line['step']:,}"} | ({"loss": ""} if "loss" in line else {})
    for key, value in line.items():
        if key == "lr":
            found["lr"] = f"{value:.1e}"
        elif key == "samples_per_second":
            found["samples/s"] = f"{value:,.1f}"
        elif key == "data_wait":
            found["wait"] = f"{value:.0%}"
        elif key == "memory_mib":
            found["MiB"] = f"{value:,.0f}"
        elif key == "seconds_left":
            found["left"] = duration(value)
        elif key not in _UNSEEN and key != "step":
            found[_SHORT.get(key, key)] = f"{value:.3f}" if isinstance(value, float) else str(value)
    return found
