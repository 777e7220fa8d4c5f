"""The figures of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from basinescape import Calibration

COLORS = {"memorized": "C3", "general": "C0"}


def single(**labels: str) -> tuple[Figure, Axes]:
    """A figure of one plot."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    return figure, axes


def pair(*titles: str) -> tuple[Figure, Sequence[Axes]]:
    """A figure of two plots of the noise gap against the step, on one scale."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, title in zip(both, titles, strict=True):
        axes.set(xlabel="step", title=title)
    both[0].set_ylabel("noise gap  ||cond - uncond||")
    return figure, both


def save(figure: Figure, path: Path) -> None:
    """With a legend that names each kind of curve once."""
    for axes in figure.axes:
        handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        axes.legend(handles.values(), handles.keys())
    figure.savefig(path, dpi=130)


def band(axes: Axes, values: Sequence[Sequence[float]], name: str) -> None:
    """The median of curves against the step, and the band of their quartiles."""
    low, middle, high = np.nanquantile(np.array(values, dtype=float), [0.25, 0.5, 0.75], axis=0)
    axes.fill_between(range(len(middle)), low, high, color=COLORS[name], alpha=0.2, linewidth=0)
    axes.plot(middle, color=COLORS[name], label=f"{name} prompts")


def onset(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = single(xlabel="step at which guidance starts", ylabel="share", title="the basin's edge")
    at = [row["onset"] for row in rows]
    for name, color in (("memorized", "C3"), ("concept", "C2"), ("similarity", "C7")):
        axes.plot(
            at, [row[name] for row in rows], color=color, marker=".", label="mean similarity" if name == "similarity" else name
        )
    save(figure, path)


def convergence(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = single(xlabel="step", ylabel="spread of a prompt's seeds", title="plain guidance")
    for group in COLORS:
        by_id: dict[str, list[float]] = {}
        for row in rows:
            if row["group"] == group:
                by_id.setdefault(row["id"], []).append(row["spread"])
        band(axes, list(by_id.values()), group)
    save(figure, path)


def returns(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = single(xlabel="step of the push", ylabel="share that returns", title="the basin's width")
    for size in sorted({row["size"] for row in rows}):
        own = [row for row in rows if row["size"] == size]
        at = sorted({row["step"] for row in own})
        shares = [np.mean([row["returned"] for row in own if row["step"] == step]) for step in at]
        axes.plot(at, shares, marker=".", label=f"noise of {size:g} times the latents' deviation")
    save(figure, path)


def curves(plain: dict[str, Sequence[dict[str, Any]]], path: Path) -> None:
    figure, axes = single(xlabel="step", ylabel="noise gap  ||cond - uncond||", title="plain guidance")
    for group, lines in plain.items():
        band(axes, [line["gap"] for line in lines], group)
    save(figure, path)


def calibration(found: Calibration, path: Path) -> None:
    """What is ordinary under plain guidance and without any, and under a guard's later attempts."""
    figure, axes = single(xlabel="timestep", ylabel="noise gap  ||cond - uncond||", title=f"ordinary prompts ({found.images})")
    plain, ordinary = found.rungs[0], found.ordinary
    axes.fill_between(plain.levels, ordinary.low, ordinary.high, color="C0", alpha=0.2, linewidth=0, label="plain: 5% to 95%")
    axes.plot(plain.levels, plain.gap, color="C0", label="plain guidance, median")
    axes.plot(plain.levels, ordinary.unguided, color="C7", label="no guidance, median")
    for rung in found.rungs[1:]:
        at, gap = zip(*((t, g) for t, g in zip(rung.levels, rung.gap, strict=True) if g > 0), strict=True)
        axes.plot(at, gap, color="C2", linewidth=0.8, label="a guard's later attempts, median")
    axes.axvline(ordinary.transition, color="C3", linestyle=":", label="static transition, a first guess")
    axes.invert_xaxis()
    axes.set_yscale("log")
    save(figure, path)
