"""Bad input, case by case: what is repaired and counted, what is refused with its place, what is kept and warned of."""

import json
import os

import pytest
from making.converting import convert_data, convert_paths

from persona.convert.command import choose
from persona.convert.inputs import find_sources
from persona.errors import DataError, UsageError


def talk(*turns, **more):
    names = {"h": "human", "g": "gpt", "s": "system"}
    return {"conversations": [{"from": names.get(who, who), "value": text} for who, text in turns], **more}


PAIR = (("h", "hi"), ("g", "ho"))
GOOD = talk(*PAIR)
SAID = [("u", "hi"), ("a", "ho")]


def said(conversion, number=0):
    return [(message["role"][0], message["content"]) for message in conversion.records[number].messages]


def codes(conversion):
    return [row["code"] for row in conversion.rejections]


def warned(conversion):
    return " ".join(conversion.report["warnings"])


# --- bytes and encodings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encode", "label"),
    [
        (lambda text: b"\xef\xbb\xbf" + text.encode(), "utf-8 with a byte order mark"),  # 1
        (lambda text: text.encode("utf-16"), "utf-16 with a byte order mark"),  # 2
        (lambda text: text.encode("utf-16-le"), "utf-16-le"),  # 3
        (lambda text: text.encode("utf-16-be"), "utf-16-be"),
        (lambda text: text.encode("gb18030"), "gb18030"),  # 4
    ],
)
@pytest.mark.parametrize("lines", [True, False])
def test_encodings_are_found(encode, label, lines):
    rows = [talk(("h", f"今天天气怎么样呢 {n}"), ("g", f"有雾，慢慢走 {n}")) for n in range(5)]
    text = (
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        if lines
        else json.dumps(rows, ensure_ascii=False)
    )
    conversion = convert_data(encode(text))
    assert conversion.report["files"][0]["encoding"] == label
    assert said(conversion)[0] == ("u", "今天天气怎么样呢 0")
    assert len(conversion.records) == 5


@pytest.mark.parametrize(("encoding", "text"), [
    ("shift_jis", "おはようございます、きょうはとてもいいてんきですね"),
    ("big5", "燈塔的看守人說今天晚上會有很大的霧請你們早一點回到港口來"),
])  # fmt: skip
def test_other_encodings_are_named_not_guessed(encoding, text):
    data = json.dumps([talk(("h", text), ("g", text[::-1]))], ensure_ascii=False).encode(encoding)
    with pytest.raises(DataError, match=f"--encoding {encoding}"):
        convert_data(data)
    assert said(convert_data(data, encoding=encoding))[0][1] == text


def test_mixed_encodings_have_a_place():  # 5
    with pytest.raises(DataError, match=r"in\.txt:2  byte 0xff at offset 16"):
        convert_data("你好，世界".encode() + b"\n\xff\xff\xff")
    with pytest.raises(UsageError, match="--encoding martian"):
        convert_data("[]", encoding="martian")


def test_garbled_and_lost_text_is_warned_of_and_mended():  # 6, 7
    row = talk(("h", "caf\u00c3\u00a9"), ("g", "lost \ufffd"))
    assert "garbled" in warned(convert_data([row]))
    assert "U+FFFD" in warned(convert_data([row]))
    mended = convert_data([row], fix_text=True)
    assert said(mended)[0] == ("u", "café")
    assert mended.report["repairs"] == {"text read in the wrong encoding mended": 1}


def test_control_characters():  # 8, 9, 14
    conversion = convert_data([talk(("h", "a\x00b\r\nc\rd"), ("g", "\x1b[31mred\x1b[0m"))])
    assert said(conversion) == [("u", "ab\nc\nd"), ("a", "red")]
    assert codes(convert_data([talk(("h", "hi"), ("g", "a\x01" * 100))])) == ["BINARY"]


def test_line_separators_of_unicode_stay():  # 10, 12, 13
    text = "a\u2028b\u2029c\x85d 👩‍🚀👍🏽 𠀀 e\u0301 Ａ\u200bz"
    lines = "\n".join(json.dumps(talk(("h", text), ("g", str(n))), ensure_ascii=False) for n in range(3))
    conversion = convert_data(lines)
    assert len(conversion.records) == 3
    assert said(conversion)[0] == ("u", text)
    assert conversion.report["statistics"]["traits"]["invisible characters"] == 3


# --- JSON and containers ------------------------------------------------------------------------------------------

