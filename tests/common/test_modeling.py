"""transformers' own tests of models, configurations and training hold for every scratch class: `make common`.

The source archive lacks two of its mixins: ExportTesterMixin is our own, with transformers' exporter, and
GenerationTesterMixin is empty, so tests/model has the tests of generation. PipelineTesterMixin does not run, because
it loads tiny models from the Hub. HFSCRATCH_TRANSFORMERS_TESTS names the folder of the archive's tests; set but wrong
is a failure, not a skip.
"""

from __future__ import annotations

import os
import unittest
from typing import Any, ClassVar

import pytest
import torch

if "HFSCRATCH_TRANSFORMERS_TESTS" not in os.environ:
    pytest.skip("HFSCRATCH_TRANSFORMERS_TESTS is not set; run: make common", allow_module_level=True)

from hfscratch.model import (
    ScratchConfig,
    ScratchForCausalLM,
    ScratchForMaskedLM,
    ScratchForQuestionAnswering,
    ScratchForSequenceClassification,
    ScratchForTokenClassification,
    ScratchModel,
)
from tests.common.tester import ScratchTester
from tests.common.upstream.generation.test_utils import GenerationTesterMixin
from tests.common.upstream.test_configuration_common import ConfigTester
from tests.common.upstream.test_modeling_common import ModelTesterMixin
from tests.common.upstream.test_training_mixin import TrainingTesterMixin

pytestmark = pytest.mark.common

CLASSIFIERS = (ScratchForSequenceClassification, ScratchForTokenClassification, ScratchForQuestionAnswering)


class ScratchTests(ModelTesterMixin):
    """What the test cases below share; they differ in classes and in `options`, fields of the config."""

    model_tester = None  # transformers declares it as an abstract property
    options: ClassVar[dict[str, Any]]

    def setUp(self):
        self.model_tester = ScratchTester(self, self.options)


class DecoderTests(ScratchTests, GenerationTesterMixin, TrainingTesterMixin):
    all_model_classes = (ScratchModel, ScratchForCausalLM)


class TestConfiguration(unittest.TestCase):
    def test_config(self):
        ConfigTester(self, ScratchConfig, hidden_size=32, num_attention_heads=4, vocab_size=99).run_common_tests()


class TestDecoder(DecoderTests, unittest.TestCase):
    all_model_classes = (ScratchModel, ScratchForCausalLM, *CLASSIFIERS)
    options: ClassVar = {}


class TestEncoder(ScratchTests, unittest.TestCase):
    all_model_classes = (ScratchModel, ScratchForMaskedLM, *CLASSIFIERS)
    options: ClassVar = {"is_causal": False}


class TestTied(DecoderTests, unittest.TestCase):
    options: ClassVar = {"tie_word_embeddings": True}


class TestSlidingWindow(DecoderTests, unittest.TestCase):
    options: ClassVar = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


class TestSlidingEncoder(ScratchTests, unittest.TestCase):
    all_model_classes = (ScratchModel, ScratchForMaskedLM)
    options: ClassVar = {
        "is_causal": False,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 2,
    }


class TestSwiglu(DecoderTests, unittest.TestCase):
    options: ClassVar = {"hidden_act": "silu"}


class TestValueResidual(DecoderTests, unittest.TestCase):
    options: ClassVar = {"value_mixing": "residual"}


class TestValueEmbeddings(DecoderTests, unittest.TestCase):
    options: ClassVar = {"value_mixing": "embeddings", "num_key_value_heads": 1}

    def test_inputs_embeds_matches_input_ids(self):
        """Replaces the test of this name, which passes embeddings alone: without ids, value embeddings are zero."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = ScratchModel(config).eval()
        with torch.no_grad():
            embedded = model.get_input_embeddings()(inputs["input_ids"])
            torch.testing.assert_close(model(**inputs, inputs_embeds=embedded)[0], model(**inputs)[0])


class TestPartialRotaryAndSoftcap(DecoderTests, unittest.TestCase):
    options: ClassVar = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "final_logit_softcapping": 10.0,
    }
