"""Opens a model folder that may come from anywhere, and streams the text it writes.

Opening is careful: no code of the folder runs unless the user says so, weights are read from safetensors only (a
pickle could run code), and whatever is wrong with the folder becomes one sentence. Any causal model that transformers
knows will do, ours included, and to be measured or trained further any masked one; adapters and encoder-decoder models
are not covered.

    model, tokenizer = load_model("runs/pycode-tiny")
    for piece in stream(model, tokenizer, "def main(", seed=0):
        ...
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfscratch.errors import HfscratchError, MachineError, UsageError

logger = logging.getLogger(__name__)

HUB_TIMEOUT_S = 10
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_model(folder_or_id: str | Path, *, trust_remote_code: bool = False, masked: bool = False) -> tuple[Any, Any]:
    """The model, ready to generate, and its tokenizer.

    Args:
        folder_or_id: a model folder, a run folder (its `pretrain` first), or the name of a model on the Hub.
        trust_remote_code: run the code that the folder brings along, if transformers does not know its model type.
        masked: open a masked model, which guesses and does not generate.

    Raises: UsageError for a folder that is not a usable model of that kind; MachineError if the Hub cannot be reached
    or a library is missing.
    """
    import torch
    from transformers import AutoTokenizer

    source, options = _locate(folder_or_id)
    if _is_onnx(source):
        return _load_onnx(source)
    options["trust_remote_code"] = trust_remote_code
    with _quiet():
        config = _load_config(source, options, masked=masked)
        on_gpu = torch.cuda.is_available()
        # Many processors multiply in bf16 far slower than in fp32, so a CPU always gets fp32.
        dtype = "auto" if on_gpu else torch.float32
        model, extra = _load_weights(source, config, {**options, "dtype": dtype}, masked=masked)
        if extra:
            logger.warning("%s has weights that its config.json does not ask for (%s)", source, _named(extra))
        if Path(source).is_dir() and not has_tokenizer(Path(source)):
            raise UsageError(f"{source} has no tokenizer; put its tokenizer.json and tokenizer_config.json there")
        with _reading(source, "the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            _check_tokenizer(source, model, tokenizer)
        model.to("cuda" if on_gpu else "cpu").eval()
        if masked:
            with _reading(source, "a value of config.json"):
                _read_one_token(source, model)
            return model, tokenizer
        with _reading(source, "generation_config.json"):
            model.generation_config = _special_ids_alone(source, model.generation_config)
        with _reading(source, "a value of config.json"):
            _write_one_token(source, model)
    return model, tokenizer


POSITIONS_BEHIND_PADDING = {
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
"""Types whose first token has the position `pad_token_id` + 1. Source: `create_position_ids_from_input_ids` of each."""


def is_masked(folder: Path) -> bool:
    """Whether a model folder, or the one in a run folder, holds a masked language model, by its config.json."""
    return any(name.endswith("ForMaskedLM") for name in _architectures(folder))


def is_classifier(folder: Path) -> bool:
    """Whether it holds a model that labels texts, in the same way."""
    return any(name.endswith("ForSequenceClassification") for name in _architectures(folder))


def labels_of(folder: Path) -> list[str]:
    """The labels of the classifier in a folder, in the order of their numbers. Raises: UsageError if it is unusable."""
    from transformers import AutoConfig

    source, options = _locate(folder)
    options["trust_remote_code"] = False
    with _quiet(), _reading(source, "config.json"):
        labels = AutoConfig.from_pretrained(source, **options).id2label
    return [str(labels[number]) for number in sorted(labels)]


def has_classifier(model_type: str) -> bool:
    """Whether there are classifiers of texts of this type."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    import hfscratch  # noqa: F401  (registers "scratch")

    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def _architectures(folder: Path) -> list[str]:
    try:
        config = json.loads((Path(_locate(folder)[0]) / "config.json").read_text(encoding="utf-8"))
        return [str(name) for name in config.get("architectures") or ()]
    except (UsageError, OSError, ValueError, AttributeError, TypeError):  # what is wrong is said when it is opened
        return []


