"""The prompt that a runtime makes of an exported file is the trained one: llama.cpp's own server, and real templates.

llama.cpp's server comes with the wheel xllamacpp; it runs in a process of its own. The real templates are those of
llama.cpp's source, in the folder that LLAMA_CPP names; they are read there and never copied.
"""

import os
import re
from datetime import date
from pathlib import Path

import pytest
from making import toy_converter
from making.tiny import FAMILIES, TEMPLATES, save_model, tokenizer

from persona.errors import UsageError, VerificationFailed
from persona.export import runtime
from persona.export.gguf_check import check_served
from persona.merge.verify import trained_prompts
from persona.model.render import Untrainable, chat_format, prompt_ids
from persona.model.template import NO_THINKING, freeze_date

WHEEL = pytest.mark.skipif(not runtime.is_there(), reason="needs llama.cpp's runtime: pip install xllamacpp")
TALK = [
    {"role": "system", "content": "You are Tamsin, keeper of the lighthouse.\n\n莫言秋。"},
    {"role": "user", "content": "Who goes there?"},
    {"role": "assistant", "content": "Only me."},
    {"role": "user", "content": "  And the fog? 雾来了。"},
]


# Qwen3's way of thinking, which llama.cpp recognises and then switches on: a field for the thought, kept in replies
# behind the last question
THINKING = """
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set words, thought = message.content, '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in words %}
            {%- set thought = words.split('</think>')[0].split('<think>')[-1] %}
            {%- set words = words.split('</think>')[-1] %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- words.lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def spoken(name):
    """The tokenizer of a family, of the kind that the toy converter writes."""
    template = THINKING if name == "qwen3" else TEMPLATES[name]
    return tokenizer(template=template, **{**FAMILIES[name], "kind": "bpe"})


def exported(folder, fmt, template):
    """A tiny Qwen3 with the tokenizer of `fmt` and `template`, as a GGUF file."""
    model = save_model(folder / "a model", "qwen3", fmt.tokenizer, "float16")
    (model / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")
    toy_converter.convert_model(model, folder / "模型.gguf", "f16", "tiny")
    return folder / "模型.gguf"


@WHEEL
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "deepseek_r1"])
def test_llama_cpp_makes_the_trained_prompt_of_a_tiny_qwen3(name, tmp_path):
    """With default arguments; the base's own template shows that the comparison can fail."""
    own, fmt = spoken(name), chat_format(spoken(name))
    talks = [TALK, TALK[1:], TALK[:2]]
    ids = [prompt_ids(talk, fmt) for talk in talks]
    requests = [{"messages": talk} for talk in talks]
    assert runtime.served(exported(tmp_path, fmt, fmt.tokenizer.chat_template), requests) == ids
    path = exported(tmp_path, fmt, own.chat_template)
    assert runtime.served(path, requests) != ids
    with pytest.raises(VerificationFailed, match=r"nothing was kept: llama\.cpp writes a conversation of .*user with"):
        check_served(path, fmt)


@WHEEL
def test_a_file_that_llama_cpp_cannot_load_is_a_note(tmp_path):
    fmt = chat_format(spoken("qwen3"))
    path = exported(tmp_path, fmt, fmt.tokenizer.chat_template)
    path.write_bytes(path.read_bytes()[:3000])
    (note,) = check_served(path, fmt)
    assert "was not asked which prompt it makes of this file: llama.cpp could not load it" in note


def test_a_runtime_that_does_not_answer_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "is_there", lambda: True)
    monkeypatch.setattr(runtime, "_SECONDS", 0.01)
    (note,) = check_served(tmp_path / "m.gguf", chat_format(spoken("qwen3")))
    assert note.endswith("which prompt it makes of this file: llama.cpp did not answer within 0 minutes")


def test_without_the_wheel_the_way_to_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "is_there", lambda: False)
    (note,) = check_served(tmp_path / "m.gguf", chat_format(spoken("qwen3")))
    assert "pip install xllamacpp" in note


# --- the real templates ----------------------------------------------------------------------------------------------

# What looks like a token in a template, since the tokenizers of these models are not here
_TOKEN = re.compile(
    r"<\|[^|<>\s'\"{}]+\|>|<｜[^｜<>\s'\"{}]+｜>|</?[a-z_:]+>|<SPECIAL_\d+>|\[/?[A-Z_]+\]|<[a-z_]+\|>|<\|[a-z_]+>"
    r"|\]~!?b\[|\[e~\["
)
# Those that cannot render a conversation without tools, or read a value that is not given
_REFUSED = {
    *("CohereForAI-c4ai-command-r-plus-tool_use", "fireworks-ai-llama-3-firefunction-v2"),
    *("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use"),
}


def real(template):
    special = [*sorted(set(_TOKEN.findall(template))), "<|bos|>", "<|eos|>"]
    kinds = {True: [token for token in special if "think" in token]}
    plain = [token for token in special if token not in kinds[True]]
    frozen = freeze_date(template, date(2026, 3, 5))
    return tokenizer(plain, frozen, eos="<|eos|>", bos="<|bos|>", added=kinds[True])


def outcome(template, folder):
    """Whether `template` is `right` in every runtime that is here, `refused`, or where it is wrong."""
    try:
        own, fmt = real(template), chat_format(real(template))
    except UsageError as error:
        return "refused" if str(error).startswith("The chat template refuses") else str(error)
    for talk in (TALK[:2], TALK[1:2], TALK, TALK[1:]):
        try:
            trained = prompt_ids(talk, fmt)
        except Untrainable:
            continue
        if talk[0]["role"] == "user":  # nothing is folded: the base's own text without thinking, and the opening
            text = own.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **NO_THINKING)
            if not fmt.tokenizer.decode(trained).startswith(text):
                return "not the base's own text"
    for messages, sent, trained in trained_prompts(fmt):
        text = fmt.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **sent)
        if fmt.tokenizer.encode(text, add_special_tokens=False) != trained:
            return f"another prompt with {sent}"
    if runtime.is_there():
        try:
            notes = check_served(exported(folder, fmt, fmt.tokenizer.chat_template), fmt)
            return " ".join(notes) or "right"
        except VerificationFailed as error:
            return str(error)
    return "right"


@pytest.mark.slow
def test_every_real_template_gives_the_trained_prompt_or_is_refused(tmp_path):
    source = os.environ.get("LLAMA_CPP")
    if not source:
        pytest.skip("needs llama.cpp's source: set LLAMA_CPP to its folder")
    paths = sorted((Path(source) / "models" / "templates").glob("*.jinja"))
    outcomes = {path.stem: outcome(path.read_text(encoding="utf-8"), tmp_path) for path in paths}
    assert len(outcomes) >= 60
    print({kind: list(outcomes.values()).count(kind) for kind in ("right", "refused")})
    assert {name: what for name, what in outcomes.items() if what != "right"} == dict.fromkeys(_REFUSED, "refused")
