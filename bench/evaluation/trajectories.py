"""Record and push trajectories: where they end, how they converge, and where the edge of a basin is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from basinescape import At, Guidance, Output, Sampler
from basinescape.kernels.state import State
from torch import Tensor
from tqdm import tqdm

from ..methods import stepwise
from ..methods.method import starting_at
from ..scenario import Prompt, Scenario, loaded
from .measure import Measure

DELAYS = (-3.5, -2.8, -1.9)  # log SNRs at which some of the pictures of memorized captions are copies


@dataclass
class Laboratory:
    """Runs of a sampler, of `steps` steps at guidance `scale`, in which every step can be recorded or changed."""

    sampler: Sampler
    steps: int
    scale: float
    measure: Measure
    batch_size: int = 16
    progress: bool = True

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        groups: Mapping[str, Sequence[Prompt]],
        device: str | None = None,
        dtype: str | None = None,
        progress: bool = True,
    ) -> Laboratory:
        """Load the scenario's model and make its laboratory.

        Raises ImportError if there are general prompts but no scikit-learn, and what `Measure` and `scenario.loaded` raise.
        """
        if "general" in groups and find_spec("sklearn") is None:
            raise ImportError("telling memorized from general prompts needs scikit-learn: pip install '.[evaluate]'")
        measure = Measure(scenario, groups)
        scenario, sampler = loaded(scenario, device, dtype)
        return cls(sampler, *scenario.how[:2], measure, progress=progress)

    def delays(self) -> list[Guidance]:
        """Delayed guidance, one for each of DELAYS."""
        return [Guidance.delayed(self.scale, until=At(log_snr=log_snr)) for log_snr in DELAYS]

    def run(
        self,
        found: Sequence[Prompt],
        seeds: Sequence[int],
        guidance: Guidance,
        look: stepwise.Look | None = None,
        push: stepwise.Push | None = None,
    ) -> Output:
        """An image for each prompt and its seed."""
        texts = [prompt.text for prompt in found]
        return stepwise.sample(self.sampler, texts, seeds, self.steps, guidance, look=look, push=push)

    def bar(self, turns: Sequence[Any], what: str) -> tqdm:
        """Iterate over `turns` with a progress bar."""
        return tqdm(turns, desc=what, disable=not self.progress)

    def batches(self, found: Sequence[Prompt], seeds: Sequence[int]) -> list[tuple[list[Prompt], list[int]]]:
        """Every prompt with every seed, in batches."""
        pairs = [(prompt, seed) for seed in seeds for prompt in found]
        chunks = [pairs[i : i + self.batch_size] for i in range(0, len(pairs), self.batch_size)]
        return [([prompt for prompt, _ in chunk], [seed for _, seed in chunk]) for chunk in chunks]

    def outcomes(
        self, found: Sequence[Prompt], seeds: Sequence[int], guidance: Guidance, push: stepwise.Push | None = None
    ) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """(id, seed, measured) of every prompt and seed under `guidance`."""
        for batch, drawn in self.batches(found, seeds):
            images = self.run(batch, drawn, guidance, push=push).images
            for prompt, seed, measured in zip(batch, drawn, self.measure(images, batch), strict=True):
                yield prompt.id, seed, measured


def onset_sweep(lab: Laboratory, found: Sequence[Prompt], seeds: Sequence[int], onsets: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each prompt, seed and onset: the measurements of the image, with guidance from the step `onset` on."""
    return [
        {"id": id, "seed": seed, "onset": onset, **measured}
        for onset in lab.bar(onsets, "onsets")
        for id, seed, measured in lab.outcomes(found, seeds, starting_at(onset, lab.scale, lab.steps))
    ]


def edges(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], int]:
    """The basin's edge of each (id, seed): the first onset of the sweep from which on no image is memorized.

    If the image of the last onset is memorized, the edge is one past it.
    """
    onsets = sorted({row["onset"] for row in rows})
    inside: dict[tuple[str, int], list[int]] = {(row["id"], row["seed"]): [] for row in rows}
    for row in rows:
        if row["memorized"]:
            inside[row["id"], row["seed"]].append(row["onset"])
    return {
        key: next((onset for onset in onsets if onset > max(found, default=-1)), onsets[-1] + 1)
        for key, found in inside.items()
    }


