"""Opens a SentencePiece `.model` file (Unigram or BPE) as a fast tokenizer that gives the same ids.

Not covered: models of words or characters, and those that write the space behind a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfscratch.errors import MachineError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
"""What SentencePiece writes a space as."""
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNREACHABLE = -1e4
"""The log-probability of entries that no text may become: the library would take "<s>" in a text for the token."""


def find(place: Path) -> Path | None:
    """The `.model` file at a path: itself, or the only tokenizer file of a folder."""
    if place.is_file():
        return place
    if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "config.json")):
        return None
    found = sorted(place.glob("*.model"))
    return found[0] if len(found) == 1 else None


def open_model(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a `.model` file, its ids untouched. Raises: UsageError if it is none, or of another kind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    proto = _read(path)
    trained, normalizing = proto.trainer_spec, proto.normalizer_spec
    if trained.model_type not in (UNIGRAM, BPE) or trained.treat_whitespace_as_suffix:
        raise UsageError(f"{path} is a SentencePiece model of a kind that is not read; it must be of Unigram or BPE")
    pieces = [piece.piece for piece in proto.pieces]
    unknown = next((number for number, piece in enumerate(proto.pieces) if piece.type == UNKNOWN), None)
    if unknown is None:
        raise UsageError(f"{path} has no piece for what is unknown, which SentencePiece models have; it is damaged")
    if trained.model_type == UNIGRAM:
        scored = [
            (each.piece, each.score if each.type in (NORMAL, USER_DEFINED) else UNREACHABLE) for each in proto.pieces
        ]
        backend = Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=trained.byte_fallback))
    else:
        backend = Tokenizer(
            models.BPE(
                {piece: number for number, piece in enumerate(pieces)},
                _merges(proto),
                unk_token=pieces[unknown],
                fuse_unk=True,
                byte_fallback=trained.byte_fallback,
            )
        )
    steps: list[Any] = []
    if normalizing.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizing.precompiled_charsmap))
    if normalizing.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(_regex(" {2,}"), " ")]
    if normalizing.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if normalizing.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    if all(SPACE not in piece[1:] for piece in pieces):  # so cutting before each space changes nothing, and is faster
        backend.pre_tokenizer = pre_tokenizers.Split(SPACE, behavior="merged_with_next")
    joined = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*joined, *([decoders.Strip(" ", 1, 0)] if normalizing.add_dummy_prefix else [])]
    )
    backend.add_tokens(
        [
            AddedToken(each.piece, normalized=False, special=each.type in (CONTROL, UNKNOWN))
            for each in proto.pieces
            if each.type in (CONTROL, USER_DEFINED, UNKNOWN)
        ]
    )
    names = {"unk_token": pieces[unknown]}
    for role in ("bos", "eos", "pad"):
        number = getattr(trained, f"{role}_id")
        if 0 <= number < len(pieces) and proto.pieces[number].type == CONTROL:
            names[f"{role}_token"] = pieces[number]
    if begin := names.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, padding_side="left", **names
    )


def _read(path: Path) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise MachineError(
            f"{path} is a SentencePiece model, which needs: pip install 'hfscratch[sentencepiece]'"
        ) from None
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    except DecodeError:
        raise UsageError(f"{path} is no SentencePiece model") from None
    if not proto.pieces:
        raise UsageError(f"{path} is no SentencePiece model")
    return proto


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the likeliest piece first, which is the order that SentencePiece merges
    in."""
    scores = {each.piece: each.score for each in proto.pieces if each.type == NORMAL}
    order = {each.piece: number for number, each in enumerate(proto.pieces)}
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, order[left], order[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _regex(text: str) -> Any:
    from tokenizers import Regex

    return Regex(text)
