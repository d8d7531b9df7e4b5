"""The engine in ordinary Opacus loops: only the import changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

from dpkernels import PrivacyEngine
from tests.engine.support import (
    TextClassifier,
    cnn,
    images,
    private,
    sentences,
)
from tests.engine.truth import microbatching, relative_error


@pytest.mark.parametrize(("build", "dataset"), [(cnn, images(64)), (TextClassifier, sentences(64))])
def test_an_opacus_loop_runs_with_the_import_changed(build, dataset) -> None:
    torch.manual_seed(0)
    engine, model, optimizer, loader = private(build(), dataset)
    before = [p.detach().clone() for p in model.parameters()]
    steps = 0
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        steps += 1
    assert steps == len(loader) == 8
    assert engine.accountant.history == [(1.0, 8 / 64, 8)]
    assert 0 < engine.get_epsilon(1e-5) < 10
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_opacus_own_mode_behaves_as_opacus() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    engine, model, optimizer, loader = private(plain, images(16), grad_sample_mode="hooks")
    x, y = images(4).tensors
    nn.functional.cross_entropy(model(x), y).backward()
    assert all(len(p.grad_sample) == 4 for p in model.parameters())
    optimizer.step()
    assert len(engine.accountant) == 1


@pytest.mark.parametrize("physical", [1, 3, 8])
def test_batch_memory_manager_gives_the_gradient_of_the_logical_batch(physical: int) -> None:
    torch.manual_seed(0)
    model = cnn()
    dataset = images(10)
    expected = microbatching(
        model,
        lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
        dataset.tensors,
        1.0,
    )
    engine, model, optimizer, loader = private(model, dataset, 10, 0.0, poisson_sampling=False)
    steps = 0
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
    ) as physical_loader:
        for x, y in physical_loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            stepped = optimizer._check_skip_next_step(pop_next=False)
            if not stepped:
                for name, p in model._module.named_parameters():
                    assert relative_error(p.grad, expected.gradients[name]) < 1e-5
            optimizer.step()
            steps += 1
    assert steps == math.ceil(10 / physical)
    assert engine.accountant.history == [(0.0, 1.0, 1)]


@pytest.mark.parametrize("set_to_none", [False, True])
def test_the_models_zero_grad_is_enough(set_to_none: bool) -> None:
    """Opacus' sums survive ``model.zero_grad()`` and are released again."""
    torch.manual_seed(0)
    x, y = images(8).tensors
    model = cnn()
    expected = microbatching(
        model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), (x, y), 1.0
    )
    engine, model, optimizer, _ = private(model, images(8), 8, 0.0)
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(2):
        model.zero_grad(set_to_none)
        nn.functional.cross_entropy(model(x), y).backward()
        for name, p in model._module.named_parameters():
            assert relative_error(p.grad, expected.gradients[name]) < 1e-5
        optimizer.step()
    assert engine.accountant.history == [(0.0, 1.0, 2)]


def test_empty_batches_step_with_noise_alone() -> None:
    engine, model, optimizer, loader = private(cnn(), images(40), 1)
    empty = 0
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if len(x) == 0:
            empty += 1
            spread = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert 0.9 < float(spread.std()) < 1.1
        optimizer.step()
    assert empty > 0
    assert engine.accountant.history == [(1.0, 1 / 40, 40)]


def test_noise_only_step_counts() -> None:
    engine, model, optimizer, _ = private(cnn(), images(40))
    optimizer.make_private_noise_only()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert 0.9 / 8 < float(gradient.std()) < 1.1 / 8
    optimizer.step()
    assert engine.accountant.history == [(1.0, 8 / 40, 1)]


def test_noise_has_the_stated_deviation_and_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
    unused = nn.Linear(100, 100)
    model.register_module("unused", nn.Identity())
    model[1].register_module("never", unused)
    x = torch.randn(4, 200)
    noisy = private(copy.deepcopy(model), TensorDataset(x), 4, 2.0, max_grad_norm=0.5)
    quiet = private(copy.deepcopy(model), TensorDataset(x), 4, 0.0, max_grad_norm=0.5)
    for _, wrapped, _, _ in (noisy, quiet):
        wrapped(x).square().flatten(1).sum(1).mean().backward()
    for (name, a), (_, b) in zip(noisy[1].named_parameters(), quiet[1].named_parameters()):
        difference = (a.grad - b.grad).flatten()
        expected = 2.0 * 0.5 / 4
        error = expected / math.sqrt(2 * len(difference))
        assert abs(float(difference.std()) - expected) < 6 * error, name
    assert all(float(p.grad.abs().min()) > 0 for p in noisy[1]._module[1].never.parameters())


def test_noise_generator_makes_noise_repeatable_and_default_does_not() -> None:
    def gradient(generator: torch.Generator | None) -> torch.Tensor:
        torch.manual_seed(0)
        _, model, optimizer, _ = private(cnn(), images(8), noise_generator=generator)
        x, y = images(8).tensors
        nn.functional.cross_entropy(model(x), y).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    seeded = [gradient(torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*seeded)
    assert not torch.equal(gradient(None), gradient(None))


def test_gradient_accumulation_without_poisson_sampling() -> None:
    torch.manual_seed(0)
    model = cnn()
    dataset = images(8)
    expected = microbatching(
        model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), dataset.tensors, 1.0
    )
    engine, model, optimizer, _ = private(model, dataset, 4, 0.0, poisson_sampling=False)
    for half in (slice(0, 4), slice(4, 8)):
        x, y = (t[half] for t in dataset.tensors)
        nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model._module.named_parameters():
        assert relative_error(p.grad, expected.gradients[name]) < 1e-5
    optimizer.step()
    assert engine.accountant.history == [(0.0, 2 * 0.5, 1)]


