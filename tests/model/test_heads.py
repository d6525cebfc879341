"""The heads beside causal LM: what they pool, what they lose, and that a Trainer's accumulation changes no gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from hfscratch.model import (
    ScratchForCausalLM,
    ScratchForMaskedLM,
    ScratchForQuestionAnswering,
    ScratchForSequenceClassification,
    ScratchForTokenClassification,
)
from tests.model import naive
from tests.model.small import make_config, make_model, random_tokens

HEADS = {
    AutoModelForCausalLM: ScratchForCausalLM,
    AutoModelForMaskedLM: ScratchForMaskedLM,
    AutoModelForSequenceClassification: ScratchForSequenceClassification,
    AutoModelForTokenClassification: ScratchForTokenClassification,
    AutoModelForQuestionAnswering: ScratchForQuestionAnswering,
}
CLASSIFIERS = (ScratchForSequenceClassification, ScratchForTokenClassification, ScratchForQuestionAnswering)
LENGTHS = (8, 3, 5)


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of three texts of `LENGTHS`; 0 pads."""
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(8 - length, 8) if side == "left" else slice(0, length)
        ids[row, place] = random_tokens(1, length, seed=row)[0].clamp(min=1)
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("auto_class", HEADS)
def test_every_auto_class_makes_saves_and_opens_its_head(tmp_path, auto_class):
    model = auto_class.from_config(make_config(num_labels=3)).eval()
    assert type(model) is HEADS[auto_class]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(report.values()), report
    tokens = random_tokens(1, 6)
    for one, other in zip(model(tokens).to_tuple(), loaded(tokens).to_tuple(), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("side", "is_causal", "told_by"),
    [
        ("left", True, "mask"),
        ("right", True, "mask"),
        ("left", False, "mask"),
        ("right", False, "mask"),
        ("right", True, "pad_token_id"),  # padding that attention sees spoils the others, as in every model
    ],
)
def test_a_text_is_classified_by_its_real_tokens_alone(side, is_causal, told_by):
    model = make_model(
        dtype=torch.float64,
        model_class=ScratchForSequenceClassification,
        num_labels=3,
        pad_token_id=0,
        is_causal=is_causal,
    )
    ids, mask = padded(side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask if told_by == "mask" else None).logits
        for row in range(3):
            real = ids[row][mask[row].bool()]
            hidden = naive.hidden_states(dict(model.named_parameters()), model.config, real)
            pooled = hidden[-1] if is_causal else hidden.mean(0)
            torch.testing.assert_close(logits[row], pooled @ model.score.weight.T, rtol=0, atol=1e-9)


def test_texts_whose_end_cannot_be_told_are_refused():
    model = make_model(model_class=ScratchForSequenceClassification)
    with pytest.raises(ValueError, match="3 texts came without attention_mask, and the configuration has no pad_token"):
        model(random_tokens(3, 5))
    model(random_tokens(1, 5))


def test_the_masked_head_reads_both_ways_and_a_masked_model_is_no_generator(tmp_path):
    config = make_config()
    model = make_model(model_class=ScratchForMaskedLM)
    tokens = random_tokens(1, 8)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 61
    assert (model(tokens).logits - model(changed).logits)[0, 0].abs().max() > 1e-3
    assert config.is_causal
    assert ScratchForMaskedLM(config).config.is_causal is False
    assert config.is_causal, "the caller's configuration was changed"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="open it with AutoModelForMaskedLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    # A classifier that starts from it reads both ways too.
    assert AutoModelForTokenClassification.from_pretrained(tmp_path).config.is_causal is False


def test_an_encoder_starts_from_a_causal_checkpoint(tmp_path):
    causal = make_model()
    causal.save_pretrained(tmp_path)
    encoder, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(encoder.lm_head.weight, causal.lm_head.weight)


