"""A small stock model and tokenizer, made on the spot, for tests of what works with any causal model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import hfscratch  # noqa: F401  # makes "scratch" a model type

TEXT = "def add(first, second):\n    return first + second\n\n\nclass Point:\n    x = 1\n    y = 2\n" * 3
CONTEXT = 32


def make_tokenizer(vocab_size: int = 300, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `<|bos|>, <|eos|>, <|pad|>` are its special tokens unless others are given."""
    special = special or {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=sorted(set(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def make_model(tokenizer: Any, model_type: str = "llama", *, spread: float = 0.5, seed: int = 0, **more: Any) -> Any:
    """A random model of two layers; a wide `spread` of its weights makes every token depend on all before it."""
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": CONTEXT,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if model_type == "llama":
        fields |= {"num_key_value_heads": 1, "intermediate_size": 64}
    fields |= more
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    # Some models start with projections of zeros, and would ignore the context.
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(spread * torch.randn_like(weight))
    return model.eval()


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Writes a plain model folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def teach(model: Any, tokenizer: Any, text: str, *, steps: int = 80) -> None:
    """Trains a model until it writes `text` over and over."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = torch.tensor([[tokenizer.bos_token_id, *ids][:CONTEXT]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        model(row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
