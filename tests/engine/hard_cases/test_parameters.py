"""Parameters that come and go."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

from dpkernels import PrivacyEngine
from dpkernels.engine.module import FusedGradSampleModule
from tests.engine.support import (
    made_private,
    squared_loss,
    step,
    values,
)
from tests.engine.truth import microbatching, relative_error


def test_a_parameter_unfrozen_later_is_private_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    x = values(4, 5).float()
    _, wrapped, optimizer, _ = made_private(model, x)
    step(wrapped, optimizer, x)
    assert model[0].weight.grad is None
    model[0].requires_grad_(True)
    expected = microbatching(model, squared_loss, (x,), 1.0)
    optimizer.zero_grad()
    squared_loss(wrapped, (x,)).backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected.gradients[name]) < 1e-5
    optimizer.step()


def test_an_added_parameter_group_is_private_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x = values(4, 5).float()
    model, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model[2].parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x), batch_size=4), noise_multiplier=0.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    added = model.to_standard_module()[0]
    expected = microbatching(nn.Sequential(*model._module), squared_loss, (x,), 1.0)
    wrapped = FusedGradSampleModule(model._module)
    wrapped.connect(optimizer)
    optimizer.original_optimizer.add_param_group({"params": list(added.parameters())})
    squared_loss(wrapped, (x,)).backward()
    assert relative_error(added.weight.grad, expected.gradients["0.weight"]) < 1e-5


def test_a_parameter_frozen_later_stays_where_it_is() -> None:
    """Also under momentum, and with Opacus' ``zero_grad()``, which leaves zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x = values(4, 5).float()
    _, wrapped, optimizer, _ = made_private(model, x)
    optimizer.param_groups[0]["momentum"] = 0.9
    step(wrapped, optimizer, x)
    model[2].requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    step(wrapped, optimizer, x)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
    assert moved == [True, True, False, False]
    assert optimizer.last_step.per_sample_norm.shape == (4,)
