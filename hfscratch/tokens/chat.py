"""The chat template that a tokenizer without one of its own is given.

It adds no token: roles are written out, and the tokenizer's own end-of-text token ends each answer. The answer, that
token included, stands between generation markers, so that training knows what to learn. transformers 4.57 and 5 both
read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hfscratch.errors import UsageError

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '### Assistant:\\n' -}}
{%- generation -%}{{- message['content'] | trim + eos_token -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '### ' + message['role'] | capitalize + ':\\n' + message['content'] | trim + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}
"""


def set_chat_template(tokenizer: Any, path: Path | None = None, key: str = "finetune.chat_template") -> None:
    """Gives the tokenizer the template at `path`, which `key` of the recipe names; without one, ours if it has none.

    Raises: UsageError if the file cannot be read, or the tokenizer has no token to end an answer with.
    """
    if path is not None:
        tokenizer.chat_template = read_template(path, key)
    elif tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise UsageError("the tokenizer has no end-of-text token, so an answer could not be ended; set one in it")
        template = CHAT_TEMPLATE if tokenizer.bos_token else CHAT_TEMPLATE.replace("{{- bos_token -}}\n", "")
        tokenizer.chat_template = template


def read_template(path: Path, key: str) -> str:
    """The text of a template. Raises: UsageError if it cannot be read or is not Jinja."""
    import jinja2

    try:
        text = path.expanduser().read_text(encoding="utf-8")
        # The statement that marks answers is transformers' own, and means nothing to the parser.
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{key}: {path} cannot be read: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"{key}: {path}:{error.lineno}: {error.message}") from None
    return text


def unknown_tokens(template: str, special_tokens: Iterable[str]) -> list[str]:
    """What a template writes in the form of a special token (<|…|>) that is none of these."""
    return sorted(set(re.findall(r"<\|[^|<>{}\s]+\|>", template)) - set(special_tokens))
