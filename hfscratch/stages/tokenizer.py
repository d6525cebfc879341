"""tokenizer: trains a tokenizer on the train split, or takes another model's, and writes every split as token ids, one
row a document.

Writes `<out>/tokenizer/` (opens in `AutoTokenizer`), `<out>/tokenizer/tokens/` (opens in `load_dataset`) and
`<out>/tokenizer/report.md`. Started again after it was killed, it goes on at the first token file that was unfinished.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfscratch import artifact
from hfscratch.artifact import Proof, Workspace
from hfscratch.errors import DataError, MachineError, UsageError
from hfscratch.recipe import Recipe, to_dict

if TYPE_CHECKING:
    from hfscratch.tokens.encoding import Counts

INPUTS = ("data",)
VERSION = 3
FILES = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
"""What is read of a tokenizer that is taken."""
REOPENED_DOCUMENTS = 50
"""Documents on which the saved tokenizer is compared with the one in memory."""
UNICODE_PROBE = (
    "Iñtërnâtiônàlizætiøn ☃ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 中文 عربى हिन्दी 👩‍👩‍👧‍👦 \u0000\u0001\x7f \r\n\t <|bos|><|eos|><|pad|> # ## ##a "
    + "".join(map(chr, range(0x20, 0x250)))
)
DEFAULTS = {"kind": "bpe", "vocab_size": 4096, "pre_tokenizer": "gpt2", "sample_bytes": 200_000_000}
"""Of what says how a tokenizer is trained."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """How text becomes tokens."""

    from_: str | None = None
    """Take this tokenizer instead of training one: a model's folder, a name on the Hub or a SentencePiece .model file.
    Its ids stay as they are. Where it has no token to begin, to end or to pad a text with, another of its special
    tokens does that too."""

    kind: Literal["bpe", "unigram", "wordpiece", "byte", "character", "word"] | None = None
    """The algorithm; bpe if not given. bpe, unigram, wordpiece and byte have the bytes for their alphabet and encode
    any text without loss; character and word have one token for all that they do not know."""

    vocab_size: int | None = None
    """Entries of the vocabulary, alphabet and special tokens included; 4096 if not given. Small corpora want small
    ones. Of characters and words it is the most, of bytes it follows."""

    pre_tokenizer: Literal["gpt2", "prose", "code"] | None = None
    """Where text is cut before it becomes tokens. gpt2, if not given: as GPT-2 cuts it. prose: words with their marks
    and contractions whole. code: the end of a line with the indentation of the next, a sign with the name behind it."""

    digits: Literal[1, 3] | None = None
    """How many digits a token may hold at most, counted from the left; null for any number."""

    sample_bytes: int | None = None
    """The tokenizer is trained on text spread evenly over the train split and its sources, up to this many bytes of
    it; 200 million if not given."""

    special_tokens: tuple[str, ...] = ()
    """Further special tokens, such as those of a chat template; what pretrain.fim_rate needs is added anyhow. No
    document becomes one by spelling it out."""

    mask: bool | None = None
    """Whether there is a token <|mask|> for what a masked model must guess; by default if pretrain.objective is mlm."""

    chat_template: str | None = None
    """A Jinja file that says how a conversation is written out; the tokenizer's own, if it has one, if not given."""

    compare_with: str | None = None
    """A tokenizer.json, or a folder with one (GPT-2's, say), beside which the report puts this tokenizer."""

    def __post_init__(self) -> None:
        if self.from_ is None:
            self._fill_in()
        else:
            for name in (*DEFAULTS, "digits"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"from is {self.from_}, a tokenizer that exists, and {name} is {getattr(self, name)}, which is "
                        "for training one; give one of them"
                    )
        own = {"<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>", "<|mask|>"}
        for position, token in enumerate(self.special_tokens):
            reason = None
            if not token or token != token.strip():
                reason = "it must have letters or signs, and no space at its ends"
            elif token in own and self.from_ is None:
                reason = "it is a special token anyhow; leave it out"
            elif token in self.special_tokens[:position]:
                reason = "it stands there twice"
            if reason:
                raise UsageError(f"special_tokens[{position}] is {token!r}; {reason}")

    def _fill_in(self) -> None:
        """Sets what says how to train one and is not given. Raises: UsageError for what cannot be."""
        from hfscratch.tokens.tokenizer import WHOLE, min_vocab_size, special_tokens

        kind = self.kind or "bpe"
        unused = [
            *(("pre_tokenizer", "digits") if kind in WHOLE else ()),
            *(("sample_bytes",) if kind == "byte" else ()),
        ]
        for name in unused:
            if getattr(self, name) is not None:
                raise UsageError(f"{name} is {getattr(self, name)}, for which kind {kind} has no use; leave it out")
        special = special_tokens(kind, mask=bool(self.mask), further=self.special_tokens)
        needed = min_vocab_size(kind, len(special))
        if kind == "byte" and self.vocab_size not in (None, needed):
            raise UsageError(
                f"vocab_size is {self.vocab_size}; the 256 bytes and {len(special)} special tokens of kind byte are "
                f"{needed}; leave it out"
            )
        for name, default in (DEFAULTS | ({"vocab_size": needed} if kind == "byte" else {})).items():
            if getattr(self, name) is None and name not in unused:
                object.__setattr__(self, name, default)
        assert self.vocab_size is not None
        if self.vocab_size < needed:
            alphabet = {"wordpiece": "the 256 bytes, once at the beginning and once within words,"}.get(
                kind, "one entry" if needed == len(special) + 1 else "the 256 bytes"
            )
            raise UsageError(
                f"vocab_size is {self.vocab_size}; {alphabet} and {len(special)} special tokens alone need {needed}"
            )
        if self.vocab_size > 2**32:
            raise UsageError(f"vocab_size is {self.vocab_size}; token ids have at most 32 bits")
        if self.sample_bytes is not None and self.sample_bytes < 1:
            raise UsageError(f"sample_bytes is {self.sample_bytes}; it must be positive")


