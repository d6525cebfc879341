"""The base class of ModelTesterMixin: its file is not in the archive, so this is ours, with transformers' exporter."""

from __future__ import annotations

import torch
from parameterized import parameterized
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter


class ExportTesterMixin:
    @parameterized.expand([("static", False), ("dynamic", True)])
    def test_exported_program_gives_the_same(self, _, dynamic):
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).eval()
            exported = DynamoExporter().export(model, dict(inputs), config=DynamoConfig(dynamic=dynamic))
            if dynamic:  # as many rows and tokens as it has not seen
                inputs = {name: torch.cat((tensor, tensor[:, :2]), dim=1)[1:] for name, tensor in inputs.items()}
            with torch.no_grad():
                torch.testing.assert_close(exported(**inputs)[0], model(**inputs)[0], msg=model_class.__name__)
