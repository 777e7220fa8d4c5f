"""Calibrations: what ordinary prompts give on a model, how it is measured, and which model it belongs to."""
