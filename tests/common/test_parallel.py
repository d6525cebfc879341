"""transformers' own tests of tensor parallelism and FSDP hold for the scratch decoder, on this machine's CPU.

They compare a sharded model with a whole one: values, gradients, training steps and checkpoints. Those that need more
processes than the machine has cores skip themselves. Run: make common.
"""

from __future__ import annotations

import os
import unittest
from typing import Any, ClassVar

import pytest

if "HFSCRATCH_TRANSFORMERS_TESTS" not in os.environ:
    pytest.skip("HFSCRATCH_TRANSFORMERS_TESTS is not set; run: make common", allow_module_level=True)

from hfscratch.model import ScratchForCausalLM, ScratchModel
from tests.common.tester import ScratchTester
from tests.common.upstream import test_fsdp_mixin, test_tensor_parallel_mixin

pytestmark = pytest.mark.common

# By default transformers runs these for the few model types that it lists.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


class ParallelTests(test_tensor_parallel_mixin.TensorParallelTesterMixin, test_fsdp_mixin.FSDPTesterMixin):
    all_model_classes = (ScratchModel, ScratchForCausalLM)
    model_tester = None  # transformers declares it as an abstract property
    options: ClassVar[dict[str, Any]]

    def setUp(self):
        self.model_tester = ScratchTester(self, self.options)


class TestParallelDecoder(ParallelTests, unittest.TestCase):
    options: ClassVar = {}


class TestParallelOptions(ParallelTests, unittest.TestCase):
    options: ClassVar = {"hidden_act": "silu", "value_mixing": "residual"}


class TestParallelValueEmbeddings(ParallelTests, unittest.TestCase):
    options: ClassVar = {"value_mixing": "embeddings"}
