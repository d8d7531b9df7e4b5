"""Attacks that reconstruct records from the very gradient that the engine releases.

Each takes the records, poses as the server (or listens to it), runs real private steps through
`dpkernels.PrivacyEngine`, and returns candidates read out of ``p.grad``. Nothing is simulated: what
is attacked is what would have been sent (docs/math.md, section 6). Needs torch, unlike the bounds.
"""

from dpkernels.reconstruction.attacks.inversion import gradient_matching
from dpkernels.reconstruction.attacks.malicious import imprint, trap_weights
from dpkernels.reconstruction.attacks.optimal import linear_optimal

__all__ = ["gradient_matching", "imprint", "linear_optimal", "trap_weights"]
