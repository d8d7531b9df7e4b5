"""From per-sample gradients to what is released: clip factors, sums, noise, ``p.grad``."""
