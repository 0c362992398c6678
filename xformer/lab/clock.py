"""How long what is left of an ablation will take, from the seconds in the JSONs of finished runs."""

import time
from typing import Any

from xformer.console import duration
from xformer.lab.results import read_result, read_results
from xformer.lab.run import Run


class Clock:
    """Time left: the seconds that each phase of the folder's finished runs took, of the same variant where there are some,
    else of any. A first stage that is finished, or that an earlier run of the list trains, costs nothing more.

    Args:
        side_by_side: runs at once; None: not known, so the pace of this call decides.
    """

    def __init__(self, runs: list[Run], done: list[str], side_by_side: int | None) -> None:
        self.todo = {run.name: run for run in runs if run.name not in done}
        self.side_by_side, self.began, self.finished = side_by_side, time.monotonic(), 0
        self.seconds: dict[str, dict[str, list[float]]] = {"first": {}, "rest": {}}
        for result in read_results(runs[0].result.parent).values():
            self._add(result)

    def _add(self, result: dict[str, Any]) -> None:
        cost, variant = result["cost"], result["variant"]
        self.seconds["first"].setdefault(variant, []).append(cost["stage1_seconds"])
        self.seconds["rest"].setdefault(variant, []).append(cost["stage2_seconds"] + cost["evaluation_seconds"])

    def after(self, run: Run) -> str:
        self.todo.pop(run.name, None)
        self.finished += 1
        if result := read_result(run.result):
            self._add(result)
        return self.left()

    def _mean(self, part: str, variant: str) -> float:
        every = self.seconds[part]
        values = every.get(variant) or [value for values in every.values() for value in values]
        return sum(values) / len(values)

    def left(self) -> str:
        if not self.todo:
            return "nothing is left"
        if not self.seconds["rest"]:
            return "no run is finished yet, so their time is not known"
        if self.side_by_side is None and self.finished:
            return f"about {duration((time.monotonic() - self.began) / self.finished * len(self.todo))} left"
        trained, total = set(), 0.0
        for run in self.todo.values():
            if run.stage1 not in trained and not (run.stage1 / "summary.json").is_file():
                total += self._mean("first", run.variant)
            trained.add(run.stage1)
            total += self._mean("rest", run.variant)
        return f"about {duration(total / max(1, min(self.side_by_side or 1, len(self.todo))))} left"
