"""Formats beyond instruction data: tables, pairs, chats, cards, character lines, with the traps of real files."""

import base64
import hashlib
import json
import random
import zlib

import pytest
from making.converting import convert_data, convert_paths

from persona.convert.cleaning import personal_data
from persona.convert.options import LINE_KINDS
from persona.convert.report import verdict
from persona.errors import DataError, UsageError


def said(conversion, number=0):
    return [(message["role"][0], message["content"]) for message in conversion.records[number].messages]


def as_lines(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


HI = [("u", "hi"), ("a", "ho")]


@pytest.mark.parametrize(
    "text",
    [
        "question,answer\nhi,ho\nx,y\n",
        "Prompt;Response\r\nhi;ho\r\nx;y\r\n",
        "query\tresponse\nhi\tho\nx\ty\n",
        "\ufeff\"问题\",\"回答\"\n\"hi\",\"ho\"\n\"x\",\"y\"\n",
        "instruction,input,output\nhi,,ho\nx,,y\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_tables(text, encoding):
    conversion = convert_data(text.removeprefix("\ufeff" if encoding == "gb18030" else "").encode(encoding))
    assert said(conversion) == HI
    assert conversion.report["written"] == 2
    assert "table separated by" in conversion.report["files"][0]["why"]


def test_columns_that_are_not_known():
    table = "问,說\nhi,ho\nx,y\nz,w\n".replace("问", "frage").replace("說", "antwort")
    with pytest.raises(UsageError, match="Columns found: frage, antwort"):
        convert_data(table)
    assert said(convert_data(table, prompt_col="frage", response_col="Antwort")) == HI
    with pytest.raises(UsageError, match="--context-col NAME"):
        convert_data(table, prompt_col="frage", response_col="antwort", context_col="none")


def test_cells():
    text = 'question,context,answer\n"a\nb","say ""it""",ho\nx,,\nonly one\n\n1,2,3,4\n'
    conversion = convert_data(text, max_reject=1)
    assert said(conversion) == [("u", 'say "it"\na\nb'), ("a", "ho")]
    assert [(row["code"], row["line"]) for row in conversion.rejections] == [("EMPTY", 4), ("EMPTY", 5), ("CELLS", 7)]
    assert "NaN" not in json.dumps(conversion.report)
    rows = [{"question": "hi", "answer": "ho", "split": "test"}, {"question": "x", "answer": "y", "split": "train"}]
    assert said(convert_data(rows, split="test")) == HI
    wrapped = convert_data({"train": rows[1:], "test": rows[:1]}, split="test")
    assert "not of --split test: train (1)" in wrapped.report["files"][0]["notes"]


def test_pairs():
    row = {"query": "甲:「一」", "answer": "乙:「二」", "chat_history": ["甲:「零」", "乙:「嗯」", "甲:「再」"]}
    conversion = convert_data(json.dumps(row) * 2, characters=("乙",))
    assert said(conversion) == [("u", "零"), ("a", "嗯"), ("u", "再\n一"), ("a", "二")]
    assert conversion.report["duplicates"] == 1
    assert convert_data([row], characters=("丙",)).rejections[0]["code"] == "OTHER_SPEAKER"


ROWS = [{"role": "A", "text": "「q1」"}, {"role": "B", "text": "r1"}, {"role": "旁白", "text": "dusk"},
        {"role": "A", "text": "q2"}, {"role": "B", "text": "r2"}]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[("u", "q1"), ("a", "r1"), ("u", "q2"), ("a", "r2")]]),
        ({"narration": "brackets"}, [[("u", "q1"), ("a", "r1"), ("u", "（dusk）\nq2"), ("a", "r2")]]),
        ({"narration": "system"}, [[("s", "dusk"), ("u", "q1"), ("a", "r1"), ("u", "q2"), ("a", "r2")]]),
        ({"keep_quotes": True}, [[("u", "「q1」"), ("a", "r1"), ("u", "q2"), ("a", "r2")]]),
        ({"flat": True}, [[("u", "q1"), ("a", "r1")], [("u", "q2"), ("a", "r2")]]),
        ({"max_exchanges": 1}, [[("u", "q1"), ("a", "r1")], [("u", "q2"), ("a", "r2")]]),
    ],
)
def test_utterances(options, expected):
    conversion = convert_data(as_lines(*ROWS), characters=("B",), **options)
    assert [said(conversion, number) for number in range(len(conversion.records))] == expected