def make_batches(kind: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, length = ids.shape
    generator = torch.Generator().manual_seed(3)
    if kind == "regression":
        return {"input_ids": ids, "labels": torch.randn(rows, generator=generator)}
    if kind == "multi_label_classification":
        return {"input_ids": ids, "labels": torch.randint(2, (rows, 3), generator=generator).float()}
    if kind == "single_label_classification":
        return {"input_ids": ids, "labels": torch.randint(3, (rows,), generator=generator)}
    if kind == "question":
        starts, ends = torch.randint(length, (2, rows), generator=generator)
        return {"input_ids": ids, "start_positions": starts, "end_positions": ends}
    labels = torch.randint(3, ids.shape, generator=generator)
    labels[torch.arange(length)[None] > torch.arange(rows)[:, None] + 1] = -100  # rows have 2, 3, 4, 5 labels
    return {"input_ids": ids, "labels": labels}


KINDS = {
    "regression": (ScratchForSequenceClassification, 1),
    "multi_label_classification": (ScratchForSequenceClassification, 3),
    "single_label_classification": (ScratchForSequenceClassification, 3),
    "token": (ScratchForTokenClassification, 3),
    "masked": (ScratchForMaskedLM, 3),
    "causal": (ScratchForCausalLM, 3),
    "question": (ScratchForQuestionAnswering, 2),
}


@pytest.mark.parametrize(
    ("kind", "label_smoothing"),
    [
        *((kind, 0.0) for kind in KINDS),
        *((kind, 0.1) for kind in ("single_label_classification", "token", "masked", "causal")),
    ],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, kind, label_smoothing):
    """Rows have different numbers of labels, so a mean of means would show."""
    model_class, num_labels = KINDS[kind]
    inputs = make_batches(kind, random_tokens(4, 8))
    data = [{name: value[row] for name, value in inputs.items()} for row in range(4)]
    gradients = []
    for batch_size in (4, 1):
        model = make_model(model_class=model_class, num_labels=num_labels, pad_token_id=0).train()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=1e9,
            label_smoothing_factor=label_smoothing,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        gradients.append(next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry))
    assert gradients[0] > 0.01
    assert abs(gradients[1] / gradients[0] - 1) < 1e-4


def test_losses_are_the_librarys_own():
    ids = random_tokens(4, 8)
    for kind, (model_class, num_labels) in KINDS.items():
        model = make_model(model_class=model_class, num_labels=num_labels, pad_token_id=0)
        inputs = make_batches(kind, ids)
        output, labels = model(**inputs), inputs.get("labels")
        if kind == "question":
            starts, ends = inputs["start_positions"], inputs["end_positions"]
            expected = (F.cross_entropy(output.start_logits, starts) + F.cross_entropy(output.end_logits, ends)) / 2
        elif kind == "regression":
            expected = F.mse_loss(output.logits[:, 0], labels)
        elif kind == "multi_label_classification":
            expected = F.binary_cross_entropy_with_logits(output.logits, labels)
        elif kind == "causal":
            expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            expected = F.cross_entropy(output.logits.flatten(0, -2), labels.flatten())
        torch.testing.assert_close(output.loss, expected, msg=kind)


def test_question_answering_leaves_out_what_lies_beyond_the_text():
    model = make_model(model_class=ScratchForQuestionAnswering)
    ids = random_tokens(2, 8)
    starts, ends = torch.tensor([1, 2]), torch.tensor([3, 99])
    output = model(ids, start_positions=starts, end_positions=ends)
    expected = (F.cross_entropy(output.start_logits, starts) + F.cross_entropy(output.end_logits[:1], ends[:1])) / 2
    torch.testing.assert_close(output.loss, expected)
    hidden = model.model(ids).last_hidden_state
    both = hidden @ model.qa_outputs.weight.T + model.qa_outputs.bias
    torch.testing.assert_close(output.start_logits, both[..., 0])
    torch.testing.assert_close(output.end_logits, both[..., 1])


@pytest.mark.parametrize("model_class", [ScratchForSequenceClassification, ScratchForTokenClassification])
def test_a_new_classifier_starts_near_zero_and_says_that_it_is_new(tmp_path, model_class):
    make_model().save_pretrained(tmp_path)
    model, report = model_class.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"score"}
    assert set(report["unexpected_keys"]) == {"lm_head.weight"}
    assert 0 < model.score.weight.std() < 0.01


