"""What rivals get is the same function of the same parameters, and without it they cannot run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from bench import adapt, cases, gate, models, rivals

pytestmark = pytest.mark.filterwarnings("ignore")
_CPU = torch.device("cpu")
_VOLUMES = partial(cases.volumes, 16, 2)
_MONAI = {c.name.split("-")[1]: c.make_model for c in cases.CASES if c.name.startswith("monai-")}
_NETWORKS = {
    "segresnet": (_MONAI["segresnet"], _VOLUMES),
    "dynunet": (_MONAI["dynunet"], _VOLUMES),
    "vit": (
        partial(models.VisionTransformer, 8, 4, 64, 1, 2, 4),
        partial(cases.labelled, (3, 8, 8), 4, 32),
    ),
}


def _workload(name: str) -> cases.Workload:
    make_model, make_batch = _NETWORKS[name]
    return cases.Case(name, name, "", make_model, make_batch).build(_CPU)


def _hooked(model: nn.Module) -> nn.Module:
    """`model` as Opacus' hooks see it: a full backward hook on every module that has parameters."""
    for module in model.modules():
        if module._parameters:
            module.register_full_backward_hook(lambda module, before, after: None)
    return model


def test_an_adapted_network_is_the_same_function_of_the_same_parameters() -> None:
    for name in _NETWORKS:
        work = _workload(name)
        model = adapt.without_bare_parameters(work.fresh_model())
        names = dict(model.named_parameters())
        model = adapt.hookable(model)
        assert set(names) == set(dict(work.model.named_parameters()))
        assert {id(p) for p in names.values()} == {id(p) for p in model.parameters()}
        torch.testing.assert_close(model(work.inputs), work.model(work.inputs))


def test_hooks_refuse_the_network_as_it_is_and_take_the_adapted_one() -> None:
    work = _workload("segresnet")
    with pytest.raises(RuntimeError, match="modified inplace"):
        _hooked(work.fresh_model())(work.inputs)
    _hooked(adapt.hookable(work.fresh_model()))(work.inputs)


def test_every_module_has_one_name() -> None:
    model = adapt.hookable(_workload("dynunet").fresh_model())
    named = [m for _, m in model.named_modules(remove_duplicate=False)]
    assert len(named) == len(set(named))


@pytest.mark.parametrize(
    ("network", "rival"), [("segresnet", "hooks"), ("dynunet", "functorch"), ("vit", "ew")]
)
def test_rivals_pass_the_gate_on_networks_that_need_adapting(network: str, rival: str) -> None:
    work = _workload(network)
    truth = gate.ground_truth(work)
    chosen = rivals.find([rival])[1]
    trainer = chosen.prepare(work, rivals.Privacy(truth.max_grad_norm, 0.0))
    assert truth.error(gate.released(trainer)) <= truth.allowed
