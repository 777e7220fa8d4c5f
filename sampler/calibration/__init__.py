"""Calibrations: the basin scores and noise gaps of ordinary prompts on a model, and the fingerprint of that model."""
