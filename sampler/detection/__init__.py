"""Does a picture look like a copy of a training image? The basin score, and verdicts by it."""
