"""Runs in the second environment: opens what `test_transformers_4_57.py` made there, and prints what it finds as JSON.

python load_with_4_57.py FOLDER
"""

import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline


def first_output(output):
    return output["last_hidden_state"] if "last_hidden_state" in output else next(iter(output.values()))


def read_every_way(model, asked):
    """`{input: its first output}`, and greedy texts if it writes."""
    tokens, mask = torch.tensor(asked["tokens"]), torch.tensor(asked["attention_mask"])
    positions = torch.tensor(asked["position_ids"])
    inputs = {"plain": {}, "padded": {"attention_mask": mask}, "packed": {"position_ids": positions}}
    found = {}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            for name, extra in inputs.items():
                found[f"{name} {attention}"] = first_output(model(tokens, **extra))
    if isinstance(model, transformers.GenerationMixin):
        options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
        for name, extra in {
            "dynamic": {},
            "static": {"cache_implementation": "static"},
            "uncached": {"use_cache": False},
            "beams": {"num_beams": 3},
        }.items():
            found[name] = model.generate(tokens, **extra, **options)
        found["left-padded"] = model.generate(tokens, attention_mask=mask, pad_token_id=0, **options)
    return {name: value.tolist() for name, value in found.items()}


def answer_questions(folder, asked):
    """What the pipeline answers, which transformers 5 has no more, and what is logged meanwhile."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    # Where padding is on the left, this pipeline takes words of the question for answers too.
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    answer = pipeline(
        "question-answering", model=str(folder), tokenizer=tokenizer, trust_remote_code=True, device="cpu"
    )
    found = answer(question=asked["question"], context=asked["context"], align_to_words=False)
    logging.getLogger("transformers").removeHandler(handler)
    return {**found, "said": said}


def main(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    found = {"transformers": transformers.__version__, "models": {}}
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoded = [tokenizer(text)["input_ids"] for text in asked["texts"]]
    found["ids"] = encoded
    found["decoded"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded]
    found["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)]
    found["tokenizers"] = {}
    for name in asked["tokenizers"]:
        each = AutoTokenizer.from_pretrained(folder / "tokenizers" / name)
        rows = each(asked["texts"])["input_ids"]
        found["tokenizers"][name] = {
            "ids": rows,
            "decoded": [each.decode(row, skip_special_tokens=True) for row in rows],
            "special": each.all_special_tokens,
            "roles": [each.bos_token_id, each.eos_token_id, each.pad_token_id, each.unk_token_id, each.mask_token_id],
            "size": len(each),
            "is_fast": each.is_fast,
        }
    messages = asked["messages"]
    found["chat"] = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    chat = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    found["chat_ids"], found["answer"] = chat["input_ids"], chat["assistant_masks"]
    for name in asked["models"]:
        model = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True).eval()
        backbone = AutoModel.from_pretrained(folder / name, trust_remote_code=True).eval()
        tokens = torch.tensor(asked["tokens"])
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            output = model(tokens, labels=tokens)
            packed = model(tokens, position_ids=torch.tensor(asked["position_ids"]))
            padded = model(tokens, attention_mask=torch.tensor(asked["attention_mask"]))
            eager = AutoModelForCausalLM.from_pretrained(
                folder / name, trust_remote_code=True, attn_implementation="eager"
            )(tokens, output_attentions=True, output_hidden_states=True)
        model.save_pretrained(folder / f"{name}-saved-again")
        found["models"][name] = {
            "logits": output.logits.tolist(),
            "loss": output.loss.item(),
            "packed": packed.logits.tolist(),
            "padded": padded.logits.tolist(),
            "eager": eager.logits.tolist(),
            "attention_shapes": [list(weights.shape) for weights in eager.attentions],
            "num_hidden_states": len(eager.hidden_states),
            "hidden": backbone(tokens).last_hidden_state.tolist(),
            "generated": model.generate(tokens, **options).tolist(),
            "static": model.generate(tokens, cache_implementation="static", disable_compile=True, **options).tolist(),
        }
        model.train().gradient_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        found["models"][name]["gradient"] = model.model.layers[0].self_attn.q_proj.weight.grad.tolist()
    found["grid"] = {}
    for name, auto_class in asked["grid"].items():
        model = getattr(transformers, auto_class).from_pretrained(folder / name, trust_remote_code=True).eval()
        model.save_pretrained(folder / f"{name}-saved-again")
        found["grid"][name] = read_every_way(model, asked)
    found["legacy"] = {}
    for name, auto_class in asked["legacy"].items():
        config = AutoConfig.from_pretrained(folder / name, trust_remote_code=True)
        model = getattr(transformers, auto_class).from_pretrained(folder / name, trust_remote_code=True).eval()
        found["legacy"][name] = {"rope": config.rope_parameters, **read_every_way(model, asked)}
    found["question_answered"] = answer_questions(folder / "questions", asked)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
