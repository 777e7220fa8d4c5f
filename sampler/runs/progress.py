"""The progress of a run, shown as a bar, as lines or as metrics, and its summary at the end."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, TextIO

from tqdm import tqdm

from .environment import library

LOGS = ("auto", "plain", "json", "none")
EVERY = 10.0  # seconds between lines, if there is no bar
NAMED = 5  # the most ids that the summary names of a kind
TICK, WINDOW, FEW = 1.0, 30, 4  # the pace: seconds between readings, the most last readings used, the fewest needed
# A bar that counts samples and also moves with the steps of unfinished ones.
FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f} of {total}{unit} [{elapsed}<{remaining}, {rate_fmt}]"
PACED = "images: {percentage:3.0f}%|{bar}| {n:.1f} of {total} images [{elapsed}{postfix}]"  # its postfix has the pace

Bar = Callable[[Sequence], Iterable]  # wraps the rows of a batch, and shows each one that passes


@dataclass
class Summary:
    """The numbers of a run.

    total:  the run's jobs. before: the jobs done before this call. skipped: rows of the prompts that were left out.
    counts: images of this call by kind: ok, failed, suspect, copies (of training images), again (after several attempts of a
            guard), flagged (by a safety checker), truncated (the prompt); and "attempts", the number of all attempts. Over all
            images of the run: duplicates (of others).
    ids:    the first NAMED ids of each kind.
    calls:  predictions of the network by branch; "spared": the predictions that steps with a single branch saved.
    seconds: how long this call took. signal: the number of the signal that stopped it; None for none.
    made: images of this call, plus the finished shares of the unfinished ones. pace: images a second over the last steps; 0
            while there are too few steps.
    """

    total: int
    before: int = 0
    skipped: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    ids: dict[str, list[str]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    signal: int | None = None
    made: float = 0.0
    pace: float = 0.0

    def add(self, line: dict[str, Any]) -> None:
        """Count a line of the manifest."""
        ok = line["status"] == "ok"
        kinds = {"ok": ok, "failed": not ok, "suspect": line.get("suspect"), "truncated": "truncated" in line}
        kinds |= {"flagged": line.get("nsfw_content_detected"), "copies": line.get("copy")}
        kinds["again"] = line.get("attempts", 1) > 1
        for kind in (kind for kind, true in kinds.items() if true):
            self.counts[kind] += 1
            if self.counts[kind] <= NAMED:
                self.ids.setdefault(kind, []).append(line["id"])
        self.counts["attempts"] += line.get("attempts", 1)

    def mark(self, kind: str, ids: Sequence[str]) -> None:
        """Set the count and ids of a kind that is known only at the end of a run."""
        self.counts[kind], self.ids[kind] = len(ids), list(ids[:NAMED])

    @property
    def done(self) -> int:
        """Images that are made and saved, in all calls of the run."""
        return self.before + self.counts["ok"]

    @property
    def left(self) -> int:
        """Images that are still to be made."""
        return self.total - self.done

    @property
    def rate(self) -> float:
        """Images a second over this whole call, failed ones included."""
        return (self.counts["ok"] + self.counts["failed"]) / self.seconds if self.seconds else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds until all are made, at the pace of the last steps; None while that is not known."""
        return (self.total - self.before - self.made) / self.pace if self.pace else None

    @property
    def spared(self) -> float:
        """The share of the network's predictions that were not needed."""
        return self.calls["spared"] / max(1, self.calls.total())

    @property
    def calls_an_image(self) -> float:
        """The network's predictions for each image that was made; a step needs one or two."""
        return (self.calls.total() - self.calls["spared"]) / max(1, self.counts["ok"] + self.counts["failed"])

    def facts(self) -> dict[str, Any]:
        """The numbers, as plain data."""
        counts = {kind: self.counts[kind] for kind in ("ok", "failed", "suspect", "copies", "flagged", "truncated", "attempts")}
        speed = {"seconds": round(self.seconds, 3), "images_per_second": round(self.rate, 4), "spared": round(self.spared, 4)}
        return {"total": self.total, "before": self.before, "skipped": self.skipped} | counts | speed

    def __str__(self) -> str:
        return ", ".join([f"{self.done:,} of {self.total:,} images", *self.how()])

    def how(self) -> list[str]:
        """The parts of a progress line after the number of images: pace, time left, suspect and failed images."""
        left = self.remaining
        known = [f"{self.pace:.3g} images/s", f"{duration(left)} left"] if left else []
        return known + [f"{self.counts[kind]} {kind}" for kind in ("suspect", "failed") if self.counts[kind]]


