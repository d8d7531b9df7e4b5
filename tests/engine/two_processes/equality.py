"""The clipped gradient of two processes is that of one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from opacus.optimizers import DistributedDPOptimizer
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dpkernels import PrivacyEngine
from tests.engine.support import Tokens, cnn
from tests.engine.truth import microbatching
from tests.engine.two_processes.models import (
    WRAPPERS,
    Classifier,
    assert_close,
    assert_same_everywhere,
    classifier,
    data,
    gradients,
    loss,
    own_part,
    private,
    sharded,
)


def check_flat_clipping_equals_the_per_sample_loop() -> None:
    batch = data(10)
    expected = microbatching(classifier(), loss, batch, 0.3, expected_batch_size=4.0)
    for wrap in WRAPPERS.values():
        _, model, optimizer, _ = private(wrap(classifier()), batch, batch_size=4)
        assert isinstance(optimizer, DistributedDPOptimizer)
        for _ in range(2):
            own = own_part(batch, (0, 7), (7, 10))
            loss(model, own).backward()
            assert_close(gradients(model), expected.gradients, 1e-9)
            norms = own_part((expected.norms,), (0, 7), (7, 10))[0]
            assert torch.allclose(optimizer.last_step.per_sample_norm, norms)
            optimizer.zero_grad()


def check_float32_convolutions() -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 4
    torch.manual_seed(0)
    plain = cnn()
    expected = microbatching(plain, loss, (x, y), 0.3, expected_batch_size=4.0)
    torch.manual_seed(0)
    _, alone, _, _ = private(cnn(), (x, y))
    loss(alone, (x, y)).backward()
    for wrap in (DistributedDataParallel, sharded):
        torch.manual_seed(0)
        _, model, _, _ = private(wrap(cnn()), (x, y))
        loss(model, own_part((x, y), (0, 2), (2, 6))).backward()
        assert_close(gradients(model), expected.gradients, 3e-5)
        assert_close(gradients(model), gradients(alone), 1e-6)


def check_every_clipping_equals_one_process() -> None:
    batch = data(10)
    trained = len(list(classifier().parameters()))
    settings = {
        "per_layer": {"max_grad_norm": [0.1 * (i + 1) for i in range(trained)]},
        "automatic": {},
        "adaptive": {
            "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.7,
            "max_clipbound": 10.0, "min_clipbound": 0.01, "unclipped_num_std": 1e-9,
        },
    }  # fmt: skip
    for clipping, arguments in settings.items():
        _, alone, one, _ = private(classifier(), batch, clipping=clipping, **arguments)
        for wrap in (DistributedDataParallel, sharded):
            one.zero_grad()
            loss(alone, batch).backward()
            _, model, optimizer, _ = private(
                wrap(classifier()), batch, clipping=clipping, **arguments
            )
            assert isinstance(optimizer, DistributedDPOptimizer)
            loss(model, own_part(batch, (0, 4), (4, 10))).backward()
            assert_close(gradients(model), gradients(alone), 1e-9)
            optimizer.step()
            if clipping == "adaptive":
                _, twin, reference, _ = private(classifier(), batch, clipping=clipping, **arguments)
                loss(twin, batch).backward()
                reference.step()
                assert optimizer.max_grad_norm != 0.3
                assert abs(optimizer.max_grad_norm - reference.max_grad_norm) < 1e-6
                assert_same_everywhere([torch.tensor(optimizer.max_grad_norm)])


def check_an_empty_batch_in_one_process() -> None:
    batch = data(5)
    expected = microbatching(classifier(), loss, batch, 0.3, expected_batch_size=4.0)
    for wrap in WRAPPERS.values():
        _, model, optimizer, _ = private(wrap(classifier()), batch)
        loss(model, own_part(batch, (0, 5), (5, 5))).backward()
        assert_close(gradients(model), expected.gradients, 1e-9)
        assert (optimizer.last_step is None) == (dist.get_rank() == 1)
        optimizer.step()


def check_unequal_numbers_of_physical_batches() -> None:
    batch = data(12)
    expected = microbatching(classifier(), loss, batch, 0.3, expected_batch_size=4.0)
    cuts = [[(0, 3), (3, 5), (5, 5), (5, 9)], [(9, 12)]]
    for own in (cuts, cuts[::-1]):
        for wrap in WRAPPERS.values():
            _, model, optimizer, _ = private(wrap(classifier()), batch)
            mine = own[dist.get_rank()]
            for index, cut in enumerate(mine):
                optimizer.signal_skip_step(index < len(mine) - 1)
                loss(model, tuple(t[slice(*cut)] for t in batch)).backward()
                if index < len(mine) - 1:
                    optimizer.step()
                    optimizer.zero_grad()
            assert_close(gradients(model), expected.gradients, 1e-9)
            optimizer.step()


def check_outputs_that_the_loss_does_not_use() -> None:
    """The blank pass of a process that is through must gather what the others' passes gather."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.used, self.other = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.body(x).tanh()
            return self.other(x), self.used(x)

    def heads() -> nn.Module:
        torch.manual_seed(0)
        return TwoHeads().double()

    def first_head(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0])[1], batch[1])

    batch = data(10)
    expected = microbatching(heads(), first_head, batch, 0.3, expected_batch_size=4.0)
    _, model, optimizer, _ = private(sharded(heads()), batch)
    first_head(model, batch).backward()
    optimizer.zero_grad()
    mine = [[(0, 3), (3, 6)], [(6, 10)]][dist.get_rank()]
    for index, cut in enumerate(mine):
        optimizer.signal_skip_step(index < len(mine) - 1)
        first_head(model, tuple(t[slice(*cut)] for t in batch)).backward()
        if index < len(mine) - 1:
            optimizer.step()
            optimizer.zero_grad()
    assert_close(gradients(model), expected.gradients, 1e-9)