LENIENT = [
    ('[{"instruction": "hi", "output": "ho"},]', "comma before a closing bracket"),  # 15
    ('[{"instruction": "hi", "output": "ho",}]', "comma before a closing bracket"),
    ('// mine\n[{"instruction": "hi", /* x */ "output": "ho"}, # end\n]', "comment dropped"),  # 16
    ("[{'instruction': 'hi', 'output': 'ho'}]", "quotes made straight"),  # 17
    ('[{instruction: "hi", "output": "ho", "input": None}]', "quotes added around a key"),
    ('[{"instruction": "hi", "output": "ho"},\n  ...\n]', "placeholder"),  # 18
    ('[\n// ......\n{"instruction": "hi", "output": "ho"}]', "comment dropped"),
    ('[{“instruction”: “hi”, "output": "ho"}]', "quotes made straight"),  # 20
    ('[{"instruction": "hi" "output": "ho"}]', "missing comma"),
]


@pytest.mark.parametrize(("text", "repair"), LENIENT)
def test_broken_json_is_placed_and_read_leniently(text, repair):
    with pytest.raises(DataError, match=r"in\.txt:\d+:\d+  "):
        convert_data(text)
    conversion = convert_data(text, lenient=True)
    assert said(conversion) == SAID
    assert any(repair in name for name in conversion.report["repairs"])


def test_line_breaks_inside_texts():  # 19
    text = '[{"instruction": "h\ni", "output": "h\to"}]'
    with pytest.raises(DataError, match="line break or tab inside a text"):
        convert_data(text)
    assert said(convert_data(text, lenient=True)) == [("u", "h\ni"), ("a", "h\to")]


@pytest.mark.parametrize("count", [1, 3000])
def test_a_file_that_was_cut_off(count):  # 21
    rows = ",\n".join(json.dumps({"instruction": f"q{n}", "output": "x" * 500 + str(n)}) for n in range(count))
    text = f'[{rows},\n{{"instruction": "lost'
    with pytest.raises(DataError, match=f"the {count:,} records before it are whole, and --lenient keeps them"):
        convert_data(text)
    conversion = convert_data(text, lenient=True)
    assert len(conversion.records) == count
    assert [(row["code"], row["line"]) for row in conversion.rejections] == [("TRUNCATED", count + 1)]
    assert len(convert_data(f"[{rows}", lenient=True).records) == count


@pytest.mark.parametrize("pretty", [None, 1])
def test_containers(pretty):  # 22, 23, 24
    one, two = {"instruction": "hi", "output": "ho"}, {"instruction": "x", "output": "y"}
    for text in (
        json.dumps([one], indent=pretty) + json.dumps([two], indent=pretty),
        json.dumps(one, indent=pretty) + "\n" + json.dumps(two, indent=pretty),
        json.dumps({"data": [one, two]}, indent=pretty),
        json.dumps({"train": [one], "test": [two]}, indent=pretty),
        json.dumps({"version": 2, "data": [one, two]}, indent=pretty),
    ):
        conversion = convert_data(text)
        assert [said(conversion, 0), said(conversion, 1)] == [SAID, [("u", "x"), ("a", "y")]]


@pytest.mark.parametrize("data", [b"", b"  \n", b"null", b'"text"', b"5", b"[]", b"{}"])
def test_nothing_to_convert(data):  # 25, 83
    try:
        conversion = convert_data(data)
    except DataError:
        return
    assert conversion.report["written"] == 0
    assert conversion.names == ["rejected.jsonl", "report.json", "report.html"]


def test_json_that_python_lets_pass():  # 26 to 29
    rows = [
        '{"instruction": "a", "instruction": "b", "output": "c"}',
        '{"instruction": "a", "output": NaN}',
        '{"instruction": "a", "output": ' + "9" * 5000 + "}",
        '{"instruction": "a", "output": ' + "[" * 1500 + "]" * 1500 + "}",
        '{"instruction": "hi", "output": "ho"}',
    ]
    conversion = convert_data("\n".join(rows))
    assert [row["line"] for row in conversion.rejections] == [1, 2, 3, 4]
    assert said(conversion) == SAID


def test_a_record_that_never_ends():  # 30
    for text in (
        '{"instruction": "' + "x" * 3_000_000,
        '[{"instruction": "' + "x" * 3_000_000,
        "{}\n" + "y" * 2_000_000,
    ):
        with pytest.raises(DataError, match="--max-record"):
            convert_data(text, max_record=1)


