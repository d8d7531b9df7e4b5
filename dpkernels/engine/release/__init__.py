"""From per-sample gradients to the released gradient: clip factors, sums, noise, ``p.grad``."""