def check_bare_parameters_of_a_sharded_root() -> None:
    class Root(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = None  # FSDP2 shards no scalar

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x)], 1) + self.positions
            return self.head(x + self.scale * x.tanh()).mean(1)

    def root() -> nn.Module:
        torch.manual_seed(0)
        return Root().double()

    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(6, 4, 6, generator=generator).double(), torch.arange(6) % 3
    expected = microbatching(root(), loss, batch, 0.3, expected_batch_size=4.0)
    for wrap in (fully_shard, DistributedDataParallel):
        _, model, _, _ = private(wrap(root()), batch)
        loss(model, own_part(batch, (0, 2), (2, 6))).backward()
        assert_close(gradients(model), expected.gradients, 1e-9)


def check_accumulated_backward_passes() -> None:
    batch = data(8)
    _, alone, one, loader = private(classifier(), batch, poisson_sampling=False)
    for half in ((0, 4), (4, 8)):
        loss(alone, tuple(t[slice(*half)] for t in batch)).backward()
    for wrap in (DistributedDataParallel, sharded):
        engine = PrivacyEngine()
        model = wrap(classifier())
        sampler = DistributedSampler(loader.dataset, shuffle=False)
        model, optimizer, _ = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(loader.dataset, batch_size=2, sampler=sampler),
            noise_multiplier=0.0, max_grad_norm=0.3, poisson_sampling=False,
        )  # fmt: skip
        assert optimizer.expected_batch_size == 2
        for cuts in (((0, 1), (1, 4)), ((4, 7), (7, 8))):
            loss(model, own_part(batch, *cuts)).backward()
        assert_close(gradients(model), gradients(alone), 1e-9)
        optimizer.step()
        assert engine.accountant.history == [(0.0, 1.0, 1)]


def check_grad_samples_on_request() -> None:
    batch = data(6)
    for wrap in (DistributedDataParallel, sharded):
        _, model, _, _ = private(wrap(classifier()), batch, materialize_grad_samples=True)
        loss(model, own_part(batch, (0, 2), (2, 6))).backward()
        for parameter in model.parameters():
            count = (2, 4)[dist.get_rank()]
            assert parameter.grad_sample.shape == (count, *parameter.shape)