def test_lines_that_belong_to_no_scene_are_each_used_once():
    conversion = convert_data("A: 1\nA: 2\nB: 3\nB: 4\nA: 5\nB: 6\nA: 7", characters=("B",), flat=True)
    assert [said(conversion, number) for number in range(2)] == [[("u", "2"), ("a", "3")], [("u", "5"), ("a", "6")]]
    unused = {"scene without the character": 2, "no line before it": 1}
    assert conversion.report["speeches"] == {"total": 7, "learned": 2, "context": 2, "not_used": unused}


def test_scenes_of_utterances_and_short_replies():
    rows = [{**row, "scene": number // 3} for number, row in enumerate(ROWS)]
    conversion = convert_data(rows, characters=("B",))
    assert [record.meta["group"] for record in conversion.records] == ["in.txt#scene-1", "in.txt#scene-2"]
    short = convert_data(rows, characters=("B",), min_chars=3, max_reject=1, format="utterances")
    assert short.report["speeches"]["not_used"]["reply shorter than --min-chars"] == 2


WECHAT = {
    "id,MsgSvrID,type_name,is_sender,talker,room_name,msg,src,CreateTime": [
        "1,9,文本,0,小汤,,hi,,2024-01-01 10:00:00",
        "2,9,文本,1,我,,ho,,2024-01-01 10:01:00",
        "3,9,图片,0,小汤,,x.jpg,,2024-01-01 10:02:00",
    ],
    "localId,TalkerId,Type,SubType,IsSender,CreateTime,Status,StrContent,StrTime": [
        "1,7,1,0,0,1700000000,2,hi,t,one value more",
        "2,7,1,0,1,1700000030,2,ho,t,one value more",
        "3,7,47,0,0,1700000040,2,<gif>,t,one value more",
    ],
}


@pytest.mark.parametrize("header", WECHAT)
def test_wechat_tables(header):
    conversion = convert_data("\n".join([header, *WECHAT[header]]), characters=("我",))
    assert said(conversion) == HI
    assert conversion.report["speeches"]["not_used"] == {"picture, voice message or file": 1}
    mine = convert_data("\n".join([header, *WECHAT[header]]), characters=("Lee",), user_name="Lee")
    assert said(mine) == HI


def test_wechat_json_and_groups():
    def row(sender, text, time, mine=False, kind=1):
        return {
            "seq": 1,
            "time": time,
            "talker": "room",
            "sender": sender,
            "isSelf": mine,
            "type": kind,
            "content": text,
        }

    rows = [
        row("a", "one", 0),
        row("b", "two", 20),
        row("", "ho", 40, True),
        row("a", "late", 9000),
        row("", "x", 9010, True),
    ]
    conversion = convert_data(rows, characters=("我",))
    assert said(conversion) == [("u", "a: one\nb: two"), ("a", "ho")]
    assert len(conversion.records) == 2
    assert len(convert_data(rows, characters=("我",), max_gap=1000).records) == 1


def test_sillytavern_greeting_and_swipes(tmp_path):
    rows = [
        {"user_name": "U", "character_name": "C"},
        {"name": "C", "is_user": False, "mes": "Welcome."},
        {"name": "U", "is_user": True, "mes": "hi"},
        {"name": "C", "is_user": False, "swipes": ["no", "ho"], "swipe_id": 1},
        {"name": "C", "is_user": False, "is_system": True, "mes": "hidden"},
    ]
    assert said(convert_data(as_lines(*rows))) == HI
    kept = convert_data(as_lines(*rows), leading_assistant="keep")
    assert said(kept) == [("u", "(The conversation begins.)"), ("a", "Welcome."), *HI]


def test_telegram_of_all_chats_and_whatsapp_forms():
    def message(who, text):
        return {"type": "message", "date": "2024-01-01T10:00:00", "from": who, "text": text}

    export = {"about": "x", "chats": {"list": [{"name": "n", "messages": [message("A", "hi"), message("B", ["ho"])]}]}}
    assert said(convert_data(export, characters=("B",))) == HI
    for text in (
        "[31/12/23, 23:59:59] A: hi\n[31/12/23, 23:59:59] B: ho",
        "12/31/23, 11:59 PM - A: hi\n12/31/23, 11:59 PM - B: ho",
        "2023/12/31, 23:59 - A: hi\n2023/12/31, 23:59 - \u200eB: ho",
    ):
        assert said(convert_data(text, characters=("B",))) == HI


CARD = {"name": "Ada", "description": "{{char}} is dry.", "first_mes": "Hello <USER>.", "personality": "",
        "mes_example": "<START>\n{{user}}: hi\n{{char}}: ho\n<START>\n<BOT>: alone"}  # fmt: skip


def test_cards():
    conversion = convert_data(CARD, user_name="Bo")
    assert said(conversion) == [("s", "Ada is dry."), *HI]
    assert said(conversion, 1)[-1] == ("a", "Hello Bo.")
    assert [row["code"] for row in conversion.rejections] == ["NO_REPLY"]
    assert conversion.report["system_prompt"] == "Ada is dry."
    assert "{{char}}" not in json.dumps(conversion.report)
    again = convert_data({"spec": "chara_card_v3", "data": CARD}, user_name="Bo")
    assert [record.messages for record in again.records] == [record.messages for record in conversion.records]


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


HEADER = chunk(b"IHDR", b"\0\0\0\1\0\0\0\1\x08\0\0\0\0")  # one grey pixel


def png(*texts, behind=()):
    """A picture with text chunks before and behind the pixels."""
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    before, after = (b"".join(chunk(*text) for text in some) for some in (texts, behind))
    return b"\x89PNG\r\n\x1a\n" + HEADER + before + pixels + after + chunk(b"IEND", b"")


def packed(card):
    return base64.b64encode((card if isinstance(card, str) else json.dumps(card)).encode())


OLD, NEW = ({**CARD, "name": name} for name in ("Old", "New"))
CHUNKS = {
    "tEXt": lambda key, data: (b"tEXt", key + b"\0" + data),
    "zTXt": lambda key, data: (b"zTXt", key + b"\0\0" + zlib.compress(data)),
    "iTXt": lambda key, data: (b"iTXt", key + b"\0\0\0\0\0" + data),
    "iTXt, compressed": lambda key, data: (b"iTXt", key + b"\0\1\0\0\0" + zlib.compress(data)),
}


@pytest.mark.parametrize("kind", CHUNKS)
@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind the pixels"])
def test_cards_in_pictures(kind, behind):
    old, new = (CHUNKS[kind](key, packed(card)) for key, card in ((b"chara", OLD), (b"ccv3", NEW)))
    for chunks, name in (([old], "Old"), ([new], "New"), ([new, old], "New"), ([old, new], "New")):
        picture = png(behind=chunks) if behind else png(*chunks)
        conversion = convert_data(picture, "in.png", max_reject=1)
        assert conversion.records[0].meta["character"] == name
        (entry,) = conversion.report["files"]
        assert entry["why"] == "PNG, character card, version 1"
        assert entry["sha256"] == hashlib.sha256(picture).hexdigest()


CARD_CHUNK = CHUNKS["tEXt"](b"chara", packed(CARD))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(), "holds no character card"),
        (png(CHUNKS["zTXt"](b"other", b"x")), "holds no character card"),
        (png(CHUNKS["tEXt"](b"chara", b"!!")), "is damaged .not JSON in base64"),
        (png(CHUNKS["tEXt"](b"chara", packed('{"name": '))), "is damaged .not JSON in base64"),
        (png(CHUNKS["tEXt"](b"chara", packed("[1]"))), "JSON that is not a character card"),
        (png(CHUNKS["tEXt"](b"chara", packed({"name": "Ada"}))), "JSON that is not a character card"),
        (png((b"zTXt", b"chara\0\0no zlib")), "is damaged .not JSON in base64"),
        (png(CARD_CHUNK)[:8], "picture is damaged"),
        (png(CARD_CHUNK)[:60], "picture is damaged"),
        (png(CARD_CHUNK)[:-26], "picture is damaged"),
        (png(CARD_CHUNK).replace(b"chara", b"chars"), "picture is damaged .*checksum"),
        (png(CHUNKS["zTXt"](b"chara", b"x" * 2_000_000)), "too much text .*MAX_TEXT_CHUNK"),
        (png(CHUNKS["iTXt, compressed"](b"chara", b"x" * 2_000_000)), "too much text .*MAX_TEXT_CHUNK"),
        (png(behind=[CHUNKS["zTXt"](b"chara", b"x" * 2_000_000)]), "too much text .*MAX_TEXT_CHUNK"),
        (png(*[CHUNKS["zTXt"](b"chara", b"x" * 1_000_000)] * 70), "too much text .*MAX_TEXT_MEMORY"),
        (
            png(CARD_CHUNK).replace(HEADER, chunk(b"IHDR", b"\0\0\xff\0\0\0\xff\0\x08\0\0\0\0")),
            "65,280 x 65,280 pixels",
        ),
    ],
)
def test_pictures_without_a_card_that_can_be_read(data, message):
    with pytest.raises(DataError, match=rf"in\.png: .*{message}"):
        convert_data(data, "in.png")


