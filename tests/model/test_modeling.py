"""The model's numbers: against the naive reference, and against itself by another road."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache, StaticCache

from hfscratch.model import ScratchForCausalLM, ScratchModel
from tests.model import naive
from tests.model.small import make_config, make_model, random_tokens

SHAPES = {
    "grouped": {},
    "one head of keys": {"num_key_value_heads": 1},
    "all heads": {"num_key_value_heads": 4},
    "head_dim apart from hidden_size": {"head_dim": 6, "intermediate_size": 50, "rope_theta": 1e3},
    "tied": {"tie_word_embeddings": True},
}


def weights_of(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize(("shape", "attention"), [*((shape, "sdpa") for shape in SHAPES), ("grouped", "eager")])
def test_logits_and_every_gradient_equal_the_naive_reference(shape, attention):
    model = make_model(dtype=torch.float64, attention=attention, **SHAPES[shape]).train()
    reference = weights_of(copy.deepcopy(model))
    tokens = random_tokens(1, 7)
    logits = model(tokens).logits[0]
    expected = naive.logits(reference, model.config, tokens[0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    direction = torch.randn(7, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-3, f"{name} does not reach the logits"
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_and_its_gradients_equal_the_naive_reference(tied):
    model = make_model(dtype=torch.float64, tie_word_embeddings=tied).train()
    reference = weights_of(copy.deepcopy(model))
    tokens = random_tokens(1, 7)
    loss = model(tokens, labels=tokens).loss
    expected = naive.loss(reference, model.config, tokens[0])
    # transformers takes the loss of fp32 logits whatever the type of the model, so this is no closer than that.
    assert abs(loss.item() - expected.item()) < 1e-6
    loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=0, atol=1e-6, msg=name)


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [None, False])
def test_documents_packed_in_a_row_do_not_see_each_other(attention, use_cache):
    model = make_model(dtype=torch.float64, attention=attention)
    tokens = random_tokens(2, 9)
    lengths = ([4, 3, 2], [2, 7])  # rows may be cut differently
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        logits = model(tokens, position_ids=position_ids, use_cache=use_cache).logits
        for row, row_lengths in enumerate(lengths):
            documents = [index for index, n in enumerate(row_lengths) for _ in range(n)]
            expected = naive.logits(weights_of(model), model.config, tokens[row], documents)
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-9)
            start = 0
            for length in row_lengths:
                alone = model(tokens[row : row + 1, start : start + length]).logits[0]
                torch.testing.assert_close(logits[row, start : start + length], alone, rtol=0, atol=1e-9)
                start += length


def test_gradients_of_packed_documents_equal_those_of_separate_ones():
    packed, separate = (make_model(dtype=torch.float64).train() for _ in range(2))
    tokens = random_tokens(1, 12)
    position_ids = torch.cat((torch.arange(7), torch.arange(5)))[None]
    packed(tokens, position_ids=position_ids).logits.square().sum().backward()
    separate(tokens[:, :7]).logits.square().sum().backward()
    separate(tokens[:, 7:]).logits.square().sum().backward()
    for one, other in zip(packed.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_a_cache_in_pieces_gives_the_logits_of_one_pass():
    model = make_model(dtype=torch.float64)
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
            pieces, start = [], 0
            for length in (5, 1, 1, 4, 1):
                piece = tokens[:, start : start + length]
                pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
                start += length
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_generation_is_the_same_with_any_cache_and_with_none(attention):
    model = make_model(attention=attention)
    tokens = random_tokens(3, 5)
    expected = tokens
    with torch.no_grad():
        for _ in range(8):
            best = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, best), dim=1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert len(set(expected[:, 5:].flatten().tolist())) > 3
    assert torch.equal(model.generate(tokens, **options), expected)
    assert torch.equal(model.generate(tokens, use_cache=False, **options), expected)
    assert torch.equal(model.generate(tokens, cache_implementation="static", disable_compile=True, **options), expected)


def test_generation_from_a_left_padded_batch_equals_generation_row_by_row():
    model = make_model()
    rows = [random_tokens(1, length, seed=length) for length in (3, 6)]
    batch = torch.zeros(2, 6, dtype=torch.long)
    mask = torch.zeros(2, 6, dtype=torch.long)
    for index, row in enumerate(rows):
        batch[index, -row.shape[1] :], mask[index, -row.shape[1] :] = row[0], 1
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)
    for index, row in enumerate(rows):
        assert torch.equal(model.generate(row, **options)[0, row.shape[1] :], together[index, 6:])


def test_embeddings_may_be_passed_in_place_of_token_ids():
    model = make_model(tie_word_embeddings=True)
    tokens = random_tokens(2, 7)
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="either"):
        model(tokens, inputs_embeds=embeddings)
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


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    plain, checkpointed = (make_model(dropout=0.1).train() for _ in range(2))
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_activation_checkpointing
    tokens = random_tokens(2, 9)
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("field", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(field, attention):
    model = make_model(attention=attention, **{field: 0.3})
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
    assert {f"model.{name}" for name in planned} | {"lm_head"} == linears
    children = [name for name, _ in model.model.named_children() if name not in ("dropout", "rotary_emb")]
    assert list(model.config.base_model_pp_plan) == children
    kinds = {type(module).__name__ for module in model.modules()}
    assert set(ScratchForCausalLM._no_split_modules) <= kinds


def test_torch_export_gives_the_same_logits_at_another_length():
    model = make_model()
    tokens = random_tokens(2, 7)
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(
        model,
        (tokens,),
        {"use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
        strict=False,
    )
    longer = random_tokens(2, 11)
    torch.testing.assert_close(
        exported.module()(longer, use_cache=False).logits, model(longer).logits, rtol=0, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_compiling_without_graph_breaks_changes_no_logit_and_no_gradient(packed):
    plain, model = (make_model().train() for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = random_tokens(2, 12)
    extra = {"position_ids": torch.cat((torch.arange(5), torch.arange(7)))[None].expand(2, -1)} if packed else {}
    outputs = [each(tokens, labels=tokens, use_cache=False, **extra) for each in (plain, compiled)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-5)


def test_positions_beyond_the_trained_context_still_give_logits():
    model = make_model(max_position_embeddings=8)
    assert torch.isfinite(model(random_tokens(1, 40)).logits).all()
    assert make_config(max_position_embeddings=8).max_position_embeddings == 8
