"""The figures of analyses, reports and the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, ScalarFormatter
from matplotlib.transforms import Bbox

COLORS = {"memorized": "C3", "general": "C0"}
SIDES = [(6, 5), (6, -5), (-6, 5), (-6, -5), (0, 9), (0, -9), (9, 0), (-9, 0)]  # offsets of a label from its dot, 1/72 inch


def single(**labels: str) -> tuple[Figure, Axes]:
    """A figure of one plot."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write the figure to `path`, with a legend that names each kind of curve once."""
    for axes in figure.axes:
        handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        axes.legend(handles.values(), handles.keys())
    figure.savefig(path, dpi=130)


def band(axes: Axes, values: Sequence[Sequence[float]], name: str) -> None:
    """Draw the median of curves against the step, a band from the first to the third quartile, and lines at 5% and 95%.

    The scale is logarithmic, so that a curve far above the others does not press them flat.
    """
    low, first, middle, third, high = np.nanquantile(np.array(values, dtype=float), [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    color = COLORS[name]
    axes.fill_between(range(len(middle)), first, third, color=color, alpha=0.2, linewidth=0)
    axes.plot(middle, color=color, label=f"{name} prompts")
    for edge in (low, high):
        axes.plot(edge, color=color, linewidth=0.6, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def onset(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = single(xlabel="step at which guidance starts", ylabel="share", title="the basin's edge")
    at = [row["onset"] for row in rows]
    for name, color in (("memorized", "C3"), ("concept", "C2"), ("similarity", "C7")):
        if any(row[name] is not None for row in rows):
            label = "mean similarity" if name == "similarity" else name
            axes.plot(at, [row[name] for row in rows], color=color, marker=".", label=label)
    save(figure, path)


def convergence(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = single(xlabel="step", ylabel="spread of a prompt's seeds", title="plain guidance")
    for group in COLORS:
        by_id: dict[str, list[float]] = {}
        for row in rows:
            if row["group"] == group:
                by_id.setdefault(row["id"], []).append(row["spread"])
        if by_id:
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


def curves(plain: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    figure, axes = single(xlabel="step", ylabel="noise gap  ||cond - uncond||", title="plain guidance")
    for group, lines in plain.items():
        band(axes, [line["gap"] for line in lines], group)
    save(figure, path)


Share = tuple[float, float, float]  # (share, low, high), with the bounds of its interval


@dataclass(frozen=True)
class Point:
    """A method in `tradeoff`: its shares of copies and of right concepts, each with the bounds of its interval.

    concept: None where it is not known.
    """

    label: str
    copies: Share
    concept: Share | None
    color: str = "C7"

    @property
    def place(self) -> tuple[float, float]:
        """(x, y) in the figure: the shares of right concepts and of copies."""
        return (self.concept or (0.0, 0.0, 0.0))[0], self.copies[0]


def tradeoff(points: Sequence[Point]) -> Figure:
    """A figure of copies against concepts, a dot with intervals for each method; if no concept is known, copies in rows."""
    if all(point.concept is None for point in points):
        return _in_rows(points)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    points = [point for point in points if point.concept is not None]
    for point in points:
        style: dict[str, Any] = {"color": point.color, "zorder": 2 if point.color == "C7" else 3}
        bars = _bars(point.copies), _bars(point.concept or point.copies)
        axes.errorbar(*point.place, *bars, "o", markersize=5, elinewidth=0.8, **style)
    best = [p for p in points if not any(_beats(other, p) for other in points)]
    front = sorted(p.place for p in best)
    axes.plot(*zip(*front, strict=True), color="C7", linewidth=0.8, linestyle=":", zorder=0)
    axes.set(xlabel="concept right, memorized prompts", ylabel="copies of a training image")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.margins(0.12)
    _name(figure, axes, sorted(points, key=lambda point: (point.color == "C7", point not in best)))
    return figure


def _in_rows(points: Sequence[Point]) -> Figure:
    figure = Figure(figsize=(5, 0.8 + 0.3 * len(points)), layout="constrained")
    axes = figure.subplots()
    for row, point in enumerate(points):
        axes.errorbar(point.copies[0], row, xerr=_bars(point.copies), fmt="o", color=point.color, markersize=5, elinewidth=0.8)
    axes.set_yticks(range(len(points)), [point.label for point in points])
    axes.invert_yaxis()
    axes.set(xlabel="copies of a training image", xlim=(-0.02, 1.02))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def _bars(share: Share) -> list[list[float]]:
    value, low, high = share
    return [[max(value - low, 0)], [max(high - value, 0)]]


def _beats(one: Point, other: Point) -> bool:
    """Whether `one` has no more copies and no fewer right concepts than `other`, and is not equal to it."""
    (right, copies), (others_right, others_copies) = one.place, other.place
    return one.place != other.place and copies <= others_copies and right >= others_right


def _name(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's label beside it, in the order of `points`. A label for which no room is left is omitted."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    taken = [_around(axes, point) for point in points]
    for point in points:
        for dx, dy in SIDES:
            text = _beside(axes, point, dx, dy)
            box = text.get_window_extent(renderer).expanded(1.1, 1.1)  # a page's own font may be wider
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _beside(axes: Axes, point: Point, dx: float, dy: float) -> Annotation:
    return axes.annotate(
        point.label,
        point.place,
        (dx, dy),
        textcoords="offset points",
        fontsize=7.5,
        ha={1: "left", -1: "right", 0: "center"}[(dx > 0) - (dx < 0)],
        va={1: "bottom", -1: "top", 0: "center"}[(dy > 0) - (dy < 0)],
        color=None if point.color == "C7" else point.color,
    )


def _around(axes: Axes, point: Point) -> Bbox:
    """The box of the point's dot, in the figure's pixels."""
    x, y = axes.transData.transform(point.place)
    return Bbox.from_extents(x - 4, y - 4, x + 4, y + 4)
