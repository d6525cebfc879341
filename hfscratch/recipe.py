"""Reads a recipe: one YAML file, plus `key=value` overrides, into frozen dataclasses, strictly.

It knows no stage: `load` receives `{section name: dataclass}` from above. Every error names the file and line (or
the override), the key, the value got and what to do. An unknown key names the nearest known one.

A section dataclass may have one *open* field, made with `open_field(names, refused)`: it collects keys that belong to
somebody else (the fields of `TrainingArguments`, of a model's config), under their own names.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from hfscratch.errors import UsageError

TOP_LEVEL = {
    "name": "what the model is called",
    "out": "the folder under which every artifact lives",
    "seed": "the seed of everything that is random",
}
SHIPPED = Path(__file__).parent / "recipes"
_CHECKOUT = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, resolved: every value checked, every default filled in.

    `sections` has only the sections that the file (or an override) names.
    """

    name: str
    out: Path
    seed: int
    sections: Mapping[str, Any]
    source: str

    def section(self, name: str) -> Any:
        """The section called `name`. Raises: UsageError if the recipe has none."""
        if name not in self.sections:
            raise UsageError(
                f"{self.source} has no section '{name}', which this stage needs; add it, or write {name}={{}} "
                "behind the recipe to take every default"
            )
        return self.sections[name]


def open_field(names: Callable[[Any], Mapping[str, str]], refused: Mapping[str, str] | None = None) -> Any:
    """A dataclass field that collects keys of a foreign vocabulary.

    Args:
        names: given the section's other values, returns `{allowed key: type annotation as text}`; an annotation of
            "Any" is not checked. It must not import torch.
        refused: `{key: reason}` for keys of that vocabulary that a recipe may not set.
    """
    return field(default_factory=dict, metadata={"names": names, "refused": refused or {}})


def shipped_recipes() -> dict[str, Path]:
    """`{name: path}` of the recipes that come with hfscratch."""
    folder = SHIPPED if SHIPPED.is_dir() else _CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name_or_path: str) -> Path:
    """The file of a recipe given by path or by a shipped recipe's name. Raises: UsageError if there is none."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    if path.is_dir():
        raise UsageError(f"{name_or_path} is a folder, not a recipe; `hfscratch init {name_or_path}` writes one for it")
    hint = _nearest(name_or_path, shipped)
    raise UsageError(f"no recipe at {name_or_path}; give a YAML file or a shipped recipe: {', '.join(shipped)}{hint}")


def load(
    name_or_path: str, sections: Mapping[str, type], overrides: Sequence[str] = (), *, model_for: str | None = None
) -> Recipe:
    """Reads a recipe and checks every value.

    Args:
        name_or_path: a YAML file, or the name of a shipped recipe.
        sections: `{section name: dataclass}` of every section that exists.
        overrides: `key=value` words; the key is a dotted path, the value is YAML.
        model_for: a section with a key `model`; a folder in place of a recipe then is that model, in a run of its own.

    Raises: UsageError, naming the line, for anything that is not as it should be.
    """
    path = Path(name_or_path)
    is_model = path.is_dir() and (name_or_path not in shipped_recipes() or (path / "config.json").is_file())
    if model_for and is_model:
        text = yaml.safe_dump({"name": path.resolve().name, model_for: {"model": name_or_path}})
    else:
        path = find(name_or_path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    root = _compose(text, str(path))
    if root is None:
        raise UsageError(f"{path} is empty; a recipe needs at least `out` and one section ({', '.join(sections)})")
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path} is not a mapping of keys to values; see recipes/README.md for an example")
    for override in overrides:
        _override(root, override)

    values = dict(_items(root, str(path), ""))
    if model_for and is_model and "out" not in values:
        raise UsageError(f"{path} is a model, and says nothing of where to write; add out=DIR")
    known = [*TOP_LEVEL, *sections]
    for key, (key_node, _) in values.items():
        if key not in known:
            raise UsageError(f"{_where(str(path), key_node)}: '{key}' is not a known key{_nearest(key, known)}")
    top: dict[str, Any] = {"name": path.stem, "seed": 0}
    for key, kind in (("name", str), ("out", str), ("seed", int)):
        if key in values:
            top[key] = _convert(values[key][1], kind, key, str(path))
    top.setdefault("out", f"runs/{top['name']}")
    if not top["name"] or "/" in top["name"]:
        raise UsageError(f"{path}: name is {top['name']!r}; it must not be empty or hold a slash")
    if not 0 <= top["seed"] < 2**32:
        raise UsageError(f"{path}: seed is {top['seed']}; it must lie between 0 and 2**32 - 1")
    built = {name: _convert(values[name][1], cls, name, str(path)) for name, cls in sections.items() if name in values}
    return Recipe(name=top["name"], out=Path(top["out"]), seed=top["seed"], sections=built, source=str(path))


def key_of(each: dataclasses.Field[Any]) -> str:
    """The recipe's key for a dataclass field: its name, less the underscore that sets a Python keyword apart."""
    return each.name.removesuffix("_")