SECTIONS = {"tokenizer": TokenizerSection}


def key_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that change the result: all, and the special tokens that the objective needs; files by their content
    (see `source_digests`)."""
    fields = to_dict(recipe.section("tokenizer"))
    del fields["chat_template"], fields["compare_with"]
    return fields | {"mask": has_mask(recipe), "special_tokens": _further(recipe)}


def has_mask(recipe: Recipe) -> bool:
    """Whether the tokenizer gets a mask token."""
    section: TokenizerSection = recipe.section("tokenizer")
    if section.mask is not None:
        return section.mask
    return getattr(recipe.sections.get("pretrain"), "objective", None) == "mlm"


def _further(recipe: Recipe) -> tuple[str, ...]:
    """Further special tokens: those of the recipe, and those that filling in middles needs."""
    from hfscratch.tokens.tokenizer import FIM_TOKENS

    given: tuple[str, ...] = recipe.section("tokenizer").special_tokens
    if not getattr(recipe.sections.get("pretrain"), "fim_rate", 0):
        return given
    return given + tuple(token for token in FIM_TOKENS if token not in given)


def source_digests(recipe: Recipe, workspace: Workspace) -> dict[str, str]:
    """The digests of the files of a tokenizer that is taken, of a chat template and of what is compared with."""
    section: TokenizerSection = recipe.section("tokenizer")
    digests = {}
    if section.from_ is not None:
        files = _files_of(section.from_)
        if files is None:  # gone since, or never there
            digests["from"] = _made_from(recipe, "from") or "missing"
        else:
            digests["from"] = artifact.digest_json({path.name: artifact.digest_file(path) for path in files})
    for name in ("chat_template", "compare_with"):
        if getattr(section, name) is None:
            continue
        path = Path(getattr(section, name)).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        digests[name] = artifact.digest_file(path) if path.is_file() else _made_from(recipe, name) or "missing"
    return digests


def _files_of(name: str) -> list[Path] | None:
    """The files of a tokenizer that is to be taken, or None if they are not here."""
    from hfscratch import serving

    place = serving.cached_copy(name, weights=False)
    if place is None:
        return None
    if place.is_file():
        return [place]
    return sorted(path for pattern in FILES for path in place.glob(pattern) if path.is_file())


def _made_from(recipe: Recipe, name: str) -> str | None:
    """The digest of the file or tokenizer that the published one was made from, if the recipe names the same."""
    manifest = artifact.read_manifest(recipe.out / "tokenizer") or {}
    is_same = manifest.get("section", {}).get(name) == _for_manifest(recipe.section("tokenizer"))[name]
    return manifest["inputs"].get(name) if is_same else None


def _for_manifest(section: TokenizerSection) -> dict[str, Any]:
    """The section, in which no file stands with its folder."""
    plain = to_dict(section)
    for name in ("chat_template", "compare_with"):
        plain[name] = plain[name] and Path(plain[name]).name
    return dict(plain)


def check(recipe: Recipe) -> None:
    """Opens what is to be taken, before any stage works; what is gone only if it may be needed."""
    import importlib.util

    from hfscratch.tokens import chat, report
    from hfscratch.tokens.tokenizer import special_tokens

    section: TokenizerSection = recipe.section("tokenizer")
    known = None
    if section.from_ is None:
        assert section.kind is not None
        if section.kind == "unigram" and importlib.util.find_spec("sentencepiece") is None:
            raise MachineError("tokenizer.kind unigram needs: pip install 'hfscratch[sentencepiece]'")
        known = special_tokens(section.kind, mask=has_mask(recipe), further=_further(recipe))
    elif _files_of(section.from_) is not None or not _made_from(recipe, "from"):
        tokenizer, _ = _open(recipe)
        known = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), *_further(recipe)]
    for name in ("chat_template", "compare_with"):
        value = getattr(section, name)
        if value is None or (not Path(value).expanduser().exists() and _made_from(recipe, name)):
            continue
        if name == "compare_with":
            report.find_compared(Path(value))
            continue
        unknown = chat.unknown_tokens(chat.read_template(Path(value), "tokenizer.chat_template"), known or [])
        if known is not None and unknown:
            raise UsageError(
                f"tokenizer.chat_template {value} writes {', '.join(unknown)}, which the tokenizer does not have; add "
                f"tokenizer.special_tokens: [{', '.join(map(repr, unknown))}]"
            )


def _open(recipe: Recipe) -> tuple[Any, list[str]]:
    """The tokenizer that the recipe takes, with what it lacks, and what was made up for it."""
    from hfscratch import serving
    from hfscratch.tokens.tokenizer import add_tokens, open_tokenizer

    section: TokenizerSection = recipe.section("tokenizer")
    assert section.from_ is not None
    place = serving.local_copy(section.from_, weights=False)
    if place.resolve().is_relative_to(recipe.out.resolve()):
        raise UsageError(
            f"tokenizer.from is {section.from_}, which this recipe writes itself (its `out` is {recipe.out}); choose "
            "another `out`"
        )
    tokenizer, notes = open_tokenizer(place)
    return tokenizer, notes + add_tokens(tokenizer, mask=has_mask(recipe), further=_further(recipe))


def run(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str]]:
    """Trains, encodes, proves, publishes."""
    from tqdm import tqdm

    from hfscratch.tokens import encoding, report
    from hfscratch.tokens.tokenizer import IN_WORDS, is_lossless, num_ids

    section: TokenizerSection = recipe.section("tokenizer")
    data = workspace.input("data")
    data_manifest = artifact.read_manifest(data)
    assert data_manifest is not None
    sizes = data_manifest["metrics"]["bytes"]
    timings: dict[str, float] = {}
    with workspace.staging() as folder:
        artifact.require_free_space(folder, 2 * sum(sizes.values()))
        working = workspace.unfinished(
            "encoding", artifact.digest_json([workspace.key, artifact.versions().get("tokenizers")])
        )
        started = time.perf_counter()
        if not (working / "tokenizer").is_dir():
            _make_tokenizer(recipe, data, sizes["train"], working)
        tokenizer, made = _kept_tokenizer(working)
        proves_round_trip = is_lossless(tokenizer)
        timings["train"] = time.perf_counter() - started

        started = time.perf_counter()
        counts: dict[str, encoding.Counts] = {}
        with tqdm(total=sum(sizes.values()), desc="encode", unit="B", unit_scale=True) as progress:
            for split in sizes:
                counts[split], found = encoding.encode_split(tokenizer, data, split, working, advance=progress.update)
                if split == "train":
                    uses = found
                if counts[split].documents == 0:
                    raise DataError(f"{data} has no documents in its {split} split")
        timings["encode"] = time.perf_counter() - started

        started = time.perf_counter()
        shutil.copytree(working / "tokenizer", folder, dirs_exist_ok=True)
        (folder / "tokens").mkdir()
        encoding.publish_files(working, folder / "tokens")
        total = encoding.Counts()
        for each in counts.values():
            total.add(each)
        proofs = [
            Proof(**made.pop("reopened")),
            _complete_proof(data, folder / "tokens", counts, data_manifest["metrics"]),
        ]
        metrics: dict[str, Any] = {
            "algorithm": IN_WORDS[section.kind] if section.kind else f"taken from {Path(str(section.from_)).name}",
            "vocab_size": num_ids(tokenizer),
            "tokens": {split: each.tokens for split, each in counts.items()},
            "bytes_per_token": {split: each.bytes / each.tokens for split, each in counts.items()},
            "by_source": {
                split: {
                    source: dict(zip(("documents", "bytes", "tokens"), numbers, strict=True))
                    for source, numbers in each.sources.items()
                }
                for split, each in counts.items()
            },
            "usage": report.usage(tokenizer, uses),
            **made,
        }
        if proves_round_trip:
            proofs += _round_trip_proofs(tokenizer, total)
        else:
            metrics["round_trip"] = {
                "documents": total.documents,
                "changed": total.changed,
                "unknown_tokens": total.unknown,
                "tokens": total.tokens,
                "example": total.example,
            }
        if section.compare_with is not None:
            metrics["compared"] = _compared(section, tokenizer, data, sizes)
        way_back = (
            f"All {total.documents:,} documents decode to the same text, and so would any other"
            if proves_round_trip
            else total.round_trip_in_words()
        )
        text = report.write_report(metrics, way_back)
        (folder / "report.md").write_text(text, encoding="utf-8")
        timings["prove"] = time.perf_counter() - started
        workspace.publish(
            folder,
            section=_for_manifest(section),
            inputs={"data": data_manifest["digest"], **source_digests(recipe, workspace)},
            proofs=proofs,
            metrics=metrics,
            timings=timings,
        )
    shutil.rmtree(working.parent, ignore_errors=True)
    return _rows(section, metrics, total)


def _make_tokenizer(recipe: Recipe, data: Path, train_bytes: int, working: Path) -> None:
    """Trains or takes the tokenizer, and keeps it in `working`, with `made.json`: what there is to tell of it."""
    from tqdm import tqdm

    from hfscratch import tokens
    from hfscratch.tokens import chat

    section: TokenizerSection = recipe.section("tokenizer")
    made: dict[str, Any] = {}
    if section.from_ is not None:
        tokenizer, notes = _open(recipe)
        names = ("bos_token", "eos_token", "pad_token")
        made["special_tokens"] = {name: getattr(tokenizer, name) for name in names} | (
            {"notes": notes} if notes else {}
        )
    else:
        assert section.kind is not None
        limit = section.sample_bytes or 0
        with tqdm(total=min(train_bytes, limit), desc="tokenizer", unit="B", unit_scale=True) as progress:
            sample = tokens.Sample(data, "train", train_bytes, limit, advance=progress.update)
            tokenizer = tokens.train_tokenizer(
                sample,
                kind=section.kind,
                vocab_size=section.vocab_size,
                pre_tokenizer=section.pre_tokenizer or "gpt2",
                digits=section.digits,
                mask=has_mask(recipe),
                further=_further(recipe),
            )
        if sample.sources:
            made["sample"] = {
                name: sum(each[name] for each in sample.sources.values()) for name in ("documents", "bytes")
            } | {"sources": sample.sources}
    if section.chat_template is not None:
        chat.set_chat_template(tokenizer, Path(section.chat_template).expanduser(), "tokenizer.chat_template")
    aside = working / "tokenizer.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    tokens.save_tokenizer(tokenizer, aside)
    made["reopened"] = dataclasses.asdict(_reopened_proof(aside, tokenizer, data))
    artifact.write_json(working / "made.json", made)
    aside.rename(working / "tokenizer")


def _kept_tokenizer(working: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(working / "tokenizer"), local_files_only=True)
    return tokenizer, json.loads((working / "made.json").read_text(encoding="utf-8"))


def _reopened_proof(folder: Path, tokenizer: Any, data: Path) -> Proof:
    """Compares the tokenizer of a folder with the one in memory on the first documents of every split."""
    from transformers import AutoTokenizer

    from hfscratch import tokens

    documents: list[str] = []
    for split in ("train", "validation", "test"):
        for _, texts in tokens.read_documents(data, split):
            documents += texts[: REOPENED_DOCUMENTS - len(documents)]
            if len(documents) == REOPENED_DOCUMENTS:
                break
    opened = AutoTokenizer.from_pretrained(str(folder))
    same = tokens.encode_documents(opened, documents) == tokens.encode_documents(tokenizer, documents)
    as_ever = opened(documents, verbose=False)["input_ids"] == tokenizer(documents, verbose=False)["input_ids"]
    return Proof(
        "the saved tokenizer opens in AutoTokenizer and gives the same ids",
        same and as_ever,
        f"{len(documents)} documents, with and without the special tokens spelt out in them",
    )


def _complete_proof(data: Path, folder: Path, counts: Mapping[str, Counts], metrics: Mapping[str, Any]) -> Proof:
    """That no document was lost or doubled, however often the stage was started again."""
    from hfscratch.tokens import encoding

    holds = all(
        encoding.holds_every_document(data, split, folder)
        and (each.documents, each.bytes) == (metrics["documents"][split], metrics["bytes"][split])
        for split, each in counts.items()
    )
    listed = ", ".join(f"{each.documents:,} of {split}" for split, each in counts.items())
    size = sum(each.bytes for each in counts.values())
    return Proof("every document stands in the tokens once", holds, f"{listed}, in order; {size:,} bytes of text")


def _round_trip_proofs(tokenizer: Any, total: Counts) -> list[Proof]:
    from hfscratch import tokens

    probe = UNICODE_PROBE + " ".join(tokenizer.all_special_tokens)
    decoded = tokenizer.decode(tokens.encode_documents(tokenizer, [probe])[0][1:-1], clean_up_tokenization_spaces=False)
    return [
        Proof(
            "every document decodes from its tokens to the same text",
            total.changed == 0,
            f"{total.documents - total.changed} of {total.documents} documents, all splits",
        ),
        Proof(
            "any Unicode text and any byte decode to themselves",
            decoded == probe and _covers_bytes(tokenizer),
            f"{len(probe)} characters of many scripts, special tokens spelt out, and all 256 bytes",
        ),
    ]


def _covers_bytes(tokenizer: Any) -> bool:
    """Whether the byte alphabet is complete, so that no byte is unknown."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = tokenizer.get_vocab()
    return all(symbol in vocabulary for symbol in ByteLevel.alphabet())


