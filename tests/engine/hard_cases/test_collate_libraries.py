"""Collators of transformers and MONAI in the trial of a loader's ``collate_fn``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from tests.engine.hard_cases.collates import Texts, tried

transformers = pytest.importorskip("transformers")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = ["[PAD]", "[MASK]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]
    table = {word: i for i, word in enumerate(words)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(table, unk_token="[UNK]")),
        pad_token="[PAD]", mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]",
    )  # fmt: skip


class Tokenized(Texts):
    def __getitem__(self, i: int) -> dict[str, Any]:
        record = super().__getitem__(i)
        return {"input_ids": record["ids"].tolist(), "labels": record["label"]}


class Sentences(Texts):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": super().__getitem__(i)["ids"].tolist()}


def padding(**kwargs: Any) -> Any:
    return transformers.DataCollatorWithPadding(tokenizer(), **kwargs)


def language(**kwargs: Any) -> Any:
    return transformers.DataCollatorForLanguageModeling(tokenizer(), **kwargs)


@pytest.mark.parametrize(
    ("collate", "dataset", "warned"),
    [
        (padding(), Tokenized(), True),
        (padding(), Tokenized((4,) * 8), False),
        (padding(padding="max_length", max_length=9), Tokenized(), False),
        (language(mlm=True), Sentences(), True),
        (language(mlm=True), Sentences((4,) * 8), False),
        (language(mlm=True, pad_to_multiple_of=8), Sentences(), False),
        (language(mlm=True, pad_to_multiple_of=8, seed=3), Sentences(), False),
        (language(mlm=False), Sentences(), True),
    ],
)
def test_collators_of_transformers(collate: Any, dataset: Dataset, warned: bool) -> None:
    found = tried(collate, dataset)
    assert [message.partition(" is padded")[1] for message in found] == [" is padded"] * warned


def test_collates_of_monai() -> None:
    monai = pytest.importorskip("monai.data")

    class Scans(Dataset):
        def __init__(self, *sizes: int) -> None:
            self.sizes = sizes

        def __len__(self) -> int:
            return len(self.sizes)

        def __getitem__(self, i: int) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(i)
            x = torch.randn(1, self.sizes[i], 5, 4, generator=generator)
            return {"image": monai.MetaTensor(x, meta={"name": f"{i}"}), "label": i}

    class Crops(Scans):
        def __getitem__(self, i: int) -> list[dict[str, Any]]:
            scan = super().__getitem__(i)
            return [{"image": scan["image"][:, k : k + 2], "label": i} for k in range(2)]

    alike = Scans(6, 6, 6, 6, 6)
    assert tried(monai.list_data_collate, alike) == []
    assert tried(monai.list_data_collate, Crops(6, 6, 6, 6, 6)) == []
    assert tried(monai.pad_list_data_collate, alike) == []
    (message,) = tried(monai.pad_list_data_collate, Scans(6, 3, 8, 5, 7))
    assert "batch['image'] is padded" in message

    def mixing(records: list[Any]) -> dict[str, Any]:
        batch = monai.list_data_collate(records)
        return {**batch, "image": batch["image"] - batch["image"].mean(0)}

    with pytest.raises(ValueError, match=r"mixing: batch\['image'\]: the row of record"):
        tried(mixing, alike)
