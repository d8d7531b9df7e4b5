"""What outlives a step: wrappers, copies, pickles, hooks, checkpoints."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from opacus.optimizers import DPOptimizer
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from tests.engine.support import (
    cnn,
    images,
    private,
)


def test_optimizer_and_module_are_what_opacus_users_expect() -> None:
    from opacus.grad_sample import AbstractGradSampleModule

    _, model, optimizer, loader = private(cnn(), images(16))
    assert isinstance(optimizer, DPOptimizer)
    assert isinstance(model, AbstractGradSampleModule)
    assert optimizer.expected_batch_size == 8
    assert (optimizer.noise_multiplier, optimizer.max_grad_norm) == (1.0, 1.0)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    standard = model.to_standard_module()
    assert "forward" not in standard.__dict__
    assert "forward" not in standard[0].__dict__
    nn.functional.cross_entropy(standard(images(4).tensors[0]), images(4).tensors[1]).backward()


def test_copies_and_pickles() -> None:
    torch.manual_seed(0)
    engine, model, optimizer, _ = private(cnn(), images(16))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    x, y = images(4).tensors
    with torch.no_grad():
        assert float(model(x).abs().sum()) > 0, "the copy must not share the original's layers"
        assert float(twin(x).abs().sum()) == 0
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    pickle.loads(pickle.dumps(optimizer)).zero_grad()
    copy.deepcopy(optimizer).zero_grad()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    assert torch.equal(restored(x), model(x))


def test_a_copied_wrapper_made_private_again_knows_its_parameters_names() -> None:
    _, model, _, _ = private(cnn(), images(16))
    engine, again, _, _ = private(copy.deepcopy(model), images(16))
    x, y = images(4).tensors
    nn.functional.cross_entropy(again(x), y).backward()
    names = {row["parameter"] for row in engine.explain().rows}
    assert names == {name for name, _ in model._module.named_parameters()}


def test_step_hooks_of_the_optimizer_run() -> None:
    _, model, optimizer, _ = private(cnn(), images(16))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.make_private_noise_only()
    optimizer.step()
    assert calls == ["pre", "post"]


def test_a_hook_in_the_place_of_the_counter_is_pointed_out() -> None:
    engine, _, optimizer, _ = private(cnn(), images(16))
    calls = []
    with pytest.warns(UserWarning, match="attach_step_hook.*get_epsilon.*register_step_post_hook"):
        optimizer.attach_step_hook(calls.append)
    optimizer.make_private_noise_only()
    optimizer.step()
    assert calls == [optimizer]
    assert engine.accountant.history == []


def test_checkpoints_restore_the_history(tmp_path) -> None:
    engine, model, optimizer, loader = private(cnn(), images(16))
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    path = tmp_path / "checkpoint.pt"
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
    other, twin, twin_optimizer, _ = private(cnn(), images(16))
    other.load_checkpoint(path=path, module=twin, optimizer=twin_optimizer)
    assert other.accountant.history == engine.accountant.history
    assert other.get_epsilon(1e-5) == engine.get_epsilon(1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_without_wrapper_the_model_stays_the_users() -> None:
    model = cnn()
    _, hooks, optimizer, _ = private(model, images(16), wrap_model=False)
    x, y = images(4).tensors
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    hooks.cleanup()
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("accountant", ["rdp", "tight"])
@pytest.mark.parametrize("ours_first", [True, False])
def test_checkpoints_load_across_the_packages(ours_first: bool, accountant: str, tmp_path) -> None:
    from opacus import PrivacyEngine as OpacusEngine

    def made(kind: type) -> tuple:
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        engine = kind(accountant=accountant)
        model, optimizer, _ = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            data_loader=DataLoader(images(16), batch_size=8), noise_multiplier=1.0,
            max_grad_norm=1.0,
        )  # fmt: skip
        return engine, model, optimizer

    kinds = (PrivacyEngine, OpacusEngine) if ours_first else (OpacusEngine, PrivacyEngine)
    (engine, model, optimizer), (other, twin, twin_optimizer) = map(made, kinds)
    x, y = images(4).tensors
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    path = tmp_path / "checkpoint.pt"

    def schedulers(optimizer: DPOptimizer, gamma: float) -> dict[str, object]:
        return {
            "noise_scheduler": ExponentialNoise(optimizer, gamma=gamma),
            "grad_clip_scheduler": ExponentialGradClip(optimizer, gamma=gamma),
        }

    theirs, restored = schedulers(optimizer, 0.5), schedulers(twin_optimizer, 0.9)
    for scheduler in theirs.values():
        scheduler.step()
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer, **theirs)
    other.load_checkpoint(path=path, module=twin, optimizer=twin_optimizer, **restored)
    for name, scheduler in restored.items():
        assert (scheduler.gamma, scheduler.last_epoch) == (0.5, 1), name
    assert other.accountant.history == engine.accountant.history
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert len(twin_optimizer.state_dict()["state"]) == len(list(twin.parameters()))


@pytest.mark.parametrize("mechanism", ["prv", "rdp", "gdp"])
def test_a_checkpoint_of_opacus_loads_into_the_default_engine(mechanism: str, tmp_path) -> None:
    """Swap the import, go on training: Opacus' default accountant is not ours."""
    from opacus import PrivacyEngine as OpacusEngine

    def made(engine):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        model, optimizer, _ = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(images(16), batch_size=8), noise_multiplier=1.0,
            max_grad_norm=1.0,
        )  # fmt: skip
        return engine, model, optimizer

    engine, model, optimizer = made(OpacusEngine(accountant=mechanism))
    nn.functional.cross_entropy(model(images(4).tensors[0]), images(4).tensors[1]).backward()
    optimizer.step()
    engine.save_checkpoint(path=tmp_path / "c.pt", module=model, optimizer=optimizer)
    ours, twin, twin_optimizer = made(PrivacyEngine())
    ours.load_checkpoint(path=tmp_path / "c.pt", module=twin, optimizer=twin_optimizer)
    assert ours.accountant.history == [(1.0, 0.5, 1)]
    assert 0 < ours.get_epsilon(1e-3) < 10
    with pytest.raises(ValueError, match="nonsense"):
        ours.accountant.load_state_dict({"history": [], "mechanism": "nonsense"})


def test_a_model_is_not_made_private_twice() -> None:
    model = cnn()
    _, wrapped, _, _ = private(model, images(16))
    with pytest.raises(ValueError, match="made private before.*to_standard_module"):
        private(model, images(16))
    x, y = images(4).tensors
    twin = copy.deepcopy(model)
    _, again, optimizer, _ = private(twin, images(16))
    nn.functional.cross_entropy(again(x), y).backward()
    optimizer.step()
    wrapped.to_standard_module()
    private(model, images(16))


def test_a_model_is_let_go_after_cleanup() -> None:
    """By its reference count: on a GPU it would wait for the garbage collector with its memory."""
    model = nn.Linear(3, 2)
    gone = weakref.ref(model)
    wrapped, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(4, 3)), batch_size=4),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    wrapped(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    gc.collect()
    gc.disable()
    try:
        wrapped.to_standard_module()
        del model, wrapped, optimizer, _
        assert gone() is None
    finally:
        gc.enable()
