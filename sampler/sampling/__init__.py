"""The denoising loop: its step table, its steps, one batch, and the engine that keeps a batch full."""
