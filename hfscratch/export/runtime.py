"""Runs an exported model with onnxruntime behind `generate()`: greedy, sampling, beams, padded batches, streaming.

    from hfscratch.export import OnnxForCausalLM

    model = OnnxForCausalLM.from_pretrained("runs/pycode-tiny/export/onnx")
    model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=50)

The cache is transformers' own `DynamicCache` of torch tensors. onnxruntime reads them where they lie and writes the
longer ones where the next step reads them, so that no step copies the cache between the two. It opens any decoder in
Optimum's layout, whoever exported it. CPU only; it cannot be trained.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, DynamicCache, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hfscratch.errors import UsageError, missing_extra
from hfscratch.export.graph import CacheShape

FOLDER = "onnx"
DEFAULT_FILE = "model.onnx"
_ELEMENT_TYPES = {torch.int64: np.int64, torch.float32: np.float32}


class OnnxForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose forward pass is an ONNX graph.

    Attributes:
        session: the `onnxruntime.InferenceSession`.
        cache_shape: what the graph caches.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, config: PretrainedConfig, session: Any) -> None:
        super().__init__(config)
        self.session = session
        inputs = {each.name: each for each in session.get_inputs()}
        self._takes_positions = "position_ids" in inputs
        self._past_names = [name for name in inputs if name.startswith("past_key_values.")]
        self._present_names = [name.replace("past_key_values.", "present.") for name in self._past_names]
        outputs = {each.name: each for each in session.get_outputs()}
        odd = inputs.keys() - {"input_ids", "attention_mask", "position_ids", *self._past_names}
        odd |= {"input_ids", "attention_mask"} - inputs.keys()
        odd |= {"logits", *self._present_names} - outputs.keys()
        past = [inputs[name] for name in self._past_names]
        odd |= {each.name for each in past if each.type != "tensor(float)" or each.shape != past[0].shape}
        if odd or not past:
            raise UsageError(
                "the ONNX graph is not a decoder with an fp32 cache in Optimum's layout; see its "
                + ", ".join(sorted(odd) or ["inputs, of which none is called past_key_values.0.key"])
            )
        _, heads, _, head_dim = past[0].shape
        self._vocab_size = outputs["logits"].shape[-1]
        if not all(isinstance(size, int) for size in (heads, head_dim, self._vocab_size)):
            raise UsageError("the ONNX graph does not say how many heads it has, how wide they are, or its vocabulary")
        self.cache_shape = CacheShape(len(past) // 2, heads, head_dim)
        own = ["input_ids", "attention_mask", *(["position_ids"] if self._takes_positions else [])]
        self._input_names = [*own, *self._past_names]
        # An empty tensor has no address; this one stands for an empty past.
        self._nothing = torch.zeros(1)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, file_name: str | None = None, num_threads: int | None = None
    ) -> OnnxForCausalLM:
        """Opens an export folder.

        Args:
            folder: with `config.json` at its root, and the graphs there or in `onnx/`.
            file_name: which graph (`model_quantized.onnx`, `model_q4.onnx`); `model.onnx` if not given.
            num_threads: torch's number of threads if not given.

        Raises: UsageError if there is no such graph or it is of another kind; MachineError without onnxruntime.
        """
        path = find_graph(folder, file_name)
        config = AutoConfig.from_pretrained(folder)
        model = cls(config, open_session(path, num_threads))
        if (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def can_generate(self) -> bool:
        return True

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, seq, vocab) of every position; with `use_cache`, the cache grows by `input_ids`.

        Args:
            attention_mask: (batch, past + seq), 0 where there is padding; all ones if not given.
            position_ids: (batch, seq); counted from the first real token of each row if not given.
        """
        batch, seq = input_ids.shape
        use_cache = past_key_values is not None if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if not isinstance(past_key_values, DynamicCache | None):
            raise ValueError(f"the cache must be a DynamicCache, not a {type(past_key_values).__name__}")
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones((batch, past + seq), dtype=torch.int64)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -seq:]
        inputs = [input_ids, attention_mask]
        if self._takes_positions:
            inputs.append(position_ids.expand(batch, seq))
        inputs = [each.to(torch.int64) for each in inputs]
        shapes = [each.shape for each in inputs]
        heads, head_dim = self.cache_shape.num_heads, self.cache_shape.head_dim
        num_states = len(self._past_names)
        inputs += _states(past_key_values) if past else [self._nothing] * num_states
        shapes += [(batch, heads, past, head_dim)] * num_states
        outputs = [torch.empty((batch, seq, self._vocab_size))]
        if use_cache:
            # One piece of memory for all of them: a small model would notice the calls.
            outputs += torch.empty((num_states, batch, heads, past + seq, head_dim)).unbind()
        self._run(inputs, shapes, outputs)
        logits, *present = outputs
        if use_cache:
            _store(past_key_values, present)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values if use_cache else None)

    def _run(self, inputs: list[torch.Tensor], shapes: list[Any], outputs: list[torch.Tensor]) -> None:
        """Runs the graph on tensors where they lie: `shapes` are those of `inputs`, and `outputs` are filled.

        A whole vector of them goes to onnxruntime at once; binding each by its name costs a small model a fifth of
        its time.
        """
        inputs = [each.contiguous() for each in inputs]  # what is handed over by address must live until it has run
        self.session.run_with_ortvaluevector(
            _run_options(),
            self._input_names,
            _vector(inputs, shapes),
            ["logits", *self._present_names][: len(outputs)],
            _vector(outputs, [each.shape for each in outputs]),
            [_cpu()] * len(outputs),
        )