def test_a_card_in_a_picture_is_read_as_strictly_as_other_json():
    twice = json.dumps(CARD)[:-1] + ', "name": "Bo"}'
    (rejection,) = convert_data(png(CHUNKS["tEXt"](b"chara", packed(twice))), max_reject=1).rejections
    assert (rejection["code"], rejection["reason"]) == ("UNSAFE_JSON", 'the key "name" is there 2 times in one object')


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_a_picture_gives_a_card_or_a_message(seed):
    draw, read, messages = random.Random(seed), 0, []
    for _ in range(50):
        data = bytearray(png(CARD_CHUNK, behind=[CHUNKS["zTXt"](b"ccv3", packed(NEW))]))
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(8, len(data))] = draw.randrange(256)
        if draw.random() < 0.3:
            data = data[: draw.randint(8, len(data))]
        try:
            read += convert_data(bytes(data), "in.png").report["read"]
        except DataError as fault:
            messages.append(str(fault))
    assert read > 0, "some pictures can still be read"
    assert messages
    assert all(message.startswith("in.png: ") for message in messages)


LINES = [
    {"source_title": "一", "speaker": "旅人", "text": "你好"},
    {"source_title": "一", "speaker": "芙", "text": "本座听见了。"},
    {"source_title": "二", "speaker": "芙", "text": "自言自语。"},
    {"input": "关于「神之眼」", "speaker": "芙", "text": "亮晶晶的。"},
    {"input": "神之眼", "speaker": "芙", "text": "一枚水色的石头。"},
    {"input": "角色故事12", "speaker": "芙", "text": "很久以前。"},
    {"input": "生日", "speaker": "芙", "text": "不告诉你。"},
    {"source_title": "二", "speaker": "芙", "text": "……"},
    {"source_title": "二", "speaker": "芙", "text": "#"},
    {"source_title": "二", "speaker": "芙", "text": "（选项一触发）"},
    {"source_title": "二", "speaker": "芙", "text": "（他来了）"},
    {"input": "生日", "speaker": "芙", "text": "不告诉你。"},
]