class Curves:
    """Collect statistics of each call of a batch: {name: (calls, B)}, with one call less of update and turn.

    gap: ||cond - uncond||. relative: the gap over ||uncond||. alignment: the cosine of cond - uncond and uncond (Asthana &
    Belagiannis, ICLR 2026). update: ||x_(k+1) - x_k|| (Huang et al., KDD 2026). turn: ||cond_k - cond_(k-1)||^2.
    """

    def __init__(self) -> None:
        self.series: dict[str, list[list[float]]] = {"gap": [], "relative": [], "alignment": [], "update": [], "turn": []}
        self._latents: Tensor | None = None
        self._cond: Tensor | None = None

    def __call__(self, state: State, uncond: Tensor, cond: Tensor) -> None:
        u = uncond.float().flatten(1)
        d = cond.float().flatten(1) - u
        latents = state.latents.x.float().flatten(1).clone()
        if self._latents is not None:
            self.series["update"].append((latents - self._latents).norm(dim=1).tolist())
        self._latents = latents
        if self._cond is not None:
            self.series["turn"].append((u + d - self._cond).square().sum(dim=1).tolist())
        self._cond = (u + d).clone()
        gap = d.norm(dim=1)
        self.series["gap"].append(gap.tolist())
        self.series["relative"].append((gap / u.norm(dim=1)).tolist())
        self.series["alignment"].append(torch.cosine_similarity(d, u, dim=1).tolist())


def curves(lab: Laboratory, found: Sequence[Prompt], seeds: Sequence[int], guidance: Guidance) -> list[dict[str, Any]]:
    """A line for each prompt and seed: its `Curves`, the basin score of its picture, and whether the picture is a copy.

    If a step calls the network more than once, its first call counts. turn is a single number, from the first two calls.
    memorized is None without training images.
    """
    lines, first = [], lab.sampler.solver(lab.steps).first_calls.tolist()
    for batch, drawn in lab.bar(lab.batches(found, seeds), f"curves, {guidance!r}"):
        look = Curves()
        out = lab.run(batch, drawn, guidance, look)
        scores = lab.sampler.judge(out.latents, [prompt.text for prompt in batch], drawn).score.tolist()
        copies = lab.measure(out.images, batch)
        for i, (prompt, seed) in enumerate(zip(batch, drawn, strict=True)):
            own: dict[str, Any] = {
                name: [round(series[call][i], 5) for call in first if call < len(series)]
                for name, series in look.series.items()
            }
            own["turn"] = round(look.series["turn"][0][i], 5)
            verdict = {"score": round(scores[i], 5), "memorized": copies[i]["memorized"]}
            lines.append({"id": prompt.id, "seed": seed, **own, **verdict})
    return lines


def constant(weight: float, steps: int) -> Guidance:
    """Guidance with the same weight in every step."""
    return Guidance.cfg(1.0, shape=(weight,) * steps)


class Spread:
    """Collect, for each step, the root mean square distance of a batch's latents to their mean."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def __call__(self, state: State, uncond: Tensor, cond: Tensor) -> None:
        latents = state.latents.x.float().flatten(1)
        self.values.append((latents - latents.mean(dim=0)).square().mean().sqrt().item())


def convergence(lab: Laboratory, groups: dict[str, list[Prompt]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each prompt and step: how far apart the trajectories of the prompt's seeds are under plain guidance."""
    rows = []
    for group, found in groups.items():
        for prompt in lab.bar(found, f"convergence, {group}"):
            look = Spread()
            lab.run([prompt] * len(seeds), seeds, Guidance.cfg(lab.scale), look)
            rows += [{"group": group, "id": prompt.id, "step": k, "spread": round(v, 5)} for k, v in enumerate(look.values)]
    return rows


def pushed(at: int, size: float) -> stepwise.Push:
    """A push that adds noise to the latents before step `at`, of `size` times their standard deviation."""

    def push(k: int, state: State, table: Tensor) -> None:
        if k == at:
            latents = state.latents.x.float()
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(at)).to(latents.device)
            deviation = latents.flatten(1).std(dim=1).view(-1, *[1] * (latents.ndim - 1))
            state.put((latents + size * deviation * noise).to(state.latents.x.dtype), table)

    return push


def returns(
    lab: Laboratory, found: Sequence[Prompt], seeds: Sequence[int], steps: Sequence[int], sizes: Sequence[float]
) -> list[dict[str, Any]]:
    """The basin's width: a row for each push says whether the plainly guided trajectory still ends in a memorized image."""
    plain = Guidance.cfg(lab.scale)
    return [
        {"step": at, "size": size, "id": id, "seed": seed, "returned": measured["memorized"]}
        for at in lab.bar(steps, "returns")
        for size in sizes
        for id, seed, measured in lab.outcomes(found, seeds, plain, pushed(at, size))
    ]
