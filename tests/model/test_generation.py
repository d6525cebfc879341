"""Generation: whatever road the library offers to the next token, the tokens are those of the model read afresh."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache
from transformers.utils.logging import warning_once

from tests.model.small import make_model, random_tokens

NUM_TOKENS = 10
# No pad_token_id: transformers would take that token for padding where a prompt has it and no mask comes along.
GREEDY = {"max_new_tokens": NUM_TOKENS, "do_sample": False}
OPTIONS = {
    "plain": {"value_mixing": "none"},
    "sliding": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "all sliding": {"sliding_window": 4},
    "residual": {"value_mixing": "residual", "num_hidden_layers": 3},
    "embeddings": {"value_mixing": "embeddings", "num_key_value_heads": 1, "num_hidden_layers": 3},
    # Within its context a dynamic model turns as any other; beyond it, the frequencies follow the length, and what a
    # cache holds was turned by those of its day, as in every model of the library.
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        "max_position_embeddings": 32,
    },
    "softcap": {"final_logit_softcapping": 2.0},
    "tied": {"tie_word_embeddings": True},
}
BREAKABLE = ("plain", "sliding", "residual", "embeddings")
"""Options that have a part in caches, masks or inputs of their own."""
OTHERS_SLOW = [*BREAKABLE, *(pytest.param(each, marks=pytest.mark.slow) for each in OPTIONS if each not in BREAKABLE)]


def make(option, **fields):
    model = make_model(**OPTIONS[option], **fields)
    for layer in model.model.layers:  # or a tied model would say its last word again and again
        layer.self_attn.o_proj.weight.data *= 4
        layer.mlp.down_proj.weight.data *= 4
    return model


@pytest.fixture(scope="module")
def models():
    return {option: make(option) for option in OPTIONS}


def read_afresh(model, tokens, num_tokens=NUM_TOKENS, **inputs):
    """Greedy tokens, each from the whole text so far."""
    with torch.no_grad():
        for _ in range(num_tokens):
            best = model(tokens, use_cache=False, **inputs).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, best), dim=1)
    return tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("option", OPTIONS)
def test_greedy_text_is_the_same_with_every_cache_and_with_none(models, option, attention):
    model = models[option]
    model.set_attn_implementation(attention)
    try:
        tokens = random_tokens(3, 6)
        expected = read_afresh(model, tokens)
        assert len(set(expected[:, 6:].flatten().tolist())) > 4  # a dull text would hide mistakes
        assert torch.equal(model.generate(tokens, use_cache=False, **GREEDY), expected)
        assert torch.equal(model.generate(tokens, **GREEDY), expected)
        for name in ("dynamic", "static"):
            assert torch.equal(model.generate(tokens, cache_implementation=name, **GREEDY), expected), name
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_cache_in_pieces_gives_the_logits_of_one_pass(option, kind):
    model = make(option, dtype=torch.float64)
    tokens = random_tokens(2, 12)
    cache = kind(config=model.config, **({"max_cache_len": 16} if kind is StaticCache else {}))
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        pieces, start = [], 0
        for length in (5, 1, 1, 4, 1):
            pieces.append(model(tokens[:, start : start + length], past_key_values=cache, use_cache=True).logits)
            start += length
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-9)


def test_sliding_layers_keep_no_more_than_their_window(models):
    output = models["sliding"].generate(random_tokens(2, 6), return_dict_in_generate=True, **GREEDY)
    held = [layer.keys.shape[-2] for layer in output.past_key_values.layers]
    assert held == [4 - 1, 6 + NUM_TOKENS - 1]  # the token that is read next is the window's last


@pytest.mark.parametrize("backend", ["fp8", pytest.param("quanto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("option", ["plain", "residual", "embeddings", "softcap"])
def test_a_quantized_cache_is_close_and_generates_what_its_logits_say(models, option, backend):
    settings = {"backend": backend}
    if backend == "quanto":  # in groups no larger than a head; what a step adds is quantized after four steps
        settings |= {"nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": 8, "residual_length": 4}
    model, tokens = models[option], random_tokens(2, 12)
    cache = QuantizedCache(config=model.config, **settings)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        pieces = [model(piece, past_key_values=cache).logits for piece in tokens.split((6, *[1] * 6), dim=1)]
        difference = torch.cat(pieces, dim=1) - whole
        share = (difference[:, 6:].square().mean() / whole[:, 6:].square().mean()).sqrt()
        assert difference[:, :6].abs().max() < 1e-5  # nothing was read from the cache yet
        assert 0 < share < (0.1 if backend == "fp8" else 0.3)

        expected, cache = tokens, QuantizedCache(config=model.config, **settings)
        for _ in range(NUM_TOKENS):
            logits = model(expected[:, cache.get_seq_length() :], past_key_values=cache).logits
            expected = torch.cat((expected, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    generated = model.generate(tokens, cache_implementation="quantized", cache_config=settings, **GREEDY)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_left_padded_batch_generates_what_each_row_does_alone(models, option, cache):
    model = models[option]
    rows = [random_tokens(1, length, seed=length) for length in (3, 7, 6)]
    batch, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for index, row in enumerate(rows):
        batch[index, -row.shape[1] :], mask[index, -row.shape[1] :] = row[0], 1
    together = model.generate(batch, attention_mask=mask, **cache, **GREEDY)
    for index, row in enumerate(rows):
        assert torch.equal(read_afresh(model, row)[0, row.shape[1] :], together[index, 7:])


@pytest.mark.parametrize("option", BREAKABLE)
def test_beams_are_the_same_with_and_without_a_cache(models, option):
    model, tokens = models[option], random_tokens(2, 6)
    options = GREEDY | {"num_beams": 4, "num_return_sequences": 3}
    plain = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(model.generate(tokens, **options), plain)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), plain)
    first = model.generate(tokens, **options | {"num_return_sequences": 1})
    assert torch.equal(first, plain[::3])
    # What beams are for: the text they find is at least as likely as the greedy one, and for some row another.
    assert (likelihood(model, first) >= likelihood(model, model.generate(tokens, **GREEDY)) - 1e-5).all()
    assert not torch.equal(first, model.generate(tokens, **GREEDY))


def likelihood(model, text):
    """Log likelihood (batch) of the new tokens."""
    with torch.no_grad():
        log_shares = model(text, use_cache=False).logits.log_softmax(-1)[:, :-1]
    return log_shares.gather(-1, text[:, 1:, None])[:, -NUM_TOKENS:, 0].sum(-1)


@pytest.mark.parametrize("option", BREAKABLE)
def test_assisted_and_prompt_lookup_generation_write_the_greedy_text(models, option):
    model, tokens = models[option], random_tokens(1, 6)
    expected = read_afresh(model, tokens)
    # Of one assistant all guesses are right, of the other hardly one.
    for assistant in (make(option), make_model(seed=5)):
        calls = count_calls(model)
        assert torch.equal(model.generate(tokens, assistant_model=assistant, **GREEDY), expected)
        is_same = torch.equal(assistant.lm_head.weight, model.lm_head.weight)
        assert (calls[0] < NUM_TOKENS) == is_same, calls
    # A text that holds what will be said lets prompt lookup guess right.
    prompt = torch.cat((expected, expected[:, :6]), dim=1)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), read_afresh(model, prompt))


def count_calls(model):
    """A list of one number, that of the forward passes from now until the next count of this model."""
    calls = [0]
    for hook in list(model._forward_hooks):
        del model._forward_hooks[hook]

    def count(*_):
        calls[0] += 1

    model.register_forward_hook(count)
    return calls


@pytest.mark.parametrize(
    ("option", "attention"), [*((each, "sdpa") for each in OPTIONS), *((each, "eager") for each in BREAKABLE)]
)
def test_continuous_batching_writes_the_greedy_text_of_each_prompt(option, attention):
    model = make(option, attention=attention)
    rows = [random_tokens(1, length, seed=length) for length in (3, 9, 6, 12)]
    expected = [read_afresh(model, row)[0, row.shape[1] :].tolist() for row in rows]
    model.generation_config.update(max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=-1)
    # Pages and batches so small that prompts are cut, and some must wait for others.
    batching = ContinuousBatchingConfig(page_size=8, num_blocks=16, max_batch_tokens=16)
    outputs = model.generate_batch([row[0].tolist() for row in rows], continuous_batching_config=batching)
    written = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert [written[tuple(row[0].tolist())] for row in rows] == expected


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("option", ["plain", "sliding", "residual", "tied"])
def test_embeddings_in_place_of_ids_generate_the_same(models, option, cache):
    model, tokens = models[option], random_tokens(2, 6)
    expected = read_afresh(model, tokens)
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **cache, **GREEDY), expected[:, 6:])
    assert torch.equal(model.generate(tokens, inputs_embeds=embeddings, **cache, **GREEDY), expected)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    padded = model.generate(tokens, attention_mask=mask, **cache, **GREEDY)
    embedded = model.generate(inputs_embeds=embeddings, attention_mask=mask, **cache, **GREEDY)
    assert torch.equal(embedded, padded[:, 6:])


@pytest.mark.parametrize("option", BREAKABLE)
def test_embeddings_beside_ids_are_what_is_read_and_the_ids_what_is_looked_up(models, option):
    model, tokens, others = models[option], random_tokens(2, 6), random_tokens(2, 6, seed=9)
    embeddings = model.get_input_embeddings()(others)
    has_tables = option == "embeddings"
    with torch.no_grad():
        both = model(tokens, inputs_embeds=embeddings).logits
        torch.testing.assert_close(model(others, inputs_embeds=embeddings).logits, model(others).logits)
        assert not torch.allclose(both, model(tokens).logits, atol=1e-2)
        assert torch.allclose(both, model(others).logits, atol=1e-5) != has_tables
        assert torch.allclose(both, model(inputs_embeds=embeddings).logits, atol=1e-5) != has_tables
        first = both[:, -1].argmax(-1)
    for cache in ({}, {"cache_implementation": "static"}):
        written = model.generate(tokens, inputs_embeds=embeddings, **cache, **GREEDY)
        assert torch.equal(written[:, :6], tokens)
        assert torch.equal(written[:, 6], first)
        expected = read_afresh(model, others)
        assert torch.equal(model.generate(others, inputs_embeds=embeddings, **cache, **GREEDY), expected)


def test_a_prompt_of_embeddings_alone_has_no_value_embeddings_which_is_said_once(models):
    model, tokens = models["embeddings"], random_tokens(2, 6)
    embeddings = model.get_input_embeddings()(tokens)
    with torch.no_grad():
        first = model(inputs_embeds=embeddings).logits[:, -1].argmax(-1)
    with warnings_caught() as said:
        written = model.generate(inputs_embeds=embeddings, **GREEDY)
        assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), written)
    assert len(said) == 1
    assert "count as zero" in said[0]
    assert torch.equal(written[:, 0], first)
    # Another prompt than the ids would have been, and what is written has its value embeddings again.
    assert not torch.equal(written, read_afresh(model, tokens)[:, 6:])
    with torch.no_grad():
        cache = model(inputs_embeds=embeddings, use_cache=True).past_key_values
        second = model(first[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
    assert torch.equal(written[:, 1], second)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_prompt_read_in_chunks_is_continued_the_same(models, option):
    model, tokens = models[option], random_tokens(2, 11)
    expected = read_afresh(model, tokens)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=4, **GREEDY), expected)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_cache_that_generation_returned_is_continued_as_if_read_in_one_go(models, option):
    model, tokens = models[option], random_tokens(2, 6)
    first = model.generate(tokens, return_dict_in_generate=True, **GREEDY)
    turn = torch.cat((first.sequences, random_tokens(2, 5, seed=4)), dim=1)
    second = model.generate(turn, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, read_afresh(model, turn))


def test_sampling_draws_from_the_shares_of_the_logits(models):
    model, tokens = models["plain"], random_tokens(1, 6)
    torch.manual_seed(0)
    options = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "num_return_sequences": 2000}
    drawn = model.generate(tokens, **options)[:, -1]
    with torch.no_grad():
        expected = model(tokens).logits[0, -1].softmax(-1)
    shares = torch.bincount(drawn, minlength=61) / 2000
    assert (shares - expected).abs().sum() / 2 < 0.1


@pytest.mark.parametrize("option", OTHERS_SLOW)
def test_compiling_without_graph_breaks_changes_no_step_of_decoding(models, option):
    check_compiled_decoding(models[option], random_tokens(2, 6), backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("option", BREAKABLE)
def test_inductor_changes_no_step_of_decoding(models, option):
    check_compiled_decoding(models[option], random_tokens(2, 6), backend="inductor")


def check_compiled_decoding(model, tokens, *, backend):
    """`generate` compiles each step by itself if told to on a CPU; here it must not break the graph."""
    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    options = GREEDY | {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Masks are made outside, as `generate` does it where it compiles.
    assert torch.equal(model.generate(tokens, **options), read_afresh(model, tokens))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    del model._compiled_call, model._last_compile_config


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("option", "checkpointing"),
    [
        ("sliding", False),
        ("residual", True),
        *(
            pytest.param(option, checkpointing, marks=pytest.mark.slow)
            for option in BREAKABLE
            for checkpointing in (False, True)
            if (option, checkpointing) not in (("sliding", False), ("residual", True))
        ),
    ],
)
def test_compiling_without_graph_breaks_changes_no_gradient(option, checkpointing, packed):
    plain, model = (make(option).train() for _ in range(2))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = random_tokens(2, 12)
    extra = {"position_ids": torch.cat((torch.arange(5), torch.arange(7)))[None].expand(2, -1)} if packed else {}
    outputs = [each(tokens, labels=tokens, use_cache=False, **extra) for each in (plain, compiled)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-5)
    assert torch.allclose(outputs[0].logits, plain(tokens).logits, atol=1e-2) != packed
    for output in outputs:
        output.loss.backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert one.grad.abs().max() > 0, name
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}], ids=str)
def test_text_beyond_the_trained_context_is_read_and_written_with_one_warning(rope):
    model = make_model(max_position_embeddings=8, **rope)
    tokens = random_tokens(2, 4)
    expected = read_afresh(model, tokens, num_tokens=20)
    for read in (
        lambda: model(random_tokens(2, 9)),
        lambda: model.generate(tokens, **GREEDY),  # here the warning is the library's own
        lambda: model.generate(tokens, **GREEDY | {"max_new_tokens": 20, "use_cache": False}),
    ):
        with warnings_caught() as said:
            model(random_tokens(2, 8))
            model.generate(tokens, **GREEDY | {"max_new_tokens": 4})
            assert said == []
            written = [read() for _ in range(2)]
            assert len(said) == 1, said
            assert "(max_position_embeddings)" in said[0] or "maximum length (8)" in said[0]
    assert torch.equal(written[-1], expected)
    for option in ({}, {"cache_implementation": "static"}):
        longer = model.generate(tokens, **option, **GREEDY | {"max_new_tokens": 20})
        assert longer.shape == (2, 24)
        assert torch.equal(longer, expected) or rope  # a dynamic model reads its cache with the turns of its day


@contextlib.contextmanager
def warnings_caught():
    """A list of what is warned of, where nothing counts as said before."""
    warning_once.cache_clear()
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "hfscratch")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield said
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
