"""Guards for tests of other things."""

from basinescape import Guard, Guidance
from basinescape.guidance.guard import Attempt

EVERY, NONE = -1e9, 1e9  # thresholds that every picture is above, and none


def guard(*attempts: tuple[Guidance, float], probes: int = 1) -> Guard:
    """A guard of these attempts, each with its threshold."""
    return Guard(tuple(Attempt(guidance, threshold, probes) for guidance, threshold in attempts))


def guarded(cautious: Guidance, threshold: float = EVERY) -> Guard:
    """Plain guidance, and `cautious`, which always passes, for pictures above the threshold."""
    plain = Guidance.cfg(cautious.scale, rule=cautious.rule, **dict(cautious.options))
    return guard((plain, threshold), (cautious, NONE))