@pytest.mark.parametrize(
    ("model_class", "head"), [(ScratchForTokenClassification, "score"), (ScratchForQuestionAnswering, "qa_outputs")]
)
def test_where_a_checkpoint_lacks_a_classifiers_bias_alone_its_weight_is_left_as_loaded(tmp_path, model_class, head):
    source = make_model(model_class=model_class, num_labels=2)
    state = {name: value for name, value in source.state_dict().items() if name != f"{head}.bias"}
    source.save_pretrained(tmp_path, state_dict=state)
    model, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {f"{head}.bias"}
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value) == (name != f"{head}.bias"), name
    assert source.get_submodule(head).bias.abs().min() > 0
    assert model.get_submodule(head).bias.tolist() == [0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("head", "is_causal"),
    [
        (ScratchForCausalLM, True),
        (ScratchForMaskedLM, False),
        *((head, is_causal) for head in CLASSIFIERS for is_causal in (True, False)),
    ],
)
def test_a_text_among_others_gives_what_it_gives_alone(head, is_causal, side):
    model = make_model(dtype=torch.float64, model_class=head, is_causal=is_causal, num_labels=3, pad_token_id=0)
    ids, mask = padded(side)
    with torch.no_grad():
        together = model(ids, attention_mask=mask)
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real])
            for name in ("logits", "start_logits", "end_logits"):
                if name in together:
                    found = together[name][row]
                    found = found[real] if found.shape[:1] == real.shape else found
                    torch.testing.assert_close(found, alone[name][0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", HEADS.values())
def test_every_head_hands_on_the_hidden_states_and_attentions_that_its_logits_are_made_of(head):
    model = make_model(model_class=head, attention="eager", num_labels=3, pad_token_id=0)
    tokens = random_tokens(2, 7).clamp(min=1)
    output = model(tokens, output_hidden_states=True, output_attentions=True)
    assert [tuple(each.shape) for each in output.hidden_states] == [(2, 7, 32)] * 3
    assert [tuple(each.shape) for each in output.attentions] == [(2, 4, 7, 7)] * 2
    sees_ahead = head is ScratchForMaskedLM
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
        assert bool((weights.triu(1) > 0).any()) == sees_ahead
    readout = next(module for name, module in model.named_children() if name != "model")
    rows = readout(output.hidden_states[-1])
    if head is ScratchForQuestionAnswering:
        found = torch.stack((output.start_logits, output.end_logits), dim=-1)
    else:
        found = output.logits
    torch.testing.assert_close(found, rows[:, -1] if head is ScratchForSequenceClassification else rows)
    assert model(tokens).hidden_states is None and model(tokens).attentions is None
    assert isinstance(model(tokens, return_dict=False), tuple)


def test_ids_and_embeddings_together_are_both_used():
    model = make_model(value_mixing="embeddings", num_key_value_heads=1)
    tokens, other = random_tokens(2, 7), random_tokens(2, 7, seed=9)
    embeds = model.get_input_embeddings()(tokens)
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(model(tokens, inputs_embeds=embeds).logits, expected)
        words_of_other = model(other, inputs_embeds=embeds).logits
        assert not torch.equal(words_of_other, expected), "input_ids did not reach the value embeddings"
        assert not torch.equal(words_of_other, model(other).logits), "inputs_embeds were not used"


def test_embeddings_alone_mean_zero_value_embeddings(monkeypatch):
    model = make_model(value_mixing="embeddings", num_key_value_heads=1)
    embeds = model.get_input_embeddings()(random_tokens(2, 7))
    with torch.no_grad():
        alone = model(inputs_embeds=embeds).logits
        for table in model.model.value_embeds.values():
            table.weight.zero_()
        assert torch.equal(alone, model(random_tokens(2, 7, seed=9), inputs_embeds=embeds).logits)


def test_resizing_the_vocabulary_resizes_the_value_tables_too():
    model = make_model(value_mixing="embeddings", num_key_value_heads=1)
    tokens = random_tokens(2, 7)
    before = model(tokens).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert {table.num_embeddings for table in model.model.value_embeds.values()} == {70}
    torch.testing.assert_close(model(tokens).logits[..., :61], before)
    model(torch.tensor([[69]]))
