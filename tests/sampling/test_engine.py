"""In-flight batching: the same images as alone, slots that are filled at once, one shape, faults that stay where they are."""

import weakref
from dataclasses import replace

import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, Sampler
from basinescape.bench.speed import engine as speed
from basinescape.bench.speed.standin import stand_in
from basinescape.sampling import slots
from basinescape.sampling.attempt_table import AttemptTable
from basinescape.sampling.engine import Engine
from basinescape.sampling.samples import Result, Sample
from basinescape.schedulers.schedule import make_scheduler
from smallguards import EVERY, NONE
from smallguards import guard as judged

PLAIN = Guidance.cfg(7.5)
DELAYED = Guidance.delayed(7.5, until=At(500))


@pytest.fixture
def sampler(pipe):
    return stand_in(pipe)


def attempt_table(sampler, steps, guidance=PLAIN):
    return AttemptTable.make(sampler.solver(steps), guidance, torch.device("cpu"))


def samples(sampler, attempt_tables, size=64):
    """One an attempt table, of prompts of their own, with the seeds 0, 1, ..."""
    encoded = sampler.model.encode([f"cat {i}" for i in range(len(attempt_tables))], size, size)
    network = sampler.model.network(encoded)
    return [Sample(i, one, sampler.model.shape(size, size), network, i, seed=i) for i, one in enumerate(attempt_tables)]


def run(sampler, work, slots=3, begin=None, **options):
    """The results by key."""
    made = Engine(begin or sampler.runner.open_batch, slots, **{"fixed": True, "local": True} | options)
    with torch.inference_mode():
        return {result.sample.key: result for result in made.run(work)}


def guard(limit, last):
    """Plain guidance, then two more careful attempts, with the first two's threshold and the last one's."""
    late = Guidance.delayed(7.5, until=At(900), before=2.0), Guidance.opposite(1.0, 7.5, At(300))
    return judged((PLAIN, limit), (late[0], limit), (late[1], last), probes=2)


def mixed(sampler):
    """Step counts, guidance, restarts and guards beside each other."""
    kinds = [
        (10, PLAIN),
        (3, DELAYED),
        (7, Guidance.opposite(2.0, scale=7.5, until=FirstMinimum(latest=4))),
        (5, Guidance.cfg(0.0)),
        (8, Guidance.cfg(3.0, restart=(300, 600, 2))),
        (5, guard(NONE, NONE)),
        (5, guard(EVERY, NONE)),
        (6, DELAYED),
        (5, guard(EVERY, EVERY)),
        (12, Guidance.cfg(7.5, interval=(200, 700))),
        (4, PLAIN),
    ]
    return kinds, samples(sampler, [attempt_table(sampler, *kind) for kind in kinds])


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "euler"])
@pytest.mark.parametrize("slots", [1, 3, 11])
def test_a_sample_is_what_it_is_alone(pipe, scheduler, slots):
    sampler = stand_in(pipe, scheduler)
    kinds, work = mixed(sampler)
    found, attempts = run(sampler, iter(work), slots), set()
    for i, (steps, guidance) in enumerate(kinds):
        alone = sampler([f"cat {i}"], [i], steps, guidance, output="latent", progress=False)
        result = found[i]
        assert torch.equal(result.latents, alone.latents[0]), guidance
        assert torch.equal(result.gaps.nan_to_num(-1), alone.noise_gap[0].nan_to_num(-1))
        transition = result.transition.item()
        assert (transition if transition < steps else -1) == alone.transition_step[0]
        if alone.attempts is not None:
            assert (result.attempts, result.suspect) == (alone.attempts[0], alone.suspect[0])
            assert result.score == pytest.approx(alone.score[0].item(), abs=1e-6)
            attempts.add(result.attempts)
    assert len(attempts) > 1


def test_a_step_that_is_the_schedulers_own_is_taken_together(pipe):
    sampler = stand_in(pipe, "unipc")
    few, many = attempt_table(sampler, 6), attempt_table(sampler, 8, DELAYED)
    assert few.stepwise and many.stepwise
    order = [few, few, few, many, few]
    found = run(sampler, samples(sampler, order), 2)
    for i, one in enumerate(order):
        guidance = DELAYED if one is many else PLAIN
        alone = sampler([f"cat {i}"], [i], one.plan.steps, guidance, output="latent", progress=False)
        assert torch.equal(found[i].latents, alone.latents[0])


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_free_slot_is_filled_at_once(sampler, slots):
    """So the network is called as often as when each slot takes the next job as soon as it is free."""
    steps = [6, 3, 4, 9, 3, 3, 5, 4]
    known = {count: attempt_table(sampler, count) for count in steps}
    free = [0] * slots
    for count in steps:
        free[free.index(min(free))] += count
    run(sampler, samples(sampler, [known[count] for count in steps]), slots)
    assert sampler.model.calls == max(free)