def _compared(section: TokenizerSection, tokenizer: Any, data: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The tokens that another tokenizer needs for the same held-out text, source by source."""
    from tokenizers import Tokenizer

    from hfscratch import tokens
    from hfscratch.tokens import report

    path = report.find_compared(Path(str(section.compare_with)))
    split = "validation" if "validation" in sizes else "train"
    sample = tokens.Sample(data, split, sizes[split], report.COMPARED_BYTES)
    sources = report.compare(tokenizer, path, sample)
    return {
        "with": path.parent.name if path.name == "tokenizer.json" else path.stem,
        "vocab_size": Tokenizer.from_file(str(path)).get_vocab_size(),
        "split": split,
        "sources": sources,
        "all": report.totals(sources),
    }


def _rows(section: TokenizerSection, metrics: Mapping[str, Any], total: Counts) -> list[tuple[str, str]]:
    """What the table says."""
    made = f", of {section.from_}" if section.from_ else f", {metrics['algorithm']}"
    rows = [("vocabulary", f"{metrics['vocab_size']:,} entries{made}")]
    rows += [("special tokens", note) for note in metrics.get("special_tokens", {}).get("notes", [])]
    if "round_trip" in metrics:
        rows.append(("round trip", total.round_trip_in_words()))
    for split, count in metrics["tokens"].items():
        rows.append((f"tokens, {split}", f"{count:,} ({metrics['bytes_per_token'][split]:.2f} bytes a token)"))
    if "compared" in metrics:
        other, each = metrics["compared"], metrics["compared"]["all"]
        ours, theirs = (each["bytes"] / max(1, each[name]) for name in ("ours", "theirs"))
        its = f"{theirs:.2f} with its {other['vocab_size']:,} entries"
        rows.append((f"beside {other['with']}", f"{ours:.2f} bytes a token, and {its} ({other['split']})"))
    usage = metrics["usage"]
    unused, rare = usage["unused"]["entries"] - usage["unused"]["single_bytes"], usage["undertrained"]
    rows.append(("entries", f"{unused:,} unused, {rare['entries']:,} used fewer than {rare['fewer_than']} times"))
    return rows
