"""The outcome of `vidaccel bench gpu`: how far each part got, and targets against results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

Items = Mapping[str, Mapping[str, Any]]

# Name of a target -> how it is compared, and the number (the project's own goals).
TARGETS: dict[str, tuple[str, float]] = {
    "sparse attention, useful TFLOP/s at 30 %": (">=", 430.0),
    "sparse attention over the fastest dense one at 30 %": (">=", 2.2),
    "sparse attention over FlashInfer at 30 %": (">=", 1.0),
    "clustering and sorting, share of dense attention": ("<=", 0.04),
    "launches of a layer": ("<=", 12),
    "waits of the host in a layer": ("<=", 0),
    "waits of the host in a step, over those of the plain model": ("<=", 0),
    "idle cost, share of a step": ("<=", 0.01),
}


def summary_of(parts: Mapping[str, Items]) -> dict[str, Any]:
    """Return how far each part got, and each target with what was measured.

    Args:
        parts: name of a part -> its items, as its file keeps them.
    """
    measured = _measured({name: _results(items) for name, items in parts.items()})
    targets = {}
    for name, (comparison, wanted) in TARGETS.items():
        value = measured.get(name)
        met = None
        if value is not None:
            met = value >= wanted if comparison == ">=" else value <= wanted
        targets[name] = {"wanted": f"{comparison} {wanted:g}", "measured": value, "met": met}
    return {"parts": {name: _progress(items) for name, items in parts.items()}, "targets": targets}


def summary_table(summary: Mapping[str, Any]) -> str:
    """Show a summary for people."""
    lines = []
    for part, progress in summary["parts"].items():
        counts = ", ".join(f"{len(names)} {status}" for status, names in progress.items() if names)
        lines.append(f"{part:10} {counts}")
        lines += [f"           failed: {name}" for name in progress["failed"]]
    lines.append("")
    for name, row in summary["targets"].items():
        value = "not measured" if row["measured"] is None else f"{row['measured']:.4g}"
        met = {True: "met", False: "MISSED", None: ""}[row["met"]]
        lines.append(f"{name:60} {row['wanted']:>8}  {value:>12}  {met}".rstrip())
    if summary.get("dry"):
        lines += ["", "a dry run: its times say nothing"]
    return "\n".join(lines)


def _progress(items: Items) -> dict[str, list[str]]:
    """Return the names of the items that are done, failed and left."""
    kinds: dict[str, list[str]] = {"done": [], "failed": [], "left": []}
    for name, item in items.items():
        kinds["left" if item["status"] == "running" else item["status"]].append(name)
    return kinds


def _results(items: Items) -> dict[str, Any]:
    """Return the results of the items that are done."""
    return {name: item["result"] for name, item in items.items() if item["status"] == "done"}


def _measured(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return what was measured of each target; the shapes at 100 to 200 query clusters count."""
    found: dict[str, float] = {}
    rates, over_dense, over_flashinfer = [], [], []
    shares, launches, waits = [], [], []
    for result in parts.get("attention", {}).values():
        if "sparse" in result and 100 <= result["query_clusters"] <= 200:
            row = result["sparse"].get("vidaccel")
            if row and result["wanted_density"] == 0.3 and row["useful_tflops"]:
                rates.append(row["useful_tflops"])
                over_dense.append(result["fastest_dense_ms"] / row["milliseconds"])
                if other := result["sparse"].get("FlashInfer with plan"):
                    over_flashinfer.append(other["milliseconds"] / row["milliseconds"])
        if "layer_ms" in result and not result["options"]:
            shares.append(result["share_of_dense"])
            launches.append(result["launches"])
            waits.append(result["waits"])
    models = parts.get("models", {}).values()
    step_waits = [r["waits"] - r["plain_waits"] for r in models if "plain_waits" in r]
    idle = [r["idle_cost"] for r in models if "idle_cost" in r]
    for name, values, pick in (
        ("sparse attention, useful TFLOP/s at 30 %", rates, statistics.median),
        ("sparse attention over the fastest dense one at 30 %", over_dense, statistics.median),
        ("sparse attention over FlashInfer at 30 %", over_flashinfer, statistics.median),
        ("clustering and sorting, share of dense attention", shares, max),
        ("launches of a layer", launches, max),
        ("waits of the host in a layer", waits, max),
        ("waits of the host in a step, over those of the plain model", step_waits, max),
        ("idle cost, share of a step", idle, max),
    ):
        if values:
            found[name] = float(pick(values))
    return found
