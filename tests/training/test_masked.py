"""The loss at masked tokens: one step is the same however its rows are divided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, TrainingArguments

import hfscratch  # noqa: F401  (registers "scratch")
from hfscratch import tokens
from hfscratch.planning.shape import build_config
from hfscratch.training import attention, masked
from hfscratch.training.trainer import PretrainTrainer

LENGTH = 32


def rows_of_unequal_masks(count: int = 24) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        ids = torch.randint(3, 64, (LENGTH,), generator=generator)
        labels = torch.full((LENGTH,), -100)
        hidden = torch.randperm(LENGTH, generator=generator)[: 1 + 3 * (number % 8)]
        labels[hidden] = ids[hidden]
        ids[hidden] = 3
        found.append({"input_ids": ids.numpy(), "labels": labels.numpy()})
    return found


def config_of(model_type: str, **fields):
    return build_config(
        model_type,
        depth=None,
        fields={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2} | fields,
        vocab_size=64,
        special_ids={"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
        sequence_length=LENGTH,
        masked=True,
    )


def trained(model_type: str, folder, *, rows: int, accumulated: int) -> tuple[dict, list[float]]:
    config = config_of(model_type)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    transformers.set_seed(0)
    model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulated,
        learning_rate=0.1,
        optim="sgd",  # whose steps are as long as its gradients
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = PretrainTrainer(
        model=model,
        args=arguments,
        train_dataset=rows_of_unequal_masks(),
        data_collator=tokens.collate,
        **masked.trainer_arguments(),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, losses


@pytest.mark.parametrize("model_type", ["scratch", "modernbert", "bert"])
def test_eight_rows_at_once_are_one_row_eight_times(model_type, tmp_path):
    """Rows have 1 to 22 masked tokens: a mean of means would weigh them wrongly."""
    whole, losses = trained(model_type, tmp_path / "whole", rows=8, accumulated=1)
    pieces, others = trained(model_type, tmp_path / "pieces", rows=1, accumulated=8)
    assert losses == pytest.approx(others, rel=1e-5)
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, pieces[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["modernbert", "bert"])
def test_masks_keep_documents_apart_and_let_tokens_see_both_sides_of_their_own(model_type):
    """Also through layers that see a window only."""
    config = config_of(model_type, num_hidden_layers=4, hidden_size=64)
    if model_type == "modernbert":
        assert {"full_attention", "sliding_attention"} == set(config.layer_types)
    transformers.set_seed(0)
    model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32).eval()
    positions = torch.cat([torch.arange(10), torch.arange(15), torch.arange(7)])[None]
    document = (positions[0] == 0).cumsum(-1)
    ids = torch.randint(3, 64, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    masks = masked.document_masks(model.config, positions)
    for place in (4, 17, 28):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 64
        with torch.no_grad():
            one, two = (
                model(input_ids=each, position_ids=positions, attention_mask=masks).logits[0] for each in (ids, other)
            )
        moved = (one - two).abs().amax(-1) > 1e-6
        assert moved[document == document[place]].all()
        assert not moved[document != document[place]].any()


def test_the_loss_is_the_mean_over_masked_tokens_and_the_accuracy_the_share_that_is_right():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 3, -100, -100, 6], [0, -100, -100, -100, -100]])
    outputs = type("Outputs", (), {"logits": logits})
    asked = labels != -100
    expected = torch.nn.functional.cross_entropy(logits[asked], labels[asked])
    torch.testing.assert_close(masked.masked_loss(outputs, labels), expected)
    torch.testing.assert_close(masked.masked_loss(outputs, labels, torch.tensor(6)), expected / 2)
    guesses = labels.clone()
    guesses[0, 1] = 4
    found = type("Found", (), {"predictions": guesses.numpy(), "label_ids": labels.numpy()})
    assert masked.trainer_arguments()["compute_metrics"](found) == {"masked_accuracy": pytest.approx(2 / 3)}


def test_a_worker_that_is_a_process_of_its_own_makes_the_masks_too():
    """It knows no attention but transformers' own."""
    config = config_of("modernbert", num_hidden_layers=2, hidden_size=64)
    config._attn_implementation = attention.NAME
    attention.register()
    collate = masked.IsolatingCollator(config, tokens.collate)
    rows = [{"input_ids": np.arange(8), "position_ids": np.array([0, 1, 2, 3, 0, 1, 2, 3])}]
    loader = DataLoader(rows, collate_fn=collate, num_workers=1, multiprocessing_context="spawn")
    (batch,) = list(loader)
    for mask in batch["attention_mask"].values():
        assert mask[0, 0, 0].tolist() == [True] * 4 + [False] * 4
