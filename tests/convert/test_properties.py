"""Any bytes in: records out, or an error of ours, thousands of times; and converting again changes nothing."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making.converting import convert_data

from persona.convert.report import describe
from persona.errors import DataError, UsageError

MANY = settings(max_examples=1800, deadline=None, suppress_health_check=list(HealthCheck))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["human", "gpt", "</s>", "A", "2024-01-01T10:00:00", "chara_card_v2", "\ud800"])
)
NAMES = """conversations messages from value role content text system instruction input output history meta tools weight
speaker source_title question answer query response chat_history role_A is_user mes swipes swipe_id user_name type split
character_name spec data name description first_mes mes_example character_book entries keys mapping current_node message
author parts parent children timestamp isBot date IsSender StrContent CreateTime Type talker isSelf time dialogue train
test group"""
KEYS = st.sampled_from(NAMES.split()) | st.text(max_size=3)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=8), max_leaves=30
)
TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "tool"]), "value": LEAVES})
ROW = st.fixed_dictionaries({"conversations": st.lists(TURN, max_size=5)}, optional={"system": LEAVES, "meta": TREES})
LINE = st.tuples(
    st.sampled_from(
        [
            "A",
            "B",
            "名",
            "第一幕",
            "SCENE I",
            "Come",
            "",
            "(x)",
            "2017-02-25 10:40:20 A(12345)",
            "[31/12/23, 23:59:59] A",
            "旁白",
        ]
    ),
    st.sampled_from([":", "：", ": ", "", "（a）：", ","]),
    st.text(max_size=12) | st.sampled_from(["「好」", "<|x|>", "a: b", "", "question,answer", "[图片]"]),
).map("".join)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "characters": st.sampled_from([("A",), ("B", "名"), ("我",)]),
        "user_name": st.just("U"),
        "lenient": st.booleans(),
        "redact": st.booleans(),
        "fix_text": st.booleans(),
        "tools": st.sampled_from(["reject", "drop"]),
        "leading_assistant": st.sampled_from(["drop", "keep"]),
        "narration": st.sampled_from(["drop", "system", "brackets"]),
        "flat": st.booleans(),
        "strip_speaker": st.booleans(),
        "allow_empty_user": st.booleans(),
        "min_chars": st.integers(0, 3),
        "max_chars": st.integers(1, 20),
        "too_long": st.sampled_from(["reject", "truncate", "split"]),
        "lore_weight": st.sampled_from([1, 2.5, 5]),
        "context_turns": st.integers(1, 3),
        "max_exchanges": st.integers(1, 3),
        "val_ratio": st.sampled_from([0, 0.1, 0.5]),
    },
)


def tokenizer():
    return "characters", lambda text: [(place, place + 1) for place in range(len(text))]


def survives(data, options):
    try:
        conversion = convert_data(data, "x", tokenizer=tokenizer, chunk_tokens=(20, 60), **options)
    except (DataError, UsageError):
        return
    report = conversion.report
    assert report["read"] == report["written"] + report["rejected"] + report["duplicates"]
    if speeches := report["speeches"]:
        assert speeches["total"] == speeches["learned"] + speeches["context"] + sum(speeches["not_used"].values())
    describe(conversion.outcome, conversion.shown)
    if conversion.train:
        text = b"".join(record.encoded() + b"\n" for record in conversion.train)
        again = convert_data(text, "y", val_ratio=0)
        assert b"".join(record.encoded() + b"\n" for record in again.train) == text


@pytest.mark.slow
@MANY
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")), OPTIONS)
def test_any_bytes(data, options):
    survives(data, options)


@pytest.mark.slow
@MANY
@given(st.lists(TREES | ROW, max_size=5), st.sampled_from(["lines", "array", "pretty", "cut", "first"]), OPTIONS)
def test_any_json(values, layout, options):
    text = {
        "lines": "\n".join(json.dumps(value) for value in values),
        "array": json.dumps(values),
        "pretty": json.dumps(values, indent=1),
        "cut": json.dumps(values)[:-3],
        "first": json.dumps(values[0] if values else {}),
    }[layout]
    survives(text.encode(), options)


@pytest.mark.slow
@MANY
@given(st.lists(LINE, max_size=30), OPTIONS)
def test_any_chat(lines, options):
    survives("\n".join(lines).encode("utf-8", "surrogatepass"), options)
