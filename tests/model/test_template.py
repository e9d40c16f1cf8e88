"""A template whose switches are fixed says the same whatever a runtime sends, and what it said in training."""

from datetime import date

import pytest
from making.tiny import FAMILIES, TEMPLATES, family, tokenizer

from persona.errors import UsageError, VerificationFailed
from persona.merge.verify import check_prompts
from persona.model import render
from persona.model.render import chat_format, prompt_text
from persona.model.template import NO_THINKING, fixed, freeze_date, switches

ASKED = [{"role": "user", "content": "Who?"}]
TALK = [*ASKED, {"role": "assistant", "content": "Me."}, {"role": "user", "content": "Twice."}]
BODY = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
)
THOUGHT = "'<think>\\n\\n</think>\\n\\n'"
# Where templates read the switch, each leaving out the thought when it is false
PLACES = {
    "plainly": BODY + f"{{% if enable_thinking is false %}}{{{{ {THOUGHT} }}}}{{% endif %}}{{% endif %}}",
    "in a macro": (
        f"{{% macro thought() %}}{{% if not enable_thinking %}}{{{{ {THOUGHT} }}}}{{% endif %}}{{% endmacro %}}"
        + BODY
        + "{{ thought() }}{% endif %}"
    ),
    "in a namespace": (
        "{%- set ns = namespace(think=enable_thinking if enable_thinking is defined else true) -%}"
        + BODY
        + f"{{% if not ns.think %}}{{{{ {THOUGHT} }}}}{{% endif %}}{{% endif %}}"
    ),
    "by a default of its own": (
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
        + BODY
        + f"{{% if not enable_thinking %}}{{{{ {THOUGHT} }}}}{{% endif %}}{{% endif %}}"
    ),
    "by another name": (
        "{% if not thinking is defined %}{% set thinking = true %}{% endif %}"
        + BODY
        + f"{{% if not thinking %}}{{{{ {THOUGHT} }}}}{{% endif %}}{{% endif %}}"
    ),
    "set for a while": (
        "{% set enable_thinking = enable_thinking | default(true) %}"
        + BODY
        + f"{{{{ '' if enable_thinking else {THOUGHT} }}}}{{% endif %}}"
    ),
    "by an effort": "{{ 'effort ' + (reasoning_effort or 'none') + ' at ' + (date_string | default('noon')) }}"
    + BODY
    + f"{{{{ {THOUGHT} if not enable_thinking }}}}{{% endif %}}",
}
SENT = (
    {},
    {"enable_thinking": True, "thinking": True},
    NO_THINKING,
    {"reasoning_effort": "high", "date_string": "25 Nov 2026", "thinking": True},
)


def made(template):
    return tokenizer(template=template, **{**FAMILIES["chatml_default"], "added": ["<think>", "</think>"]})


def text(loaded, messages, **sent):
    return loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **sent)


@pytest.mark.parametrize("place", PLACES)
def test_a_switch_is_fixed_wherever_it_is_read(place):
    own, fmt = made(PLACES[place]), chat_format(made(PLACES[place]))
    for messages in (ASKED, TALK):
        trained = text(own, messages, **NO_THINKING)
        assert trained.endswith("<think>\n\n</think>\n\n")
        assert prompt_text(messages, fmt) == trained
        for sent in SENT:
            assert text(fmt.tokenizer, messages, **sent) == trained
    assert text(own, ASKED, enable_thinking=True, thinking=True) != text(own, ASKED, **NO_THINKING)
    assert switches(fmt.tokenizer.chat_template) == set()


@pytest.mark.parametrize("start", ["", "\n", "\n\n", "  ", " \n ", "{#- a licence -#}\n", "Hello\n", "{{- '' }}\n"])
def test_the_text_around_the_template_stays(start):
    template = start + "{{ bos_token }}" + PLACES["plainly"] + "\n"
    for opening in ("", "<think>"):
        body = template[:-1].removesuffix("{% endif %}") + opening + "{% endif %}\n"
        own, fmt = made(body), chat_format(made(body))
        trained = text(own, ASKED, **NO_THINKING)
        assert text(fmt.tokenizer, ASKED, enable_thinking=True).startswith(trained)
        assert text(fmt.tokenizer, ASKED, enable_thinking=True).endswith("</think>\n\n")


@pytest.mark.parametrize("token", ["it's", "a\\b", "two\nlines", "｜结束｜", '"', "{{ x }}"])
def test_special_tokens_of_any_text_are_written_as_they_are(token):
    loaded = made(fixed("{{ eos_token }}{{ messages[0]['content'] }}", {"eos_token": token}))
    assert text(loaded, ASKED, eos_token="another") == f"{token}Who?"


def test_a_date_that_is_computed_is_refused():
    with pytest.raises(UsageError, match=r"writes today's date in a form .* model\.chat_template"):
        freeze_date("{% set form = '%d' %}{{ strftime_now(form) }}", date(2026, 3, 5))


def test_a_runtime_without_dates_writes_the_day_of_training():
    asks = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}" + BODY + "{% endif %}"
    fmt = chat_format(made(freeze_date(asks, date(2026, 3, 5))))
    assert text(fmt.tokenizer, ASKED).startswith("2026")
    assert fmt.tokenizer.chat_template.startswith("{%- set strftime_now = true %}")
    assert chat_format(made(fmt.tokenizer.chat_template)).tokenizer.chat_template == fmt.tokenizer.chat_template


def test_a_switch_that_cannot_be_fixed_is_refused(monkeypatch):
    monkeypatch.setattr(render, "fixed", lambda template, special: template)
    with pytest.raises(UsageError, match="reads a switch in a way that cannot be fixed"):
        chat_format(made(PLACES["plainly"]))


def test_a_conversation_begun_by_the_character_is_not_folded_into_her_words():
    fmt = chat_format(family("gemma2"))
    greeted = [{"role": "system", "content": "S"}, {"role": "assistant", "content": "Aye?"}, *ASKED]
    with pytest.raises(UsageError, match="System role not supported"):
        prompt_text(greeted, fmt)


@pytest.mark.parametrize("name", ["qwen3", "gemma4", "gpt_oss"])
def test_a_template_of_the_base_does_not_pass_for_the_trained_one(name):
    own, fmt = family(name), chat_format(family(name))
    check_prompts(fmt.tokenizer, fmt.tokenizer.chat_template, fmt)
    with pytest.raises(VerificationFailed, match="transformers writes a conversation of user with"):
        check_prompts(own, TEMPLATES[name], fmt)