def test_one_branch_runs_where_all_need_the_same(sampler):
    delayed, plain = attempt_table(sampler, 4, DELAYED), attempt_table(sampler, 4)
    branches = delayed.plan.branches
    assert branches.count("uncond") == 2
    made = Engine(sampler.runner.open_batch, 2, fixed=True)
    with torch.inference_mode():
        list(made.run(samples(sampler, [delayed, delayed])))
        assert made.calls == {"uncond": 4, "both": 8, "spared": 4}
        list(made.run(samples(sampler, [delayed, plain])))
    assert made.calls == {"uncond": 4, "both": 8 + 16, "spared": 4}


def test_what_is_under_way_counts_the_attempts_that_are_usual(sampler):
    """Three attempts a sample: once one is done, the next is a third done after one attempt, two thirds after two."""
    three = judged((PLAIN, EVERY), (PLAIN, EVERY), (PLAIN, NONE))
    made, told = Engine(sampler.runner.open_batch, 1, fixed=True), []
    with torch.inference_mode():
        work = samples(sampler, [attempt_table(sampler, 4, three)] * 2)
        results = made.run(work, tick=lambda: told.append(made.under_way))
        assert next(results).attempts == 3
        told.clear()
        assert next(results).attempts == 3
    assert told == sorted(told) and told[0] == 0 and told[-1] == 1
    assert {1 / 3, 2 / 3} <= set(told)


def test_the_network_sees_one_shape(sampler):
    """Also where the work ends; without `fixed` the batch shrinks there."""
    sizes, predict = [], sampler.model._predict

    def noted(latents, *arguments, **options):
        sizes.append(len(latents))
        return predict(latents, *arguments, **options)

    sampler.model._predict = noted
    work = [attempt_table(sampler, steps) for steps in (6, 2, 2, 3)]
    run(sampler, samples(sampler, work))
    assert set(sizes) == {6}
    sizes.clear()
    run(sampler, samples(sampler, work), fixed=False)
    assert sizes[0] == 6 and sizes[-1] == 2


def test_samples_of_another_size_wait_until_the_batch_is_free(sampler):
    small, large = (
        samples(sampler, [attempt_table(sampler, 3)] * 3),
        samples(sampler, [attempt_table(sampler, 3)] * 3, size=128),
    )
    work = [small[0], large[1], replace(small[2])]
    found = run(sampler, work)
    assert [tuple(found[i].latents.shape) for i in range(3)] == [(4, 16, 16), (4, 32, 32), (4, 16, 16)]


def test_a_table_that_is_full_begins_anew(sampler, monkeypatch):
    monkeypatch.setattr(slots, "ROWS", 12)
    work = samples(sampler, [attempt_table(sampler, steps) for steps in (5, 6, 7, 5)])
    found = run(sampler, work)
    assert sorted(found) == [0, 1, 2, 3] and all(result.error is None for result in found.values())


def test_nobody_gets_far_ahead_of_the_slowest(sampler, monkeypatch):
    monkeypatch.setattr(slots, "AHEAD", 2)
    slow, quick = attempt_table(sampler, 60), attempt_table(sampler, 3)
    order = [result.sample.key for result in _ordered(sampler, samples(sampler, [slow] + [quick] * 12), 2)]
    assert order.index(0) == 3  # 1, 2 and 3 are less than 2 x 2 ahead


def _ordered(sampler, work, slots):
    with torch.inference_mode():
        return list(Engine(sampler.runner.open_batch, slots, fixed=True).run(work))


def failing(sampler, fault):
    """`fault(latents, texts)` before each call of the network."""
    predict = sampler.model._predict

    def called(latents, timesteps, encoder_hidden_states, return_dict):
        fault(latents, encoder_hidden_states.flatten().tolist())
        return predict(latents, timesteps, encoder_hidden_states, return_dict)

    sampler.model._predict = called


def test_out_of_memory_means_fewer_slots(sampler, caplog):
    def short(latents, texts):
        if len(latents) > 4:
            raise torch.OutOfMemoryError("no memory")

    work = [attempt_table(sampler, steps) for steps in (3, 4, 5, 3, 4, 5)]
    right = run(sampler, samples(sampler, work), 5)
    failing(sampler, short)
    found = run(sampler, samples(sampler, work), 5)
    assert all(torch.equal(found[i].latents, right[i].latents) for i in range(6))
    assert [record.getMessage() for record in caplog.records] == [
        "5 samples failed together (no memory): they begin again, 2 at a time"
    ]


