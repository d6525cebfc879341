"""`import hfscratch` is enough for the Auto classes, in any order, and costs neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = """
config = transformers.AutoConfig.for_model("scratch", hidden_size=32, num_attention_heads=2, vocab_size=50)
model = transformers.AutoModelForCausalLM.from_config(config)
assert type(model) is hfscratch.ScratchForCausalLM and type(config) is hfscratch.ScratchConfig
assert type(transformers.AutoModel.from_config(config)) is hfscratch.ScratchModel
"""


def run(code: str) -> None:
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr


def test_importing_hfscratch_imports_neither_torch_nor_transformers():
    run(
        "import sys, hfscratch\n"
        "assert hfscratch.__version__\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers\nimport hfscratch",
        "import hfscratch\nimport transformers",
        "import hfscratch\nfrom transformers import AutoModelForCausalLM\nimport transformers",
        "import hfscratch.model\nimport transformers",
        "from hfscratch import ScratchConfig\nimport hfscratch, transformers",
        "import hfscratch.model.modeling_scratch\nimport hfscratch, transformers",
    ],
)
def test_the_auto_classes_know_the_model_in_any_order_of_imports(imports):
    run(f"{imports}\n{CHECK}")


def test_registering_twice_changes_nothing():
    from hfscratch.model.registration import register

    register()
    register()


def test_a_name_that_hfscratch_does_not_have_is_an_attribute_error():
    import hfscratch

    with pytest.raises(AttributeError, match="ScratchForMaskedLM"):
        _ = hfscratch.ScratchForMaskedLM
