"""The model's numbers: against the naive reference, and against itself by another road."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hfscratch.model import ScratchForCausalLM, ScratchModel
from tests.model import naive
from tests.model.small import make_config, make_model, random_tokens


def weights_of(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_changes_no_logit(attention):
    model = make_model(dtype=torch.float64, attention=attention)
    tokens = random_tokens(1, 8)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), tokens), dim=1)
    batch = torch.cat((padded, random_tokens(1, 11, seed=5)))
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    with torch.no_grad():
        logits = model(batch, attention_mask=mask).logits
        for row, real in ((0, tokens[0]), (1, batch[1])):
            expected = naive.logits(weights_of(model), model.config, real)
            torch.testing.assert_close(logits[row, -len(real) :], expected, rtol=0, atol=1e-9)


def test_gradients_of_packed_documents_equal_those_of_separate_ones():
    packed, separate = (make_model(dtype=torch.float64).train() for _ in range(2))
    tokens = random_tokens(1, 12)
    position_ids = torch.cat((torch.arange(7), torch.arange(5)))[None]
    packed(tokens, position_ids=position_ids).logits.square().sum().backward()
    separate(tokens[:, :7]).logits.square().sum().backward()
    separate(tokens[:, 7:]).logits.square().sum().backward()
    for one, other in zip(packed.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_embeddings_may_be_passed_in_place_of_token_ids():
    model = make_model(tie_word_embeddings=True)
    tokens = random_tokens(2, 7)
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="either"):
        model()


def test_logits_to_keep_takes_every_form_that_transformers_knows():
    model = make_model()
    tokens = random_tokens(2, 7)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    with torch.no_grad():
        logits = model(tokens).logits
        for keep, expected in (
            (0, logits),
            (3, logits[:, -3:]),
            (torch.tensor([1, 4]), logits[:, [1, 4]]),
            (torch.tensor([[1, 4], [0, 6]]), torch.stack((logits[0, [1, 4]], logits[1, [0, 6]]))),
            (mask, logits[mask]),
        ):
            torch.testing.assert_close(model(tokens, logits_to_keep=keep).logits, expected, rtol=0, atol=1e-6)


def test_the_loss_follows_num_items_in_batch_and_shift_labels():
    model = make_model()
    tokens = random_tokens(2, 7)
    labels = tokens.clone()
    labels[0, 3:] = -100
    with torch.no_grad():
        mean = model(tokens, labels=labels).loss
        counted = (labels[:, 1:] != -100).sum()
        torch.testing.assert_close(model(tokens, labels=labels, num_items_in_batch=100).loss, mean * counted / 100)
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        torch.testing.assert_close(model(tokens, labels=labels, shift_labels=shifted).loss, mean)


def test_label_smoothing_in_the_trainer_shifts_the_labels(tmp_path):
    model = make_model()
    arguments = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    tokens = random_tokens(2, 7)
    loss = Trainer(model=model, args=arguments).compute_loss(model, {"input_ids": tokens, "labels": tokens.clone()})
    log_shares = model(tokens).logits[:, :-1].log_softmax(-1)
    hard = -log_shares.gather(-1, tokens[:, 1:, None]).mean()
    torch.testing.assert_close(loss, 0.9 * hard + 0.1 * -log_shares.mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_acts_in_training_only(attention):
    model = make_model(attention=attention, attention_dropout=0.3)
    without = make_model(attention=attention)
    tokens = random_tokens(2, 9)
    assert torch.equal(model(tokens).logits, without(tokens).logits)
    assert not torch.allclose(model.train()(tokens).logits, without(tokens).logits, atol=1e-3)
    assert torch.equal(without.train()(tokens).logits, without.eval()(tokens).logits)


def test_hidden_states_and_attentions_are_captured():
    model = make_model(attention="eager")
    tokens = random_tokens(2, 7)
    output = model(tokens, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 7, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 7, 7)] * 2
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
        assert weights.triu(1).abs().max() == 0
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert isinstance(model(tokens, return_dict=False), tuple)


def test_under_autocast_the_stream_is_bf16_and_the_loss_is_close():
    model = make_model(attention="eager")
    tokens = random_tokens(2, 16)
    expected = model(tokens, labels=tokens).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens, labels=tokens, output_hidden_states=True)
    assert {states.dtype for states in output.hidden_states} == {torch.bfloat16}
    assert output.loss.dtype == torch.float32
    assert abs(output.loss.item() - expected.item()) < 0.05
    output.loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_to_half_precision_is_close_far_into_the_context(dtype):
    model = make_model(tie_word_embeddings=True)
    tokens = random_tokens(1, 400)
    with torch.no_grad():
        expected = model(tokens).logits
        difference = model.to(dtype)(tokens).logits.float() - expected
    assert difference.square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


def test_the_backbone_alone_gives_what_the_head_gets():
    model = make_model()
    backbone = ScratchModel(model.config).eval()
    backbone.load_state_dict(model.model.state_dict())
    tokens = random_tokens(2, 7)
    assert torch.equal(model.lm_head(backbone(tokens).last_hidden_state), model(tokens).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_can_be_resized(tied):
    model = make_model(tie_word_embeddings=tied)
    tokens = random_tokens(2, 7)
    before = model(tokens).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.vocab_size == 70
    after = model(tokens).logits
    assert after.shape[-1] == 70
    torch.testing.assert_close(after[..., :61], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_every_module_that_the_parallel_plans_name_exists():
    model = make_model()
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    planned = {name.replace("*", str(layer)) for name in model.config.base_model_tp_plan for layer in range(2)}
    assert {f"model.{name}" for name in planned if "value_mix" not in name} | {"lm_head"} == linears
    children = [name for name, _ in model.model.named_children() if name != "rotary_emb"]
    assert model.config.base_model_pp_plan is None
    assert list(make_config(value_mixing="none").base_model_pp_plan) == children
    kinds = {type(module).__name__ for module in model.modules()}
    assert set(ScratchForCausalLM._no_split_modules) <= kinds
