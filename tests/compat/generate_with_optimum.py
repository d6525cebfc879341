"""Runs in the second environment: opens export folders with optimum-onnx and with our own runtime, and prints what they
write as JSON.

python generate_with_optimum.py FOLDER
"""

import json
import sys
from pathlib import Path

import transformers
from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from transformers import AutoTokenizer

from hfscratch.export import OnnxForCausalLM


def main(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    found = {"transformers": transformers.__version__, "models": {}}
    for name in asked["models"]:
        path = folder / name
        tokenizer = AutoTokenizer.from_pretrained(path)
        inputs = tokenizer(
            asked["prompts"], return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False
        )
        texts = {"optimum": {}, "ours": {}}
        for file_name in asked["files"]:
            # With no file named, both must find onnx/model.onnx by themselves.
            chosen = {} if file_name == "model.onnx" else {"file_name": file_name}
            for kind, cls in (("optimum", ORTModelForCausalLM), ("ours", OnnxForCausalLM)):
                model = cls.from_pretrained(path, **chosen)
                written = model.generate(**inputs, max_new_tokens=asked["num_tokens"], do_sample=False)
                texts[kind][file_name] = written[:, inputs["input_ids"].shape[1] :].tolist()
        quantizer = ORTQuantizer.from_pretrained(path / "onnx", file_name="model.onnx")
        settings = AutoQuantizationConfig.avx2(is_static=False, per_channel=True)
        quantizer.quantize(save_dir=folder / f"{name}-quantized", quantization_config=settings)
        (quantized,) = (folder / f"{name}-quantized").glob("*.onnx")
        share = quantized.stat().st_size / (path / "onnx" / "model.onnx").stat().st_size
        found["models"][name] = {**texts, "optimum_quantized_share": share}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
