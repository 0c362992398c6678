"""One line for each fault: what was done, how often, how often the software survived it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def line(fault: str, tried: int, survived: int) -> None:
    print(f"\n{fault} | tried {tried} | survived {survived}")
    assert survived == tried
