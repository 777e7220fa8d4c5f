"""The commands that measure methods, in `evaluation`. `cli` has the others, and runs them all.

Nothing here imports torch before a command runs.
"""
