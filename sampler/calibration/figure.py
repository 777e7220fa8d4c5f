"""The plot beside a calibration."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ..guidance.guard import THRESHOLD
from .calibration import Calibration


def draw(found: Calibration, path: Path) -> None:
    """Plot the noise gaps of ordinary prompts, with plain guidance and without any, and the basin scores of their pictures."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, scores = figure.subplots(1, 2)
    curves.set(title=f"ordinary prompts ({found.images})", xlabel="timestep", ylabel="noise gap  ||cond - uncond||")
    baseline = found.baseline
    if baseline is not None:
        at = found.timesteps
        curves.fill_between(at, baseline.low, baseline.high, color="C0", alpha=0.2, linewidth=0, label="plain: 5% to 95%")
        curves.plot(at, found.gap, color="C0", label="plain guidance, median")
        if baseline.unguided:
            curves.plot(at, baseline.unguided, color="C7", label="no guidance, median")
            curves.axvline(baseline.transition, color="C3", linestyle=":", label="static transition, a first guess")
        curves.invert_xaxis()
        curves.set_yscale("log")
    scores.hist(found.scores, bins=30, color="C0")
    scores.axvline(THRESHOLD, color="C3", linestyle=":", label="above: suspect, without a calibration")
    scores.set(title="their pictures", xlabel="basin score", ylabel="pictures")
    for axes in figure.axes:
        axes.legend()
    figure.savefig(path, dpi=130)
