"""Answers on disk as they come, so that a killed evaluation goes on. One JSON line per answer.

A journal's name holds a digest of everything that decides the answers; those of another model, prompt or question set
are never read. Several processes write one file each and read all of them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(what: Any) -> str:
    """Of anything that is JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """The answers of one system to one list of questions, by the questions' numbers."""

    def __init__(self, folder: Path, what: Any, rank: int = 0) -> None:
        self.folder, self.name = folder, digest(what)
        self.own = folder / f"{self.name}-{rank}.jsonl"

    def read(self) -> dict[int, str]:
        """All answers so far, of every process. A line cut off by a kill does not count."""
        found: dict[int, str] = {}
        for file in sorted(self.folder.glob(f"{self.name}-*.jsonl")):
            for line in file.read_bytes().splitlines(keepends=True):
                try:
                    row = json.loads(line)
                    found[int(row["number"])] = str(row["answer"])
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def append(self, numbers: list[int], answers: list[str]) -> None:
        """Adds answers and hands them to the operating system."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"number": n, "answer": a}) + "\n" for n, a in zip(numbers, answers, strict=True)]
        with self.own.open("a+b") as file:
            size = file.seek(0, 2)
            if size:  # what a kill cut off must not swallow the next line
                file.seek(size - 1)
                lines = lines if file.read(1) == b"\n" else ["\n", *lines]
            file.write("".join(lines).encode())
