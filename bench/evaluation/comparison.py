"""An evaluation summed up: the finding in a sentence, and a line a method, memorized prompts beside general ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..methods import label
from .evaluate import RECORDED

Row = dict[str, Any]  # of `evaluate.table`
GROUPS = {"memorized": "memorized prompts", "general": "general prompts"}


@dataclass(frozen=True)
class Column:
    """A column of the comparison: a field of a group's rows.

    share: whether it is shown as a percentage. best: min or max, which picks the best value; None where none is the best.
    """

    group: str
    title: str
    field: str
    share: bool = True
    best: Callable[..., Any] | None = min

    @property
    def bounds(self) -> tuple[str, str]:
        stem = self.field.removesuffix("_share")
        return f"{stem}_low", f"{stem}_high"


COLUMNS = (
    Column("memorized", "copies", "memorized_share"),
    Column("memorized", "copies not marked", "unmarked_copies"),
    Column("memorized", "marked suspect", "suspect_share", best=None),
    Column("memorized", "concept right", "concept_share", best=max),
    Column("memorized", "network calls", "network_calls", share=False),
    Column("general", "copies", "memorized_share"),
    Column("general", "marked suspect", "suspect_share"),
    Column("general", "concept right", "concept_share", best=max),
    Column("general", "network calls", "network_calls", share=False),
)
JUDGED = ("unmarked_copies", "suspect_share")  # fields that say something only where a method marks images


@dataclass(frozen=True)
class Cell:
    """value: as measured. text: as shown. interval: its bounds as shown, where the column has them. best: of its column."""

    value: float | None
    text: str = ""
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A method by its name and as a reader calls it, its rows by group, and its cells, one a column."""

    name: str
    label: str
    rows: dict[str, Row]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Comparison:
    """The methods of a run side by side."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    @classmethod
    def of(cls, rows: Sequence[Row], transition: float) -> Comparison:
        """From the rows of `evaluate.table`. Columns without values are left out, and JUDGED where no method marks images."""
        by_method: dict[str, dict[str, Row]] = {}
        for row in rows:
            by_method.setdefault(row["method"], {})[row["group"]] = row
        judged = any(row["suspect_share"] for row in rows)
        columns = tuple(
            column
            for column in COLUMNS
            if (judged or column.field not in JUDGED) and any(value is not None for value in _values(by_method, column))
        )
        cells = [_cells(list(by_method.values()), column) for column in columns]
        lines = [
            Line(name, label(name, transition), groups, tuple(column[i] for column in cells))
            for i, (name, groups) in enumerate(by_method.items())
        ]
        return cls(columns, tuple(lines))

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The heading over the columns of each group, and how many those are."""
        found = [column.group for column in self.columns]
        return [(GROUPS[group], found.count(group)) for group in dict.fromkeys(found)]

    @property
    def best(self) -> Line | None:
        """The method, plain guidance apart, with the fewest copies and lost concepts together on memorized prompts."""
        told = [line for line in self.lines if line.name != RECORDED and _memorized(line, "memorized_share") is not None]
        return min(told, key=_lost, default=None)

    def finding(self) -> str:
        """What came out, in one line."""
        plain = next((line for line in self.lines if line.name == RECORDED), None)
        best = self.best
        if best is None and (plain is None or _memorized(plain, "memorized_share") is None):
            return "Copies were not counted: there is no training image to compare with (--images)."
        parts = []
        if plain is not None:
            parts.append(f"plain guidance copies a training image in {_share(plain, 'memorized_share')} of its images")
        if best is not None:
            row = best.rows["memorized"]
            range_ = f"95% interval {percent(row['memorized_low'])} to {percent(row['memorized_high'])}"
            parts.append(f"{best.label}{'' if plain else ' copies'} in {_share(best, 'memorized_share')} ({range_})")
            if row["concept_share"] is not None:
                instead = f" (plain {_share(plain, 'concept_share')})" if plain else ""
                parts.append(f"with the concept right in {_share(best, 'concept_share')}{instead}")
            times = f" (plain {plain.rows['memorized']['network_calls']:.0f})" if plain else ""
            parts.append(f"at {row['network_calls']:.0f} network calls an image{times}")
        return f"On memorized prompts {', '.join(parts)}."

    def text_rows(self) -> list[dict[str, str]]:
        """Rows to be printed in 80 columns."""
        return [
            {"method": line.name}
            | {
                f"{'' if column.group == 'memorized' else 'general '}{SHORT[column.title]}": _text(column, cell)
                for column, cell in zip(self.columns, line.cells, strict=True)
            }
            for line in self.lines
        ]

    def csv(self) -> str:
        """Every number of the comparison as CSV, with the bounds of intervals; shares are in 0..1."""
        rows = []
        for line in self.lines:
            row: dict[str, Any] = {"method": line.name, "label": line.label}
            for column, cell in zip(self.columns, line.cells, strict=True):
                title = f"{column.group}: {column.title}"
                own = line.rows.get(column.group, {})
                row[title] = cell.value
                if any(column.bounds[0] in each for each in line.rows.values()):
                    row |= {
                        f"{title}, {end}": own.get(bound) for end, bound in zip(("low", "high"), column.bounds, strict=True)
                    }
            rows.append(row)
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()

    def latex(self) -> str:
        """The table for a paper: booktabs, the best of a column bold."""
        spans, start = [], 2
        for _, count in self.groups:
            spans.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
            start += count
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


SHORT = {
    "copies": "copies",
    "copies not marked": "unmarked",
    "marked suspect": "suspect",
    "concept right": "concept",
    "network calls": "calls",
}


def percent(share: float) -> str:
    """A share as a short percentage: 98%, 0.5%. Only exactly 1 is 100%, and only exactly 0 is 0%."""
    return f"{100 * share:.1f}%" if 0 < min(share, 1 - share) < 0.01 else f"{100 * share:.0f}%"


def _values(by_method: dict[str, dict[str, Row]], column: Column) -> list[float | None]:
    return [groups.get(column.group, {}).get(column.field) for groups in by_method.values()]


def _cells(rows: Sequence[dict[str, Row]], column: Column) -> list[Cell]:
    """The cells of a column. All with the same text as the best one are marked best, unless they are the majority."""
    cells = []
    for groups in rows:
        row = groups.get(column.group, {})
        value = row.get(column.field)
        if value is None:
            cells.append(Cell(None))
            continue
        low, high = map(row.get, column.bounds)
        interval = "" if low is None or high is None else f"{percent(low)} to {percent(high)}"
        cells.append(Cell(value, percent(value) if column.share else f"{value:.0f}", interval))
    known = [cell for cell in cells if cell.value is not None]
    if column.best is None or not known:
        return cells
    text = column.best(known, key=lambda cell: cell.value).text
    if 2 * sum(cell.text == text for cell in known) > len(known):
        return cells
    return [Cell(cell.value, cell.text, cell.interval, cell.text == text) for cell in cells]


def _memorized(line: Line, field: str) -> float | None:
    return line.rows.get("memorized", {}).get(field)


def _share(line: Line, field: str) -> str:
    return percent(line.rows["memorized"][field])


def _lost(line: Line) -> float:
    """Copies and lost concepts together."""
    right = _memorized(line, "concept_share")
    return (_memorized(line, "memorized_share") or 0.0) + (0.0 if right is None else 1 - right)


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
