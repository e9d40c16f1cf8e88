"""Text is cut and remembered without changing an id, and what stands in every prompt is encoded once."""

import re
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from making.tiny import FAMILIES, TEMPLATES, USABLE, family, tokenizer
from tokenizers import AddedToken, normalizers, pre_tokenizers

from persona.model.dataset import render_records
from persona.model.render import Untrainable, chat_format, fit, prompt_ids, render
from persona.model.token_cache import Encoder, cut_tokens
from persona.records import Record

CONTROL = sorted({text for made in FAMILIES.values() for text in [*made["special"], *made.get("added", ())]})
NASTY = (
    *CONTROL,
    *(
        "<",
        "|>",
        "<|im_",
        "im_end|>",
        "[INST",
        "/INST]",
        "</",
        "s>",
        "<｜",
        "think>",
        "▁",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
    ),
    *(
        "\r\n",
        "\u00a0",
        "\u2028",
        "\u200b",
        "\ue000",
        "\U000f0000",
        "\U000f0001",
        "e\u0301",
        "é",
        "ﬁ",
        "🌊",
        "👩‍🚀",
        "雾",
        "，",
    ),
    *(
        "Who",
        " goes",
        "there?",
        "You are",
        "'s",
        "3.14",
        "{{ 1 }}",
        "###",
        "### User:\n",
        "assistant",
        "\x00",
        "_",
        "User:",
    ),
)
TEXT = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=4)), min_size=1, max_size=8).map("".join)


@cache
def both(name):
    """The format of a family, and the same as transformers alone would have it: nothing cut, nothing taken as plain."""
    fmt = chat_format(family(name))
    return fmt, replace(fmt, typed=re.compile(""), encoder=Encoder(fmt.tokenizer, ""))


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except Untrainable as error:
        return str(error)


@pytest.mark.parametrize("name", USABLE)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(TEXT, min_size=1, max_size=6), st.none() | TEXT, st.integers(20, 400))
def test_cutting_changes_no_id_and_no_refusal(name, texts, system, limit):
    fast, slow = both(name)
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    messages = [{"role": "system", "content": system}, *turns] if system is not None else turns
    assert outcome(render, messages, fast, limit) == outcome(render, messages, slow, limit)
    asked = messages if messages[-1]["role"] == "user" else messages[:-1]
    assert outcome(prompt_ids, asked, fast) == outcome(prompt_ids, asked, slow)
    assert outcome(fit, asked, fast, limit) == outcome(fit, asked, slow, limit)
    for text in texts:
        assert fast.encoder.encode(text) == fast.tokenizer.encode(text, add_special_tokens=False)


LETTERS = ("<", ">", "|", "a", "b", "_", " ", "\n", "é")
ADDED = st.builds(
    AddedToken,
    st.lists(st.sampled_from(LETTERS), min_size=1, max_size=4).map("".join),
    single_word=st.booleans(),
    lstrip=st.booleans(),
    rstrip=st.booleans(),
    normalized=st.booleans(),
    special=st.booleans(),
)
PLAIN = st.sampled_from(["<a>", "<b>", "<|a|>", "[a]", "</a>"]).map(lambda text: AddedToken(text, normalized=False))
NORMALIZERS = (
    None,
    normalizers.NFC(),
    normalizers.Lowercase(),
    normalizers.Strip(),
    normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),  # the older files of Llama 2
)
SPLITTERS = (
    None,
    pre_tokenizers.ByteLevel(add_prefix_space=True),
    *(pre_tokenizers.Metaspace(prepend_scheme=scheme) for scheme in ("first", "always", "never")),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(PLAIN, min_size=1, max_size=3, unique_by=str),
    st.lists(ADDED, max_size=2),
    st.sampled_from(["bpe", "spm", "unk"]),
    st.sampled_from(NORMALIZERS),
    st.sampled_from(SPLITTERS),
    st.data(),
)
def test_tokens_of_every_kind_are_cut_at_only_where_it_is_exact(plain, added, kind, normalizer, splitter, data):
    loaded = tokenizer(["<s>", "</s>"], TEMPLATES["builtin"], "</s>", kind=kind)
    loaded.backend_tokenizer.add_tokens([*plain, *added])
    if normalizer is not None:
        loaded.backend_tokenizer.normalizer = normalizer
    if splitter is not None:
        loaded.backend_tokenizer.pre_tokenizer = splitter
    tokens = [token.content for token in (*plain, *added)]
    encoder = Encoder(loaded, "<s></s>" + "\x00".join(tokens))
    text = "".join(data.draw(st.lists(st.sampled_from((*tokens, *LETTERS, "<s>", "Who")), max_size=20)))
    try:
        expected = loaded.encode(text, add_special_tokens=False)
    except BaseException as error:  # tokenizers 0.23 panics on some white space between tokens that strip it
        assume(type(error).__name__ != "PanicException")
        raise
    assert encoder.encode(text) == expected


