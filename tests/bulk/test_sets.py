"""Sets as people use them: rows of several sizes, steps and guidances in one run; sets that grow; what can't be made."""

import json
from dataclasses import replace
from functools import partial
from itertools import count, groupby, pairwise

import pytest
import torch
from basinescape import At, Guidance, Sampler
from basinescape.bulk.job_order import END, WINDOW, by_size, longest_first
from basinescape.data.prompts import Job, Prompts
from basinescape.data.verify import verify
from basinescape.guidance.early import EarlyLook
from bulkruns import jobs, make, sound
from hypothesis import given
from hypothesis import strategies as st
from rounding import assert_same_but_for_rounding
from safetensors.torch import load_file
from smallguards import EVERY, NONE
from smallguards import guard as guard_of

PLAIN = Guidance.cfg(5.0)
GUARD = guard_of((PLAIN, EVERY), (Guidance.delayed(5.0, until=At(600)), NONE))  # every first attempt begins again
NAMED = {"delayed": Guidance.delayed(5.0, until=At(500)), "guard": GUARD}
SIZES = [(32, 32), (64, 64), (48, 96), (96, 32)]


def mixed(number):
    """Jobs of every size, of two numbers of steps, two scales and three guidances."""
    for i in range(number):
        height, width = SIZES[i % len(SIZES)]
        own = {"height": height, "width": width} if i % 5 else {}
        own |= {"steps": 3} if i % 3 == 1 else {}
        own |= {"scale": 2.0} if i % 7 == 2 else {}
        own |= {"guidance": (None, "delayed", "guard")[i % 3]}
        yield Job(f"p{i}", f"a picture of a cat {i}", i, "blurry" if i % 4 == 3 else None, **own)


def latents(out, **named):
    return {line["id"]: load_file(out / line["file"])["latents"] for line in sound(out)}


def alone(sampler, job, out):
    """The latents of a job whose settings are those of its run."""
    own = {name: value for name, value in job.kind._asdict().items() if value is not None}
    guidance = NAMED[own.pop("guidance")] if "guidance" in own else PLAIN
    if "scale" in own:
        guidance = guidance.scaled(own.pop("scale"))
    plain = Job(job.id, job.prompt, job.seed, job.negative_prompt)
    make(sampler, [plain], out, guidance, format="latents", **{"steps": 4} | own)
    return latents(out)[job.id]


@pytest.mark.slow
def test_each_image_of_a_mixed_set_is_that_of_its_own_run(small, tmp_path, monkeypatch, ways):
    """In as many slots, also of a set that was stopped on its way and that grew.

    Bit for bit where all steps need both predictions. Where some need one, the batch has twice the rows as long as another
    sample needs both, and rounds otherwise.
    """
    monkeypatch.setattr("basinescape.bulk.generate.balanced", lambda most, jobs: 3)
    sampler, out = Sampler.from_pipeline(small, "ddim"), tmp_path / "out"
    options = {"guidance": PLAIN, "steps": 4, "named": NAMED, "format": "latents"}
    asked = list(mixed(14))
    make(sampler, asked[:9], out, **options)
    lines = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").write_text("\n".join(lines[:4]))
    before = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    summary = make(sampler, asked, out, **options)
    assert (summary.before, summary.counts["ok"]) == (4, 10)
    assert sum(path.stat().st_mtime_ns == time for path, time in before.items()) == 4
    found = latents(out)
    assert found.keys() == {job.id for job in asked} and list(verify(out)) == []
    for job in asked:
        expected = alone(sampler, job, tmp_path / job.id)
        if job.guidance is None:
            assert torch.equal(found[job.id], expected), job
        else:
            again = (alone(sampler, job, tmp_path / f"{job.id} {k}") for k in count())
            assert_same_but_for_rounding(found[job.id], expected, small, partial(next, again))


