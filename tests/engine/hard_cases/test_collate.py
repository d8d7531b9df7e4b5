"""A ``collate_fn`` that mixes records is refused by name; all others pass, or are warned of."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from opacus.data_loader import wrap_collate_with_empty
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from dpkernels import PrivacyEngine
from tests.engine.hard_cases.collates import Texts, mix_up, padded, stacked, tried
from tests.engine.support import images


def mix_up_sometimes(records: list[Any]) -> Any:
    return mix_up(records) if random.random() < 0.5 else default_collate(records)


def cut_mix(records: list[Any]) -> dict[str, torch.Tensor]:
    x, y = default_collate(records)
    x[:, :, 2:5, 3:6] = x.roll(1, 0)[:, :, 2:5, 3:6]
    return {"label": y, "image": x}


def normalized(records: list[Any]) -> dict[str, torch.Tensor]:
    x, y = default_collate(records)
    return {"image": (x - x.mean(0)) / x.std(0), "label": y}


def labels_of_neighbours(records: list[Any]) -> list[torch.Tensor]:
    """Each tensor's rows are those of single records, but a row's two halves are of two."""
    x, _ = stacked(records)
    return [x, x.mean((1, 2, 3)).roll(1, 0)]


def mixed_in_a_list(records: list[Any]) -> list[dict[str, torch.Tensor]]:
    x, _ = stacked(records)
    return [{"x": row, "of_another": other} for row, other in zip(x, 0.9 * x + 0.1 * x.flip(0))]


def similarities(records: list[Any]) -> torch.Tensor:
    x = stacked(records)[0].flatten(1)
    return x @ x.T


@pytest.mark.parametrize(
    ("collate", "leaf"),
    [
        (mix_up, r"batch\[0\]"),
        (mix_up_sometimes, r"batch\[0\]"),
        (cut_mix, r"batch\['image'\]"),
        (normalized, r"batch\['image'\]"),
        (labels_of_neighbours, r"batch\[1\]"),
        (mixed_in_a_list, r"batch\[...\]\['of_another'\]"),
        (similarities, "batch"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_collate_fn_that_mixes_records_is_refused(
    collate: Callable[[list[Any]], Any], leaf: str
) -> None:
    name = rf"{collate.__module__}\.{collate.__name__}"
    message = (
        rf"data_loader\.collate_fn {name}: {leaf}: the row of record \d moves when record"
        r" \d is exchanged.*max_grad_norm.*__getitem__"
    )
    for wrapped in (collate, wrap_collate_with_empty(collate_fn=collate)):
        with pytest.raises(ValueError, match=message):
            tried(wrapped)
    with pytest.raises(ValueError, match=rf"\.{collate.__name__}: "):
        tried(partial(collate))


@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_the_engine_refuses_and_its_remedy_is_taken(poisson_sampling: bool) -> None:
    """Noise added to every record by itself, in the dataset, instead of another record's values."""

    class Augmented(Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            x, y = images(12)[i]
            return x + 0.1 * torch.randn_like(x), y

    def made(dataset: Dataset, collate: Any, **kwargs: Any) -> DataLoader:
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        return PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(dataset, batch_size=4, collate_fn=collate), max_grad_norm=1.0,
            noise_multiplier=1.0, poisson_sampling=poisson_sampling, **kwargs,
        )[2]  # fmt: skip

    with pytest.raises(ValueError, match="Transform every record by itself in the dataset"):
        made(images(12), mix_up)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(next(iter(made(Augmented(), lambda records: default_collate(records))))) == 2
    made(images(12), mix_up, grad_sample_mode="hooks")  # Opacus' modes run as Opacus runs them


