"""Runs in the second environment: exports our checkpoints with optimum-onnx, and prints what the graphs compute as
JSON.

python export_with_optimum.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

import hfscratch  # noqa: F401  # after Optimum, which must not matter

TASK = "text-generation-with-past"


def opened(source: Path, how: str) -> ORTModelForCausalLM:
    """The graph that Optimum makes of a checkpoint."""
    target = source.with_name(f"{source.name}-by-{how}")
    if how == "from_pretrained":
        return ORTModelForCausalLM.from_pretrained(source, export=True)
    main_export(str(source), output=target, task=TASK, do_validation=False)
    return ORTModelForCausalLM.from_pretrained(target)


def main(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    found = {"transformers": transformers.__version__, "models": {}}
    mask = torch.tensor(asked["attention_mask"])
    tokens = torch.tensor(asked["tokens"])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cut = asked["cut"]
    for name, how in asked["exports"]:
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        model = opened(folder / name, how)
        inputs = tokenizer(
            asked["prompts"], return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False
        )
        written = model.generate(**inputs, max_new_tokens=asked["num_tokens"], do_sample=False)
        whole = model(tokens, attention_mask=mask, position_ids=positions)
        first = model(tokens[:, :cut], attention_mask=mask[:, :cut], position_ids=positions[:, :cut])
        rest = model(
            tokens[:, cut:],
            attention_mask=mask,
            position_ids=positions[:, cut:],
            past_key_values=first.past_key_values,
        )
        found["models"][f"{name} {how}"] = {
            "text": written[:, inputs["input_ids"].shape[1] :].tolist(),
            "logits": whole.logits.tolist(),
            "continued": torch.cat([first.logits, rest.logits], dim=1).tolist(),
        }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
