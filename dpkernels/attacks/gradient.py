"""The attacker's view: the released gradient of real private steps by the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpkernels import PrivacyEngine
from dpkernels.accounting.checks import check_count

#: A loss of a model's output [B, ...], as the mean over samples.
LossOfOutput = Callable[[torch.Tensor], torch.Tensor]


class Server:
    """Takes private steps with a model of the attacker's choice, and reads released gradients.

    The optimizer's learning rate is zero: a malicious server sends the same weights again and
    again, so that the updates that contain a record can be averaged.

    Args:
        model: the attacker's model, not copied: put into training mode and made private.
        noise_multiplier: std of the noise divided by max_grad_norm, >= 0.
        max_grad_norm: bound C on one sample's gradient, > 0.
        batch_size: samples in each update.
        noise_generator: replaces the engine's generator, for tests.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        batch_size: int,
        noise_generator: torch.Generator | None = None,
    ) -> None:
        self._model = model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._private, self._optimizer, _ = PrivacyEngine().make_private(
            module=self._model,
            optimizer=torch.optim.SGD(parameters, lr=0.0),
            data_loader=DataLoader(range(batch_size), batch_size=batch_size),  # type: ignore[arg-type]
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            poisson_sampling=False,  # the batch to attack is given
            noise_generator=noise_generator,
        )

    def released(
        self,
        images: torch.Tensor,
        loss: LossOfOutput,
        read: Sequence[torch.Tensor],
        updates: int = 1,
    ) -> list[torch.Tensor]:
        """The released gradients of some parameters, averaged over updates.

        Args:
            images: [B, ...], the samples of every update.
            loss: the loss of the model's output; a mean over samples.
            read: parameters to read.
            updates: number of private steps on these samples, >= 1.

        Returns:
            For each parameter of `read`, the clipped sum over the samples plus noise, of the dtype
            and on the device of the parameter.
        """
        check_count("updates", updates)
        divisor = float(self._optimizer.expected_batch_size)
        totals = [torch.zeros_like(p) for p in read]
        for _ in range(updates):
            loss(self._private(images)).backward()
            for total, parameter in zip(totals, read, strict=True):
                if parameter.grad is None:
                    raise ValueError("read: a parameter got no gradient, expected a trained one")
                total.add_(parameter.grad, alpha=divisor / updates)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return totals
