"""Trains a tokenizer, or opens one of another model, and saves it so that transformers 5 and 4.57 both open it.

Ours normalise nothing. Those with bytes for an alphabet (BPE, Unigram, WordPiece, bytes) encode any text and decode it
to the same text; characters and words that they have no entry for are `<|unk|>` to the two others. A text is encoded as
`<|bos|>` and its tokens; a literal "<|bos|>" inside a document is text (`encode_documents` sees to it).
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hfscratch.errors import DataError, UsageError
from hfscratch.tokens import splitting
from hfscratch.tokens.splitting import PreTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, UNK, MASK = "<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>", "<|mask|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE = FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
"""What stands before the parts of a text whose middle is to be filled in; the names are Qwen2.5-Coder's."""
NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)
CONTINUATION = "##"
"""What stands before a WordPiece token that does not begin a word."""
MAX_WORDPIECE_RUN = 24
"""Letters in a row that WordPiece reads at once; a longer word is cut. With the signs, line ends and spaces that may
stay with them, and four bytes a letter, a piece has no more than `MAX_WORDPIECE_BYTES`."""
MAX_WORDPIECE_BYTES = 400
UNREACHABLE = -1e4
"""The log-probability of entries that no text may become."""

Kind = Literal["bpe", "unigram", "wordpiece", "byte", "character", "word"]
KINDS: tuple[Kind, ...] = get_args(Kind)
IN_WORDS: dict[Kind, str] = {
    "bpe": "byte-level BPE",
    "unigram": "byte-level Unigram",
    "wordpiece": "byte-level WordPiece",
    "byte": "bytes",
    "character": "characters",
    "word": "words",
}
LOSSLESS: tuple[Kind, ...] = ("bpe", "unigram", "wordpiece", "byte")
"""Kinds whose alphabet is bytes, so that no text is unknown to them."""
WHOLE: tuple[Kind, ...] = ("byte", "character")
"""Kinds that cut text as finely as can be, whatever the pre-tokenizer."""


def special_tokens(kind: Kind = "bpe", *, mask: bool = False, further: Sequence[str] = ()) -> list[str]:
    """The special tokens of a tokenizer, in the order of their ids, which are the first of the vocabulary."""
    return [*SPECIAL_TOKENS, *([] if kind in LOSSLESS else [UNK]), *([MASK] if mask else []), *further]


def min_vocab_size(kind: Kind, num_special: int) -> int:
    """The entries that a kind cannot do without: its alphabet and its special tokens."""
    alphabet = {"bpe": NUM_BYTES, "unigram": NUM_BYTES, "byte": NUM_BYTES, "wordpiece": 2 * NUM_BYTES}
    return num_special + alphabet.get(kind, 1)


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int | None,
    kind: Kind = "bpe",
    pre_tokenizer: PreTokenizer = "gpt2",
    digits: int | None = None,
    mask: bool = False,
    further: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` entries, special tokens and alphabet included; the same for the same text.

    Characters and words take as many entries as the text has, up to `vocab_size`; bytes need neither it nor any text.

    Args:
        texts: may be read twice.
        pre_tokenizer, digits: as `splitting.pattern` says.
        mask: whether it has a token for what a masked model must guess.
        further: more special tokens.

    Raises: DataError if the text has too few different words for that many entries; UsageError for a special token
    that texts would be taken for.
    """
    special = special_tokens(kind, mask=mask, further=further)
    needed = min_vocab_size(kind, len(special))
    if vocab_size is not None and vocab_size < needed:
        raise UsageError(
            f"tokenizer.vocab_size is {vocab_size}; the alphabet and {len(special)} special tokens alone need {needed}"
        )
    if kind == "byte":
        backend = _bytes(special)
    else:
        assert vocab_size is not None
        make = {"bpe": _bpe, "unigram": _unigram, "wordpiece": _wordpiece, "word": _words}
        if kind == "character":
            backend = _characters(texts, vocab_size, special)
        else:
            backend = make[kind](texts, vocab_size, special, pre_tokenizer, digits)
    return _wrap(backend, kind, mask=mask, further=further)


def _bpe(
    texts: Iterable[str], vocab_size: int, special: list[str], name: PreTokenizer, digits: int | None
) -> Tokenizer:
    """Source: Sennrich et al. 2016 (BPE); Radford et al. 2019, section 2.2 (bytes as the alphabet)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splitting.split_bytes(name, digits)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    _require_size(backend.get_vocab_size(), vocab_size)
    return backend


def _unigram(
    texts: Iterable[str], vocab_size: int, special: list[str], name: PreTokenizer, digits: int | None
) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from hfscratch.tokens import unigram

    cut = splitting.split_bytes(name, digits)
    try:
        pieces = unigram.train_pieces(
            texts, cut, num_pieces=vocab_size - len(special), alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    except unigram.TooFewPieces as error:
        _require_size(error.most + len(special), vocab_size)
        raise
    _require_size(len(pieces) + len(special), vocab_size)
    backend = Tokenizer(models.Unigram([(token, UNREACHABLE) for token in special] + pieces, None))
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    return backend


def _wordpiece(
    texts: Iterable[str], vocab_size: int, special: list[str], name: PreTokenizer, digits: int | None
) -> Tokenizer:
    """WordPiece as BERT reads it: of what is left of a word always the longest entry, `##` before all but its first.

    Unlike BERT's it has bytes for its alphabet, within words too, so that no word is unknown; and as `#` always stands
    alone, a token that begins with `##` is a continuation and no text.

    Source: Devlin et al. 2019, section 3; trained by merges, as `tokenizers` does.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(continuing_subword_prefix=CONTINUATION))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("#", behavior="isolated"),
            # Looking for the longest entry takes time that grows with the square of a word's length.
            splitting.split_bytes(name, digits, longest=MAX_WORDPIECE_RUN),
        ]
    )
    # Given beforehand, the alphabet has fixed ids; left to the trainer, they follow a hash table's order.
    letters = [*special, *alphabet, *(CONTINUATION + letter for letter in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=letters, continuing_subword_prefix=CONTINUATION, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    _require_size(trained.get_vocab_size(), vocab_size)
    backend = Tokenizer(
        models.WordPiece(
            trained.get_vocab(),
            unk_token=special[0],  # never needed, but the library asks for one
            max_input_chars_per_word=MAX_WORDPIECE_BYTES,
            continuing_subword_prefix=CONTINUATION,
        )
    )
    backend.pre_tokenizer = trained.pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace(Regex(f"^{CONTINUATION}"), ""), decoders.ByteLevel()])
    return backend


