"""What a run will take is told after its first measured step."""

import json
from collections import Counter
from dataclasses import replace
from io import StringIO
from itertools import count

import pytest
from basinescape import Guidance, Sampler
from basinescape.bulk.cost_forecast import LONG
from basinescape.data.prompts import Job
from basinescape.runs import progress
from basinescape.runs.progress import Progress
from bulkruns import jobs, make, sound
from smallguards import EVERY, NONE, guard

PLAIN = Guidance.cfg(5.0)
STEP = 30.0  # seconds


class Clock:
    """Time of which only the steps of the network take some."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


def told(sampler, asked, out, log="json", slower=(), seconds=STEP, **options):
    """What was expected of a run, its clock being that of steps; None where nothing was said. It is said once at most.

    seconds: what a step takes. slower: the steps, by their numbers, that take ten times as long.
    """
    stream, clock, steps, moved = StringIO(), Clock(), count(), Progress.moved

    def step(self, under_way):
        clock.now += 0 if under_way == 0 else seconds * (10 if next(steps) in slower else 1)
        moved(self, under_way)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "time", clock)
        patch.setattr(Progress, "moved", step)
        make(sampler, asked, out, progress=Progress(log, stream=stream), **{"batch_size": 2, "steps": 5} | options)
    if log == "plain":
        return stream.getvalue()
    found = [event for event in map(json.loads, stream.getvalue().splitlines()) if event["event"] == "expected"]
    assert len(found) <= 1
    return found[0] if found else None


def test_time_is_that_of_all_steps(small, drawn, tmp_path):
    """Of 6 jobs, two at a time, 5 steps each: all but the first 4, after which the pace is known."""
    sampler = Sampler.from_pipeline(small, "ddim")
    assert told(sampler, jobs(6), tmp_path / "plain")["seconds"] == STEP * (3 * 5 - 4)
    assert told(sampler, jobs(6), tmp_path / "set up", slower={0})["seconds"] == STEP * (3 * 5 - 4)
    own = [*jobs(4), *(Job(f"q{i}", f"q{i}", i, steps=10, height=128) for i in range(4))]
    assert told(sampler, own, tmp_path / "own")["seconds"] == STEP * (2 * 5 + 2 * 10 * 2 - 4)


def test_what_is_there_is_not_counted(small, drawn, tmp_path):
    sampler = Sampler.from_pipeline(small, "ddim")
    first = told(sampler, jobs(8), tmp_path)
    assert first["images"] == first["attempts"] == 8 and first["bytes"] == 8 * 3 * 64 * 64 and first["free"] > 0
    for line in sound(tmp_path)[:4]:
        (tmp_path / line["file"]).unlink()
    again = told(sampler, jobs(8), tmp_path)
    latents = told(sampler, jobs(8), tmp_path / "latents", format="latents")
    assert latents["bytes"] == 8 * 4 * 4 * 16 * 16  # float32
    assert (again["images"], again["bytes"]) == (first["images"] / 2, first["bytes"] / 2)
    assert again["seconds"] == first["seconds"] - STEP * 2 * 5


def test_it_is_said_in_words_and_not_of_a_short_run(small, drawn, tmp_path):
    sampler = Sampler.from_pipeline(small, "ddim")
    said = told(sampler, jobs(6), tmp_path / "long", "plain", guidance=guard((PLAIN, NONE), (PLAIN, EVERY)))
    assert "6 images to make: 6 attempts, and more for what looks like a copy; about 00:05:30; at most 73.7kB of " in said
    assert told(sampler, jobs(1), tmp_path / "short", steps=1) is None
    left = 3 * 5 - 4  # steps, once the pace is known
    assert told(sampler, jobs(6), tmp_path / "just too short", seconds=0.99 * LONG / left) is None
    assert told(sampler, jobs(6), tmp_path / "just long enough", seconds=1.01 * LONG / left)["seconds"] == round(1.01 * LONG)


def test_more_attempts_are_said_to_be_possible_where_any_job_is_guarded(small, drawn, tmp_path):
    sampler, plain = Sampler.from_pipeline(small, "ddim"), Job("p", "a cat", 0, guidance="cfg")
    guarded = {"guidance": guard((PLAIN, NONE), (PLAIN, EVERY)), "named": {"cfg": PLAIN}}
    for asked, more in (([*jobs(5), plain], True), ([replace(plain, id=f"p{i}") for i in range(6)], False)):
        said = told(sampler, asked, tmp_path / str(more), "plain", **guarded)
        assert "6 images to make: 6 attempts" in said and ("and more for what looks like a copy" in said) is more


def test_what_is_left_follows_the_last_steps(monkeypatch):
    """Nothing is said before some were taken; then the first one, and what is long ago, count for nothing."""
    clock, shown = Clock(), Progress("none")
    monkeypatch.setattr(progress, "time", clock)
    shown.begin(100, 0, 0)

    def step(seconds, under_way):
        clock.now += seconds
        shown.moved(under_way)
        return shown.summary.remaining

    assert [step(50, 0.25), step(4, 0.5), step(4, 0.75)] == [None] * 3
    assert step(4, 1.0) == 99 / 0.25 * 4
    assert step(4, 0.0) == 99 / 0.75 * 16  # a guard begins again: no way back
    for done in range(40):
        left = step(8, 1.25 + done / 4)
    assert left == pytest.approx((100 - 11) / 0.25 * 8)


def test_without_steps_the_pace_is_that_of_finished_images(monkeypatch):
    """Those of a cluster come in blocks: the time before the first of them counts, and one burst is no pace."""
    clock, shown = Clock(), Progress("none")
    monkeypatch.setattr(progress, "time", clock)
    shown.begin(64, 0, 0)
    for seconds in (60, 1, 1):
        clock.now += seconds
        for i in range(8):
            shown.update({"id": str(i), "status": "ok"}, Counter())
    assert shown.summary.pace == pytest.approx(24 / 62, rel=0.3) and shown.summary.remaining == 40 / shown.summary.pace