def local_copy(folder_or_id: str | Path, *, weights: bool = True, otherwise: Path | None = None) -> Path:
    """The folder to start from: the one named, or the local cache's copy of a model on the Hub, fetched if need be.

    What the cache holds whole is taken as it is, and the Hub not asked: the same name stays the same model until
    `hf download` brings a newer one.

    Args:
        folder_or_id: a model folder, a run folder (its `pretrain` first), or the name of a model on the Hub; without
            `weights` a folder that holds no more than a tokenizer, or the file of one, too.
        weights: whether the model is wanted, or its configuration and tokenizer alone.
        otherwise: the folder that was made from it, which will do if it stands and what it was made from is gone.

    Raises: UsageError if there is no such model; MachineError if the Hub cannot be reached.
    """
    import huggingface_hub

    if otherwise is not None and otherwise.is_dir() and cached_copy(folder_or_id, weights=weights) is None:
        return otherwise
    folder_or_id, is_path = _expanded(folder_or_id)
    path = Path(folder_or_id)
    if not weights and path.is_file():
        return path
    if not weights and path.is_dir():
        inside = (path / name for name in ("", "pretrain", "finetune/merged", "tokenizer"))
        return next((folder for folder in inside if has_tokenizer(folder)), path)
    if path.exists():
        return Path(_locate(folder_or_id)[0])
    if is_path:
        raise UsageError(f"there is no model folder at {folder_or_id}")
    cached = cached_copy(folder_or_id, weights=weights)
    if cached is not None:
        return cached
    name = str(folder_or_id)
    if not _hub_has(name):
        raise MachineError(f"the local cache holds a part of {name} only, and the Hub cannot be reached for the rest")
    kinds = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=kinds, ignore_patterns=["*/*"]))
    except Exception as error:  # whatever the network layer raises
        raise MachineError(f"{name} could not be fetched from the Hub: {_first_line(error)}") from error


def cached_copy(folder_or_id: str | Path, *, weights: bool = True) -> Path | None:
    """What `local_copy` gives without asking the Hub, or None if that takes asking."""
    import huggingface_hub

    folder_or_id, is_path = _expanded(folder_or_id)
    if Path(folder_or_id).exists():
        return local_copy(folder_or_id, weights=weights)
    if is_path:
        return None
    found = huggingface_hub.try_to_load_from_cache(str(folder_or_id), "config.json")
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder and (_has_all_weights(folder) if weights else has_tokenizer(folder)) else None


