"""Options that say how pictures are guided."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar

import typer

from . import options


class Method(StrEnum):
    """How guidance is scheduled."""

    cfg = "cfg"
    delayed = "delayed"
    opposite = "opposite"
    guard = "guard"


OWN = {  # option -> the methods that have it
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
        """Raises ValueError for options that no guidance can have, before a model is loaded."""
        from .. import Guidance
        from ..guidance.transitions import check

        Guidance.cfg(7.5 if self.scale is None else self.scale, **self.given())
        if self.until is not None:
            check(self.until)

    @property
    def method(self) -> Method:
        """The method of rows that name none: as given, else delayed if --until or --restart is given, else a guard."""
        return self.guidance or (Method.delayed if self.until or self.restart else Method.guard)

    def given(self) -> dict[str, Any]:
        """Return the arguments that all guidance has: its rule and its restarts."""
        given: dict[str, Any] = {"rule": self.rule, **options.named("rule_option", self.rule_option, float)}
        return given | ({"restart": _restart(self.restart)} if self.restart else {})


def _restart(text: str) -> tuple[float, float, int]:
    try:
        low, high, times = text.split(",")
        return float(low), float(high), int(times)
    except ValueError as error:
        raise ValueError(f"restart must be LOW,HIGH,TIMES, two timesteps and a number, as 300,500,2; got {text!r}") from error
