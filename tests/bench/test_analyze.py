"""What an analysis makes of a sweep over the step at which guidance begins."""

import sys
from dataclasses import replace

import pytest
from basinescape.bench.evaluation import experiment, trajectories
from basinescape.bench.evaluation.analyze import analyze
from basinescape.bench.evaluation.trajectories import edges
from basinescape.bench.methods.method import starting_at
from basinescape.bench.scenario import PRESETS


def test_edges_are_the_first_onsets_after_the_last_copy():
    rows = [
        {"id": "x", "seed": 0, "onset": onset, "memorized": memorized}
        for onset, memorized in [(0, True), (2, False), (4, True), (6, False), (8, False)]
    ]
    always = [{"id": "y", "seed": 0, "onset": onset, "memorized": True} for onset in (0, 2, 4, 6, 8)]
    never = [{"id": "z", "seed": 0, "onset": onset, "memorized": False} for onset in (0, 2, 4, 6, 8)]
    assert edges(rows + always + never) == {("x", 0): 6, ("y", 0): 9, ("z", 0): 0}


def test_a_sweep_starts_where_it_says():
    weights = starting_at(3, 7.5, 6).weights([900, 700, 500, 300, 100, 0])
    assert [after for _, after in weights] == [0, 0, 0, 7.5, 7.5, 7.5]


@pytest.mark.shipped
def test_a_single_step_is_no_trajectory(tmp_path):
    with pytest.raises(ValueError, match="steps must be a whole number of at least 2, got 1"):
        analyze(replace(PRESETS["tiny"], steps=1), tmp_path / "out", 1, 1, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.shipped
def test_a_study_without_general_prompts_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text("model: tiny\nmemorized: tiny\n")
    arguments = ["study", "--scenario", str(tmp_path / "mine.yaml"), "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        experiment.run(lambda *_: pytest.fail("work was begun"), "about", 0)
    assert "has no general prompts" in capsys.readouterr().err


@pytest.mark.shipped
def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs scikit-learn"):
        analyze(PRESETS["tiny"], tmp_path / "out", 1, 1, progress=False)
    assert not (tmp_path / "out").exists()
