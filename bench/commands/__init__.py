"""Commands for a model of one's own, a file each: `generate`, `calibrate`, `audit`. `cli` has the others, and runs them all.

Nothing here imports torch before a command runs.
"""