def find_graph(folder: str | Path, file_name: str | None = None) -> Path:
    """The graph's file: at the folder's root or in `onnx/`. Raises: UsageError, naming the graphs there are."""
    folder, wanted = Path(folder), file_name or DEFAULT_FILE
    for path in (folder / wanted, folder / FOLDER / wanted):
        if path.is_file():
            return path
    there = sorted(path.name for path in (*folder.glob("*.onnx"), *(folder / FOLDER).glob("*.onnx")))
    raise UsageError(
        f"{folder} has no {wanted}; " + (f"it has {', '.join(there)}" if there else "it has no ONNX graph")
    )


def has_graph(folder: str | Path) -> bool:
    """Whether `from_pretrained` would find a graph there."""
    return any((Path(folder) / place / DEFAULT_FILE).is_file() for place in ("", FOLDER))


def open_session(path: Path, num_threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU. Raises: UsageError for a file that is not a graph it can run."""
    try:
        import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", "export") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for every way to fail, with no common parent
        raise UsageError(f"onnxruntime cannot open {path}: {' '.join(str(error).split())[:200]}") from error


def _states(cache: DynamicCache) -> list[torch.Tensor]:
    """Keys and values of the layers in turn, as the graph's inputs are."""
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]


def _store(cache: Any, present: list[torch.Tensor]) -> None:
    """Makes the graph's outputs the content of the cache, without copying them."""
    if not cache.layers or len(cache.layers) < len(present) // 2 or not cache.layers[0].is_initialized:
        for layer in range(len(present) // 2):
            cache.update(present[2 * layer][:, :, :0], present[2 * layer + 1][:, :, :0], layer)
    for layer, keys, values in zip(cache.layers, present[::2], present[1::2], strict=True):
        layer.keys, layer.values = keys, values


def _vector(tensors: list[torch.Tensor], shapes: list[Any]) -> Any:
    """Torch tensors as onnxruntime's values, which share their memory."""
    from onnxruntime.capi import _pybind_state as native

    values = native.OrtValueVector()
    values.push_back_batch(
        tensors,
        [each.data_ptr() for each in tensors],
        [_ELEMENT_TYPES[each.dtype] for each in tensors],
        shapes,
        [_cpu()] * len(tensors),
    )
    return values


@functools.cache
def _run_options() -> Any:
    import onnxruntime

    return onnxruntime.RunOptions()


@functools.cache
def _cpu() -> Any:
    from onnxruntime.capi import _pybind_state as native

    return native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0)