def _expanded(folder_or_id: str | Path) -> tuple[str, bool]:
    """A name with `~` resolved, and whether it can only be a path."""
    name = str(Path(folder_or_id).expanduser())
    return name, str(folder_or_id).startswith(("./", "../", "/", "~")) or not _HUB_ID.fullmatch(name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _has_all_weights(folder: Path) -> bool:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return all((folder / name).is_file() for name in shards)


def load_config(folder: Path, *, masked: bool = False, **changes: Any) -> Any:
    """The configuration of the causal (or masked) model in a folder whose code, if it brings any, is never run.

    Args:
        changes: fields to give other values.

    Raises: UsageError for a folder that is not a usable model of that kind.
    """
    options = {"local_files_only": True, "trust_remote_code": False, **changes}
    with _quiet():
        return _load_config(str(folder), options, masked=masked)


def load_weights(folder: Path, config: Any, *, masked: bool = False, **options: Any) -> Any:
    """The causal (or masked) model of a folder, every weight of it from the file and every weight of the file in it.

    Args:
        options: of `from_pretrained`; `device_map="meta"` compares the names and shapes alone.

    Raises: UsageError naming up to three of the weights that are missing, of another shape or too many.
    """
    with _quiet():
        options = {"local_files_only": True, "trust_remote_code": False, **options}
        model, extra = _load_weights(str(folder), config, options, masked=masked)
    if extra:
        raise UsageError(
            f"the weights of {folder} have {len(extra)} tensors that its config.json does not ask for "
            f"({_named(extra)}); the two do not belong together"
        )
    return model


def load_classifier(folder: Path, labels: Sequence[str] | None = None) -> tuple[Any, Any, list[str]]:
    """The model of a folder as a classifier in fp32, its tokenizer, and the names of weights that were drawn anew.

    Args:
        labels: make a classifier of these of any model, causal, masked or a classifier; None: it must be one.

    Raises: UsageError for a folder that is no usable model, or lacks weights of more than the classifier's own.
    """
    import torch
    from transformers import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    source, options = _locate(folder)
    options["trust_remote_code"] = False
    with _quiet():
        with _reading(source, "config.json"):
            _check_config_file(Path(source), False)
            config = AutoConfig.from_pretrained(source, **options)
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UsageError(f"{source} is of model type '{config.model_type}', which has no classifier of texts")
        if labels is None and not is_classifier(Path(source)):
            raise UsageError(f"{source} holds a {(config.architectures or ['model'])[0]}, which is no classifier")
        if not has_tokenizer(Path(source)):
            raise UsageError(f"{source} has no tokenizer; put its tokenizer.json and tokenizer_config.json there")
        with _reading(source, "the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if labels is not None:
            config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
            config.problem_type = "single_label_classification"
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id  # causal types look for the last token that is none
        with _reading(source, "the weights (model.safetensors; other formats are not opened)"):
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                source,
                config=config,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that it is we who say so, below
                output_loading_info=True,
                dtype=torch.float32,
                **options,
            )
            model, loading = loaded
            _check_tokenizer(source, model, tokenizer)
    fresh = sorted(map(str, (*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"]))))
    # A pooler stands inside of BERT's backbone, and its language models have none.
    inside = f"{model.base_model_prefix}."
    lost = [name for name in fresh if labels is None or (name.startswith(inside) and ".pooler." not in name)]
    if lost:
        raise UsageError(
            f"the weights of {source} lack {len(lost)} of the tensors that its config.json asks for, or have them in "
            f"another shape ({_named(lost)}); the two do not belong together"
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model, tokenizer, fresh


def _load_config(source: str, options: Mapping[str, Any], *, masked: bool) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    known = MODEL_FOR_MASKED_LM_MAPPING if masked else MODEL_FOR_CAUSAL_LM_MAPPING
    kind, does = ("masked", "guess masked tokens") if masked else ("causal", "write text")
    with _reading(source, "config.json"):
        if Path(source).is_dir():
            _check_config_file(Path(source), options["trust_remote_code"])
        config = AutoConfig.from_pretrained(source, **options)
        brings_code = not masked and _brings_causal_code(config, options["trust_remote_code"])
        if type(config) not in known and not brings_code:
            raise UsageError(f"{source} is of model type '{config.model_type}', which is not a {kind} language model")
        if type(config) in known and config.architectures:
            needed = getattr(known[type(config)], "__name__", "")
            if needed and needed not in config.architectures:
                raise UsageError(
                    f"{source} holds a {config.architectures[0]}, which cannot {does}; that takes a {needed}"
                )
    return config


def _load_weights(
    source: str, config: Any, options: Mapping[str, Any], *, masked: bool = False
) -> tuple[Any, list[str]]:
    """The model, and the names of tensors in its files that it has no place for (those that its type is known to
    leave behind, such as old buffers, not counted). Raises: UsageError if one of its own is missing there."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    with _reading(source, "the weights (model.safetensors; other formats are not opened)"):
        loaded: Any = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that it is we who say so, below
            output_loading_info=True,
            **options,
        )
    model, loading = loaded
    unfilled = sorted(str(key) for key in (*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])))
    if unfilled:
        raise UsageError(
            f"the weights of {source} lack {len(unfilled)} of the tensors that its config.json asks for, or have "
            f"them in another shape ({_named(unfilled)}); the two do not belong together"
        )
    return model, sorted(map(str, loading["unexpected_keys"]))


def _named(keys: Sequence[str]) -> str:
    """The first three of a list of names."""
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")


def _is_onnx(source: str) -> bool:
    """Whether a folder holds a model for ONNX Runtime, and no weights for torch."""
    from hfscratch.export import has_graph

    return Path(source).is_dir() and has_graph(source) and not any(Path(source).glob("*.safetensors"))


def _load_onnx(source: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from hfscratch.export import OnnxForCausalLM

    with _quiet(), _reading(source, "the ONNX folder"):
        model = OnnxForCausalLM.from_pretrained(source)
        return model, AutoTokenizer.from_pretrained(source, local_files_only=True)


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, str]] = "",
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
) -> Iterator[str]:
    """Yields the continuation of `prompt` piece by piece, until the model ends the text or a limit is reached.

    Args:
        prompt: the text to continue; if empty, the model begins a text of its own. Or a conversation, as messages with
            `role` and `content`, that the model answers through its tokenizer's chat template.
        max_new_tokens: the most tokens to add; fewer if the model's context is full before.
        temperature: 0 takes the likeliest token every time.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: the same seed gives the same text; None gives another one each time.

    Raises: UsageError, before anything is generated, for values that cannot be or a prompt longer than the context.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0:
        raise UsageError(f"temperature is {temperature}; it must be 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}; it must be above 0 and at most 1")
    ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else chat_ids(tokenizer, prompt)
    context = context_of(model.config)
    if context is not None and len(ids) >= context:
        raise UsageError(f"the prompt has {len(ids)} tokens, and the model reads {context} at most; shorten the prompt")
    if context is not None and len(ids) + max_new_tokens > context:
        max_new_tokens = context - len(ids)
        logger.warning("the text will stop after %d tokens, where the model's context is full", max_new_tokens)
    choice: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        choice = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return _stream(model, tokenizer, ids, seed, {"max_new_tokens": max_new_tokens, "num_beams": 1, **choice})


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's token ids, behind the beginning-of-text token where the tokenizer has one.

    Raises: UsageError for an empty prompt if the tokenizer has no token to begin a text with, or a prompt with bytes
    that are no text.
    """
    _require_text(prompt)
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] if prompt else []
    begin = tokenizer.bos_token_id
    if begin is None and not ids:
        begin = tokenizer.eos_token_id
        if begin is None:
            raise UsageError("the tokenizer has no token that begins a text, so the prompt must not be empty")
    if begin is not None and ids[:1] != [begin]:
        ids = [begin, *ids]
    return ids


def _require_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python's stand-ins for bytes that it could not decode, which no file holds
        raise UsageError(
            f"the prompt is not valid UTF-8: its character {error.start + 1} is {prompt[error.start]!r}; "
            "give it as UTF-8 text"
        ) from None


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """A conversation's token ids through the tokenizer's chat template, up to where the model's answer begins.

    Raises: UsageError if the tokenizer has no chat template, or its template refuses the conversation.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise UsageError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; `hfscratch finetune` "
            "with task sft gives it one and teaches the model to answer"
        )
    for message in messages:
        _require_text(message["content"])
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise UsageError(f"the model's chat template refuses a conversation of {roles}: {error}") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def context_of(config: Any) -> int | None:
    """The most tokens that a model of this configuration reads at once, or None if it sets no limit."""
    config = config.get_text_config()
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in POSITIONS_BEHIND_PADDING and config.pad_token_id is not None:
        return positions - config.pad_token_id - 1
    return positions


def _stream(model: Any, tokenizer: Any, ids: list[int], seed: int | None, settings: dict[str, Any]) -> Iterator[str]:
    """Runs `generate` in a thread; its errors are raised here, and leaving the iterator early stops it."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, set_seed

    class Abandoned(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), abandoned.is_set(), device=input_ids.device, dtype=torch.bool)

    inputs = torch.tensor([ids], device=model.device)  # (1, prompt)
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    ends = _end_token_ids(model, tokenizer)
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), ids[0])
    abandoned = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            if seed is not None:
                set_seed(seed)
            model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([Abandoned()]),
                eos_token_id=ends or None,
                pad_token_id=pad,
                **settings,
            )
        except BaseException as error:  # handed to the reader, who would otherwise wait for ever
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        abandoned.set()
        thread.join()
    if failures:
        raise failures[0]


def _end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a text, by the model's generation settings and by the tokenizer."""
    ends = model.generation_config.eos_token_id
    found = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return sorted(token for token in found if token is not None)


def _locate(folder_or_id: str | Path) -> tuple[str, dict[str, Any]]:
    """Where to load from, and the options for it."""
    path = Path(folder_or_id)
    if path.is_dir():
        if not (path / "config.json").is_file():
            # A run folder, or the artifact of its export.
            inside = (path / name for name in ("pretrain", "finetune/merged", "export/hf", "hf", "export/onnx", "onnx"))
            path = next((folder for folder in inside if (folder / "config.json").is_file()), path)
        if (path / "adapter_config.json").is_file():
            raise UsageError(f"{path} holds an adapter, not a whole model; give the merged model (finetune/merged)")
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} is not a model folder: it has no config.json")
        return str(path), {"local_files_only": True}
    if path.exists():
        raise UsageError(f"{path} is a file; give the folder that holds the model")
    if not _HUB_ID.fullmatch(str(folder_or_id)):
        raise UsageError(f"there is no model folder at {folder_or_id}")
    return str(folder_or_id), {"local_files_only": not _hub_has(str(folder_or_id))}


def _hub_has(name: str) -> bool:
    """True if the Hub has the model, False if the Hub is out of reach but the model is in the local cache.

    Asked once and without retries, because loading would try six times over half a minute.

    Raises: UsageError if the Hub does not have it (or not for us); MachineError if nobody can say.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        huggingface_hub.model_info(name, timeout=HUB_TIMEOUT_S)
    except HFValidationError:
        raise UsageError(f"there is no model folder at {name}, and that cannot be a name on the Hub") from None
    except GatedRepoError:
        raise UsageError(f"{name} on the Hub asks for permission; request it there, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UsageError(f"there is no folder {name} here and no public model of that name on the Hub") from None
    except Exception as error:  # whatever the network layer raises: no route, no name, timeout, proxy, offline mode
        if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            logger.warning("the Hub cannot be reached; using the copy of %s in the local cache", name)
            return False
        raise MachineError(
            f"there is no folder {name} here, and the Hub cannot be reached to look for a model of that name"
        ) from error
    return True


def _check_config_file(folder: Path, trust_remote_code: bool) -> None:
    """What transformers would say at length, or ask on the terminal. Raises: UsageError."""
    from transformers import CONFIG_MAPPING, __version__

    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(model_type, str):
        raise UsageError(f"{folder}/config.json names no model_type, so it is not the config of a model")
    if model_type in CONFIG_MAPPING:
        return
    if not values.get("auto_map"):
        raise UsageError(f"{folder} is of model type '{model_type}', which transformers {__version__} does not know")
    if not trust_remote_code:
        raise UsageError(
            f"{folder} needs its own Python code to run (model type '{model_type}'); read that code, and pass "
            "--trust-remote-code if you trust it"
        )


def _brings_causal_code(config: Any, trust_remote_code: bool) -> bool:
    return trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _check_tokenizer(source: str, model: Any, tokenizer: Any) -> None:
    """Raises: UsageError if it is not the model's, or has a limit that is no number."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= highest < rows:
        raise UsageError(
            f"the tokenizer of {source} has ids up to {highest} and the model has {rows} embeddings; "
            "they do not belong together"
        )
    limit = tokenizer.model_max_length
    if not isinstance(limit, int | float):
        raise UsageError(f"{source}/tokenizer_config.json: model_max_length is {limit!r}; it must be a number")


def _special_ids_alone(source: str, settings: Any) -> Any:
    """Generation settings with the folder's special ids and nothing else of it.

    A repetition penalty or a minimum probability of the folder's would make what we say of `temperature` and `top_p`
    untrue. Raises: UsageError for ids that are none.
    """
    from transformers import GenerationConfig

    ids = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        if value is not None and not all(isinstance(each, int) for each in (value if type(value) is list else [value])):
            raise UsageError(f"{source}: {name} is {value!r}; it must be a token id, or a list of them")
    return GenerationConfig(**ids)


def _write_one_token(source: str, model: Any) -> None:
    """Tries what loading does not: values that are read by the first forward pass only. Raises: UsageError for NaN."""
    import torch

    output = model.generate(
        torch.zeros((1, 1), dtype=torch.long, device=model.device),
        attention_mask=torch.ones((1, 1), dtype=torch.long, device=model.device),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    _require_numbers(source, output.logits[0])


def _read_one_token(source: str, model: Any) -> None:
    """The same of a masked model."""
    import torch

    with torch.no_grad():
        _require_numbers(source, model(torch.zeros((1, 1), dtype=torch.long, device=model.device)).logits)


def _require_numbers(source: str, logits: Any) -> None:
    if logits.isnan().any():
        raise UsageError(f"{source} computes no numbers (NaN): its weights are damaged, or its training diverged")


@contextlib.contextmanager
def _reading(source: str, what: str) -> Iterator[None]:
    """Turns what the libraries raise at a damaged or incomplete folder into one sentence.

    Every `Exception` is meant: with fuzzed files there is hardly a kind that they do not raise.
    """
    import torch

    try:
        yield
    except (HfscratchError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise MachineError(f"{source} needs a library that is missing: {_first_line(error)}") from error
    except Exception as error:
        if "trust_remote_code=True" in str(error):
            raise UsageError(
                f"{source} needs its own Python code to run; read that code, and pass --trust-remote-code if you trust "
                "it"
            ) from error
        raise UsageError(f"{source}: {what} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The telling part of a message: its first line, or the second if the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        return f"{type(error).__name__} {error}"
    return lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' own reports and bars off the terminal while a model loads."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
