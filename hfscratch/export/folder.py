"""The files around the graphs: a folder as those of onnx-community are.

Runtimes size the cache by `model_type` alone, and know ours by no name. So `config.json` carries the label of a type
whose cache has our shape, `llama`, and says that it is one; the architecture is in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfscratch.artifact import write_json, write_text
from hfscratch.export.graph import CacheShape

LABEL = "llama"
NOTE = (
    "model_type is a label: runtimes size the key-value cache by it. The architecture is in the ONNX graph; "
    "its own model_type stands beside this note."
)


def label_config(config: Any, shape: CacheShape, vocab_size: int) -> dict[str, Any]:
    """What `config.json` says: the label, the sizes that runtimes read, and what the model really is.

    Runtimes compute the width of a head as `hidden_size / num_attention_heads`, so `hidden_size` is written as heads
    times head width, whatever it is in the model.
    """
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or shape.num_heads
    hidden_size = heads * shape.head_dim
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": LABEL,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shape.num_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None) or 2048,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",
        "hfscratch": {
            "note": NOTE,
            "model_type": config.model_type,
            "hidden_size": getattr(config, "hidden_size", hidden_size),
        },
    }


def cache_shape_by_label(config: Mapping[str, Any]) -> CacheShape:
    """The cache's shape as Optimum and transformers.js compute it for a `llama`."""
    return CacheShape(
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_key_value_heads"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
    )


def write_root(folder: Path, model: Any, shape: CacheShape) -> dict[str, Any]:
    """Writes `config.json` and `generation_config.json`, and returns the former."""
    from transformers import GenerationConfig

    config = label_config(model.config, shape, model.get_output_embeddings().weight.shape[0])
    write_json(folder / "config.json", config)
    settings = GenerationConfig.from_dict(model.generation_config.to_dict())
    settings.save_pretrained(str(folder))
    return config


def write_readme(folder: Path, *, name: str, config: Mapping[str, Any], table: Sequence[Mapping[str, str]]) -> None:
    """Writes the folder's `README.md`.

    Args:
        table: a row a file, all with the same columns.
    """
    real = config["hfscratch"]
    columns = list(table[0])
    lines = [
        "---",
        "library_name: transformers.js",
        "pipeline_tag: text-generation",
        "tags: [onnx, hfscratch]",
        "---",
        f"# {name}, as ONNX",
        "",
        "One graph serves prefill, decode and everything between; batch, length and past are dynamic, the past may be "
        "empty, and left padding is respected.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row[column] for column in columns) + " |" for row in table),
        "",
        "Quantized files hold weights in 8 or 4 bits. Activations are never scaled over a batch, so that a row's "
        "logits do not depend on what else is in it.",
        "",
        f"**The label.** `config.json` says `model_type: {config['model_type']}`, because runtimes size the key-value "
        f"cache by that name. The model is a `{real['model_type']}`, and its architecture is in the graph.",
    ]
    if real["hidden_size"] != config["hidden_size"]:
        lines.append(
            f"Runtimes compute the width of a head from `hidden_size`, so that is written as {config['hidden_size']} "
            f"(heads × width of a head); in the model it is {real['hidden_size']}."
        )
    lines += [
        "",
        "```python",
        "# pip install 'hfscratch[export]'",
        "from transformers import AutoTokenizer",
        "from hfscratch.export import OnnxForCausalLM",
        "",
        'folder = "."  # this one',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'model = OnnxForCausalLM.from_pretrained(folder, file_name="model_quantized.onnx")',
        'inputs = tokenizer("Once", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        "```",
        "",
        "Optimum opens the same folder (`ORTModelForCausalLM.from_pretrained`), and so does transformers.js, from "
        "version 4 on (3 knows no 8-bit weights of this kind, and opens `onnx/model.onnx` alone):",
        "",
        "```javascript",
        'import { pipeline } from "@huggingface/transformers";',
        "",
        'const generate = await pipeline("text-generation", "NAME/MODEL", { dtype: "q8" });',
        'console.log(await generate("Once", { max_new_tokens: 50 }));',
        "```",
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))
