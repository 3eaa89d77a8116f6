"""The search for a method's learning rate and settings, by the same rule and with as many trials for every method.

Every rate of the grid is tried first, and the next one beyond it where the best is at an end. The other settings follow, one
after another, at the best values of the rest, and the rate again as one of them, until none of them gets better. The trials
that are left refine the rate, or where no candidate tells rates apart, try ever further ones."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tutelage.reproduction.statistics import rounded
from tutelage.reproduction.variants import Candidate

RATE = "learning_rate"
_FINEST = 1.15  # rates nearer to each other than this ratio are not told apart

Score = tuple[float, float]  # lower is better
WORST: Score = (math.inf, math.inf)


@dataclass(frozen=True)
class Axis:
    """A setting that is searched, and what is tried for it."""

    values: tuple[Any, ...]
    start: Any = None  # the value that the search begins with; None: the first
    ordered: bool = True  # whether values beside each other are alike; if so, only neighbours of the best are tried
    grows: bool = False  # whether numbers beyond both ends are tried as well, in steps of the ratio of the last two

    @property
    def first(self) -> Any:
        """The value that is tried first."""
        return self.values[0] if self.start is None else self.start


@dataclass
class Search:
    """One method's search.

    `score` tells how good a candidate is, given the best score so far; None where it cannot be run at all, which is no trial.
    `trials` is the number of candidates; None tries the grid of rates and the other settings, and nothing beyond them."""

    axes: Mapping[str, Axis]  # by the name of the setting, the rate's among them
    trials: int | None
    score: Callable[[Candidate, Score | None], Score | None]
    clean: Callable[[dict[str, Any]], dict[str, Any]] = dict  # leaves out settings that the others make void
    tried: dict[str, Score | None] = field(default_factory=dict)  # by label
    seen: dict[str, list[Any]] = field(default_factory=dict)  # the values of each axis that were tried, in its order
    best: tuple[Candidate, Score] | None = None

    def run(self) -> Candidate:
        """The best candidate; the first one where none was better than `WORST`."""
        for rate in self.axes[RATE].values:
            self._try({RATE: rate})
        others = [name for name in self.axes if name != RATE]
        if self.trials is not None:
            self._descend()
            self._climb(RATE, far=not others)  # a rate that goes on would leave no trials to the other settings
        names = [*others, RATE] if others else []
        better = True
        while better and self._left:
            better = sum(self._climb(name) for name in names) > 0
        while self.trials is not None and self._left and (self._widen() if self._flat else self._refine()):
            pass
        assert self.best is not None, "no candidate can be run"
        return self.best[0]

    @property
    def edges(self) -> tuple[str, ...]:
        """The settings whose best value is the smallest or largest one tried, though there are further ones."""
        found = []
        for name, value in self._chosen.items():
            seen, line = self.seen[name], self._line(name, beyond=True)
            at_end = len(seen) > 1 and value in (seen[0], seen[-1])
            if self.axes[name].ordered and at_end and any(near not in seen for near in _near(line, value)):
                found.append(name)
        return tuple(found)

    @property
    def _left(self) -> bool:
        return self.trials is None or sum(score is not None for score in self.tried.values()) < self.trials

    @property
    def _flat(self) -> bool:
        """Whether no candidate reached the target and several are equally far from it: the rates beside the best one then
        promise no more than others."""
        return self.best is not None and self.best[1][0] == math.inf and [*self.tried.values()].count(self.best[1]) > 1

    @property
    def _chosen(self) -> dict[str, Any]:
        assert self.best is not None
        return {RATE: self.best[0].learning_rate, **self.best[0].settings}

    def _try(self, values: Mapping[str, Any]) -> bool:
        """Whether these values are the best so far. A setting without a value has the one that its axis begins with: it is not
        given, or was void at the other values until now."""
        values = {name: values.get(name, axis.first) for name, axis in self.axes.items()}
        settings = self.clean({name: value for name, value in values.items() if name != RATE})
        candidate = Candidate(values[RATE], settings)
        if candidate.label in self.tried or not self._left:
            return False
        score = self.tried[candidate.label] = self.score(candidate, self.best[1] if self.best else None)
        if score is None:
            return False
        for name, value in {RATE: candidate.learning_rate, **settings}.items():
            seen = self.seen.setdefault(name, [])
            if value not in seen:
                seen.append(value)
                order = self.axes[name].values
                seen.sort(key=lambda known: known if _is_number(known) else order.index(known))
        if self.best is not None and score >= self.best[1]:
            return False
        self.best = candidate, score
        return True

    def _descend(self) -> None:
        """Try ever smaller rates as long as training diverges at all of them: larger ones can only diverge too."""
        while self._left and self.axes[RATE].grows and self.best is not None and self.best[1] == WORST:
            self._try({RATE: _further(self.seen[RATE])[0]})

    def _climb(self, name: str, far: bool = True) -> bool:
        """Try the values beside the best one, and if `far` go on in a direction that gets better; whether any was better."""
        better = False
        for values in self._beside(name):
            better |= self._try({**self._chosen, name: values})
        while far and better and self.axes[name].ordered and self._left:
            if not any(self._try({**self._chosen, name: value}) for value in self._beside(name)):
                break
        return better

    def _beside(self, name: str) -> list[Any]:
        """The values to try next; none where the setting is void at the best values of the others."""
        axis, chosen = self.axes[name], self._chosen
        if name not in chosen:
            return []
        if not axis.ordered:
            return [value for value in axis.values if value != chosen[name]]
        return _near(self._line(name, beyond=self.trials is not None), chosen[name])

    def _line(self, name: str, beyond: bool) -> list[Any]:
        """The values of an axis in their order; with `beyond` a growing one has a further number at either end."""
        axis = self.axes[name]
        if not axis.grows:
            return list(axis.values)
        values = sorted({*axis.values, *self.seen[name]})
        return sorted({*values, *_further(values)}) if beyond else values

    def _widen(self) -> bool:
        """Try a rate beyond both ends; whether there was one left to try."""
        before = len(self.tried)
        better = False
        for rate in _further(self.seen[RATE]) if self.axes[RATE].grows else []:
            better |= self._try({**self._chosen, RATE: rate})
        if better:
            self._climb(RATE)
        return len(self.tried) > before

    def _refine(self) -> bool:
        """Try the rates between the best one and its neighbours; whether there was one left to try."""
        rate, before = self._chosen[RATE], len(self.tried)
        for other in _near(self.seen[RATE], rate):
            if max(rate, other) / min(rate, other) > _FINEST**2:
                self._try({**self._chosen, RATE: rounded(math.sqrt(rate * other), 2)})
        return len(self.tried) > before


def _near(line: list[Any], value: Any) -> list[Any]:
    """The values before and after one."""
    place = line.index(value)
    return [line[near] for near in (place - 1, place + 1) if 0 <= near < len(line)]


def _further(values: list[Any]) -> list[Any]:
    """The numbers before and after these, which are in order, by the ratio of the two at that end."""
    first, last = values[0], values[-1]
    low, high = (values[1] / first, last / values[-2]) if len(values) > 1 else (2.0, 2.0)
    if isinstance(first, int):
        return [max(1, round(first / low)), round(last * high)]
    return [rounded(first / low, 2), rounded(last * high, 2)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
