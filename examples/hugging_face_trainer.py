"""Hugging Face ``Trainer``: hand it the private optimizer and the Poisson loader.

    pip install transformers accelerate
    python examples/hugging_face_trainer.py

The model stays the user's (``wrap_model=False``), so saving and generation work as usual. The
trainer must not split, pad, clip or scale what the engine has made: no gradient accumulation, no
``max_grad_norm`` of its own, bfloat16 instead of fp16.
"""

from __future__ import annotations

import tempfile

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from dpkernels import PrivacyEngine


class Sentences(Dataset):
    """Synthetic sentences whose label is whether token 1 occurs."""

    def __init__(self, count: int = 256):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 20, (count, 8), generator=generator)
        self.labels = (self.ids == 1).any(1).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class PrivateTrainer(Trainer):
    """A ``Trainer`` that takes the Poisson loader as it is."""

    def __init__(self, *args: object, private_loader: DataLoader, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.private_loader = private_loader

    def get_train_dataloader(self) -> DataLoader:
        return self.private_loader


def main(epochs: int = 1) -> PrivacyEngine:
    """Train a tiny BERT; returns the engine that counted the steps."""
    torch.manual_seed(0)
    data = Sentences()
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=8,
        )
    ).train()  # fmt: skip
    engine = PrivacyEngine()
    hooks, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        data_loader=DataLoader(data, batch_size=32),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        wrap_model=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = PrivateTrainer(
            model=model,
            args=TrainingArguments(
                folder, num_train_epochs=epochs, max_grad_norm=0.0, report_to=[],
                save_strategy="no", use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            ),
            train_dataset=data,
            private_loader=loader,
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        )  # fmt: skip
        trainer.train()
    hooks.cleanup()
    print(f"epsilon {engine.get_epsilon(1e-5):.2f} at delta 1e-5")
    return engine


if __name__ == "__main__":
    main()