def test_the_three_kinds_of_lines():
    conversion = convert_data(LINES, characters=("芙",), background=("生日",), drop_lines=LINE_KINDS)
    kinds = [record.meta["type"] for record in conversion.records]
    assert kinds == ["dialogue", "dialogue", "lore_qa", *["lore_background"] * 3]
    assert said(conversion) == [
        ("s", "你现在是芙。请模仿芙的语气、口癖和性格进行对话。"),
        ("u", "你好"),
        ("a", "本座听见了。"),
    ]
    assert said(conversion, 2)[0] == ("s", "你现在是芙。请根据你的背景设定回答问题。")
    assert said(conversion, 3)[:2] == [("s", "以下是关于芙的背景故事和设定描述。"), ("u", "神之眼")]
    assert conversion.report["system_prompt"] == "你现在是芙。请模仿芙的语气、口癖和性格进行对话。"
    assert conversion.report["duplicates"] == 1
    unused = conversion.report["speeches"]["not_used"]
    assert [
        unused[name] for name in ("line of dots only", "leftover mark", "stage note", "inner thoughts in brackets")
    ] == [1] * 4
    kept = convert_data(LINES, characters=("芙",), drop_lines=())
    assert kept.report["written"] == 10
    with pytest.raises(UsageError, match="--character must say"):
        convert_data(LINES)


@pytest.mark.parametrize(("weight", "times"), [(1, 4), (2.5, 10), (5, 20)])
def test_lore_is_weighted_exactly(weight, times):
    conversion = convert_data(LINES, characters=("芙",), val_ratio=0, lore_weight=weight)
    kinds = [record.meta["type"] for record in conversion.train]
    assert kinds.count("dialogue") == 3
    assert len(kinds) - 3 == times
    apart = convert_data(LINES, characters=("芙",), lore_apart=True, lore_weight=weight)
    assert len(apart.lore) == 4
    assert {record.meta["type"] for record in apart.train + apart.validation} == {"dialogue"}


