"""What people look at while a run goes on, and what it came to."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, TextIO

from tqdm import tqdm

LOGS = ("auto", "plain", "json", "none")
EVERY = 10.0  # seconds between lines where there is no terminal
NAMED = 5  # ids that are named of each kind
# Of a bar over samples that moves with the steps of those in the making.
FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"

Bar = Callable[[Sequence], Iterable]  # what the rows of a run go through


@dataclass
class Summary:
    """What a run came to.

    total: jobs of this run. before: those that were done when it began. skipped: rows of the prompts that are no jobs.
    counts: of the images of this call: ok, failed, suspect, copies (of training images), again (those that a guard made more
            than once), flagged (by a safety checker), truncated; and all attempts. Of all images: duplicates (of others).
    ids:    the first ids of those.
    calls:  network calls of samples, by branch; "spared" are those that one branch alone saved.
    seconds: of this call. signal: of what stopped it, None where nothing did.
    """

    total: int
    before: int = 0
    skipped: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    ids: dict[str, list[str]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    signal: int | None = None

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
        """Count images of a kind that is known at the end alone."""
        self.counts[kind], self.ids[kind] = len(ids), list(ids[:NAMED])

    @property
    def done(self) -> int:
        """Images that are there."""
        return self.before + self.counts["ok"]

    @property
    def left(self) -> int:
        """Images that are not there."""
        return self.total - self.done

    @property
    def rate(self) -> float:
        """Images a second."""
        return (self.counts["ok"] + self.counts["failed"]) / self.seconds if self.seconds else 0.0

    @property
    def spared(self) -> float:
        """The share of the network's calls that were not needed."""
        made = sum(count for kind, count in self.calls.items() if kind != "spared")
        return self.calls["spared"] / max(1, made + self.calls["spared"])

    @property
    def calls_an_image(self) -> float:
        """The network's calls of a sample, one or two a step, for each image that was made."""
        made = sum(count for kind, count in self.calls.items() if kind != "spared")
        return made / max(1, self.counts["ok"] + self.counts["failed"])

    def facts(self) -> dict[str, Any]:
        """Numbers alone, as plain data."""
        counts = {kind: self.counts[kind] for kind in ("ok", "failed", "suspect", "copies", "flagged", "truncated", "attempts")}
        own = {"total": self.total, "before": self.before, "skipped": self.skipped} | counts
        return own | {
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.rate, 4),
            "spared": round(self.spared, 4),
        }

    def __str__(self) -> str:
        left = self.left - self.counts["failed"]
        text = f"{self.done:,} of {self.total:,} images, {self.rate:.3g} images/s"
        if left and self.rate:
            text += f", {duration(left / self.rate)} left"
        return text + "".join(f", {self.counts[kind]} {kind}" for kind in ("suspect", "failed") if self.counts[kind])


def duration(seconds: float) -> str:
    """A time as hours:minutes:seconds."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{second:02d}"


class Progress:
    """A bar in a terminal, lines elsewhere ("auto"), lines ("plain"), JSON Lines ("json") or nothing ("none").

    metrics: a port to serve the same numbers on for Prometheus, with the package prometheus_client; None: not served.
    host: the address that it is served on: this machine alone, unless another is given; "0.0.0.0" is every one that it has.

    Raises ValueError for another kind, ImportError without that package, OSError for a port that is taken.
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
        try:
            from prometheus_client import CollectorRegistry, Gauge, start_http_server
        except ImportError as error:
            raise ImportError("metrics need the package prometheus_client: pip install prometheus_client") from error
        registry = CollectorRegistry()
        for name in Summary(0).facts():
            self._gauges[name] = Gauge(f"basinescape_{name}", f"{name} of the run, as in its summary", registry=registry)
        self.port = start_http_server(port, host, registry)[0].server_port

    def begin(self, total: int, before: int, skipped: int) -> None:
        self.summary, self._start = Summary(total, before, skipped), time.monotonic()
        self._shown = self._start
        if self.kind == "bar":
            self._bar = tqdm(total=total, initial=before, desc="images", unit="image", bar_format=FORMAT, file=self.stream)
        self._tell("begin", due=self.kind == "json")

    def update(self, line: dict[str, Any], calls: Counter[str]) -> None:
        """Tell of a line of the manifest, and of the engine's calls so far."""
        self.summary.add(line)
        self.summary.calls, self.summary.seconds = Counter(calls), time.monotonic() - self._start
        if self._bar is not None:
            kinds = ("suspect", "failed")
            self._bar.set_postfix({kind: self.summary.counts[kind] for kind in kinds if self.summary.counts[kind]}, False)
            self.moved(0.0)
        self._tell("progress", due=time.monotonic() - self._shown >= EVERY)

    def moved(self, under_way: float) -> None:
        """Tell of steps taken, as so many images' worth that are not yet done; the bar moves with them."""
        if self._bar is not None:
            counts = self.summary.counts
            self._bar.update(self.summary.before + counts["ok"] + counts["failed"] + under_way - self._bar.n)

    def tell(self, text: str, facts: dict[str, Any]) -> None:
        """Tell of what is expected: a line, or for "json" its facts."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        elif self.kind != "none":
            self._print(json.dumps({"event": "expected", **facts}) if self.kind == "json" else text)

    def _print(self, text: str) -> None:
        with suppress(ValueError, OSError):  # nobody listens any more
            print(text, file=self.stream, flush=True)

    def _tell(self, event: str, due: bool) -> None:
        for name, value in self.summary.facts().items() if self._gauges else ():
            self._gauges[name].set(value)
        if not due or self.kind in ("bar", "none"):
            return
        self._shown = time.monotonic()
        self._print(json.dumps({"event": event, **self.summary.facts()}) if self.kind == "json" else str(self.summary))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._tell("end", due=self.kind == "json")


class JsonFormatter(logging.Formatter):
    """Log records as JSON Lines beside those of `Progress`."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"event": "log", "level": record.levelname, "message": record.getMessage()})


def moving(bar: tqdm, count: int) -> Callable[[float], None]:
    """What moves `bar`, of FORMAT, while `count` of its items are in the making; done, they are to be counted by `update`."""
    done = bar.n

    def tell(share: float) -> None:
        bar.update((done if share >= 1 else done + share * count) - bar.n)

    return tell


def parts(total: int, size: int) -> list[range]:
    """`total` samples, at most `size` at a time."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def bar(progress: bool | Callable[[float], None], part: int, parts: int) -> Bar:
    """A bar for the rows of one part of the work, or what tells `progress` of them."""
    if not callable(progress):
        of = f" {part + 1}/{parts}" if parts > 1 else ""
        return partial(tqdm, desc=f"sampling{of}", unit="step", disable=not progress, file=sys.stderr)

    def told(rows: Sequence) -> Iterable:
        for k, row in enumerate(rows, 1):
            yield row
            progress((part + k / len(rows)) / parts)

    return told
