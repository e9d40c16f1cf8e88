"""The chat template as it is trained and exported: one text that gives the trained prompt in every runtime.

Runtimes render a template with values of their own: llama.cpp sends `enable_thinking` as true, today's date and the
begin token of its file, vLLM what the request says. Everything that a template reads besides the conversation is
therefore set in front of it to the value of the training, which a default cannot do. The system prompt of a template
without a system role, and the text by which a reply is opened, are in the template too.
"""

import re
from collections.abc import Mapping
from datetime import date
from functools import lru_cache

from jinja2 import meta
from jinja2.exceptions import TemplateError

from persona.errors import UsageError

# Switches by which templates leave out the thinking block
NO_THINKING = {"enable_thinking": False, "thinking": False}
Sent = Mapping[str, bool | str]
# Nothing, thinking on, and thinking off, as runtimes send it; each has to give the trained prompt
SENT: tuple[Sent, ...] = ({}, {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}, NO_THINKING)
# The conversation and what is asked of it; everything else that a template reads is a switch
_CONVERSATION = {"messages", "add_generation_prompt", "tools", "documents"}
_UNDEFINED = "undefined"  # a name that nobody gives, in front of which `is defined` is false
_NOW = re.compile(r"\bstrftime_now\s*\(\s*(['\"])(.*?)\1\s*\)")
_FOLD = (
    "{%- if messages[0]['role'] == 'system' and messages | length > 1 and messages[1]['role'] == 'user' %}"
    "{%- set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}] "
    "+ messages[2:] %}{%- endif %}\n"
)


def freeze_date(template: str, day: date) -> str:
    """`template` with calls of `strftime_now` replaced by `day`, so that training, chat and export agree.

    Raises `UsageError` for a call whose form is computed.
    """
    frozen = _NOW.sub(lambda match: repr(day.strftime(match[2])), template)
    if _calls_now(frozen):
        raise UsageError(
            "The chat template writes today's date in a form that it computes, so no two days have the same prompt. "
            "Write the date as text in a copy of the template, and name it as model.chat_template."
        )
    return frozen


def _calls_now(template: str) -> bool:
    return re.search(r"\bstrftime_now\s*\(", template) is not None


@lru_cache(64)
def switches(template: str) -> frozenset[str]:
    """The names that `template` reads besides the conversation; empty for one that is fixed."""
    from transformers.utils.chat_template_utils import _compile_jinja_template  # heavy

    try:
        tree = _compile_jinja_template(template).environment.parse(template)
    except TemplateError as error:
        raise UsageError(f"The chat template refuses every conversation: {error}") from None
    return frozenset(meta.find_undeclared_variables(tree) - _CONVERSATION - {_UNDEFINED})


def fixed(template: str, special_tokens: Mapping[str, str]) -> str:
    """`template` with everything that it reads besides the conversation set to its value in training.

    Thinking is off, `special_tokens` (such as `bos_token`) are the tokenizer's, and all else is undefined.
    """
    values = {name: _quoted(text) for name, text in special_tokens.items()}
    values |= {name: str(value).lower() for name, value in NO_THINKING.items()}
    names = switches(template)
    if "strftime_now" in template and not _calls_now(template) and "set strftime_now" not in template:
        values["strftime_now"] = "true"  # some ask whether it is there; its dates are frozen
        names |= {"strftime_now"}
    return "".join(f"{{%- set {name} = {values.get(name, _UNDEFINED)} %}}\n" for name in sorted(names)) + template


def with_system_folded(template: str) -> str:
    """`template`, which has no system role, with the system prompt in front of the first user message."""
    return _FOLD + template


def with_opening(template: str, opening: str) -> str:
    """`template` with `opening` written behind its generation prompt."""
    body = template.removesuffix("\n")  # which Jinja drops at the end of a template
    return f"{body}{{{{ {_quoted(opening)} if add_generation_prompt else '' }}}}"


def _quoted(text: str) -> str:
    """`text` as a string of Jinja; quoted so that the tokens in it stay readable for programs that look for them."""
    for character, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escaped)
    return f"'{text}'"
