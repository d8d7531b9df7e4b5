"""The optimizer's class by arguments: ``isinstance`` finds the class that Opacus would choose."""

from __future__ import annotations

from opacus.optimizers import AdaClipDPOptimizer, DistributedDPOptimizer

from dpkernels.engine.processes.collectives import Processes
from dpkernels.engine.release.optimizer import FusedDPOptimizer


class FusedAdaClipDPOptimizer(FusedDPOptimizer, AdaClipDPOptimizer):
    """With ``clipping="adaptive"``."""


class FusedDistributedDPOptimizer(FusedDPOptimizer, DistributedDPOptimizer):
    """In several processes."""

    def reduce_gradients(self) -> None:
        """Nothing to do: sums crossed the processes at the end of ``backward()``."""


class FusedDistributedAdaClipDPOptimizer(FusedDistributedDPOptimizer, FusedAdaClipDPOptimizer):
    """In several processes, with ``clipping="adaptive"``."""


def optimizer_class(clipping: str, processes: Processes) -> type[FusedDPOptimizer]:
    """The class of the private optimizer.

    Args:
        clipping: as in ``make_private``.
        processes: the processes that train together.
    """
    adaptive, several = clipping == "adaptive", type(processes) is not Processes
    if several:
        return FusedDistributedAdaClipDPOptimizer if adaptive else FusedDistributedDPOptimizer
    return FusedAdaClipDPOptimizer if adaptive else FusedDPOptimizer