def check_wrappers_go_on_as_the_users_own() -> None:
    """``wrap_model=False``; and DDP is what it was once the hooks are gone."""
    batch = data(6)
    expected = microbatching(classifier(), loss, batch, 0.3, expected_batch_size=4.0)
    for wrap in WRAPPERS.values():
        model = wrap(classifier())
        _, hooks, _, _ = private(model, batch, wrap_model=False)
        own = own_part(batch, (0, 2), (2, 6))
        loss(model, own).backward()
        assert_close(gradients(model), expected.gradients, 1e-9)
        hooks.cleanup()
    model = DistributedDataParallel(classifier(), find_unused_parameters=True)
    _, hooks, _, _ = private(model, batch, wrap_model=False)
    hooks.cleanup()
    loss(model, own_part(batch, (0, 3), (3, 6))).backward()
    ordinary = classifier()
    loss(ordinary, batch).backward()
    used = {n: p.grad for n, p in ordinary.named_parameters() if p.grad is not None}
    assert_close({n: g for n, g in gradients(model).items() if n in used}, used, 1e-9)


def check_without_clipping_it_is_ordinary_training() -> None:
    """What Opacus' own test on two GPUs asserts (multigpu_gradcheck_test)."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net1, self.net2 = nn.Linear(10, 10), nn.Linear(10, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net2(torch.relu(self.net1(x)))

    def first_step(dp: bool, clipping: str, wrap_model: bool) -> torch.Tensor:
        torch.manual_seed(2)
        model = DistributedDataParallel(Toy())
        net1, optimizer = model.module.net1, torch.optim.SGD(model.parameters(), lr=1)
        dataset = TensorDataset(torch.randn(4, 10), torch.randn(4, 5))
        loader = DataLoader(dataset, batch_size=2, sampler=DistributedSampler(dataset))
        if dp:
            bound = [1e8] * 4 if clipping == "per_layer" else 1e8
            made, optimizer, loader = PrivacyEngine().make_private(
                module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=0,
                max_grad_norm=bound, poisson_sampling=False, clipping=clipping,
                wrap_model=wrap_model,
            )  # fmt: skip
            model = made if wrap_model else model
        x, y = next(iter(loader))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        return net1.weight.detach()

    for clipping in ("flat", "per_layer"):
        for wrap_model in (True, False):
            ordinary = first_step(False, clipping, wrap_model)
            assert torch.allclose(
                first_step(True, clipping, wrap_model), ordinary, atol=1e-5, rtol=1e-3
            )


def check_a_transformer_block_sharded() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
            self.recurrent = nn.LSTM(8, 6, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.recurrent(self.block(self.embedding(ids)))[0].mean(1))

    def encoder() -> nn.Module:
        torch.manual_seed(0)
        return Encoder().double()

    generator = torch.Generator().manual_seed(2)
    batch = torch.randint(0, 11, (6, 4), generator=generator), torch.arange(6) % 3
    expected = microbatching(encoder(), loss, batch, 0.3, expected_batch_size=4.0)
    blocks = encoder()
    fully_shard(blocks.block)
    fully_shard(blocks.recurrent)
    for wrapped in (fully_shard(blocks), DistributedDataParallel(encoder())):
        _, model, _, _ = private(wrapped, batch)
        loss(model, own_part(batch, (0, 2), (2, 6))).backward()
        assert_close(gradients(model), expected.gradients, 1e-9)


def check_activation_checkpointing_inside_shards() -> None:
    class Checkpointed(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            run = torch.utils.checkpoint.checkpoint
            x = run(lambda x: self.norm(torch.tanh(self.first(x))), x, use_reentrant=False)
            return self.last(self.slope(self.twice(self.twice(x)))) / self.temperature

    batch = data(6)
    expected = microbatching(classifier(), loss, batch, 0.3, expected_batch_size=4.0)
    torch.manual_seed(0)
    _, model, _, _ = private(sharded(Checkpointed().double()), batch)
    loss(model, own_part(batch, (0, 2), (2, 6))).backward()
    assert_close(gradients(model), expected.gradients, 1e-9)


def check_mixed_precision_of_fsdp() -> None:
    """bf16 parameters and activations, float32 norms, sums and shards: as one bf16 model."""
    x, y = data(6, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    _, model, _, _ = private(sharded(classifier(torch.float32), mp_policy=policy), (x, y))
    own = own_part((x, y), (0, 2), (2, 6))
    loss(model, own).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    _, half, one, _ = private(classifier(torch.bfloat16), (x.bfloat16(), y))
    loss(half, (x.bfloat16(), y)).backward()
    assert_close(gradients(model), gradients(half), 1e-2)
