"""Guards for tests of other things."""

import math
from dataclasses import replace

from basinescape import Guidance, Rung


def guarded(cautious: Guidance, steps: int, threshold: float) -> Guidance:
    """Plain guidance, and `cautious` for samples whose first gap is above the threshold."""
    plain = Rung(replace(cautious, until=None, before=0.0), (1.0,) * steps, 1, threshold, 1, 0, math.inf)
    late = (0.0,) * (steps - 2) + (1.0, 1.0)  # steps whose gap every guidance has
    return Guidance.ladder([plain, Rung(cautious, late, 1, math.inf, 1, 0, math.inf)])