def to_dict(value: Any) -> Any:
    """A section (or a value in it) as plain YAML types, keys of an open field at the section's own level."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain: dict[str, Any] = {}
        for each in dataclasses.fields(value):
            if "names" in each.metadata:
                plain.update(getattr(value, each.name))
            else:
                plain[key_of(each)] = to_dict(getattr(value, each.name))
        return plain
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load` reads it back to the same values."""
    plain = {"name": recipe.name, "out": str(recipe.out), "seed": recipe.seed}
    plain |= {name: to_dict(section) for name, section in recipe.sections.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """`{field: docstring}` of a section dataclass: the string literal under each field."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    body = definition.body
    docs = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = " ".join(ast.literal_eval(following.value).split())  # type: ignore[union-attr]
    return docs


def annotated_fields(source: Path, class_name: str) -> dict[str, str]:
    """`{field: annotation}` of a dataclass, read from its source file without importing it."""
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {
                item.target.id: ast.unparse(item.annotation)
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and not item.target.id.startswith("_")
                and not ast.unparse(item.annotation).startswith("ClassVar")
            }
    raise LookupError(f"{source} defines no class {class_name}")


# ---------------------------------------------------------------------------------------------------------------------
# From YAML nodes to values


def _compose(text: str, where: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _override(root: yaml.MappingNode, override: str) -> None:
    """Sets one `dotted.key=value` in the tree of nodes."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"'{override}' is not of the form key=value, for example pretrain.max_steps=50")
    value = _compose(text, override)
    if value is None:
        value = yaml.ScalarNode("tag:yaml.org,2002:null", "")
    mark = yaml.Mark(override, 0, 0, 0, None, 0)
    for node in _walk(value):
        node.start_mark = mark
    *parents, last = key.split(".")
    node = root
    for depth, name in enumerate(parents):
        child = next((v for k, v in node.value if k.value == name), None)
        if child is None or (isinstance(child, yaml.ScalarNode) and child.tag.endswith(":null")):
            node.value = [(k, v) for k, v in node.value if k.value != name]
            child = yaml.MappingNode("tag:yaml.org,2002:map", [], start_mark=mark)
            node.value.append((yaml.ScalarNode("tag:yaml.org,2002:str", name, start_mark=mark), child))
        if not isinstance(child, yaml.MappingNode):
            raise UsageError(f"{override}: {'.'.join(parents[: depth + 1])} is not a section with keys of its own")
        node = child
    node.value = [(k, v) for k, v in node.value if k.value != last]
    node.value.append((yaml.ScalarNode("tag:yaml.org,2002:str", last, start_mark=mark), value))


def _walk(node: yaml.Node) -> Iterator[yaml.Node]:
    yield node
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _walk(item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _walk(key)
            yield from _walk(value)


def _where(source: str, node: yaml.Node) -> str:
    mark = node.start_mark
    if mark is None:
        return source
    return f"'{mark.name}'" if "=" in str(mark.name) else f"{source}:{mark.line + 1}"


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _items(node: yaml.MappingNode, source: str, prefix: str) -> list[tuple[str, tuple[yaml.Node, yaml.Node]]]:
    """The `(key, (key node, value node))` pairs of a mapping, refusing duplicates."""
    seen: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key in seen:
            raise UsageError(f"{_where(source, key_node)}: {prefix}{key} is given twice")
        seen[key] = (key_node, value_node)
    return list(seen.items())


def _plain(node: yaml.Node, source: str) -> Any:
    """A node as plain Python values, as `yaml.safe_load` would give them."""
    try:
        return yaml.constructor.SafeConstructor().construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        raise UsageError(f"{_where(source, node)}: {_show(node)} is no value that YAML knows: {reason}") from None


def _convert(node: yaml.Node, kind: Any, key: str, source: str) -> Any:
    """The value of `node` as `kind`, or an error that names the key and the line."""
    where = _where(source, node)
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not types.NoneType]
        is_optional = len(options) < len(typing.get_args(kind))
        if is_optional and isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
            return None
        if len(options) == 1:
            return _convert(node, options[0], key, source)
        for option in options:
            try:
                return _convert(node, option, key, source)
            except UsageError:
                continue
        raise UsageError(f"{where}: {key} is {_show(node)}, which is not {_name(kind)}")
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _section(node, kind, key, source)
    if origin in (list, tuple):
        if not isinstance(node, yaml.SequenceNode):
            raise UsageError(f"{where}: {key} is {_show(node)}; it must be a list, as in {key}: [ … ]")
        item_kind = typing.get_args(kind)[0]
        return tuple(_convert(item, item_kind, f"{key}[{i}]", source) for i, item in enumerate(node.value))
    if origin is dict or kind is dict:
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{where}: {key} is {_show(node)}; it must be a mapping, as in {key}: {{a: 1}}")
        _, each = typing.get_args(kind) or (str, Any)
        if isinstance(each, type) and dataclasses.is_dataclass(each):
            pairs = _items(node, source, f"{key}.")
            return {name: _section(value, each, f"{key}.{name}", source) for name, (_, value) in pairs}
        return _plain(node, source)
    if not isinstance(node, yaml.ScalarNode):
        raise UsageError(f"{where}: {key} is {_show(node)}; it must be {_name(kind)}")
    value = _plain(node, source)
    if origin is Literal:
        options = list(typing.get_args(kind))
        value = node.value if isinstance(value, bool) and node.value in options else value
        if value not in options or isinstance(value, bool) != any(
            value is option for option in options if isinstance(option, bool)
        ):
            hint = _nearest(str(value), [str(option) for option in options])
            raise UsageError(f"{where}: {key} is {_show(node)}; it must be one of {', '.join(map(str, options))}{hint}")
        return value
    return _scalar(value, node, {kind}, key, where)


def _scalar(value: Any, node: yaml.ScalarNode, kinds: set[type], key: str, where: str) -> Any:
    """`value` if it is of one of `kinds`, with YAML's surprises put right or named."""
    if type(value) in kinds:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    if isinstance(value, bool) and str in kinds:
        return node.value  # `no`, `on` and the like, meant as words
    names = " or ".join(sorted(_name(kind) for kind in kinds))
    if isinstance(value, str) and kinds & {int, float}:
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            plain = str(int(number) if kinds == {int} and number.is_integer() else number)
            if "e" in plain and "." not in plain:
                plain = plain.replace("e", ".0e")  # YAML 1.1 reads no 1e-9
            raise UsageError(f"{where}: {key} is '{value}', which YAML reads as text, not as a number; write {plain}")
    raise UsageError(f"{where}: {key} is {_show(node)}; it must be {names}")


def _section(node: yaml.Node, cls: type, key: str, source: str) -> Any:
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
        node = yaml.MappingNode("tag:yaml.org,2002:map", [], start_mark=node.start_mark)
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{_where(source, node)}: {key} is {_show(node)}; it must be a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    fields = {key_of(each): each for each in dataclasses.fields(cls)}
    open_name = next((name for name, each in fields.items() if "names" in each.metadata), None)
    known = {name for name in fields if name != open_name}
    values: dict[str, Any] = {}
    rest: list[tuple[str, yaml.Node, yaml.Node]] = []
    for name, (key_node, value_node) in _items(node, source, f"{key}."):
        if name in known:
            values[name] = _convert(value_node, hints[fields[name].name], f"{key}.{name}", source)
        else:
            rest.append((name, key_node, value_node))
    if open_name is not None:
        metadata = fields[open_name].metadata
        allowed = metadata["names"](values) if rest else {}
        collected = {}
        for name, key_node, value_node in rest:
            where = _where(source, key_node)
            if name in metadata["refused"]:
                raise UsageError(f"{where}: {key}.{name} cannot be set in a recipe: {metadata['refused'][name]}")
            if name not in allowed:
                hint = _nearest(name, known | set(allowed))
                raise UsageError(f"{where}: {key}.{name} is not a known key{hint}")
            collected[name] = _foreign(value_node, allowed[name], f"{key}.{name}", source)
        values[open_name] = collected
    elif rest:
        name, key_node, _ = rest[0]
        raise UsageError(f"{_where(source, key_node)}: {key}.{name} is not a known key{_nearest(name, known)}")
    missing = [
        name
        for name, each in fields.items()
        if name not in values and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"{_where(source, node)}: {key} needs the key '{missing[0]}'")
    try:
        return cls(**{fields[name].name: value for name, value in values.items()})
    except UsageError as error:
        raise UsageError(f"{_where(source, node)}: {key}: {error}") from None


def _foreign(node: yaml.Node, annotation: str, key: str, source: str) -> Any:
    """The value of a key that belongs to somebody else, checked by the words of its annotation."""
    value = _plain(node, source)
    if "Any" in annotation or not isinstance(node, yaml.ScalarNode) or value is None:
        return value
    kinds: set[type] = {kind for kind in (int, float, str, bool) if kind.__name__ in annotation.replace("[str", "")}
    if not kinds or (str in kinds and isinstance(value, str)):
        return value
    checked = _scalar(value, node, kinds, key, _where(source, node))
    return value if isinstance(value, int) and not isinstance(checked, str) else checked  # 5 steps stay 5, not 5.0


def _name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if kind in names:
        return names[kind]
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_name(option) for option in typing.get_args(kind) if option is not types.NoneType)
    if typing.get_origin(kind) in (list, tuple):
        return "a list"
    return getattr(kind, "__name__", str(kind))


def _show(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "empty" if node.tag.endswith(":null") else f"'{node.value}'"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