def duration(seconds: float) -> str:
    """A time as hours:minutes:seconds."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{second:02d}"


class Progress:
    """Shows how far a run is. log: "plain" lines, "json" lines, "none", or "auto": a bar in a terminal, else plain lines.

    metrics: the port on which the package prometheus_client serves the same numbers to Prometheus; None: they are not served.
    host: the address of that port. By default only this machine can reach it; with "0.0.0.0" others can.

    Raises ValueError for another `log`, ImportError without that package, OSError for a port that is taken.
    """

    def __init__(self, log: str = "auto", metrics: int | None = None, stream: TextIO | None = None, host: str = "127.0.0.1"):
        if log not in LOGS:
            raise ValueError(f"log must be one of {', '.join(LOGS)}, got {log!r}")
        self.stream = sys.stderr if stream is None else stream
        terminal = bool(getattr(self.stream, "isatty", bool)())
        self.kind = {"auto": "bar" if terminal else "plain"}.get(log, log)
        self.summary, self._gauges = Summary(0), dict[str, Any]()
        self._bar: tqdm | None = None
        if metrics is not None:
            self._serve(metrics, host)

    def _serve(self, port: int, host: str) -> None:
        client = library("prometheus_client", "metrics need")
        registry = client.CollectorRegistry()
        for name in Summary(0).facts():
            self._gauges[name] = client.Gauge(f"basinescape_{name}", f"{name} of the run, as in its summary", registry=registry)
        self.port = client.start_http_server(port, host, registry)[0].server_port

    def begin(self, total: int, before: int, skipped: int) -> None:
        self.summary, self._start = Summary(total, before, skipped), time.monotonic()
        self._shown, self._looks = self._start, deque([(self._start, 0.0)], WINDOW)
        if self.kind == "bar":  # miniters=0: else tqdm skips slow steps after quick first ones
            self._bar = tqdm(total=total, initial=before, bar_format=PACED, miniters=0, file=self.stream)
        self._tell("begin", due=self.kind == "json")

    def update(self, line: dict[str, Any], calls: Counter[str]) -> None:
        """Count a new line of the manifest. calls: the network's predictions so far, by branch."""
        self.summary.add(line)
        self.summary.calls = Counter(calls)
        self.moved(0.0)

    def moved(self, under_way: float) -> None:
        """Update what is shown after a step. under_way: the summed finished shares of unfinished images."""
        summary, now = self.summary, time.monotonic()
        summary.seconds = now - self._start
        if under_way and not summary.made:
            self._looks.clear()  # the first step includes the set-up, so the pace leaves it out
        # Never decreases, although an image leaves the network before it is written, and a guard begins samples again.
        summary.made = max(summary.made, summary.counts["ok"] + summary.counts["failed"] + under_way)
        if not self._looks or now - self._looks[-1][0] >= TICK:
            self._looks.append((now, summary.made))
        (since, before), (until, made) = self._looks[0], self._looks[-1]
        summary.pace = (made - before) / (until - since) if len(self._looks) >= FEW else 0.0
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(summary.how()), refresh=False)
            self._bar.update(summary.before + summary.made - self._bar.n)
        self._tell("progress", due=now - self._shown >= EVERY)

    def tell(self, event: str, text: str, facts: dict[str, Any]) -> None:
        """Show what happens: as text, or as a JSON line of facts."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            self._print(event, text, facts)

    def _print(self, event: str, text: str, facts: dict[str, Any]) -> None:
        if self.kind in ("plain", "json"):
            with suppress(ValueError, OSError):  # the stream is closed
                print(json.dumps({"event": event, **facts}) if self.kind == "json" else text, file=self.stream, flush=True)

    def _tell(self, event: str, due: bool) -> None:
        facts = self.summary.facts()
        for name, gauge in self._gauges.items():
            gauge.set(facts[name])
        if due:
            self._shown = time.monotonic()
            self._print(event, str(self.summary), facts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._tell("end", due=self.kind == "json")


class JsonFormatter(logging.Formatter):
    """Writes log records as JSON lines, like those of `Progress`."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"event": "log", "level": record.levelname, "message": record.getMessage()})


def moving(bar: tqdm, count: float) -> Callable[[float], None]:
    """A function that moves `bar`, which has the FORMAT, by a share of its next `count` items.

    At the share 1 it sets the bar back to where it was: the caller then counts the finished items with `bar.update`.
    """
    done = bar.n

    def tell(share: float) -> None:
        if share < 1:
            bar.update(done + share * count - bar.n)
        else:
            bar.n = done  # without a redraw

    return tell


def bar(progress: bool | Callable[[float], None], part: int, parts: int) -> Bar:
    """Return a bar for the rows of batch `part` of `parts`. A function `progress` is called with the finished share instead."""
    if not callable(progress):
        of = f" {part + 1}/{parts}" if parts > 1 else ""
        return partial(tqdm, desc=f"sampling{of}", unit="step", disable=not progress, file=sys.stderr)

    def counted(rows: Sequence) -> Iterable:
        for k, row in enumerate(rows, 1):
            yield row
            progress((part + k / len(rows)) / parts)

    return counted
