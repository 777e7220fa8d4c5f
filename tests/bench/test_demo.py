"""The demo and the analysis from end to end, at a small size."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from basinescape import Guidance
from basinescape.bench.evaluation import demo
from basinescape.bench.evaluation.analyze import analyze
from basinescape.bench.scenario import PRESETS
from basinescape.guidance.guidance import SHAPES
from basinescape.kernels.table import Column
from basinescape.sampling.step_table import StepTable
from basinescape.schedulers.schedule import Schedule
from basinescape.schedulers.solver_coefficients import Solver
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from PIL import Image

pytestmark = pytest.mark.shipped
TINY = replace(PRESETS["tiny"], steps=4)


def test_the_demo_shows_both_methods_of_both_pipelines_and_frames_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ROWS", {"tiny": ("m00",), "flow": ("s07",)})
    monkeypatch.setattr(demo, "PRESETS", {name: replace(PRESETS[name], steps=4) for name in ("tiny", "flow")})
    monkeypatch.setattr(demo, "SEEDS", 2)
    said = demo.demo(str(tmp_path / "out"), progress=False)
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["model"], row["method"]) for row in rows] == [
        (name, method) for name in ("tiny", "flow") for method in ("plain guidance", "with the guard")
    ]
    assert all(str(tmp_path / "out" / f"{name}.png") in said and f"{name}: asked" in said for name in ("tiny", "flow"))
    with Image.open(tmp_path / "out" / "noise_gap.png") as plot:
        assert np.asarray(plot.convert("L")).std() > 5
    frames = {name: framed(tmp_path / "out" / f"{name}.png") for name in ("tiny", "flow")}
    counts = {row["model"]: 0 for row in rows}
    for row in rows:
        counts[row["model"]] += int(row["copies"].split()[0])
    assert frames == counts


def framed(path):
    """How many of the places of images, 4 a row in two columns of 2, have a red frame."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    red = (pixels == (0xD0, 0, 0)).all(axis=-1)
    lines = red.sum(axis=0)  # a frame has upright lines, FRAME wide, higher than a picture
    upright = (lines >= demo.SIDE).astype(int)
    return int((np.diff(upright, prepend=0) == 1).sum()) // 2


def test_the_analysis_writes_what_it_says(tmp_path):
    summary = analyze(TINY, tmp_path / "out", seeds=1, limit=2, onsets=(0, 2, 4))
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    first, *_, last = summary["onset"]
    assert (first["onset"], last["onset"]) == (0, 4) and first["similarity"] > last["similarity"]
    assert all(0 <= row["auc"] <= 1 for row in summary["detection"]) and len(summary["ordinary"]) == TINY.steps
    lines = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert {len(line["gap"]) for part in (lines["unguided"], *lines["plain"].values()) for line in part} == {TINY.steps}
    for name in ("onset", "convergence", "returns", "curves"):
        with Image.open(tmp_path / "out" / f"{name}.png") as plot:
            assert np.asarray(plot.convert("L")).std() > 5
    with pytest.raises(ValueError, match="not empty"):
        analyze(TINY, tmp_path / "out")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_closed_form(shape):
    """As the authors' scripts have them, over t in 0..1000 and for the scale g (Jain et al., CVPR 2025)."""
    g, pi = 3.0, np.pi
    solver = Solver.of(DDIMScheduler(timestep_spacing="linspace"), Schedule(9))
    t = solver.timesteps.double().numpy()
    expected = {
        "static": np.full_like(t, g),
        "invlinear": g * t / 1000,
        "linear": g * (1 - t / 1000),
        "cosine": g * (np.cos(pi * t / 1000) + 1),
        "sine": g * (np.sin(pi * t / 1000 - pi / 2) + 1),
        "v_shape": np.where(t > 500, g * (1 - t / 1000), g * t / 1000),
        "a_shape": np.where(t < 500, g * (1 - t / 1000), g * t / 1000),
    }[shape]
    weights = Guidance.cfg(g, shape=shape).weights(solver.levels)
    np.testing.assert_allclose([after for _, after in weights], expected, rtol=1e-6, atol=1e-6)


def test_an_interval_guides_inside_and_a_table_has_a_factor_a_step():
    """Under Heun, too: a step's second call has the weight of its first."""
    solver = Solver.of(HeunDiscreteScheduler(beta_schedule="scaled_linear"), Schedule(6))
    first = [solver.step.tolist().index(step) for step in range(6)]
    inside = [200 <= t <= 700 for t in solver.timesteps[first].tolist()]
    cpu = torch.device("cpu")
    table = StepTable.make(solver, Guidance.cfg(5.0, interval=(200, 700)), cpu).table
    assert table[:, Column.AFTER].tolist() == [5.0 if inside[step] else 1.0 for step in solver.step.tolist()]
    assert 0 < sum(inside) < 6
    factors = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    table = StepTable.make(solver, Guidance.cfg(2.0, shape=factors), cpu).table
    assert table[:, Column.AFTER].tolist() == [2 * factors[step] for step in solver.step.tolist()] and len(table) == 11
