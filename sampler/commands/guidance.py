"""The guidance that the options of a command ask for."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import typer

from .guidance_options import OWN, GuidanceOptions, Method
from .model_loading import of_enough

if TYPE_CHECKING:
    from .. import Calibration, Guard, Guidance, Sampler
    from ..guidance.transitions import Transition


def guidances(
    options: GuidanceOptions, sampler: Sampler, known: Calibration | None, steps: int, scale: float, names: Collection[Method]
) -> tuple[Guidance | Guard, dict[str, Guidance | Guard]]:
    """Return (the guidance of rows that name none, the guidance that other rows name, by name).

    Raises ValueError for options that do not fit these.
    """
    if options.guidance is None and options.method == Method.delayed:
        asked = "--until" if options.until else "--restart"
        typer.echo(f"guidance is delayed, as {asked} asks: no picture is judged (--guidance guard does)", err=True)
    methods = {options.method, *names}
    for name, needed in OWN.items():
        if (given := getattr(options, name)) is not None and not methods & set(needed):
            which = f"which guidance {' and '.join(sorted(methods))} does not have"
            raise ValueError(f"{name} is {given!r}, {which}: leave it out, or take --guidance {' or '.join(needed)}")
    fitted = None if known is None or methods == {Method.cfg} else known.fitted(sampler, steps)
    enough = of_enough(fitted, options.calibration) if Method.guard in methods else None
    made = {method: _made(options, method, scale, enough if method == Method.guard else fitted) for method in methods}
    return made[options.method], {name.value: made[name] for name in names}


def _made(options: GuidanceOptions, method: Method, scale: float, known: Calibration | None) -> Guidance | Guard:
    from .. import Guidance

    given = options.given()
    if method == Method.cfg:
        return Guidance.cfg(scale, **given)
    if method == Method.guard:
        fits = known is not None and known.scale == scale
        if known is not None and not fits:
            without = f"the guard goes without it; --scale {known.scale:g} has it"
            typer.echo(f"the calibration is of scale {known.scale:g}, not {scale:g}: {without}", err=True)
        return Guidance.guard(scale, known if fits else None, **given)
    transition = _transition(options, known)
    if method == Method.delayed:
        return Guidance.delayed(scale, until=transition, before=options.before or 0.0, **given)
    weight = 2.0 if options.opposite_scale is None else options.opposite_scale
    return Guidance.opposite(weight, scale=scale, until=transition, **given)


def _transition(options: GuidanceOptions, known: Calibration | None) -> Transition:
    """Return where guidance starts: as asked for, else as the calibration says, else at the paper's timestep."""
    from .. import At
    from ..calibration.baseline import STATIC
    from ..guidance.transitions import named

    if options.until is not None:
        return named(options.until, known, earliest=options.earliest, latest=options.latest)
    if options.earliest is not None or options.latest is not None:
        raise ValueError("earliest and latest bound a transition that is looked for: give --until auto, too")
    return At(STATIC if known is None or known.baseline is None else known.baseline.transition)