@given(st.lists(st.sampled_from(SIZES), max_size=3 * WINDOW), st.integers(1, 40))
def test_jobs_of_one_size_come_together_and_none_is_lost(sizes, window):
    placed = [(i, Job(f"{i}", "a", i, height=height, width=width)) for i, (height, width) in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("basinescape.bulk.job_order.WINDOW", window)
        ordered = list(by_size(iter(placed), lambda job: (job.height, job.width)))
    assert sorted(ordered, key=lambda one: one[0]) == placed
    for start in range(0, len(placed), window):
        assert {position for position, _ in ordered[start : start + window]} == set(range(len(placed))[start : start + window])
    turns = sum(1 for _ in groupby((job.height, job.width) for _, job in ordered))
    assert turns <= sum(len(set(sizes[start : start + window])) for start in range(0, len(sizes), window))


@given(st.lists(st.tuples(st.sampled_from(SIZES), st.integers(1, 50)), max_size=60), st.integers(1, 6))
def test_the_last_jobs_of_a_size_begin_longest_first_and_none_is_lost(asked, slots):
    placed = [
        (i, Job(f"{i}", "a", i, height=height, width=width, steps=steps)) for i, ((height, width), steps) in enumerate(asked)
    ]
    ordered = list(longest_first(iter(placed), slots, lambda job: (job.height, job.width), lambda job: job.steps))
    before = max(0, len(placed) - END * slots)
    assert ordered[:before] == placed[:before] and sorted(ordered, key=lambda one: one[0]) == placed
    for (_, here), (_, following) in pairwise(ordered[before:]):
        assert here.steps >= following.steps or (here.height, here.width) != (following.height, following.width)
    assert [(job.height, job.width) for _, job in ordered] == [size for size, _ in asked]


def test_slots_run_empty_together(small, drawn, tmp_path):
    """Short jobs fill what longer ones leave free at the end; in their order the longest would run alone for its last steps."""
    sampler, steps = Sampler.from_pipeline(small), [2, 2, 2, 6]
    make(sampler, [replace(job, steps=own) for job, own in zip(jobs(4), steps, strict=True)], tmp_path, batch_size=2)
    assert drawn.calls == 6


def test_a_set_of_one_size_keeps_its_order(small, drawn, tmp_path):
    own = Sampler.from_pipeline(small).size()
    asked = [replace(job, height=own[0] if i % 2 else None) for i, job in enumerate(jobs(6))]
    make(Sampler.from_pipeline(small), asked, tmp_path)
    assert [line["id"] for line in sound(tmp_path)] == [job.id for job in asked]


UNFIT = {
    "height must be a multiple of": {"height": 63},
    "guidance is 'opposite', and the run has delayed, guard by name": {"guidance": "opposite"},
    "shape has 4 factors, but the sampler takes 5 steps": {"steps": 5},
}


@pytest.mark.parametrize("says", UNFIT)
def test_what_cannot_be_made_is_refused_by_row_or_left_out_before_any_work(small, drawn, tmp_path, says):
    sampler, guidance = Sampler.from_pipeline(small, "ddim"), Guidance.cfg(5.0, shape=(1.0,) * 4)
    rows = [{"prompt": "a"}, {"prompt": "b", **UNFIT[says]}, {"prompt": "c"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"guidance": guidance, "steps": 4, "named": NAMED}
    with pytest.raises(ValueError, match=f"line 2: {says}"):
        make(sampler, Prompts(tmp_path / "p.jsonl"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and not drawn.calls
    summary = make(sampler, Prompts(tmp_path / "p.jsonl", on_error="skip"), tmp_path / "out", **options)
    assert (summary.total, summary.skipped) == (2, 1)
    assert [line["id"] for line in sound(tmp_path / "out")] == ["0000", "0002"] and list(verify(tmp_path / "out")) == []


def test_a_size_that_no_memory_holds_is_named_beside_all_other_rows_that_are_wrong(small, drawn, tmp_path):
    sampler = Sampler.from_pipeline(small)
    side = 10**6 * sampler.size()[0]
    rows = [{"prompt": ""}, {"prompt": "b"}, {"prompt": "c", "height": side, "width": side, "count": 3}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    too_large = rf"line 3: height {side} and width {side} are too large: .* GiB, and the device 'cpu' has [0-9.,]+ GiB"
    with pytest.raises(ValueError, match=rf"2 rows are wrong: line 1: prompt must be .*; {too_large}$"):
        make(sampler, Prompts(tmp_path / "p.jsonl", later=True), tmp_path / "out")
    with pytest.raises(ValueError, match=f"^height {side} "):
        make(sampler, jobs(1), tmp_path / "out", height=side, width=side)
    assert not (tmp_path / "out").exists() and not drawn.calls
    summary = make(sampler, Prompts(tmp_path / "p.jsonl", on_error="skip"), tmp_path / "out")
    assert (summary.total, summary.skipped) == (1, 2)


def test_a_guard_looks_early_only_at_pictures_as_it_was_calibrated_for(small, tmp_path):
    sampler = Sampler.from_pipeline(small, "ddim")
    early = EarlyLook((1.0,) * 4, tuple(sampler.solver(4).levels), 1, 0.0)  # gives up every attempt that it looks at
    looking = replace(guard_of((PLAIN, NONE), (PLAIN, NONE)), early=early)
    height = sampler.size()[0]
    own = [
        {},
        {"height": 32},
        {"steps": 5},
        {"scale": 2.0},
        {"height": height, "steps": 4, "scale": 5.0},
        {"guidance": "guard"},
    ]
    asked = [Job(f"{i}", "a", i, **one) for i, one in enumerate(own)]
    make(sampler, asked, tmp_path, looking, steps=4, named={"guard": looking}, format="latents")
    attempts = {line["id"]: line["attempts"] for line in sound(tmp_path)}
    assert attempts == {"0": 2, "1": 1, "2": 1, "3": 1, "4": 2, "5": 2}


@pytest.mark.parametrize("format", ["png", "parquet"])
def test_a_set_that_grows_makes_what_is_new_alone(small, drawn, tmp_path, format):
    pytest.importorskip("pyarrow")
    sampler, out = Sampler.from_pipeline(small), tmp_path / "out"
    make(sampler, jobs(3), out, format=format, batch_size=2)
    drawn.asked.clear()
    summary = make(sampler, jobs(5), out, format=format, batch_size=2)
    assert (summary.before, summary.counts["ok"]) == (3, 2)
    assert [text for call in drawn.asked for text in call["prompts"]] == [job.prompt for job in jobs(5)[3:]]
    assert list(verify(out)) == [] and json.loads((out / "run.json").read_text())["prompts"] == 5
    make(sampler, jobs(5), tmp_path / "once", format=format, batch_size=2)
    for path in (path for path in out.rglob("*") if path.suffix in (".png", ".parquet", ".jsonl")):
        assert path.read_bytes() == (tmp_path / "once" / path.relative_to(out)).read_bytes()


REFUSED = {
    "'p1' was asked for with prompt 'a picture of a cat 1', now 'a dog'": lambda j: [j[0], replace(j[1], prompt="a dog"), j[2]],
    "'p2' was asked for with seed 2, now 7, steps None, now 3": lambda j: [
        *j[:2],
        replace(j[2], seed=7, steps=3),
        Job("n", "n", 0),
    ],
    "image 1 was 'p1' .'a picture of a cat 1'., now 'new' .'a'.: add new prompts behind": lambda j: [
        j[0],
        Job("new", "a", 9),
        *j[1:],
    ],
    "holds a run of 2 more images, 'p1' the first": lambda j: j[:1],
}


@pytest.mark.parametrize("says", REFUSED)
def test_a_set_that_changes_is_refused_by_what_has_changed(small, drawn, tmp_path, says):
    sampler, out = Sampler.from_pipeline(small), tmp_path / "out"
    make(sampler, jobs(3), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=says):
        make(sampler, REFUSED[says](jobs(3)), out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_a_name_means_may_not_change_and_others_may_come(small, drawn, tmp_path):
    sampler = Sampler.from_pipeline(small, "ddim")
    asked = [Job("a", "a", 0), Job("b", "b", 1, guidance="delayed")]
    make(sampler, asked, tmp_path, named={"delayed": NAMED["delayed"]})
    with pytest.raises(ValueError, match=r"its named differ: named.delayed.scale 5.0 there, 6.0 now"):
        make(sampler, [*asked, Job("c", "c", 2)], tmp_path, named={"delayed": Guidance.delayed(6.0, until=At(500))})
    assert make(sampler, [*asked, Job("c", "c", 2, guidance="guard")], tmp_path, named=NAMED).counts["ok"] == 1


def test_a_set_grows_whose_named_guidance_has_an_interval(small, drawn, tmp_path):
    """Which run.json has as a list, and the guidance as a tuple."""
    sampler, named = Sampler.from_pipeline(small, "ddim"), {"cfg": Guidance.cfg(5.0, interval=(0, 500))}
    asked = [Job(f"{i}", "a", i, guidance="cfg") for i in range(2)]
    make(sampler, asked[:1], tmp_path, named=named)
    assert make(sampler, asked, tmp_path, named=named).counts["ok"] == 1


def test_a_folder_that_no_longer_says_of_what_it_is_does_not_grow(small, drawn, tmp_path):
    """Else images of other prompts would stand in it under the new ones' names."""
    sampler = Sampler.from_pipeline(small)
    make(sampler, jobs(3), tmp_path)
    text = (tmp_path / "jobs.jsonl").read_text()
    (tmp_path / "jobs.jsonl").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"jobs.jsonl, which says which, is missing or cut off"):
        make(sampler, jobs(4), tmp_path)
    make(sampler, jobs(3), tmp_path)
    assert make(sampler, jobs(4), tmp_path).counts["ok"] == 1
