"""Every format with its spellings, repairs and refusals; bytes, encodings and broken JSON."""

import codecs
import json

import pytest
from making.converting import convert_data as convert

from persona.convert.formats.recognise import NAMES
from persona.errors import DataError, UsageError


def said(conversion, number=0):
    return [(message["role"][0], message["content"]) for message in conversion.records[number].messages]


def sharegpt(*turns, **row):
    names = {"h": "human", "g": "gpt", "s": "system"}
    return {"conversations": [{"from": names.get(role, role), "value": text} for role, text in turns], **row}


PAIR = (("h", "hi"), ("g", "ho"))
SAID = [("u", "hi"), ("a", "ho")]


@pytest.mark.parametrize(
    "row",
    [
        sharegpt(*PAIR),
        {"messages": [{"from": "Human ", "value": "hi"}, {"from": "ChatGPT", "value": "ho"}]},
        {"conversation": [{"role": "user", "text": "hi"}, {"role": "bot", "text": "ho"}]},
        {"dialogue": [{"speaker": "prompter", "text": "hi"}, {"speaker": "model", "text": "ho"}]},
        {"items": [{"role": "USER", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": "ho"},
            ]
        },
        {"conversations": json.dumps(sharegpt(*PAIR)["conversations"])},
        {"conversations": [sharegpt(*PAIR)["conversations"]]},
        {"instruction": "hi", "input": "", "output": "ho"},
        {"instruction": "hi", "output": "ho", "history": None, "input": None, "system": None},
        {"instruction": "", "input": "hi", "output": "ho"},
    ],
)
@pytest.mark.parametrize("layout", ["array", "line", "pretty", "two on a line"])
def test_every_spelling_gives_the_same_conversation(row, layout):
    text = {
        "array": json.dumps([row]),
        "line": json.dumps(row) + "\n",
        "pretty": json.dumps(row, indent=2),
        "two on a line": json.dumps(row) * 2,
    }[layout]
    conversion = convert(text)
    assert said(conversion) == SAID
    assert conversion.report["duplicates"] == (layout == "two on a line")


def test_columns_are_rows():
    conversion = convert({"instruction": ["hi", "x"], "input": ["", "y"], "output": ["ho", "z"]})
    assert [said(conversion, 0), said(conversion, 1)] == [SAID, [("u", "x\ny"), ("a", "z")]]
    (rejection,) = convert({"instruction": ["hi", "x"], "output": ["ho", ""]}).rejections
    assert rejection["path"] == "$.*[1].output"


def test_system_prompts():
    assert said(convert([sharegpt(*PAIR, system="Be.")])) == [("s", "Be."), *SAID]
    assert said(convert([sharegpt(("s", "Be."), *PAIR)])) == [("s", "Be."), *SAID]
    assert said(convert([sharegpt(*PAIR, system="")])) == SAID
    assert said(convert([{"instruction": "hi", "output": "ho", "system": "Be."}])) == [("s", "Be."), *SAID]
    assert said(convert([sharegpt(*PAIR)], system="Mine.")) == [("s", "Mine."), *SAID]
    assert said(convert([sharegpt(*PAIR, system="Be.")], system="Mine."))[0] == ("s", "Be.")


def test_alpaca_input_and_history():
    row = {"instruction": "Say", "input": "it", "output": "done", "history": [["q1", "a1"], ["q2", "a2"]]}
    expected = [("u", "q1"), ("a", "a1"), ("u", "q2"), ("a", "a2"), ("u", "Say\nit"), ("a", "done")]
    assert said(convert([row])) == expected


@pytest.mark.parametrize(
    ("turns", "expected", "repair", "count"),
    [
        ([("g", "x"), ("g", "y"), *PAIR], SAID, "leading assistant turn dropped", 2),
        ([*PAIR, ("h", "more")], SAID, "last user turn without reply dropped", 1),
        ([("h", 5), ("g", "ho")], [("u", "5"), ("a", "ho")], "number written as text", 1),
        ([("h", "a\r\nb\rc"), ("g", "ho")], [("u", "a\nb\nc"), ("a", "ho")], "line ends changed to LF", 1),
        ([("h", "h\x00i\x1b[31m"), ("g", "ho")], SAID, "control characters removed", 2),
        ([("h", " \u3000hi\n"), ("g", "ho")], SAID, "white space at the ends removed", 1),
    ],
)
def test_repairs_are_counted(turns, expected, repair, count):
    conversion = convert([sharegpt(*turns)])
    assert said(conversion) == expected
    assert conversion.report["repairs"] == {repair: count}
    assert conversion.report["repaired"] == 1


REFUSED = [
    (sharegpt(), "NO_TURNS", "$[0].conversations"),
    (sharegpt(("s", "x")), "NO_REPLY", "$[0].conversations"),
    (sharegpt(("h", "x")), "NO_REPLY", "$[0].conversations"),
    (sharegpt(("g", "x")), "NO_REPLY", "$[0].conversations"),
    (sharegpt(("h", "x"), ("g", " ")), "EMPTY", "$[0].conversations[1].value"),
    (sharegpt(("h", ""), ("g", "x")), "EMPTY", "$[0].conversations[0].value"),
    (sharegpt(("h", "x"), ("甄嬛", "y")), "UNKNOWN_ROLE", "$[0].conversations[1].from"),
    (
        sharegpt(("h", "x"), ("function_call", "y"), ("observation", "z"), ("g", "ok")),
        "TOOLS",
        "$[0].conversations[1].from",
    ),
    (sharegpt(("h", "x"), ("g", None)), "CONTENT", "$[0].conversations[1].value"),
    (sharegpt(("h", {"a": 1}), ("g", "x")), "CONTENT", "$[0].conversations[0].value"),
    (sharegpt(("h", []), ("g", "x")), "CONTENT", "$[0].conversations[0].value"),
    (sharegpt(("h", [{"type": "image_url"}]), ("g", "x")), "NOT_TEXT", "$[0].conversations[0].value[0]"),
    (sharegpt(("h", "x"), ("s", "y"), ("g", "z")), "SYSTEM", "$[0].conversations[1].value"),
    (sharegpt(("s", "x"), ("s", "y"), *PAIR), "SYSTEM", "$[0].conversations[1].value"),
    (sharegpt(("h", "hi"), ("h", "you"), ("g", "ho")), "CONSECUTIVE", "$[0].conversations[1].value"),
    (sharegpt(("h", "hi"), ("g", "a"), ("g", "b")), "CONSECUTIVE", "$[0].conversations[2].value"),
    ({"conversations": [{"from": "gpt", "value": "x", "loss": False}]}, "NOT_LEARNED", "$[0].conversations[0].loss"),
    (sharegpt(("s", "x"), *PAIR, system="y"), "SYSTEM", "$[0].conversations[0].value"),
    (sharegpt(("h", "\ud83d"), ("g", "x")), "SURROGATE", "$[0].conversations[0].value"),
    (sharegpt(*PAIR, id="\ud83d"), "SURROGATE", "$[0].meta"),
    ({"conversations": ["hi"]}, "NO_TURNS", "$[0].conversations[0]"),
    ({"conversations": [{"from": "human"}]}, "NO_TURNS", "$[0].conversations[0]"),
    ({"conversations": "hi"}, "NO_TURNS", "$[0].conversations"),
    ({"conversations": None}, "NO_TURNS", "$[0]"),
    ({"conversations": [1], "items": [2]}, "NO_TURNS", "$[0]"),
    ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "NOT_LEARNED", "$[0].messages[0].weight"),
    (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "TOOLS",
        "$[0].messages[0].tool_calls",
    ),
    ({"messages": [{"role": "user", "content": "x"}, "y"]}, "NO_TURNS", "$[0].messages[1]"),
    ({"messages": [{"role": "user", "content": "x"}], "meta": 3}, "META", "$[0].meta"),
    ({"instruction": "x"}, "MISSING", "$[0].output"),
    ({"instruction": None, "output": "x"}, "MISSING", "$[0].instruction"),
    ({"instruction": "x", "output": ""}, "EMPTY", "$[0].output"),
    ({"instruction": "x", "output": "y", "history": [["q"]]}, "HISTORY", "$[0].history[0]"),
    ({"instruction": "x", "output": "y", "history": "q"}, "HISTORY", "$[0].history"),
    ({"prompt": "x", "chosen": "y", "rejected": "z"}, "PREFERENCE", "$[0]"),
    ("text", "NOT_AN_OBJECT", "$[0]"),
    ([5], "NOT_AN_OBJECT", "$[0]"),
]


