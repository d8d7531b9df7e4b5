"""The engine: Opacus' surface over capture, planning, clipping and noise in one backward pass."""
