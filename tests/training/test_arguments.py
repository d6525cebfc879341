"""Training arguments of a recipe: what would lose a run, or be ignored, is refused by name when it is read."""

from __future__ import annotations

import pytest

from hfscratch.errors import UsageError
from hfscratch.training import arguments
from tests.conftest import load


def test_every_argument_that_is_refused_is_one_that_transformers_has():
    unknown = arguments.refused("pretrain.batch_tokens").keys() - arguments.argument_names().keys()
    assert not unknown


@pytest.mark.parametrize("section", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", ["save_only_model", "ignore_data_skip", "save_on_each_node", "enable_jit_checkpoint"])
def test_what_would_make_a_checkpoint_that_cannot_be_gone_on_from_is_refused(tiny_recipe, section, name):
    others = ["finetune.task=docstring"] if section == "finetune" else []
    with pytest.raises(UsageError, match=rf"{section}\.{name}.*could not go on with the same bits"):
        load(tiny_recipe, *others, f"{section}.{name}=true")