@pytest.mark.parametrize(("row", "code", "path"), REFUSED)
def test_refused_rows_are_placed_and_the_others_kept(row, code, path):
    conversion = convert([row, sharegpt(*PAIR)])
    (rejection,) = conversion.rejections
    assert tuple(rejection[key] for key in ("code", "path", "file", "line")) == (code, path, "in.txt", 1)
    assert said(conversion) == SAID


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<end_of_turn>", "<｜User｜>", "<\x00/s>"]
)
def test_control_tokens_are_refused_by_name(token):
    (rejection,) = convert([sharegpt(("h", "hi"), ("g", f"ho {token} hi"))]).rejections
    assert rejection["code"] == "CONTROL_TOKEN"
    assert token.replace("\x00", "") in rejection["reason"]
    assert rejection["path"] == "$[0].conversations[1].value"


def test_rows_are_decided_one_by_one():
    rows = [sharegpt(*PAIR), {"instruction": "a", "output": "b"}, {"x": 1}]
    conversion = convert("\n".join(json.dumps(row) for row in rows))
    assert conversion.report["files"][0]["formats"] == {"sharegpt": 1, "alpaca": 1, "unknown": 1}
    assert conversion.rejections[0]["line"] == 3
    forced = convert(rows, format="alpaca")
    assert [rejection["code"] for rejection in forced.rejections] == ["MISSING", "MISSING"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "rows",
    [
        [{"x": 1}],
        [sharegpt(*PAIR)],
        [{"instruction": "hi", "output": "ho"}],
        [{"query": "hi"}, {"response": "ho"}],
        [{"mapping": []}, {"messages": "hi"}, {"chats": {"list": [{"messages": 3}, 4]}}],
        [{"data": {"mes_example": 5, "character_book": {"entries": 3}}}],
        [{"IsSender": 1}, {"is_sender": 0}, {"SenderName": "A"}, {"speaker": "A", "text": 3}],
    ],
    ids=["unknown", "sharegpt", "alpaca", "half a pair", "chats", "card", "columns"],
)
def test_a_format_forced_on_other_rows_gives_records_or_faults(name, rows):
    options = {
        "characters": ("A",),
        "tokenizer": lambda: ("letters", lambda text: [(i, i + 1) for i in range(len(text))]),
    }
    try:
        conversion = convert(rows, format=name, **options)
    except (DataError, UsageError) as fault:
        message = str(fault)
    else:
        assert conversion.report["read"] >= conversion.report["written"]
        (message,) = (entry["why"] for entry in conversion.report["files"])
        assert f"--format {name}" in message or "unreadable" in message
    assert message