@pytest.mark.parametrize("signature", [b"PK\x03\x04", b"\x1f\x8b\x08", b"PAR1", b"%PDF-1.7", b"SQLite format 3\x00"])
def test_files_that_are_no_text(signature):  # 31
    with pytest.raises(DataError, match="in.txt: it is"):
        convert_data(signature + b"\x00\x01" * 50)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_things_that_are_no_files(tmp_path):  # 32
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in (tmp_path / "pipe", "/dev/zero", tmp_path / "loop", tmp_path / "no*.json", "bad\0name"):
        with pytest.raises(UsageError):
            find_sources([str(name)])
    with pytest.raises(DataError, match="No input files"):
        find_sources([str(tmp_path)])


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):  # 33
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(talk(("h", f"q{n}"), ("g", f"r{n}"))) for n in range(9)), encoding="utf-8")
    from persona.convert import reading

    whole = reading.probe

    def probe(*arguments):
        found = whole(*arguments)
        path.write_text(path.read_text(encoding="utf-8").replace("r8", "r9"), encoding="utf-8")
        return found

    monkeypatch.setattr(reading, "probe", probe)
    with pytest.raises(DataError, match="changed while it was read"):
        convert_paths(path)


def test_empty_lines_are_counted():  # 34
    conversion = convert_data(json.dumps(GOOD) + "\n\n \n" + json.dumps(talk(("h", "a"), ("g", "b"))))
    assert conversion.report["repairs"] == {"empty lines passed over": 2}
    assert len(conversion.records) == 2


# --- structure -----------------------------------------------------------------------------------------------------

TURN = {"from": "human", "value": "x"}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"conversations": [TURN], "messages": [{"from": "gpt", "value": "y"}]}, "NO_TURNS"),  # 36
        ({"conversations": [[TURN], [TURN]]}, "NO_TURNS"),  # 38
        ({"conversations": ["x", 3]}, "NO_TURNS"),  # 39
        ({"conversations": [{"from": "human"}]}, "NO_TURNS"),  # 40
        ({"conversations": [{"from": "What is this long text about?", "value": "human"}]}, "UNKNOWN_ROLE"),  # 41
        (talk(("h", "x"), ("甄嬛", "y")), "UNKNOWN_ROLE"),  # 43
        (talk(("h", "x"), ("h", "y"), ("g", "z")), "CONSECUTIVE"),  # 45
        (talk(("h", "x"), ("g", "y"), ("g", "z")), "CONSECUTIVE"),  # 46
        (talk(("h", "x")), "NO_REPLY"),  # 48
        (talk(("s", "x"), ("h", "x"), ("s", "z"), ("g", "y")), "SYSTEM"),  # 49
        (talk(), "NO_TURNS"),  # 50
        (talk(("h", "x"), ("g", " ")), "EMPTY"),  # 51
        (talk(("h", ""), ("g", "y")), "EMPTY"),
        (talk(("h", "x"), ("g", None)), "CONTENT"),  # 52
        (talk(("h", [{"type": "image_url"}]), ("g", "y")), "NOT_TEXT"),  # 53
        (talk(("h", "x"), ("function_call", "{}"), ("observation", "{}"), ("g", "y")), "TOOLS"),  # 54
        ({"messages": [{"role": "assistant", "content": "y", "weight": 0}]}, "NOT_LEARNED"),  # 55
        ({"instruction": "x", "input": "y"}, "MISSING"),  # 58
        ({"instruction": "x", "output": "y", "history": [["a", "b", "c"]]}, "HISTORY"),  # 59
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "PREFERENCE"),  # 60
        (talk(("h", "<|im_start|>user"), ("g", "y")), "CONTROL_TOKEN"),  # 63, 65
        (talk(("h", "x"), ("g", "y" * 100_001)), "TOO_LONG"),  # 66
    ],
)  # fmt: skip
def test_what_is_refused(row, code):
    conversion = convert_data([GOOD, row])
    assert codes(conversion) == [code]
    assert conversion.rejections[0]["path"].startswith("$[1]")
    assert said(conversion) == SAID