def test_what_is_refused_would_break_the_bound() -> None:
    """One record is exchanged: without MixUp, at most one row within C moves, by 2 C at most."""
    x = torch.tensor([[9.0, 0.0], [1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    exchanged = torch.cat([-x[:1], x[1:]])

    def apart(share: float) -> float:
        sums = []
        for batch in (x, exchanged):
            model = nn.Linear(2, 1, bias=False)
            private, _, _ = PrivacyEngine().make_private(
                module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=DataLoader(TensorDataset(x), batch_size=4), noise_multiplier=0.0,
                max_grad_norm=1.0,
            )  # fmt: skip
            private((1 - share) * batch + share * batch.roll(1, 0)).mean().backward()
            sums.append(model.weight.summed_grad)
        return float((sums[0] - sums[1]).norm())

    assert apart(0.0) <= 2.0
    assert apart(0.4) > 3.5


def padded_both_sides(records: list[Any]) -> torch.Tensor:
    longest = max(len(r["ids"]) for r in records)
    extra = [longest - len(r["ids"]) for r in records]
    return torch.stack([F.pad(r["ids"], (n // 2, n - n // 2)) for r, n in zip(records, extra)])


def transformed_after_padding(records: list[Any]) -> torch.Tensor:
    """Rounding may depend on the length: a product of matrices goes by blocks."""
    table = torch.linspace(-1.0, 1.0, 50 * 7).reshape(50, 7)
    rows = F.one_hot(padded(records)["ids"], 50).float() @ table
    return rows * (1 + rows.shape[1] * 1e-7)


def padded_with_positions_and_causal_mask(records: list[Any]) -> dict[str, torch.Tensor]:
    batch = padded(records)
    count, length = batch["ids"].shape
    batch["positions"] = torch.arange(length).expand(count, length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    batch["attention"] = causal & batch["mask"][:, None, :]
    return batch


@pytest.mark.parametrize(
    "collate",
    [
        padded,
        partial(padded, side="left"),
        padded_both_sides,
        padded_with_positions_and_causal_mask,
        transformed_after_padding,
    ],
)
def test_padding_to_the_longest_is_warned_of_once(collate: Callable[[list[Any]], Any]) -> None:
    (message,) = tried(collate, Texts())
    assert "is padded to the longest record of the batch" in message
    assert "pad to a fixed length" in message


def test_padding_with_the_records_on_the_second_axis() -> None:
    def collate(records: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.tensor([r["label"] for r in records])
        return pad_sequence([r["ids"] for r in records]), labels

    (message,) = tried(collate, Texts(), batch_first=False)
    assert "batch[0] is padded" in message

    def mixing(records: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = collate(records)
        return ids + ids.roll(1, 1), labels

    with pytest.raises(ValueError, match=r"mixing: batch\[0\]: the row of record"):
        tried(mixing, Texts(), batch_first=False)
    with pytest.raises(ValueError, match=r"mixing: batch\[0\]: the row of record"):
        tried(mixing, Texts((4,) * 3), batch_first=False)


def test_records_of_the_next_row_in_the_padding_are_mixed() -> None:
    def packed_with_the_next(records: list[Any]) -> torch.Tensor:
        ids = [r["ids"] for r in records]
        pairs = [torch.cat(pair) for pair in zip(ids, [*ids[1:], ids[0]])]
        return pad_sequence(pairs, batch_first=True)

    with pytest.raises(ValueError, match="packed_with_the_next: batch: the row of record"):
        tried(packed_with_the_next, Texts())


@dataclass
class Batch:
    image: torch.Tensor
    label: torch.Tensor
    note: str = "as in torch"
    nothing: None = None


def sorted_by_length(records: list[Any]) -> dict[str, torch.Tensor]:
    """Rows in another order are not mixed: the sum over rows does not depend on their order."""
    records = sorted(records, key=lambda r: len(r["ids"]))
    rows = torch.stack([F.pad(r["ids"], (0, 8 - len(r["ids"]))) for r in records])
    return {"ids": rows, "label": torch.tensor([r["label"] for r in records])}


def packed(records: list[Any]) -> Any:
    return pack_sequence([r["ids"] for r in records], enforce_sorted=False)


def packed_in_order(records: list[Any]) -> Any:
    records = sorted(records, key=lambda r: -len(r["ids"]))
    return pack_sequence([r["ids"] for r in records]), [r["label"] for r in records]


def masked_at_random(records: list[Any]) -> dict[str, torch.Tensor]:
    """Masks whose draws depend on the length of the batch alone."""
    batch = padded(records)
    return {"ids": batch["ids"] * torch.bernoulli(torch.full(batch["ids"].shape, 0.7)).long()}


@pytest.mark.parametrize(
    ("collate", "dataset"),
    [
        (lambda records: default_collate(records), images(12)),
        (lambda records: Batch(*stacked(records)), images(12)),
        (lambda records: records, images(12)),
        (lambda records: [x for x, _ in records], images(12)),  # of three colours
        (lambda records: (torch.stack([x for x, _ in records]), [{"y": y} for _, y in records]),
         images(12)),
        (lambda records: torch.stack([x for x, _ in records]).numpy(), images(12)),
        (lambda records: (len(records), *default_collate(records)), images(12)),
        (lambda records: torch.cat([torch.stack([x, -x]) for x, _ in records]), images(12)),
        (sorted_by_length, Texts()),
        (packed, Texts()),
        (packed_in_order, Texts()),
        (lambda records: [r["ids"] for r in records], Texts()),
        (lambda records: padded(records)["label"], Texts()),
        (padded, Texts((4,) * 8)),
        (masked_at_random, Texts((4,) * 8)),
        (lambda records: default_collate(records), TensorDataset(torch.full((9, 2), torch.nan))),
    ],
)  # fmt: skip
def test_a_collate_fn_that_keeps_records_apart_passes(
    collate: Callable[[list[Any]], Any], dataset: Dataset
) -> None:
    assert tried(collate, dataset) == []


def test_random_masks_on_padded_rows_are_judged_where_the_length_stays() -> None:
    (message,) = tried(masked_at_random, Texts())
    assert "batch['ids'] is padded" in message

    def mixing(records: list[Any]) -> torch.Tensor:
        return masked_at_random(records)["ids"].cumsum(0)

    with pytest.raises(ValueError, match="mixing: batch: the row of record"):
        tried(mixing, Texts())


@pytest.mark.parametrize(
    ("loose", "leaf"),
    [
        (lambda x: x.max(), "['loose']"),
        (lambda x: float(x.mean()), "['loose']"),
        (lambda x: x.mean(0), "['loose']"),
        (lambda x: x.flatten().tolist()[:1], "['loose'][0]"),
    ],
)
def test_what_belongs_to_no_record_and_moves_is_pointed_out(
    loose: Callable[[torch.Tensor], Any], leaf: str
) -> None:
    def collate(records: list[Any]) -> dict[str, Any]:
        x, y = stacked(records)
        return {"x": x, "y": y, "loose": loose(x)}

    (message,) = tried(collate)
    assert f"batch{leaf} has no row for each record" in message


def test_numbers_that_every_batch_shares_are_not_pointed_out() -> None:
    assert tried(lambda records: {"x": stacked(records)[0], "C": 3.0, "w": torch.ones(5)}) == []


def test_records_of_several_rows() -> None:
    """Rows of one record are adjacent, as `views_per_sample` takes them; others are mixed up."""

    def by_view(records: list[Any]) -> torch.Tensor:
        x, _ = stacked(records)
        return torch.cat([x, -x])

    with pytest.raises(ValueError, match="by_view: batch: the row of record"):
        tried(by_view)
