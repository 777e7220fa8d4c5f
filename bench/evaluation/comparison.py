"""The summary of an evaluation: the finding in a sentence, and a line for each method, memorized beside general prompts."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from ..methods import label
from .evaluate import RECORDED

Row = dict[str, Any]  # of `evaluate.table`
ENOUGH = 30  # images for each method; with fewer, a difference of methods is chance
GROUPS = {"memorized": "memorized prompts", "general": "general prompts"}


@dataclass(frozen=True)
class Column:
    """A column of the comparison: a field of a group's rows.

    short: its title in text of 80 columns. share: whether it is shown as a percentage. best: min or max, which selects the best
    value; None if no value is better than another.
    """

    group: str
    title: str
    short: str
    field: str
    share: bool = True
    best: Callable[..., Any] | None = min

    @property
    def bounds(self) -> tuple[str, str]:
        stem = self.field.removesuffix("_share")
        return f"{stem}_low", f"{stem}_high"


COLUMNS = (
    Column("memorized", "copies", "copies", "memorized_share"),
    Column("memorized", "copies not marked", "unmarked", "unmarked_copies"),
    Column("memorized", "marked suspect", "suspect", "suspect_share", best=None),
    Column("memorized", "concept right", "concept", "concept_share", best=max),
    Column("memorized", "network calls", "calls", "network_calls", share=False),
    Column("general", "copies", "general copies", "memorized_share"),
    Column("general", "marked suspect", "general suspect", "suspect_share"),
    Column("general", "concept right", "general concept", "concept_share", best=max),
    Column("general", "network calls", "general calls", "network_calls", share=False),
)
JUDGED = ("unmarked_copies", "suspect_share")  # fields shown only if a method marks images


@dataclass(frozen=True)
class Cell:
    """value: as measured. text, interval: the value and its bounds, if any, as shown. best: whether it is the column's best."""

    value: float | None
    text: str = ""
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A method: its name, its label, its rows by group, and its cells, one for each column."""

    name: str
    label: str
    rows: dict[str, Row]
    cells: tuple[Cell, ...]

    @property
    def memorized(self) -> Row:
        """The row of memorized prompts; empty if there is none."""
        return self.rows.get("memorized", {})

    @property
    def copies(self) -> float | None:
        """The share of copies on memorized prompts; None if copies were not counted."""
        return self.memorized.get("memorized_share")


@dataclass(frozen=True)
class Comparison:
    """The methods of a run side by side."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    @classmethod
    def of(cls, rows: Sequence[Row], transition: float) -> Comparison:
        """Compare the rows of `evaluate.table`. Columns without values are left out, and JUDGED if no method marks images."""
        by_method: dict[str, dict[str, Row]] = {}
        for row in rows:
            by_method.setdefault(row["method"], {})[row["group"]] = row
        judged = any(row["suspect_share"] for row in rows)
        cells = {
            column: _cells([groups.get(column.group, {}) for groups in by_method.values()], column)
            for column in COLUMNS
            if judged or column.field not in JUDGED
        }
        cells = {column: found for column, found in cells.items() if any(cell.value is not None for cell in found)}
        by_line = zip(by_method.items(), zip(*cells.values(), strict=True), strict=True)
        return cls(tuple(cells), tuple(Line(name, label(name, transition), groups, own) for (name, groups), own in by_line))

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(heading, number of columns) of each group."""
        return [(GROUPS[group], count) for group, count in Counter(column.group for column in self.columns).items()]

    @property
    def plain(self) -> Line | None:
        """The line of plain guidance; None if it was not run or its copies were not counted."""
        return next((line for line in self.lines if line.name == RECORDED and line.copies is not None), None)

    @property
    def best(self) -> Line | None:
        """The method, without plain guidance, with the smallest sum of copies and wrong concepts on memorized prompts."""
        measured = [line for line in self.lines if line.name != RECORDED and line.copies is not None]
        return min(measured, key=_lost, default=None)

    def finding(self) -> str:
        """The result in one sentence."""
        plain, best, parts = self.plain, self.best, []
        if plain is not None:
            parts.append(
                f"plain guidance copies a training image in {percent(plain.memorized['memorized_share'])} of its images"
            )
        if best is not None:
            row = best.memorized
            range_ = f"95% interval {percent(row['memorized_low'])} to {percent(row['memorized_high'])}"
            parts.append(f"{best.label}{'' if plain else ' copies'} in {percent(row['memorized_share'])} ({range_})")
            if row["concept_share"] is not None:
                instead = f" (plain {percent(plain.memorized['concept_share'])})" if plain else ""
                parts.append(f"with the concept right in {percent(row['concept_share'])}{instead}")
            times = f" (plain {plain.memorized['network_calls']:.0f})" if plain else ""
            parts.append(f"at {row['network_calls']:.0f} network calls an image{times}")
        if not parts:
            return "Copies were not counted: there is no training image to compare with (--images)."
        return f"On memorized prompts {', '.join(parts)}."

    def sure(self) -> str:
        """A line about the intervals, and whether the images are too few to compare methods; "" if no copies were counted."""
        counts = [line.memorized["n"] for line in self.lines if line.copies is not None]
        if not counts:
            return ""
        text = "In brackets: the 95% interval of the share, by bootstrap over prompts."
        if min(counts) >= ENOUGH:
            return text
        few = f"{min(counts)} image{'s' if min(counts) > 1 else ''}"
        return f"{text} Shares of {few} cannot tell methods apart; those of {ENOUGH} or more can begin to."

    def text_rows(self) -> list[dict[str, str]]:
        """Rows to print in 80 columns, with short titles."""
        return [
            {"method": line.name}
            | {column.short: _text(column, cell) for column, cell in zip(self.columns, line.cells, strict=True)}
            for line in self.lines
        ]

    def csv(self) -> str:
        """Every number of the comparison as CSV, with the bounds of intervals; shares are in 0..1."""
        rows = []
        for line in self.lines:
            row: dict[str, Any] = {"method": line.name, "label": line.label}
            for column in self.columns:
                title, own = f"{column.group}: {column.title}", line.rows.get(column.group, {})
                row[title] = own.get(column.field)
                if column.field in ("memorized_share", "concept_share"):
                    low, high = column.bounds
                    row |= {f"{title}, low": own.get(low), f"{title}, high": own.get(high)}
            rows.append(row)
        writer = csv.DictWriter(file := io.StringIO(newline=""), list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()

    def latex(self) -> str:
        """The table for a paper: booktabs, the best of a column bold."""
        ends = list(accumulate((count for _, count in self.groups), initial=1))
        spans = [rf"\cmidrule(lr){{{start + 1}-{end}}}" for start, end in pairwise(ends)]
        heads = " & ".join(rf"\multicolumn{{{count}}}{{c}}{{{title}}}" for title, count in self.groups)
        titles = " & ".join(column.title for column in self.columns)
        body = [" & ".join([_escaped(line.label), *map(_latex, line.cells)]) + r" \\" for line in self.lines]
        return "\n".join(
            [
                r"% \usepackage{booktabs}",
                rf"\begin{{tabular}}{{l{'r' * len(self.columns)}}}",
                r"\toprule",
                rf" & {heads} \\",
                " ".join(spans),
                rf"method & {titles} \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                "",
            ]
        )


def percent(share: float) -> str:
    """A share as a short percentage: 98%, 0.5%. Only exactly 1 is 100%, and only exactly 0 is 0%."""
    return f"{100 * share:.1f}%" if 0 < min(share, 1 - share) < 0.01 else f"{100 * share:.0f}%"


def _lost(line: Line) -> float:
    """The share of copies plus the share of wrong concepts."""
    right = line.memorized["concept_share"]
    return (line.copies or 0.0) + (0.0 if right is None else 1 - right)


def _cells(rows: Sequence[Row], column: Column) -> list[Cell]:
    """The cells of a column. Cells with the text of the best one are marked best, unless more than half have that text."""
    cells = []
    for row in rows:
        value, (low, high) = row.get(column.field), map(row.get, column.bounds)
        interval = "" if low is None or high is None else f"{percent(low)} to {percent(high)}"
        text = "" if value is None else percent(value) if column.share else f"{value:.0f}"
        cells.append(Cell(value, text, interval))
    known = [cell for cell in cells if cell.value is not None]
    if column.best is None or not known:
        return cells
    text = column.best(known, key=lambda cell: cell.value).text
    if 2 * sum(cell.text == text for cell in known) > len(known):
        return cells
    return [replace(cell, best=cell.text == text) for cell in cells]


def _text(column: Column, cell: Cell) -> str:
    if cell.value is None:
        return "-"
    exact = (column.group, column.field) == ("memorized", "memorized_share")
    return f"{cell.text} ({cell.interval.replace('% to ', '-')})" if exact else cell.text


def _latex(cell: Cell) -> str:
    text = _escaped(cell.text)
    text = rf"\textbf{{{text}}}" if cell.best else text
    return f"{text} ({_escaped(cell.interval)})" if cell.interval else text


SPECIAL = {letter: rf"\{letter}" for letter in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _escaped(text: str) -> str:
    text = text.replace("\\", "\0")
    return "".join(SPECIAL.get(letter, letter) for letter in text).replace("\0", r"\textbackslash{}")
