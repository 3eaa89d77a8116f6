"""The search for a rate and settings, on landscapes whose best place is known."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tutelage.reproduction import schedules
from tutelage.reproduction.search import RATE, WORST, Axis, Score, Search
from tutelage.reproduction.variants import PACES, Candidate

GRID = (0.3, 1.0, 3.0)
Landscape = Callable[[float, dict[str, Any]], float]


def valley(peak: float, **settings: float) -> Landscape:
    """Best at these values, and worse with the distance of the logarithms."""

    def height(rate: float, chosen: dict[str, Any]) -> float:
        apart = [abs(math.log(chosen[name] / value)) for name, value in settings.items()]
        return abs(math.log(rate / peak)) + sum(apart)

    return height


def searched(
    landscape: Landscape,
    trials: int | None,
    settings: Mapping[str, Axis] | None = None,
    rates: Axis | None = None,
    runs: Callable[[Candidate], bool] = lambda candidate: True,
    clean: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> tuple[Search, list[Candidate]]:
    """The search, which has found the best of what it tried, and the candidates in the order in which they were run."""
    tried: list[Candidate] = []
    asked: list[str] = []

    def score(candidate: Candidate, best: Score | None) -> Score | None:
        asked.append(candidate.label)
        earlier = [(landscape(one.learning_rate, one.settings), 0.0) for one in tried]
        assert best == min(earlier, default=None)
        if not runs(candidate):
            return None
        tried.append(candidate)
        return landscape(candidate.learning_rate, candidate.settings), 0.0

    search = Search({RATE: rates or Axis(GRID, grows=True), **(settings or {})}, trials, score, clean)
    best = search.run()
    assert len(set(asked)) == len(asked)  # nothing is run twice
    assert best == min(tried, key=lambda one: landscape(one.learning_rate, one.settings))
    return search, tried


def rates_of(tried: list[Candidate]) -> list[float]:
    return [candidate.learning_rate for candidate in tried]


# ---- The rate ----


def test_every_rate_of_the_grid_is_tried_first_with_the_settings_that_the_search_begins_with() -> None:
    axes = {"steps": Axis((10, 20, 40), start=20), "kind": Axis(("a", "b"), ordered=False)}
    _, tried = searched(lambda rate, settings: rate, 8, axes)
    assert tried[:3] == [Candidate(rate, {"steps": 20, "kind": "a"}) for rate in GRID]


@pytest.mark.parametrize(("peak", "order"), [(27.0, [9.0, 27.0, 81.0]), (0.01, [0.09, 0.027, 0.0081, 0.0024])])
def test_rates_beyond_the_grid_are_tried_while_the_best_one_is_at_an_end(peak: float, order: list[float]) -> None:
    search, tried = searched(valley(peak), 3 + len(order))
    assert rates_of(tried)[3:] == order
    assert search.edges == ()  # a further one was tried, and it is worse


@pytest.mark.parametrize(("peak", "last"), [(1e9, 81.0), (1e-9, 0.0081)])
def test_a_rate_at_an_end_when_the_trials_run_out_is_at_an_edge(peak: float, last: float) -> None:
    search, tried = searched(valley(peak), 6)
    assert rates_of(tried)[-1] == last
    assert search.edges == (RATE,)


def test_a_rate_that_goes_on_leaves_trials_to_the_other_settings() -> None:
    """One rate beyond the grid comes before them, the others after."""
    axes = {"weight": Axis((0.3, 1.0, 3.0), start=1.0)}
    _, tried = searched(valley(1e9, weight=3.0), 8, axes)
    assert rates_of(tried) == [*GRID, 9.0, 9.0, 9.0, 3.0, 27.0]
    assert [candidate.settings["weight"] for candidate in tried[4:6]] == [0.3, 3.0]


def test_a_rate_within_the_grid_is_at_no_edge() -> None:
    search, tried = searched(valley(1.0), 3)
    assert rates_of(tried) == list(GRID) and search.edges == ()


def test_from_a_single_rate_the_search_goes_up_and_down() -> None:
    for peak in (4.0, 0.25):
        search, tried = searched(valley(peak), 5, rates=Axis((1.0,), grows=True))
        assert set(rates_of(tried)[:3]) == {1.0, 2.0, 0.5}
        assert search.best is not None and search.best[0].learning_rate == peak


def test_a_rate_that_is_fixed_is_the_only_one() -> None:
    search, tried = searched(valley(1e9, weight=1.0), 8, {"weight": Axis((0.3, 1.0, 3.0))}, Axis((0.1,)))
    assert set(rates_of(tried)) == {0.1} and len(tried) == 3 and search.edges == ()


def test_the_trials_that_are_left_refine_the_rate() -> None:
    """The geometric means of the best one and its two neighbours, again and again, down to a ratio of 1.15."""
    _, tried = searched(valley(1.4), 9)
    assert rates_of(tried)[3:] == [0.55, 1.7, 1.3, 2.3]
    finer, tried = searched(valley(1.02), 20)
    assert rates_of(tried)[3:] == [0.55, 1.7, 0.74, 1.3, 0.86]
    for rate, other in itertools.pairwise(sorted(rates_of(tried))):
        assert other / rate > 1.15
    assert finer.edges == ()


def test_where_no_rate_reaches_the_target_further_ones_are_tried_on_both_sides() -> None:
    search, tried = searched(lambda rate, settings: math.inf, 8)
    assert rates_of(tried)[3:] == [0.09, 0.027, 9.0, 0.0081, 27.0]
    assert search.best is not None and search.best[0].learning_rate == GRID[0]


def test_a_far_rate_that_reaches_the_target_is_followed_and_refined() -> None:
    _, tried = searched(lambda rate, settings: 100 / rate if 5 < rate < 40 else math.inf, 10)
    assert rates_of(tried)[3:] == [0.09, 0.027, 9.0, 27.0, 81.0, 16.0, 47.0]


def test_the_order_in_which_rates_are_given_does_not_matter() -> None:
    for grid in (GRID, GRID[::-1], (1.0, 3.0, 0.3)):
        search, tried = searched(valley(9.0), 5, rates=Axis(grid, grows=True))
        assert rates_of(tried)[3:] == [9.0, 27.0] and search.edges == ()


# ---- Other settings ----


def test_of_an_ordered_setting_only_neighbours_of_the_best_value_are_tried() -> None:
    axis = Axis((1, 2, 3, 4, 5, 6), start=3)
    search, tried = searched(valley(1.0, steps=5), 7, {"steps": axis})
    assert [candidate.settings["steps"] for candidate in tried[3:]] == [2, 4, 5, 6]
    assert all(candidate.learning_rate == 1.0 for candidate in tried[3:]) and search.edges == ()


def test_of_an_unordered_setting_every_value_is_tried() -> None:
    heights = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 0.0}
    axis = Axis(tuple(heights), ordered=False)
    search, tried = searched(lambda rate, chosen: heights[chosen["kind"]], 6, {"kind": axis}, Axis((0.1,)))
    assert [candidate.settings["kind"] for candidate in tried] == list("abcd")
    assert search.edges == ()  # the last value of a setting without an order is no edge


@pytest.mark.parametrize(("peak", "further"), [(320, [40, 80, 160, 320, 640]), (2, [10, 40, 5, 2, 1])])
def test_a_growing_setting_goes_beyond_both_ends(peak: int, further: list[int]) -> None:
    axis = Axis((10, 20, 40), start=20, grows=True)
    search, tried = searched(valley(0.1, steps=peak), 20, {"steps": axis}, Axis((0.1,)))
    assert [one.settings["steps"] for one in tried] == [20, 10, 40, *further[len(set(further) & {10, 40}) :]]
    assert search.edges == ()


def test_whole_numbers_end_at_one_which_is_no_edge_then() -> None:
    axis = Axis((2, 4, 8), start=4, grows=True)
    search, tried = searched(valley(0.1, steps=0.001), 20, {"steps": axis}, Axis((0.1,)))
    assert [one.settings["steps"] for one in tried] == [4, 2, 8, 1] and search.edges == ()


def test_at_the_smallest_whole_number_the_next_larger_one_is_still_tried() -> None:
    """The best rate makes a longer stage worth it, which is found after the stage of one step."""
    axes = {"steps": Axis((1, 2, 4), grows=True), "kind": Axis(("a", "b"), ordered=False)}

    def height(rate: float, chosen: dict[str, Any]) -> float:
        wanted = 4 if chosen["kind"] == "b" else 1
        return abs(math.log(chosen["steps"] / wanted)) - 5 * (chosen["kind"] == "b")

    search, _ = searched(height, 20, axes, Axis((0.1,)))
    assert search.best is not None and search.best[0].settings == {"steps": 4, "kind": "b"}


def test_a_setting_at_the_end_of_what_it_may_be_is_at_no_edge() -> None:
    for values in ((0.3, 1.0, 3.0), (3.0, 1.0, 0.3)):
        for peak in (0.3, 3.0):
            search, _ = searched(valley(1.0, weight=peak), 12, {"weight": Axis(values)})
            assert search.best is not None and search.best[0].settings == {"weight": peak}
            assert search.edges == ()


def test_a_setting_at_an_end_of_what_was_tried_is_at_an_edge() -> None:
    axes = {"steps": Axis((10, 20, 40), start=20, grows=True), "weight": Axis((1, 2, 3, 4), start=2)}
    search, tried = searched(valley(1.0, steps=1e9, weight=4), 8, axes)
    assert [one.settings["steps"] for one in tried][3:] == [10, 40, 80, 160, 320]
    assert search.edges == ("steps",)  # of the weight only one value was tried
    search, _ = searched(valley(1.0, steps=20, weight=4), 7, axes)
    assert search.edges == ("weight",)


def test_settings_are_climbed_again_until_none_gets_better() -> None:
    """Two settings whose best values depend on each other: one round over them does not suffice."""
    axes = {"a": Axis((1, 2, 3, 4, 5)), "b": Axis((1, 2, 3, 4, 5))}

    def height(rate: float, chosen: dict[str, Any]) -> float:
        return 3.0 * abs(chosen["a"] - chosen["b"]) - chosen["a"] - chosen["b"] + abs(math.log(rate / chosen["a"]))

    diagonal = {"a": Axis((1, 2, 3, 4, 5)), "b": Axis((1, 2, 3, 4, 5), ordered=False)}
    for chosen in (axes, diagonal):
        search, _ = searched(height, 100, chosen, Axis((1.0, 5.0)))
        assert search.best is not None
        at = {RATE: search.best[0].learning_rate, **search.best[0].settings}
        for name, axis in search.axes.items():  # no other value of one setting alone is better
            place = axis.values.index(at[name])
            near = axis.values[max(0, place - 1) : place + 2] if axis.ordered else axis.values
            for value in near:
                other = {**at, name: value}
                assert height(other.pop(RATE), other) >= search.best[1][0]


# ---- Trials ----

METHODS: dict[str, dict[str, Axis]] = {
    "one_shot": {},
    "joint": {"hidden_weight": Axis((0.3, 1.0, 3.0), start=1.0, grows=True)},
    "extraction": {
        "stage_steps": Axis((125, 250, 500), start=250, grows=True),
        "stage_learning_rate": Axis((1.0, 3.0, 9.0), start=3.0, grows=True),
    },
    "progressive": {
        "phase_samples": Axis((16_000, 32_000, 64_000), start=32_000, grows=True),
        "checkpoint": Axis(tuple(range(-3, 5)), start=0),
        "schedule": Axis(PACES, ordered=False),
    },
}


def rough(rate: float, settings: dict[str, Any]) -> float:
    """A landscape with one best rate and noise that depends on the candidate alone."""
    return abs(math.log(rate / 1.3)) + zlib.crc32(repr(settings).encode()) % 97 / 97


@pytest.mark.parametrize("trials", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_exactly_as_many_trials(method: str, trials: int) -> None:
    _, tried = searched(rough, trials, METHODS[method], clean=schedules.clean)
    assert len(tried) == trials


@pytest.mark.parametrize("method", ["joint", "extraction", "progressive"])
@pytest.mark.parametrize("trials", [8, 12])
def test_methods_with_settings_use_all_of_many_trials(method: str, trials: int) -> None:
    _, tried = searched(rough, trials, METHODS[method], clean=schedules.clean)
    assert len(tried) == trials


def test_a_candidate_that_cannot_be_run_is_no_trial() -> None:
    axes = {"steps": Axis((100, 200, 400), start=200, grows=True)}
    search, tried = searched(valley(1.0, steps=1e9), 8, axes, runs=lambda one: one.settings["steps"] <= 400)
    assert len(tried) == 8 and max(one.settings["steps"] for one in tried) == 400
    assert search.best is not None and search.best[0].settings == {"steps": 400}


def test_where_every_candidate_is_as_bad_as_can_be_the_first_one_is_named() -> None:
    tried: list[Candidate] = []

    def score(candidate: Candidate, best: Score | None) -> Score:
        tried.append(candidate)
        return WORST

    assert Search({RATE: Axis(GRID, grows=True)}, 4, score).run() == tried[0] == Candidate(0.3)


# ---- No number of trials ----


@pytest.mark.parametrize("peak", [1e9, 1e-9])
def test_without_a_number_of_trials_the_search_stays_in_the_grid(peak: float) -> None:
    axes = {"steps": Axis((10, 20, 40), start=20, grows=True), "kind": Axis(("a", "b"), ordered=False)}
    search, tried = searched(valley(peak, steps=peak), None, axes)
    end = 2 if peak > 1 else 0
    assert search.best is not None and search.best[0] == Candidate(GRID[end], {"steps": (10, 20, 40)[end], "kind": "a"})
    assert set(rates_of(tried)) == set(GRID)
    assert {candidate.settings["steps"] for candidate in tried} == {10, 20, 40}
    assert {candidate.settings["kind"] for candidate in tried} == {"a", "b"}
    assert search.edges == (RATE, "steps")  # there are further ones, which only a number of trials would try


# ---- Settings that others make void ----


def test_settings_that_a_schedule_does_not_use_make_no_further_candidates() -> None:
    _, tried = searched(
        lambda rate, chosen: PACES[::-1].index(chosen["schedule"]), 12, METHODS["progressive"], clean=schedules.clean
    )
    paced = [candidate for candidate in tried if candidate.settings["schedule"] != "two"]
    assert {tuple(candidate.settings) for candidate in paced} == {("schedule",)}
    assert {tuple(candidate.settings) for candidate in tried if candidate not in paced} == {
        tuple(METHODS["progressive"])
    }
    at_best = [candidate for candidate in paced if candidate.settings["schedule"] == "pace-1"]
    assert len({candidate.learning_rate for candidate in at_best}) == len(at_best) > 1  # all that is left is the rate
    assert schedules.clean({"phase_samples": 5, "checkpoint": 1}) == {"phase_samples": 5, "checkpoint": 1}
    assert schedules.clean({"phase_samples": 5, "schedule": "pace-2"}) == {"schedule": "pace-2"}


def test_where_training_diverges_at_all_rates_smaller_ones_are_tried() -> None:
    def score(candidate: Candidate, best: Score | None) -> Score:
        tried.append(candidate.learning_rate)
        return WORST if candidate.learning_rate > 0.01 else (-candidate.learning_rate, 0.0)

    tried: list[float] = []
    best = Search({RATE: Axis(GRID, grows=True)}, 9, score).run()
    assert tried[:6] == [0.3, 1.0, 3.0, 0.09, 0.027, 0.0081]
    assert 0.0081 <= best.learning_rate <= 0.01
