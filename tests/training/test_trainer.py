"""The pretrain Trainer: every token counts alike however a step is cut, and sources are validated side by side."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch.nn import functional as F

from hfscratch import tokens
from hfscratch.training.trainer import PretrainTrainer
from tests.model.small import make_model

LENGTH = 24
DOCUMENTS = [(("web", "code")[number % 4 == 0], 3 + (number * 5) % (LENGTH - 3)) for number in range(40)]


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> tokens.TokenizedSplit:
    """Documents of two sources, of 3 to 23 tokens, none longer than a row."""
    folder = tmp_path_factory.mktemp("tokens")
    writer = tokens.TokenWriter(folder, "train", 61)
    for number, (source, length) in enumerate(DOCUMENTS):
        inner = [3 + (number * 5 + at * at) % 58 for at in range(length - 2)]
        writer.write([str(number)], [2 * length], [[0, *inner, 1]], [source])
    writer.close()
    return tokens.TokenizedSplit(folder, "train")


def rows_of(split, index, num_rows, **kwargs):
    return tokens.PackedRows(
        split, index, num_rows=num_rows, bos_token_id=0, pad_token_id=2, isolate_documents=True, **kwargs
    )


def make_trainer(folder, *, train=None, evaluation=None, model=None, **arguments):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 3,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "prediction_loss_only": True,
    }
    trainer = PretrainTrainer(
        model=model or make_model(),
        args=transformers.TrainingArguments(**(values | arguments)),
        data_collator=tokens.collate,
        train_dataset=train,
        eval_dataset=evaluation,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def step_of(split, folder, *, pieces):
    """What a step of eight rows with unequal numbers of labels makes of the weights: the gradient, at a rate of 1."""
    rows = rows_of(split, tokens.index_rows(split.lengths, packing="single", sequence_length=LENGTH, seed=0), 8)
    batches = tokens.Batches([rows], rows_of_step=lambda step: (0, 8 * step, 8), num_steps=1, items_per_step=pieces)
    trainer = make_trainer(
        folder,
        train=batches,
        max_steps=1,
        gradient_accumulation_steps=pieces,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    loss = trainer.train().training_loss
    gradients = {name: before[name] - value.detach() for name, value in trainer.model.named_parameters()}
    return rows, loss, gradients


@pytest.mark.parametrize("pieces", [1, 2, 3, 8])
def test_a_step_cut_into_pieces_has_the_gradient_of_all_its_tokens_at_once(split, tmp_path, pieces):
    rows, loss, gradients = step_of(split, tmp_path, pieces=pieces)
    assert len({int((rows[row]["labels"] != -100).sum()) for row in range(8)}) > 3
    model = make_model()
    batch = tokens.collate([rows[row] for row in range(8)])
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=2e-6)


def alone(split, model, name):
    """The loss of a source's documents, each read by itself."""
    total, count = 0.0, 0
    for number, (source, length) in enumerate(DOCUMENTS):
        if source == name:
            ids = torch.tensor(split.read(number, 0, length).astype("int64"))[None]
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            total += F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
            count += length - 1
    return total / count, count


def test_each_source_has_the_loss_that_it_has_alone_and_all_together_what_they_had_before(split, tmp_path):
    """In rows that documents of both share."""
    index = tokens.index_rows(split.lengths, packing="best_fit", sequence_length=LENGTH, seed=0)
    plain = make_trainer(tmp_path / "plain", evaluation=rows_of(split, index, index.rows_per_epoch)).evaluate()
    rows = rows_of(split, index, index.rows_per_epoch, names_sources=True)
    assert any(len({split.sources[piece[0]] for piece in index.pieces(row)}) == 2 for row in range(len(rows)))
    trainer = make_trainer(tmp_path / "named", evaluation=rows)
    trainer.source_names = split.source_names
    for _ in range(2):  # nothing is left over from one validation to the next
        found = trainer.evaluate()
        assert found["eval_loss"] == plain["eval_loss"]
        for name in ("web", "code"):
            assert found[f"eval_loss_{name}"] == pytest.approx(alone(split, trainer.model, name)[0], abs=1e-5)


def test_types_whose_names_the_trainer_does_not_know_have_the_same_losses(split, tmp_path):
    """GPT-2's class has no loss of its name, for which the Trainer would not shift."""
    ids = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    transformers.set_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=LENGTH, **ids)
    index = tokens.index_rows(split.lengths, packing="single", sequence_length=LENGTH, seed=0)
    rows = rows_of(split, index, index.rows_per_epoch, names_sources=True)
    trainer = make_trainer(tmp_path, evaluation=rows, model=transformers.GPT2LMHeadModel(config))
    trainer.source_names = split.source_names
    found = trainer.evaluate()
    each = {name: alone(split, trainer.model, name) for name in ("web", "code")}
    for name, (mean, _) in each.items():
        assert found[f"eval_loss_{name}"] == pytest.approx(mean, abs=1e-5)
    expected = sum(mean * count for mean, count in each.values()) / sum(count for _, count in each.values())
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 5])
def test_the_validation_loss_does_not_depend_on_how_rows_are_put_into_batches(split, tmp_path, rows_at_a_time):
    index = tokens.index_rows(split.lengths, packing="single", sequence_length=LENGTH, seed=0)
    rows = rows_of(split, index, index.rows_per_epoch)
    found = make_trainer(tmp_path, evaluation=rows, per_device_eval_batch_size=rows_at_a_time).evaluate()
    model = make_model().eval()
    each = [alone(split, model, name) for name in ("web", "code")]
    expected = sum(mean * count for mean, count in each) / sum(count for _, count in each)
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_where_sources_are_read_in_other_proportions_the_loss_is_the_mean_by_their_shares(split, tmp_path):
    sources = tokens.Sources(split, packing="best_fit", seed=0)
    counts = {name: sources.rows_per_epoch(name, LENGTH) for name in split.source_names}
    counts["code"] *= 3
    rows = rows_of(split, sources.deal(counts, LENGTH), sum(counts.values()), names_sources=True)
    trainer = make_trainer(tmp_path, evaluation=rows)
    trainer.source_names = split.source_names
    trainer.source_shares = {name: alone(split, trainer.model, name)[1] for name in split.source_names}
    found = trainer.evaluate()
    each = {name: alone(split, trainer.model, name) for name in split.source_names}
    expected = sum(mean * count for mean, count in each.values()) / sum(count for _, count in each.values())
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert math.isfinite(found["eval_loss_code"])
