"""Runs in the second environment: opens what `test_transformers_4_57.py` made there, and prints what it finds as JSON.

python load_with_4_57.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


def main(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    found = {"transformers": transformers.__version__, "models": {}}
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoded = [tokenizer(text)["input_ids"] for text in asked["texts"]]
    found["ids"] = encoded
    found["decoded"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded]
    found["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)]
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
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