def test_a_fault_costs_one_sample_and_no_slots(sampler):
    work = samples(sampler, [attempt_table(sampler, 3)] * 8)
    texts = work[0].network.inputs["cond"]["encoder_hidden_states"].flatten().tolist()
    sizes = []

    def fault(latents, there):
        sizes.append(len(latents))
        if texts[2] in there:
            raise TypeError("bad")

    failing(sampler, fault)
    found = run(sampler, samples(sampler, [attempt_table(sampler, 3)] * 8), 4)
    assert {i for i, result in found.items() if result.error is not None} == {2} and str(found[2].error) == "bad"
    assert sizes[-1] == 8  # both branches of four
    with pytest.raises(TypeError, match="bad"):
        run(sampler, samples(sampler, [attempt_table(sampler, 3)] * 8), 4, local=False)


def test_a_fault_that_passes_costs_nothing(sampler, caplog):
    """Also one in giving the batch its memory; afterwards there are as many slots as before."""
    faults, sizes, lane = ["step", "lane"], [], sampler.runner.open_batch

    def opened(*given):
        if faults[-1:] == ["lane"]:
            faults.pop()
            raise RuntimeError("passes")
        return lane(*given)

    def fault(latents, there):
        sizes.append(len(latents))
        if len(sizes) == 2:
            faults.pop()
            raise RuntimeError("passes")

    failing(sampler, fault)
    found = run(sampler, samples(sampler, [attempt_table(sampler, 3)] * 16), 4, begin=opened)
    assert not faults and len(found) == 16 and all(result.error is None for result in found.values())
    assert sizes[0] == 4 and sizes[-1] == 8 and len(caplog.records) == 2


def test_a_source_that_fails_ends_the_work(sampler):
    def work():
        yield samples(sampler, [attempt_table(sampler, 3)])[0]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        run(sampler, work(), 2)


def test_what_has_failed_already_is_passed_on(sampler):
    work = samples(sampler, [attempt_table(sampler, 3)] * 3)
    work[1] = Result(work[1], error=ValueError("no prompt"))
    found = run(sampler, work, 1)
    assert str(found[1].error) == "no prompt" and found[0].error is found[2].error is None


def test_what_is_done_is_let_go(sampler):
    """However long the work, what is in memory of it is bounded."""
    alive, most, one = weakref.WeakSet(), 0, attempt_table(sampler, 1)
    network = samples(sampler, [one])[0].network

    def work():
        nonlocal most
        for i in range(200):
            alive.add(sample := Sample(i, one, (4, 16, 16), network, 0, seed=i))
            most = max(most, len(alive))
            yield sample

    with torch.inference_mode():
        assert sum(1 for _ in Engine(sampler.runner.open_batch, 4, fixed=True).run(work())) == 200
    assert most < 20


def test_bits_do_not_depend_on_the_neighbours(pipe):
    """With the small pipeline's own network, whose bits depend on the shape of its batch."""
    sampler = Sampler.from_pipeline(pipe, "dpmsolver++")
    three, two = attempt_table(sampler, 3), attempt_table(sampler, 2)
    together = run(sampler, samples(sampler, [three, two, three, two, three]))
    others = [replace(sample) for sample in samples(sampler, [three, two, three, two, three]) if sample.key in (2, 3)]
    again = run(sampler, others)
    assert all(torch.equal(again[i].latents, together[i].latents) for i in (2, 3))


def test_the_benchmarks_peers_sample_the_same_and_the_network_is_timed(small, monkeypatch):
    monkeypatch.setattr(small, "scheduler", make_scheduler("dpmsolver++", small.scheduler))
    case = speed.Case(Sampler.from_pipeline(small), jobs=5)
    work = [(steps, Guidance.cfg(speed.SCALE)) for steps in (3, 4, 3, 3, 4)]
    made = {name: peer() for name, peer in case.peers(work, loop=True).items()}
    speed.agree(*made.values())
    assert set(made) >= {speed.LOOP, "in-flight"} and {tuple(sorted(found)) for found in made.values()} == {(0, 1, 2, 3, 4)}
    with pytest.raises(RuntimeError, match="of their norm apart"):
        speed.agree(made["in-flight"], {i: x + 1 for i, x in made["in-flight"].items()})
    row = speed.busy(case.sampler, slots=2, jobs=3, steps=2)
    assert 0 < row["median"] < 1
