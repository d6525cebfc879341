"""Small models of three kinds, each exported once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hfscratch.export import folder, graph, quantize
from tests.evaluation.small_model import make_model as make_stock_model
from tests.evaluation.small_model import make_tokenizer
from tests.model.small import make_model as make_scratch_model

VOCAB_SIZE = 300
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PAD = 2


@dataclass(frozen=True)
class Exported:
    """A model, and the folder that it was exported to."""

    model: Any
    folder: Path
    shape: graph.CacheShape

    @property
    def graph(self) -> Path:
        return self.folder / "onnx" / "model.onnx"


def make_model(kind: str, **more: Any) -> Any:
    """A random model; scratch and qwen3 have grouped heads wider than hidden / heads, all of them a tied head."""
    if kind == "scratch":
        fields = {"vocab_size": VOCAB_SIZE, "head_dim": 16, "tie_word_embeddings": True, **SPECIAL}
        model = make_scratch_model(**(fields | more))
    else:
        fields = {"max_position_embeddings": 64, "tie_word_embeddings": True}
        if kind == "qwen3":
            fields |= {"num_key_value_heads": 1, "intermediate_size": 64, "head_dim": 24}
        model = make_stock_model(make_tokenizer(VOCAB_SIZE), kind, spread=0.3, **(fields | more))
    model.generation_config.update(**SPECIAL)
    return model


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A function from a kind to its `Exported`."""
    made: dict[str, Exported] = {}

    def export(kind: str) -> Exported:
        if kind not in made:
            target = tmp_path_factory.mktemp(kind)
            model = make_model(kind)
            path = target / "onnx" / "model.onnx"
            shape = graph.export_graph(model, path)
            folder.write_root(target, model, shape)
            for each in quantize.KINDS.values():
                quantize.quantize(path, path.with_name(each.file_name), each)
            made[kind] = Exported(model, target, shape)
        return made[kind]

    return export


@pytest.fixture(scope="session", params=["scratch", "qwen3", "gpt2"])
def any_kind(request, exported) -> Exported:
    return exported(request.param)