@pytest.mark.parametrize(
    ("others", "cut"),
    [
        ([], True),
        ([AddedToken("<turn>\n", normalized=False)], False),  # longer, and would win
        ([AddedToken("a<", normalized=False)], False),  # begins before, and would win
        ([AddedToken("  ", normalized=False), AddedToken("\n\n", normalized=False)], True),
    ],
)
def test_where_a_text_is_cut(others, cut):
    loaded = tokenizer(["<turn>"], TEMPLATES["no_end"], "<turn>")
    loaded.backend_tokenizer.add_tokens(others)
    assert cut_tokens(loaded, "a<turn>b") == (["<turn>"] if cut else [])
    assert cut_tokens(loaded, "nothing") == []


def test_every_template_with_tokens_is_cut_at_them():
    found = {name: cut_tokens(both(name)[0].tokenizer, TEMPLATES[name]) for name in USABLE}
    assert {name for name, tokens in found.items() if not tokens} == {"builtin", "no_end", "mistral_v1"}
    assert found["chatml_default"] == ["<|im_start|>", "<|im_end|>"]


SYSTEM = "You are Tamsin, keeper of the lighthouse. " * 20
# Where tokens stand around the system prompt
APART = ("chatml_default", "granite_date", "qwen3", "llama3", "gpt_oss", "gemma4", "deepseek_r1")


@pytest.fixture
def encoded(monkeypatch):
    """The pieces of text that the tokenizer has to encode, as they come."""
    pieces = []
    encode = Encoder._encode_piece
    monkeypatch.setattr(Encoder, "_encode_piece", lambda self, piece: pieces.append(piece) or encode(self, piece))
    return pieces


def conversation(number, turns):
    messages = [{"role": "system", "content": SYSTEM}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"What of ship {number}, on day {turn}?"})
        messages.append({"role": "assistant", "content": f"She answered {number} times on day {turn}."})
    return Record(tuple(messages))


@pytest.mark.parametrize("name", APART)
def test_the_system_prompt_is_encoded_once(encoded, name):
    fmt = chat_format(family(name))
    cost = {}
    for count in (20, 40):
        encoded.clear()
        records = [conversation(count * 1000 + number, 1) for number in range(count)]
        assert len(render_records(records, fmt, None, 100_000).conversations) == count
        assert sum(SYSTEM.strip() in piece for piece in encoded) == (1 if count == 20 else 0)
        cost[count] = sum(map(len, encoded)) - (len(SYSTEM) if count == 20 else 0)
    assert cost[40] < 2.2 * cost[20]
    assert cost[40] < 40 * 400  # of 840 characters of system prompt and about 70 of talk in each


@pytest.mark.parametrize("name", APART)
def test_a_turn_is_not_encoded_again_for_each_that_follows(encoded, name):
    fmt = chat_format(family(name))
    render_records([conversation(7, 1)], fmt, None, 100_000)
    encoded.clear()
    assert len(render_records([conversation(8, 12)], fmt, None, 100_000).examples) == 12
    for turn in range(12):
        assert sum(f"ship 8, on day {turn}?" in piece for piece in encoded) == 1
        # to be learned, behind the prompt or a line break, and as history
        assert 1 <= sum(f"times on day {turn}." in piece for piece in encoded) <= 3


def test_a_tokenizer_file_that_asks_for_truncation_is_not_followed():
    loaded = family("chatml_default")
    loaded.backend_tokenizer.enable_truncation(4)
    loaded.backend_tokenizer.enable_padding(length=50)
    text = "<|im_start|>Who goes there? " * 3
    assert Encoder(loaded, text).encode(text) == family("chatml_default").encode(text, add_special_tokens=False)
