"""Hugging Face models as they are, built from configurations, against one sample at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.engine.support import values
from tests.engine.truth import assert_private, fused

transformers = pytest.importorskip("transformers")

_SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert() -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "max_position_embeddings": 16}
    config = transformers.BertConfig(num_labels=3, **sizes, **_SIZES, **_NO_DROPOUT)
    return transformers.BertForSequenceClassification(config).train()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1,
        eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).train()


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, image_size=8, patch_size=4, num_labels=3, **_SIZES, **_NO_DROPOUT
    )
    return transformers.ViTForImageClassification(config).train()


def lora(base: Callable[[], nn.Module], *modules: str, **kwargs: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=list(modules), init_lora_weights=False, lora_dropout=0.0, **kwargs
    )
    return peft.get_peft_model(base(), config)


def logits_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (model(batch[0]).logits - 0.1).flatten(1).square().sum(1).mean()


IDS = torch.tensor([[5, 0, 7, 7, 0], [9, 8, 0, 0, 0], [3, 3, 3, 4, 5], [2, 1, 6, 8, 0]])
MODELS = {
    "bert": (bert, IDS),
    "gpt2-tied": (gpt2, IDS),
    "vit": (vit, values(4, 3, 8, 8)),
    "lora-attention": (lambda: lora(bert, "query", "value"), IDS),
    "lora-embedding": (lambda: lora(bert, "query", "word_embeddings"), IDS),
    "lora-gpt2": (lambda: lora(gpt2, "c_attn"), IDS),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_one_sample_at_a_time(name: str) -> None:
    torch.manual_seed(0)
    build, x = MODELS[name]
    assert_private(build().double(), logits_loss, (x,))


@pytest.mark.filterwarnings("ignore")
def test_weight_decomposed_lora_is_refused() -> None:
    """DoRA reads the adapters' weights without calling them."""
    torch.manual_seed(0)
    model = lora(bert, "query", use_dora=True)
    with pytest.raises(ValueError, match="lora_B.*outside its module's forward"):
        fused(model, logits_loss, (IDS,), 1.0)