PALACE = {"甄嬛": "assistant", "皇上": "user"}
OPENING = ("u", "(The conversation begins.)")
TOOL = (("h", "t"), ("function_call", "{}"), ("observation", "{}"), ("g", "done"))


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (talk(("皇上", "hi"), ("甄嬛", "ho")), {"role_map": PALACE}, SAID),
        (talk(("g", "hi"), ("h", "ho")), {"role_map": {"gpt": "user", "human": "assistant"}}, SAID),
        (talk(("g", "hello"), *PAIR), {"leading_assistant": "keep"}, [OPENING, ("a", "hello"), *SAID]),  # 44
        (talk(("g", "hello"), *PAIR), {}, SAID),
        (talk(("h", "hi"), ("h", "you"), ("g", "ho")), {"merge_consecutive": True}, [("u", "hi\nyou"), ("a", "ho")]),
        (talk(*PAIR, ("h", "more")), {}, SAID),  # 47
        (talk(("s", "a"), ("h", "hi"), ("s", "b"), ("g", "ho")), {"lenient": True}, [("s", "a\nb"), *SAID]),
        (talk(("h", ""), ("g", "ho")), {"allow_empty_user": True}, [OPENING, ("a", "ho")]),
        (talk(*TOOL, *PAIR), {"tools": "drop"}, SAID),
        (talk(("h", "A：hi"), ("g", "B: ho")), {"strip_speaker": True}, SAID),
        (talk(("h", "A：hi"), ("g", "B: ho")), {}, [("u", "A：hi"), ("a", "B: ho")]),
        (talk(("h", "{{char}}"), ("g", "<USER>")), {"characters": ("hi",), "user_name": "ho"}, SAID),  # 61
        (talk(*PAIR, ("h", "x" * 200), ("g", "z")), {"too_long": "truncate", "max_chars": 100}, SAID),
        ([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], {}, SAID),
        ({"conversations": [{"Role ": "human", "Text": "hi"}, {"role": "GPT ", "value": "ho"}]}, {}, SAID),  # 42
    ],
)  # fmt: skip
def test_what_is_mended_when_asked(row, options, expected):
    conversion = convert_data([row], **options)
    assert said(conversion) == expected


def test_splitting_around_a_long_turn_keeps_the_account():
    row = talk(*PAIR, ("h", "x" * 200), ("g", "z"), ("h", "a"), ("g", "b"))
    conversion = convert_data([row], too_long="split", max_chars=100)
    assert (conversion.report["read"], len(conversion.records)) == (2, 2)
    assert {record.meta["group"] for record in conversion.records} == {"in.txt#1"}


def test_a_turn_is_too_long_by_what_is_left_of_it():
    row = talk(("h", "a@example.com " * 10), ("g", "ho"))
    assert len(convert_data([row], redact=True, max_chars=100).records) == 1


def test_unknown_roles_are_counted():
    rows = [talk(("h", str(n)), ("甄嬛", "y")) for n in range(3)]
    assert convert_data(rows).report["unknown_roles"] == {"'甄嬛'": 3}


def test_extra_keys_are_kept_and_double_ids_noticed():  # 56, 57
    rows = [talk(("h", f"q{n}"), ("g", f"r{n}"), id="same", long=["x"]) for n in range(2)]
    conversion = convert_data(rows)
    assert conversion.records[0].meta["extra"] == {"id": "same"}
    assert conversion.report["repairs"] == {"other keys with long values dropped": 2}
    assert "have the id of another one" in warned(conversion)


# --- contents and the whole set ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        ("Human: yes?", "names or roles"),  # 64
        ("嗯", "very short"),  # 69
        ("[图片]", "media or links"),
        ("question 0", "copy the prompt"),  # 70
        ("z" * 300, "one character over and over"),  # 71
        ("As an AI language model, I cannot.", "speak as an AI"),  # 73
        ("<think>hm</think> yes", "thinking"),
    ],
)
def test_what_is_warned_of(reply, word):
    rows = [talk(("h", "question 0"), ("g", reply)), talk(("h", "other"), ("g", "words enough"))]
    assert word in warned(convert_data(rows))


def test_duplicates_exact_and_near():  # 76 to 78
    rows = [talk(("h", "Say it"), ("g", answer)) for answer in ("It is.", "It is.", "it is!", "No more.")]
    conversion = convert_data(rows)
    assert (conversion.report["duplicates"], len(conversion.records)) == (1, 3)
    assert conversion.report["statistics"]["near_duplicates"] == 1
    assert conversion.report["statistics"]["prompts_with_several_answers"] == 1
    assert len(convert_data(rows, keep_dups=True).records) == 4


def test_a_ratio_that_cannot_be_held():  # 80
    with pytest.raises(DataError, match="1 record in one group"):
        convert_data([GOOD], val_ratio=0.1)
    assert convert_data([GOOD]).report["val"] == 0
    assert convert_data([GOOD], val_ratio=0).report["val"] == 0


def test_the_split_hardly_moves_when_rows_are_added():  # 81
    rows = [talk(("h", f"q{n}"), ("g", f"r{n}")) for n in range(400)]
    before, after = (
        {record.messages[0]["content"] for record in convert_data(some).validation} for some in (rows[:380], rows)
    )
    assert len(before & after) >= len(before) - 4


@pytest.mark.parametrize(
    "options",
    [{"lore_weight": 0.5}, {"max_record": 0}, {"max_gap": -1}, {"min_chars": -1}, {"chunk_tokens": (800, 300)}],
)
def test_options_are_bounded(options):
    with pytest.raises(UsageError, match="--"):
        choose(options)
