"""What a run will take is told after its first measured step."""

import json
from io import StringIO

import pytest
from basinescape import Guidance, Sampler
from basinescape.bulk import forecast
from basinescape.data.prompts import Job
from basinescape.runs.progress import Progress
from bulkruns import jobs, make, sound
from ladders import EVERY, NONE, guard

PLAIN = Guidance.cfg(5.0)
STEP = 30.0  # seconds


class Clock:
    """Time that passes between two looks alone, so much as a step takes."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += STEP
        return self.now


def told(sampler, asked, out, log="json", **options):
    """What was expected of a run, its clock being that of steps; None where nothing was said."""
    stream = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "time", Clock())
        make(sampler, asked, out, progress=Progress(log, stream=stream), **{"batch_size": 2, "steps": 5} | options)
    if log == "plain":
        return stream.getvalue()
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    return next((event for event in found if event["event"] == "expected"), None)


def test_time_is_that_of_all_steps_and_calls_that_judge(small, drawn, tmp_path):
    sampler = Sampler.from_pipeline(small, "ddim")
    assert told(sampler, jobs(6), tmp_path / "plain")["seconds"] == STEP * 3 * 5
    guarded = guard((PLAIN, NONE), (PLAIN, EVERY))
    assert told(sampler, jobs(6), tmp_path / "guard", guidance=guarded)["seconds"] == STEP * 3 * (
        5 + guarded.attempts[0].probes
    )
    own = [*jobs(4), *(Job(f"q{i}", f"q{i}", i, steps=10, height=128) for i in range(4))]
    assert told(sampler, own, tmp_path / "own")["seconds"] == STEP * (2 * 5 + 2 * 10 * 2)


def test_what_is_there_is_not_counted(small, drawn, tmp_path):
    sampler = Sampler.from_pipeline(small, "ddim")
    first = told(sampler, jobs(8), tmp_path)
    assert first["images"] == 8 and first["bytes"] == 8 * 3 * 64 * 64 and first["free"] > 0
    for line in sound(tmp_path)[:4]:
        (tmp_path / line["file"]).unlink()
    again = told(sampler, jobs(8), tmp_path)
    assert (again["images"], again["seconds"], again["bytes"]) == tuple(
        first[name] / 2 for name in ("images", "seconds", "bytes")
    )


def test_it_is_said_in_words_and_not_of_a_short_run(small, drawn, tmp_path):
    sampler = Sampler.from_pipeline(small, "ddim")
    said = told(sampler, jobs(6), tmp_path / "long", "plain", guidance=guard((PLAIN, NONE), (PLAIN, EVERY)))
    assert "6 images to make: 6 attempts, and more for what looks like a copy; about 00:09:00; at most 73.7 kB of " in said
    assert told(sampler, jobs(1), tmp_path / "short", steps=1) is None