def test_evaluation_and_no_grad_capture_nothing() -> None:
    _, model, optimizer, _ = private(cnn(), images(16))
    x, y = images(4).tensors
    with torch.no_grad():
        model(x)
    model.eval()
    with pytest.raises(ValueError, match="eval mode"):
        nn.functional.cross_entropy(model(x), y).backward()
    model.train()
    model(x)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_made_private_without_gradients_around() -> None:
    dataset = images(8)
    model = cnn()
    expected = microbatching(
        model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), dataset.tensors, 1.0
    )
    with torch.no_grad():
        _, model, _, _ = private(model, dataset, 8, 0.0)
    x, y = dataset.tensors
    nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model._module.named_parameters():
        assert relative_error(p.grad, expected.gradients[name]) < 1e-5


def test_frozen_batch_norm_is_allowed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    model[1].requires_grad_(False).eval()
    _, wrapped, optimizer, _ = private(model, images(16))
    x, y = images(4).tensors
    nn.functional.cross_entropy(wrapped(x), y).backward()
    optimizer.step()


def test_rate_steps_and_denominator_are_exact() -> None:
    for count in (98, 107, 161):
        _, _, optimizer, loader = private(nn.Linear(4, 2), TensorDataset(torch.randn(count, 4)), 1)
        assert len(loader) == count
        assert len(list(loader.batch_sampler)) == count
        assert optimizer.expected_batch_size == 1
    _, _, optimizer, loader = private(nn.Linear(4, 2), TensorDataset(torch.randn(100, 4)), 64)
    assert (len(loader), loader.sample_rate, optimizer.expected_batch_size) == (2, 0.64, 64)


def test_epsilon_is_the_target_after_the_planned_epochs() -> None:
    engine = PrivacyEngine()
    model = cnn()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(images(30), batch_size=8), target_epsilon=4.0, target_delta=1e-4,
        epochs=3, max_grad_norm=1.0,
    )  # fmt: skip
    for _ in range(3 * len(loader)):
        optimizer.zero_grad()
        optimizer.make_private_noise_only()
        optimizer.step()
    assert 0.98 * 4.0 < engine.get_epsilon(1e-4) <= 4.0


def test_risk_report_is_filled_from_the_history() -> None:
    engine, _, optimizer, _ = private(cnn(), images(40))
    with pytest.raises(ValueError, match="no step has been taken"):
        engine.risk_report(delta=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.make_private_noise_only()
        optimizer.step()
    report = engine.risk_report(delta=1e-3, dimension=192)
    text = report.to_markdown()
    assert "tight" in text
    assert "RDP" in text
    from dpkernels.reconstruction import rero_bound

    bound = rero_bound(noise_multiplier=1.0, sample_rate=8 / 40, steps=3, kappa=1 / 40)
    assert bound in [row.value for row in report.rows]


def test_grad_samples_on_request() -> None:
    torch.manual_seed(0)
    _, model, optimizer, _ = private(cnn(), images(16), materialize_grad_samples=True)
    x, y = images(4).tensors
    plain = copy.deepcopy(model.to_standard_module())
    _, model, optimizer, _ = private(
        copy.deepcopy(plain), images(16), materialize_grad_samples=True
    )
    nn.functional.cross_entropy(model(x), y).backward()
    nn.functional.cross_entropy(plain(x[1:2]), y[1:2]).backward()
    for p, q in zip(model.parameters(), plain.parameters()):
        assert p.grad_sample.shape == (4, *p.shape)
        torch.testing.assert_close(p.grad_sample[1], q.grad, rtol=1e-4, atol=1e-6)


def test_explain_names_every_parameter() -> None:
    engine, model, optimizer, _ = private(cnn(), images(16))
    assert "no plan yet" in str(engine.explain())
    x, y = images(4).tensors
    nn.functional.cross_entropy(model(x), y).backward()
    rows = engine.explain().rows
    assert {r["parameter"] for r in rows} == {n for n, _ in model._module.named_parameters()}
    assert sum(r["share"] for r in rows) == pytest.approx(1.0)
    assert "0.weight" in str(engine.explain())


def test_automatic_clipping_scales_every_sample_to_the_bound() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    x = torch.randn(1, 6)
    _, model, optimizer, _ = private(
        model, TensorDataset(x), 1, 0.0, clipping="automatic", max_grad_norm=3.0
    )
    model(x).square().sum(1).mean().backward()
    norm = float(optimizer.last_step.per_sample_norm[0])
    total = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    assert float(total) == pytest.approx(3.0 * norm / (norm + 0.01), rel=1e-5)


def test_epsilon_tolerance_reaches_opacus_accountants() -> None:
    model = cnn()
    engine = PrivacyEngine(accountant="rdp")
    _, optimizer, _ = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(images(30), batch_size=8), target_epsilon=4.0, target_delta=1e-4,
        epochs=3, max_grad_norm=1.0, epsilon_tolerance=0.5,
    )  # fmt: skip
    assert optimizer.noise_multiplier > 0
