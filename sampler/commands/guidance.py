"""Options that say how pictures are guided, and the guidance that they ask for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from . import options

if TYPE_CHECKING:
    from .. import Calibration, Guard, Guidance, Sampler
    from ..guidance.transitions import Transition


class Method(StrEnum):
    """How guidance is scheduled."""

    cfg = "cfg"
    delayed = "delayed"
    opposite = "opposite"
    guard = "guard"


OWN = {  # options -> the methods that have them
    "until": (Method.delayed, Method.opposite),
    "before": (Method.delayed,),
    "opposite_scale": (Method.opposite,),
    "earliest": (Method.delayed, Method.opposite),
    "latest": (Method.delayed, Method.opposite),
}


@dataclass(frozen=True)
class GuidanceOptions:
    """How pictures are guided."""

    TITLE: ClassVar = "Guidance"
    guidance: Annotated[
        Method | None,
        typer.Option(help="cfg (plain), delayed, opposite or guard, of rows that do not say; default guard", metavar="<str>"),
    ] = None
    scale: Annotated[
        float | None, typer.Option(help="guidance scale (after the transition); default as calibrated, else the model's own")
    ] = None
    calibration: Annotated[
        str | None, typer.Option(help="thresholds at a stated false-alarm rate; default calibration.json in the model's folder")
    ] = None
    until: Annotated[
        str | None,
        typer.Option(
            help="transition of delayed and opposite guidance: a timestep; 'auto', the first minimum of the noise gap; "
            "'fallen', when that has halved; 'settled', when it is ordinary; or a rule of your own, FILE.py:NAME; default the "
            "calibration's timestep, else 500"
        ),
    ] = None
    before: Annotated[float | None, typer.Option(help="weight before the transition, with --guidance delayed; default 0")] = (
        None
    )
    opposite_scale: Annotated[
        float | None, typer.Option(help="with --guidance opposite: weight -N before the transition; default 2")
    ] = None
    earliest: Annotated[int | None, typer.Option(help="with --until auto: first step that may be it; default 2")] = None
    latest: Annotated[int | None, typer.Option(help="with --until NAME: step at which guidance starts in any case")] = None
    restart: Annotated[
        str | None, typer.Option(help="LOW,HIGH,TIMES: at timestep LOW go back to HIGH by new noise, so many times")
    ] = None
    rule: Annotated[str, typer.Option(help="how predictions combine: cfg, rescale, cfg-zero, apg, tcfg, ...")] = "cfg"
    rule_option: Annotated[list[str] | None, typer.Option(help="of the rule, as phi=0.5; may be repeated")] = None

    def check(self) -> None:
        """Raises ValueError for what no guidance can be, before a model is loaded."""
        from .. import Guidance
        from ..guidance.transitions import check

        Guidance.cfg(7.5 if self.scale is None else self.scale, **self._given())
        if self.until is not None:
            check(self.until)

    @property
    def method(self) -> Method:
        """Of rows that do not say: a guard, unless options of another one are given."""
        return self.guidance or (Method.delayed if self.until or self.restart else Method.guard)

    def plans(
        self, sampler: Sampler, known: Calibration | None, steps: int, scale: float, names: Collection[Method]
    ) -> tuple[Guidance | Guard, dict[str, Guidance | Guard]]:
        """The guidance of rows that do not say, and those that rows ask for by name.

        Raises ValueError where they do not fit the rest.
        """
        if self.guidance is None and self.method == Method.delayed:
            asked = "--until" if self.until else "--restart"
            typer.echo(f"guidance is delayed, as {asked} asks: no picture is judged (--guidance guard does)", err=True)
        methods = {self.method, *names}
        for name, needed in OWN.items():
            if (given := getattr(self, name)) is not None and not methods & set(needed):
                which = f"which guidance {' and '.join(sorted(methods))} does not have"
                raise ValueError(f"{name} is {given!r}, {which}: leave it out, or take --guidance {' or '.join(needed)}")
        fitted = None if known is None or methods == {Method.cfg} else known.fitted(sampler, steps)
        enough = options.of_enough(fitted, self.calibration) if Method.guard in methods else None
        made = {method: self._made(method, scale, enough if method == Method.guard else fitted) for method in methods}
        return made[self.method], {name.value: made[name] for name in names}

    def _made(self, method: Method, scale: float, known: Calibration | None) -> Guidance | Guard:
        from .. import Guidance

        given = self._given()
        if method == Method.cfg:
            return Guidance.cfg(scale, **given)
        if method == Method.guard:
            fits = known is not None and known.scale == scale
            if known is not None and not fits:
                without = f"the guard goes without it; --scale {known.scale:g} has it"
                typer.echo(f"the calibration is of scale {known.scale:g}, not {scale:g}: {without}", err=True)
            return Guidance.guard(scale, known if fits else None, **given)
        transition = self._transition(known)
        if method == Method.delayed:
            return Guidance.delayed(scale, until=transition, before=self.before or 0.0, **given)
        weight = 2.0 if self.opposite_scale is None else self.opposite_scale
        return Guidance.opposite(weight, scale=scale, until=transition, **given)

    def _given(self) -> dict[str, Any]:
        given: dict[str, Any] = {"rule": self.rule, **options.named("rule_option", self.rule_option, float)}
        return given | ({"restart": _restart(self.restart)} if self.restart else {})

    def _transition(self, known: Calibration | None) -> Transition:
        """Where guidance starts: as asked for, else where the calibration says, else the paper's timestep."""
        from .. import At
        from ..calibration.baseline import STATIC
        from ..guidance.transitions import named

        if self.until is not None:
            return named(self.until, known, earliest=self.earliest, latest=self.latest)
        if self.earliest is not None or self.latest is not None:
            raise ValueError("earliest and latest bound a transition that is looked for: give --until auto, too")
        return At(STATIC if known is None or known.baseline is None else known.baseline.transition)


def _restart(text: str) -> tuple[float, float, int]:
    try:
        low, high, times = text.split(",")
        return float(low), float(high), int(times)
    except ValueError as error:
        raise ValueError(f"restart must be LOW,HIGH,TIMES, two timesteps and a number, as 300,500,2; got {text!r}") from error