def _bytes(special: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    entries = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _characters(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    letters = sorted(counts, key=lambda letter: (-counts[letter], letter))[: vocab_size - len(special)]
    if not letters:
        raise DataError("there is no text to train a tokenizer on")
    entries = {entry: number for number, entry in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(entries, [], unk_token=UNK, fuse_unk=False))
    backend.pre_tokenizer = splitting.split_text("gpt2", None)  # for speed; no piece becomes a token whole
    backend.decoder = decoders.Fuse()
    return backend


def _words(
    texts: Iterable[str], vocab_size: int, special: list[str], name: PreTokenizer, digits: int | None
) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, trainers

    backend = Tokenizer(models.WordLevel(unk_token=UNK))
    backend.pre_tokenizer = splitting.split_text(name, digits)
    backend.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() == len(special):
        raise DataError("there is no text to train a tokenizer on")
    return backend


def _require_size(found: int, vocab_size: int) -> None:
    """Raises: DataError if the text gave fewer entries than were asked for."""
    if found < vocab_size:
        raise DataError(
            f"the training text supports a vocabulary of {found} entries, and tokenizer.vocab_size "
            f"is {vocab_size}; set it to {found} or less, or add text"
        )


def _wrap(backend: Tokenizer, kind: Kind, *, mask: bool, further: Sequence[str]) -> PreTrainedTokenizerFast:
    """A trained model as transformers knows it. Raises: UsageError for a special token that is taken from text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    special = special_tokens(kind, mask=mask, further=further)
    backend.add_special_tokens(special)
    backend.encode_special_tokens = True
    for token in further:
        for text in (token, f" {token}", f"x {token}."):
            if backend.token_to_id(token) in backend.encode(text, add_special_tokens=False).ids:
                raise UsageError(
                    f"tokenizer.special_tokens has {token!r}, which a text that spells it would be taken for; choose "
                    f"one such as <|{token.strip('<|>[] ').lower() or 'name'}|>"
                )
    backend.encode_special_tokens = False
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    if kind not in LOSSLESS:
        names["unk_token"] = UNK
    if mask:
        names["mask_token"] = MASK
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        **({"additional_special_tokens": list(further)} if further else {}),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def open_tokenizer(place: Path) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """The tokenizer of a folder or of a SentencePiece `.model` file, its ids untouched, and in words what was made up
    for the special tokens it lacks.

    A document needs a token that begins it and one that ends it. Where there is but one of the two, it does both, as
    in GPT-2. For padding, a token that no text has is preferred to one that the model must learn to predict.

    Raises: UsageError if it is none, is not of the `tokenizers` library, brings code of its own, cannot end a text or
    names special tokens that it does not have.
    """
    from transformers import AutoTokenizer

    from hfscratch.tokens import sentencepiece_model

    model_file = sentencepiece_model.find(place)
    if model_file is not None:
        tokenizer = sentencepiece_model.open_model(model_file)
    else:
        try:
            # False, and not left out: left out, transformers asks on the terminal whether to run the code.
            tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever the libraries raise at a damaged folder; tokenizers' is a plain Exception
            if "trust_remote_code=True" in str(error):
                raise UsageError(
                    f"the tokenizer of {place} needs its own Python code to run, which is not run"
                ) from error
            raise UsageError(f"{place}: the tokenizer cannot be read: {' '.join(str(error).split())}") from error
        if not tokenizer.is_fast:
            raise UsageError(
                f"the tokenizer of {place} has no tokenizer.json form ({type(tokenizer).__name__}), so it cannot "
                "encode a corpus; convert it to one"
            )
        _require_special_tokens(place, tokenizer)
    notes = []
    for name, stand_ins in (
        ("eos_token", ("sep_token", "bos_token")),
        ("bos_token", ("cls_token", "eos_token")),
        ("pad_token", ("unk_token", "eos_token")),
    ):
        if getattr(tokenizer, name) is not None:
            continue
        stand_in = next((each for each in stand_ins if getattr(tokenizer, each, None) is not None), None)
        if stand_in is None:
            raise UsageError(f"the tokenizer of {place} has no token that could end a text; give it an eos_token")
        setattr(tokenizer, name, getattr(tokenizer, stand_in))
        notes.append(f"{getattr(tokenizer, stand_in)} is its {name} too, as it has none of its own")
    return tokenizer, notes


def _require_special_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises: UsageError if a special token that the configuration names is not in the vocabulary.

    transformers gives such a token a new id in silence, one that no model has seen.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    stored = Tokenizer.from_file(str(file))
    known = set()
    for name in ("tokenizer_config.json", "added_tokens.json"):
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            added = settings.get("added_tokens_decoder", {}) if name == "tokenizer_config.json" else {}
            known |= {each["content"] for each in added.values()}
            known |= set(settings) if name == "added_tokens.json" else set()
    for role in ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "cls_token", "sep_token"):
        token = getattr(tokenizer, role, None)
        if token is not None and stored.token_to_id(token) is None and token not in known:
            raise UsageError(
                f"the tokenizer of {folder} names {token!r} as its {role}, and its vocabulary of "
                f"{stored.get_vocab_size():,} entries has no such token; put it right in tokenizer_config.json"
            )


def add_tokens(tokenizer: PreTrainedTokenizerFast, *, mask: bool, further: Sequence[str]) -> list[str]:
    """Gives a tokenizer that was taken the special tokens that it lacks, behind all its ids, and says which."""
    notes = []
    before = len(tokenizer)
    if mask and tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
        notes.append(f"{MASK} is its mask_token, id {tokenizer.mask_token_id}")
    if further:
        listed = "extra_special_tokens" if hasattr(tokenizer, "extra_special_tokens") else "additional_special_tokens"
        have = list(getattr(tokenizer, listed) or [])
        tokenizer.add_special_tokens({listed: have + [token for token in further if token not in have]})
        new = [token for token in further if tokenizer.convert_tokens_to_ids(token) >= before]
        if new:
            notes.append(f"{', '.join(new)} {'was' if len(new) == 1 else 'were'} added")
    return notes


def is_lossless(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a tokenizer, by how it is built, encodes any text and decodes it to the same: bytes are its alphabet,
    all of them, and nothing is normalised, added or stripped."""
    from tokenizers.pre_tokenizers import ByteLevel

    built = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = [built["pre_tokenizer"] or {}]
    steps += steps[0].get("pretokenizers", [])
    decoder, alphabet = built["decoder"] or {}, set(ByteLevel.alphabet())
    if built["model"]["type"] == "WordPiece":
        alphabet |= {CONTINUATION + letter for letter in alphabet}
        joined = [(each["type"], each.get("pattern")) for each in decoder.get("decoders", [])]
        decodes = joined == [("Replace", {"Regex": f"^{CONTINUATION}"}), ("ByteLevel", None)]
        decodes &= any(step.get("pattern") == {"String": "#"} for step in steps[:2])
    else:
        decodes = decoder.get("type") == "ByteLevel"
    return (
        built["normalizer"] is None
        and decodes
        and any(step.get("type") == "ByteLevel" for step in steps)
        and not any(step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in steps)
        and not any(each["lstrip"] or each["rstrip"] for each in built["added_tokens"] if not each["special"])
        and alphabet <= tokenizer.get_vocab().keys()
    )


def num_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the highest id: what a model's vocabulary must hold, which gaps make larger than the entries."""
    return max(tokenizer.get_vocab().values()) + 1


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the tokenizer's files, in the form that transformers 4.57 reads too.

    transformers 5 names the class `TokenizersBackend` and lists `extra_special_tokens`, both unknown to 4.57. A chat
    template goes into `tokenizer_config.json`: transformers.js does not look for it in a file of its own.
    """
    tokenizer.save_pretrained(str(folder), save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.pop("extra_special_tokens", None)
    if extra:
        config["additional_special_tokens"] = extra
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)  # how this process opened it, nobody else's concern
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def special_tokens_as_text(tokenizer: PreTrainedTokenizerFast) -> Iterator[Any]:
    """The tokenizer's backend, which meanwhile takes special tokens that a text spells out for text."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    if not before:  # left alone if set: another thread may be decoding, and then it cannot be set
        backend.encode_special_tokens = True
    try:
        yield backend
    finally:
        if not before:
            backend.encode_special_tokens = before


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text between those that begin and end one; special tokens spelt out in a text stay text."""
    with special_tokens_as_text(tokenizer) as backend:
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [[bos, *each.ids, eos] for each in encoded]