def test_small_extra_keys_are_kept():
    row = sharegpt(*PAIR, id="a1", score=3, tags=["x"], long="x" * 1000)
    assert convert([row]).records[0].meta["extra"] == {"id": "a1", "score": 3}


@pytest.mark.parametrize(
    ("encode", "encoding"),
    [
        (lambda text: text.encode(), "utf-8"),
        (lambda text: codecs.BOM_UTF8 + text.encode(), "utf-8 with a byte order mark"),
        (lambda text: text.encode("utf-16"), "utf-16 with a byte order mark"),
        (lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"), "utf-16 with a byte order mark"),
        (lambda text: text.encode("utf-32"), "utf-32 with a byte order mark"),
        (lambda text: text.encode("gb18030"), "gb18030"),
    ],
)
def test_encodings(encode, encoding):
    text = json.dumps([sharegpt(("h", "你好"), ("g", "再见"))], ensure_ascii=False)
    conversion = convert(encode(text))
    assert said(conversion) == [("u", "你好"), ("a", "再见")]
    entry = conversion.report["files"][0]
    assert entry["encoding"] == encoding
    assert ("你好" in "".join(entry["notes"])) == (encoding == "gb18030"), "a guess is shown with decoded lines"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"\xef\xbb\xbf\xff", "byte 0xff at offset 3"),
        ("你好".encode() + b"\nab\xff\xff", ":2  byte 0xff at offset 9"),
        (b"some \x00\x00 text" * 9, "zero bytes"),
        (b"[]", "holds no records"),
        (b"Once upon a time.\nThe end.", "no format recognised"),
        (b'[{"a": 1},\n]', ":2:1  a comma before a closing bracket"),
        (b'[{"a": 1,}]', "a comma before a closing bracket"),
        (b'[\n  // the first\n  {"a": 1}]', ":2:3  found a comment"),
        (b'// my data\n[{"a": 1}]', ":1:1  found a comment"),
        (b'[{"a": 1},\n  // ......\n]', ":2:3  found a comment"),
        (b'[{"a": 1},\n  ...\n]', ":2:3  found the placeholder ..."),
        (b"[{'a': 1}]", "single quotes"),
        ("[{“a”: 1}]".encode(), "curly quotes"),
        (b'[{"a": None}]', "Python value"),
        (b'[{a: "b"}]', "a word without quotes"),
        (b'[{"a": "b\nc"}]', "a line break or tab inside a text"),
        (b'[{"a": "\\x"}]', "a backslash without an escape"),
        (b'[{"a": 1}\n {"b": 2}]', ":2:2  found a value with no comma before it"),
        (b'[{"a": 1}', "ends inside a value"),
        (b'[{"a": "b', "ends inside a value"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b'{"instruction": ["a"], "output": ["b", "c"]}', "differ in length"),
    ],
)
def test_unusable_files_name_the_place_and_the_fix(data, message):
    with pytest.raises(DataError) as caught:
        convert(data)
    assert message in str(caught.value)
    assert str(caught.value).startswith("in.txt")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"instruction": "a', "ends inside a value"),
        ("// ...", "a comment"),
        ("...", "the placeholder"),
        ('{"instruction": "a", "instruction": "b"}', 'the key "instruction" is there 2 times'),
        ('{"instruction": NaN, "output": "b"}', "NaN is not JSON"),
        ('{"instruction": "a", "output": ' + "[" * 70 + "]" * 70 + "}", "deeper than 64"),
        ('{"instruction": "a", "output": ' + "[" * 50_000 + "]" * 50_000 + "}", "deeper than 64"),
    ],
)
def test_a_broken_line_costs_that_line_only(line, reason):
    good = ['{"instruction": "a\u2028b", "output": "x"}', "", '{"instruction": "c", "output": "y"}']
    for lines, place in (([line, *good], 1), ([*good, line], 4)):
        if place == 1 and not line.startswith("{"):
            continue  # a file that begins with a comment is refused as a whole
        conversion = convert("\n".join(lines))
        (rejection,) = conversion.rejections
        assert reason in rejection["reason"]
        assert rejection["line"] == place
        assert len(conversion.records) == 2
        assert "\u2028" in said(conversion)[0][1]


def test_line_numbers_inside_an_array():
    rows = ",\n".join(json.dumps(row, indent=1) for row in (sharegpt(*PAIR), {"x": 1}))
    (rejection,) = convert(f"[\n{rows}\n]").rejections
    assert rejection["line"] == 2 + json.dumps(sharegpt(*PAIR), indent=1).count("\n") + 1
    assert rejection["path"] == "$[1]"


def test_hints_for_common_mistakes():
    (rejection,) = convert('{"instruction": "a", "output": "b"},\n{"instruction": "c", "output": "d"}\n').rejections
    assert "a comma between objects" in rejection["reason"]
    (rejection,) = convert({"mine": [{"instruction": "a", "output": "b"}]}).rejections
    assert 'the list under "mine"' in rejection["fix"]