def test_lore_comes_back_as_it_was(tmp_path):
    path = tmp_path / "in.json"
    path.write_text(json.dumps(LINES), encoding="utf-8")
    convert_paths(path, output=tmp_path / "a", characters=("芙",), lore_weight=2.5, val_ratio=0)
    convert_paths(tmp_path / "a" / "train.jsonl", output=tmp_path / "b", val_ratio=0)
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()
    convert_paths(path, output=tmp_path / "c", characters=("芙",), lore_apart=True)
    convert_paths(tmp_path / "c" / "lore.jsonl", output=tmp_path / "d", val_ratio=0)
    assert (tmp_path / "c" / "lore.jsonl").read_bytes() == (tmp_path / "d" / "train.jsonl").read_bytes()


def test_personal_data():
    text = (
        "Call 13812345678 or +14155550123, a.b@c.example, ID 11010519491231002X, card 4111 1111 1111 1111, year 2024."
    )
    assert dict(personal_data(text)) == {"phone": 2, "email": 1, "id": 1, "card": 1}
    conversion = convert_data([{"instruction": text, "output": "fine"}], redact=True)
    masked = said(conversion)[0][1]
    assert masked == "Call [phone] or [phone], [email], ID [id], card [card], year 2024."
    assert "Personal data" in " ".join(convert_data([{"instruction": text, "output": "x"}]).report["warnings"])


FRIEND = """消息记录（此消息记录为文本格式，不支持重新导入）
================================================================
消息分组:我的好友
================================================================
消息对象:小雨
================================================================

2023-01-10 10:00:00 小雨
在吗

2023-01-10 10:00:30 阿哲
在

================================================================
消息对象:小雨
================================================================

2023-01-10 10:01:00 小雨
吃了吗

2023-01-10 10:01:20 阿哲
吃了
"""


def test_a_chat_with_one_friend_has_no_numbers():
    conversion = convert_data(FRIEND, characters=("阿哲",))
    assert conversion.report["files"][0]["formats"] == {"qq": 1}
    assert [m["content"] for m in conversion.records[0].messages] == ["在吗", "在", "吃了吗", "吃了"]


def test_a_log_is_no_chat():
    lines = "".join(f"2023-01-10 10:00:0{n} INFO step {n} done\n" for n in range(9))
    with pytest.raises(DataError, match="no format recognised"):
        convert_data(lines)


@pytest.mark.parametrize("header", ["Speaker\tText", "角色\t台词", "Character\tDialogue"])
def test_a_table_of_speeches(header):
    rows = "Kai\tFirst: hello\nNova\tSecond: ho\n"
    conversion = convert_data(f"{header}\n{rows}", characters=("Nova",))
    assert conversion.report["files"][0]["formats"] == {"utterances": 1}
    assert [m["content"] for m in conversion.records[0].messages] == ["First: hello", "Second: ho"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1\r\n00:00:01,000 --> 00:00:02,500\r\nWe are here. It is late. Go on.\r\n\r\n" * 9, "subtitles"),
        ("[Script Info]\nTitle: x\n[Events]\nDialogue: 0,0:00:01.00\nDialogue: 0,0:00:02.00\n", "subtitles"),
        (
            'define e = Character("Eileen")\n\nlabel start:\n    e "Hello."\n    e "Again. And again. Yes."\n' * 9,
            "Ren'Py",
        ),
        ("<html><body><p>Alice: Hi</p>\nAlice: Hi\nBob: Ho\nAlice: so\n", "web page"),
    ],
)
def test_what_only_looks_like_prose_or_dialogue(text, what):
    with pytest.raises(DataError, match=what) as caught:
        convert_data(text)
    assert "--format NAME" in str(caught.value)


def test_the_dialogue_that_renpy_extracts():
    header = "Identifier\tCharacter\tDialogue\tFilename\tLine Number\tRen'Py Script\n"
    rows = 'start_1\t\tThe wind howled.\ta.rpy\t5\t"[what]"\nstart_2\tEileen\tHello.\ta.rpy\t6\te "[what]"\n'
    conversion = convert_data(header + rows, characters=("Eileen",), narration="brackets")
    assert [m["content"] for m in conversion.records[0].messages] == ["（The wind howled.）", "Hello."]


def test_a_chat_in_which_nobody_answers_in_time_is_advised():
    lines = "".join(f"2023-01-1{n} 1{n % 2}:00:00 {('小雨', '阿哲')[n % 2]}(1234{n % 2})\nline {n}\n" for n in range(8))
    conversion = convert_data(lines, characters=("阿哲",))
    said = verdict(conversion.outcome.counts, 0.05)
    assert "4 lines of the character have no line before them" in said
    assert "--max-gap" in said
    assert len(convert_data(lines, characters=("阿哲",), max_gap=10_000).records) == 1
