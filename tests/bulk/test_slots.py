"""The number of slots, on which the last bits of pictures may depend: a setting of a run, found again when it goes on."""

import json

import bulkruns
import pytest
from basinescape import Guidance, Sampler
from basinescape.data.prompts import Job
from bulkruns import sound

JOBS = [Job(f"p{i}", f"a picture of a cat {i}", i) for i in range(6)]


def make(sampler, out, batch_size):
    bulkruns.make(sampler, JOBS, out, Guidance.cfg(5.0), batch_size=batch_size)
    sound(out)
    return json.loads((out / "run.json").read_text())["slots"]


def test_a_run_goes_on_with_as_many_and_is_refused_with_others(small, tmp_path):
    sampler = Sampler.from_pipeline(small, "ddim")
    assert make(sampler, tmp_path / "a", 4) == 3  # 6 jobs fill 3 slots twice, not 4 and 2
    kept = (tmp_path / "a" / "images" / "p4.png").read_bytes()
    (tmp_path / "a" / "images" / "p4.png").unlink()
    assert make(sampler, tmp_path / "a", None) == 3 and (tmp_path / "a" / "images" / "p4.png").read_bytes() == kept
    with pytest.raises(ValueError, match=r"holds a run of 3 samples at a time, .* got batch_size 2"):
        make(sampler, tmp_path / "a", 2)
    assert make(sampler, tmp_path / "b", None) == 6  # what the device holds, and no more than there are jobs
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        make(sampler, tmp_path / "c", 0)
    assert not (tmp_path / "c").exists()
