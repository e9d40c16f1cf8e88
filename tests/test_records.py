"""The format on disk: what passes, what is refused and where, splitting and weighting."""

import itertools
import json
from collections import Counter

import pytest

from persona.errors import DataError
from persona.records import (
    CHARACTER_MACRO,
    MACRO,
    USER_MACRO,
    Record,
    RecordFault,
    check_messages,
    control_token,
    is_chinese,
    language,
    read_records,
    repeat_weighted,
    speaks_as_ai,
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def record(number, group=None):
    meta = {} if group is None else {"group": group}
    return Record((user(f"question {number}"), assistant(f"answer {number}")), meta)


SYSTEM = {"role": "system", "content": "Be brief."}


def test_system_and_turns():
    with_system = Record((SYSTEM, user("a"), assistant("b")))
    assert with_system.system == "Be brief."
    assert with_system.turns == (user("a"), assistant("b"))
    assert record(1).system is None
    assert record(1).turns == record(1).messages


@pytest.mark.parametrize(
    ("messages", "code", "path"),
    [
        ([], "NO_MESSAGES", "$.messages"),
        ("text", "NO_MESSAGES", "$.messages"),
        (["hi"], "MESSAGE", "$.messages[0]"),
        ([user("a"), {**assistant("b"), "weight": 0}], "UNKNOWN_KEY", "$.messages[1]"),
        ([{"role": "human", "content": "a"}], "UNKNOWN_ROLE", "$.messages[0].role"),
        ([{"role": ["user"], "content": "a"}], "UNKNOWN_ROLE", "$.messages[0].role"),
        ([user("a"), {"role": "assistant"}], "CONTENT", "$.messages[1].content"),
        ([user("a"), assistant(3)], "CONTENT", "$.messages[1].content"),
        ([user("a"), assistant(" \n\u3000")], "EMPTY", "$.messages[1].content"),
        ([user("a"), assistant("\ud83d")], "SURROGATE", "$.messages[1].content"),
        ([assistant("b")], "ORDER", "$.messages[0].role"),
        ([user("a"), user("a")], "ORDER", "$.messages[1].role"),
        ([SYSTEM, user("a"), assistant("b"), SYSTEM], "ORDER", "$.messages[3].role"),
        ([user("a"), assistant("b"), user("c")], "NO_REPLY", "$.messages[2].role"),
        ([SYSTEM], "NO_REPLY", "$.messages[0].role"),
    ],
)
def test_messages_that_cannot_be_learned(messages, code, path):
    with pytest.raises(RecordFault) as caught:
        check_messages(messages)
    assert (caught.value.code, caught.value.path) == (code, path)
    assert caught.value.reason
    assert caught.value.fix


def test_what_is_written_is_read_back(tmp_path):
    records = [
        Record(
            (SYSTEM, user("线\u2028\u2029\x85 行\n第二行"), assistant('"\\ 👩‍🚀 \u202e')),
            {"group": "a", "extra": {"id": 3}},
        ),
        record(2),
    ]
    lines = [record.encoded() for record in records]
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert read_records(path) == records
    assert not any(mark in line for line in lines for mark in (b"\n", b"\r"))
    assert "线".encode() in lines[0]


def test_a_line_is_what_the_json_module_writes():
    every = "".join(chr(code) for code in range(1, 0x11000) if not 0xD800 <= code < 0xE000)
    texts = (every, 'a",\n  "b', '",', "\\", " ", "\U0001f469\u200d\U0001f680")
    extra = {"id": 3, "deep": [{"": None}, []]}
    for text, more in itertools.product(texts, ({}, {"big": 10**30})):
        meta = {"group": every, "extra": extra | more}
        messages = (SYSTEM, user(text), assistant(text), user("again"), assistant(text))
        expected = json.dumps({"messages": messages, "meta": meta}, ensure_ascii=False, separators=(",", ":"))
        assert Record(messages, meta).encoded() == expected.encode("utf-8")


@pytest.mark.parametrize(
    ("messages", "meta", "path"),
    [
        ((user("a"), assistant("b\ud83d")), {}, "$.messages[1].content"),
        ((user("a"), assistant("b")), {"group": "\ud83d"}, "$.meta"),
    ],
)
def test_half_a_character_is_never_written(messages, meta, path):
    with pytest.raises(RecordFault) as caught:
        Record(messages, meta).encoded()
    assert (caught.value.code, caught.value.path) == ("SURROGATE", path)


def test_bom_blank_lines_and_crlf_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    line = record(1).encoded()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n  \n" + line)
    assert read_records(path) == [record(1), record(1)]


GOOD = record(1).encoded().decode()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"messages": []}', "$.messages"),
        (b"{", "not JSON at column"),
        (b'{"messages": 1}]', "more text after column"),
        (b"[1]", "convert_dataset.py"),
        (b'{"conversations": []}', "convert_dataset.py"),
        (b'\xff{"messages": []}', "is not UTF-8"),
        (b'{"messages": [], "messages": []}', 'the key "messages" is there 2 times'),
        (GOOD.replace('"meta":{}', '"meta": {"a": NaN}').encode(), "NaN"),
        (GOOD.replace('"meta":{}', '"meta": {"a": 1e999}').encode(), "too large"),
        (GOOD.replace('"meta":{}', '"meta": {"a": ' + "1" * 5000 + "}").encode(), "5000 digits"),
        (GOOD.replace('"meta":{}', '"meta": {"a": ' + "[" * 70 + "]" * 70 + "}").encode(), "64 levels"),
        (GOOD.replace('"meta":{}', '"meta": {"a": ' + "[" * 90_000 + "]" * 90_000 + "}").encode(), "64 levels"),
        (GOOD.replace('"meta":{}', '"meta": {"a": "\\ud83d"}').encode(), "surrogate"),
        (GOOD.replace('"meta":{}', '"meta": []').encode(), "$.meta"),
        (GOOD.replace('"meta"', '"id"').encode(), 'unknown key "id"'),
        (GOOD.replace('"meta":{}', '"meta": {"type": "settings_qa"}').encode(), 'write "lore_qa", its name now'),
        (GOOD.replace('"meta":{}', '"meta": {"type": "settings_background"}').encode(), 'write "lore_background"'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_records(path)
    message = str(caught.value)
    assert f"{path}:3" in message
    assert "1 of 2 records" in message
    assert said in message


@pytest.mark.parametrize("inside", ["", '"text", 1', "{}"])
@pytest.mark.parametrize("depth", [61, 62, 63])
def test_depth_of_64_is_allowed(tmp_path, depth, inside):
    path = tmp_path / "a.jsonl"
    nested = "[" * depth + inside + "]" * depth
    path.write_text(GOOD.replace('"meta":{}', '"meta": {"a": ' + nested + "}"), encoding="utf-8")
    if depth + 2 + bool(inside) > 65:  # the record, its meta and the lists, and what is in the innermost
        with pytest.raises(DataError, match="64 levels"):
            read_records(path)
    else:
        assert len(read_records(path)) == 1


def test_all_faults_are_counted_and_twenty_shown(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["{}"] * 33), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_records(path)
    lines = str(caught.value).split("\n")
    assert "33 of 33" in lines[0]
    assert len(lines) == 22
    assert lines[-1] == "... and 13 more"


def test_files_without_records(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n", encoding="utf-8")
    for name, said in (("empty.jsonl", "is empty"), ("missing.jsonl", "does not exist"), (".", "is not a file")):
        with pytest.raises(DataError, match=said) as caught:
            read_records(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(("weight", "expected"), [(0, 0), (1, 10), (2.5, 25), (0.25, 2), (5, 50), (1.96, 20)])
def test_weights(weight, expected):
    records = [record(number) for number in range(10)]
    repeated = repeat_weighted(records, weight, seed=0)
    assert len(repeated) == expected
    counts = Counter(item.encoded() for item in repeated)
    assert set(counts.values()) <= {int(weight), int(weight) + 1}
    assert repeated == repeat_weighted(records, weight, seed=0)


def test_the_extra_copies_are_chosen_by_the_seed():
    records = [record(number) for number in range(10)]
    chosen = {b"".join(item.encoded() for item in repeat_weighted(records, 0.5, seed)) for seed in range(5)}
    assert len(chosen) > 1
    with pytest.raises(ValueError, match="weight"):
        repeat_weighted(records, -1, 0)


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("今晚的潮水很大。", "Chinese"),
        ("我叫 Tamsin，住在 Lantern Rock。", "Chinese"),
        ("灯台に住んでいます。", "Japanese"),
        ("The word 灯 means lamp, and nobody here can write it.", "Latin letters"),
        ("Où est le chat ?", "Latin letters"),
        ("Кто там?", "other"),
        ("…", "other"),
    ],
)
def test_the_language_of_a_text(text, expected):
    assert language(text) == expected
    assert is_chinese(text) == (expected in ("Chinese", "Japanese"))


@pytest.mark.parametrize("token", ["<|im_end|>", "<｜User｜>", "</s>", "[INST]", "<</SYS>>", "<end_of_turn>", "<bos>"])
def test_a_control_token_is_found_in_a_text(token):
    assert control_token(f"Aye. {token} Mind the tide.") == token
    assert control_token("Aye [softly] <sighs> a < b | c > d.") is None


@pytest.mark.parametrize("text", ["As an AI, I cannot feel.", "I'm an AI.", "作为一个人工智能，我没有感情。"])
def test_a_reply_that_speaks_as_a_language_model_is_found(text):
    assert speaks_as_ai(f"Hm. {text}")
    assert speaks_as_ai("As an aide to the keeper, I am just fine. 作为看守人，我不睡。") is None


def test_macros_of_role_play_programs():
    assert [bool(p.search("{{ user }} sees <USER>")) for p in (USER_MACRO, CHARACTER_MACRO, MACRO)] == [
        True,
        False,
        True,
    ]
    assert [bool(p.search("{{Char}} and <BOT>")) for p in (USER_MACRO, CHARACTER_MACRO, MACRO)] == [False, True, True]
    assert not MACRO.search("{{ two words }} <people>")
