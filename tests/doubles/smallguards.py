"""Guards for tests of other things."""

from basinescape import At, Guard, Guidance
from basinescape.guidance.guard import Attempt

EVERY, NONE = -1e9, 1e9  # thresholds that every picture is above, and none
FAILS, PASSES = EVERY, NONE  # what becomes of the picture


def guard(*attempts: tuple[Guidance, float], probes: int = 1) -> Guard:
    """A guard of these attempts, each with its threshold."""
    return Guard(tuple(Attempt(guidance, threshold, probes) for guidance, threshold in attempts))


def guarded(cautious: Guidance, threshold: float = EVERY) -> Guard:
    """Plain guidance, and `cautious`, which always passes, for pictures above the threshold."""
    plain = Guidance.cfg(cautious.scale, rule=cautious.rule, **dict(cautious.options))
    return guard((plain, threshold), (cautious, NONE))


def delays(*thresholds: float, until: float = 900) -> Guard:
    """A plain attempt at scale 4, and delayed ones: a threshold each."""
    later = [Attempt(Guidance.delayed(4.0, until=At(until)), one) for one in thresholds[1:]]
    return Guard((Attempt(Guidance.cfg(4.0), thresholds[0]), *later))
