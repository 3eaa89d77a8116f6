"""A comparison in words.

Public names: `verdict`.
"""

from __future__ import annotations

import statistics
from typing import Any

from tutelage.reproduction.statistics import FEWEST_FOR_INTERVAL


def verdict(result: dict[str, Any]) -> str:
    """A few lines: who reached the target with how many samples, and how extraction compares with one-shot."""
    methods = {name: entry for name, entry in result["methods"].items() if entry["runs"]}
    if not methods:
        return "No run has finished yet."
    metric, target = result["metric"], result["target"]
    sentences = []
    if target is not None:
        for name, entry in methods.items():
            reached = [run for run in entry["runs"] if run["samples_to_target"] is not None]
            share = f"{len(reached)} of {len(entry['runs'])} seeds"
            median = entry["median_samples_to_target"]
            if median is not None:
                sentences.append(
                    f"{name} reached {metric} {target:.4g} on {share}, after {median:,.0f} samples (median)."
                )
            else:
                most = max(run["curve"][-1]["samples"] for run in entry["runs"])
                final = statistics.median(run["final"].get(metric, float("nan")) for run in entry["runs"])
                sentences.append(
                    f"{name} did not reach {metric} {target:.4g} (median beyond {most:,} samples; {share} did; it ended at "
                    f"{final:.4g})."
                )
        for name, ratio in result["ratios"].items():
            over, _, under = name.partition("/")
            if under in ("one_shot", "progressive") and {over, under} <= methods.keys():
                sentences.append(_compared(over, under, ratio, result["ratios"].get(f"{name} flops", {})))
    else:
        finals = {
            name: statistics.median(finals)
            for name, entry in methods.items()
            if (finals := [run["final"][metric] for run in entry["runs"] if metric in run["final"]])
        }
        best = (max if result["better"] == "higher" else min)(finals, key=lambda name: finals[name])
        sentences.append(
            f"{best} ended best: " + ", ".join(f"{name} {value:.4g}" for name, value in finals.items()) + "."
        )
    return "\n".join(sentence for sentence in sentences if sentence)


def _compared(over: str, under: str, ratio: dict[str, Any], flops: dict[str, Any]) -> str:
    if ratio.get("seeds") == 0:
        return ""  # no seed that both have finished
    if not ratio["pairs"]:
        return f"Neither {over} nor {under} reached the target."
    if ratio["median"] is None:
        return f"{over} mostly did not reach the target within the budget where {under} did: {under} is better here."
    low, high = ratio["ci95"]
    bound = "at most " if "note" in ratio else ""
    shown = f"[{low:.2g}, {'beyond the budget' if high is None else format(high, '.2g')}]" if low is not None else ""
    # the bootstrap of a median of few values is their range, which is no 95% interval
    spread = "95% interval" if ratio["pairs"] >= FEWEST_FOR_INTERVAL else f"range of {ratio['pairs']} seed(s)"
    text = f"{over} needed {bound}{ratio['median']:.2g} times the samples of {under} ({spread} {shown})"
    if flops.get("median") is not None:
        text += f" and {'at most ' if 'note' in flops else ''}{flops['median']:.2g} times its FLOPs"
    if ratio["pairs"] < ratio.get("seeds", 0):
        return f"{text} on {ratio['pairs']} of {ratio['seeds']} seeds; on the others neither arrived."
    if ratio["pairs"] < 3:
        return f"{text}: too few seeds to tell."
    if high is not None and high < 1:
        return f"{text}: {over} is better here."
    if low is not None and low > 1 and "note" not in ratio:
        return f"{text}: {under} is better here."
    return f"{text}: these runs do not tell the two apart."
