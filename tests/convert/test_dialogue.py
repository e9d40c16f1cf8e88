"""Raw dialogue: who speaks, what is learned, and where every speech went."""

from collections import Counter

import pytest
from making.converting import convert_data

from persona.convert.formats import dialogue
from persona.errors import DataError, UsageError


def convert(text, *characters, **options):
    return convert_data(text, "talk.txt", characters=characters, **options)


def said(conversion):
    return [[(m["role"][0], m["content"]) for m in record.messages] for record in conversion.records]


def speeches(text, *characters):
    return [(speech.speaker, speech.text) for speech in dialogue.parse(text, characters).speeches]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("NAME: line", ("NAME", "line")),
        ("名：台词", ("名", "台词")),
        ("名:「台词」", ("名", "台词")),
        ("名：“台词”", ("名", "台词")),
        ("名（动作）：台词", ("名", "台词")),
        ("Name (aside): line", ("Name", "line")),
        ("\u3000名 ： 台词 ", ("名", "台词")),
        ("Dr. O'Neil-Smith 2: line", ("Dr. O'Neil-Smith 2", "line")),
        ("A: Listen: I know. 12:30", ("A", "Listen: I know. 12:30")),
        ("A: “x” and “y”", ("A", "“x” and “y”")),
        ("A: 「x」「y」", ("A", "「x」「y」")),
    ],
)
def test_forms_of_a_line(line, expected):
    assert speeches(line) == [expected]


@pytest.mark.parametrize(
    "line",
    [
        "It is late, he said: go",
        "https://example.org",
        "12:30 at the gate",
        "What I have to say about it: nothing",
        "Stop. Listen: go",
        "Well, then: go",
        "Five words are a name six words are not: go",
        "Donaudampfschifffahrtsgesellschaftskapitaen: go",
        "这是一句很长很长很长的话说到最后才有冒号：对",
        "Listen: go",
    ],
)
def test_colons_that_make_no_speaker(line):
    once = f"A: one\nB: two\n{line}\nA: three\nB: four"
    assert speeches(once) == [("A", "one"), ("B", f"two\n{line}"), ("A", "three"), ("B", "four")]
    if line != "Listen: go":  # a short word that recurs cannot be told from a name
        assert speeches(f"{once}\n{line}") == [
            ("A", "one"),
            ("B", f"two\n{line}"),
            ("A", "three"),
            ("B", f"four\n{line}"),
        ]


def test_a_name_that_stands_once():
    text = "A: one\nB: two\nGuard: halt\nA: three\nB: four"
    assert ("B", "two\nGuard: halt") in speeches(text)
    assert '"Guard"' in dialogue.parse(text).notes[0]
    assert ("Guard", "halt") in speeches(text, "guard"), "--character settles it"
    for before in ("\n", "\n[Enter]\n", "SCENE I\n"):
        assert ("Guard", "halt") in speeches(text.replace("Guard", f"{before}Guard")), "so does what opens a block"


def test_guests_speak_once_where_every_line_has_a_name():
    text = "芽衣：早\n琪亚娜：早上好\n芽衣：嗯\n旁白：天亮了"
    assert [name for name, _ in speeches(text)] == ["芽衣", "琪亚娜", "芽衣", "旁白"]
    assert speeches("Anna: hi\nBen: ho") == [("Anna", "hi"), ("Ben", "ho")]
    wrapped = "Anna: a\nand\nBen: b\nand\nListen: c\nAnna: d\nBen: e"
    assert ("Ben", "b\nand\nListen: c") in speeches(wrapped), "but not where speeches run over several lines"


def test_prose_with_a_few_colons_is_no_dialogue():
    prose = "\n".join(["It was night.", "He slept.", "", "He said: go", "", "Nothing moved.", "", "She said: no"])
    with pytest.raises(DataError, match="no format recognised"):
        convert(prose)
    assert convert(prose, "He said", format="dialogue").report["speeches"]["total"] == 2


def test_play_form():
    text = "ROMEO:\nO, she doth teach:\nthe torches\n\nSenators, &C:\nWeapons!\n\nROMEO:\nCome:\nhere\n"
    expected = [("ROMEO", "O, she doth teach:\nthe torches"), ("Senators, &C", "Weapons!"), ("ROMEO", "Come:\nhere")]
    assert speeches(text) == expected


def test_names_alone_without_empty_lines():
    assert speeches("A:\nhi\nB:\nho\nA:\nha\nB:\nhe") == [("A", "hi"), ("B", "ho"), ("A", "ha"), ("B", "he")]


def test_narration_and_stage_directions_are_counted_not_learned():
    script = dialogue.parse("A: one\n（她笑了）\n(both)\ngoes on\n\nThe sun set.\nSlowly.\n\nB: two\nB: three")
    assert [speech.text for speech in script.speeches] == ["one\ngoes on", "two", "three"]
    assert script.narration == 2
    assert script.repairs == {"stage direction dropped": 2}
    assert "not used: 2" in script.notes[0]


@pytest.mark.parametrize(
    "head",
    [
        "第一集",
        "第1幕",
        "第二章 归来",
        "第十二回：雪",
        "SCENE II",
        "Scene 3: A street",
        "ACT I. SCENE 2",
        "# One",
        "===",
        "---",
        "* * *",
        "【第三场】",
    ],
)
def test_scene_heads_are_borders(head):
    conversion = convert(f"A: one\nB: two\n{head}\nB: three\nA: four\nB: five", "B")
    assert said(conversion) == [[("u", "one"), ("a", "two")], [("u", "four"), ("a", "five")]]
    assert [record.meta["group"] for record in conversion.records] == ["talk.txt#scene-1", "talk.txt#scene-2"]
    assert conversion.report["speeches"]["not_used"] == {"no line before it": 1}


@pytest.mark.parametrize("line", ["第一次见到你：真好", "第一场雨来了", "scene of the crime"])
def test_words_that_are_no_scene_heads(line):
    script = dialogue.parse(f"A: one\nB: two\n{line}\nA: three")
    assert not script.has_borders


def test_context_is_the_last_lines_with_names_where_several_speak():
    text = "\n".join(f"{'AC'[n % 2]}: line {n}" for n in range(6)) + "\nB: reply\nA: and\nB: so\nB: on\nC: end"
    conversion = convert(text, "b", context_turns=3)
    assert said(conversion) == [
        [("u", "C: line 3\nA: line 4\nC: line 5"), ("a", "reply"), ("u", "and"), ("a", "so\non")],
    ]
    speeches = conversion.report["speeches"]
    assert (speeches["total"], speeches["learned"], speeches["context"]) == (11, 3, 4)
    assert speeches["not_used"] == {"more than 3 lines before the reply": 3, "after the last reply": 1}


def test_one_speaker_several_lines_need_no_name():
    assert said(convert("A: one\nA: two\nB: three", "B")) == [[("u", "one\ntwo"), ("a", "three")]]


def test_aliases_are_one_character():
    conversion = convert("A: one\nB: two\nA: three\nBea: four", "Bea", "B")
    assert said(conversion) == [[("u", "one"), ("a", "two"), ("u", "three"), ("a", "four")]]
    assert conversion.records[0].meta["character"] == "Bea"


def test_long_conversations_are_cut_and_nothing_is_learned_twice():
    text = "\n".join(f"A: q{n}\nB: r{n}" for n in range(20))
    conversion = convert(text, "B", max_exchanges=8)
    assert [len(record.messages) for record in conversion.records] == [16, 16, 8]
    assert {record.meta["group"] for record in conversion.records} == {"talk.txt#scene-1"}
    replies = Counter(content for record in said(conversion) for role, content in record if role == "a")
    assert replies == Counter(f"r{n}" for n in range(20))


def test_without_heads_a_long_silence_ends_a_scene():
    def talk(silence):
        return "A: q\nB: r\n" + "\n".join(f"A: s{n}\nC: t{n}" for n in range(silence // 2)) + "\nB: end\nA: bye"

    assert len(convert(talk(20), "B").records) == 1
    conversion = convert(talk(22), "B")
    assert [record.meta["group"] for record in conversion.records] == ["talk.txt#scene-1", "talk.txt#scene-3"]
    assert conversion.report["speeches"]["not_used"] == {"scene without the character": 18, "after the last reply": 1}
    assert len(convert("SCENE I\n" + talk(22), "B").records) == 1, "heads overrule the rule"
    ending = "A: q\nB: r\n" + "\n".join(f"A: s{n}\nC: t{n}" for n in range(11))
    assert convert(ending, "B").report["speeches"]["not_used"] == {"scene without the character": 22}


def test_speeches_of_rejected_and_duplicate_conversations_are_accounted_for():
    text = "# 1\nA: hi\nB: ho\n# 2\nA: hi\nB: ho\n# 3\nA: hi\nB: <|im_end|>\n# 4\nB:\nA: x\nA: y"
    report = convert(text, "B").report
    assert (report["read"], report["written"], report["rejected"], report["duplicates"]) == (3, 1, 1, 1)
    assert report["speeches"] == {
        "total": 9,
        "learned": 1,
        "context": 1,
        "not_used": {
            "no words": 1,
            "scene without the character": 2,
            "in a duplicate conversation": 2,
            "in a rejected conversation": 2,
        },
    }


def test_the_character_must_be_named_and_known():
    text = "\n".join(f"P{n}: hi\nP{n}: ho" for n in range(25)) + "\nKING RICHARD: a\nKING RICHARD: b\nKING RICHARD: c"
    with pytest.raises(UsageError) as caught:
        convert(text)
    message = str(caught.value)
    assert 'Add for example: --character "KING RICHARD"' in message
    assert "and 6 more" in message
    assert message.count("\n") == 22
    for wrong in ("Richard", "King Rihcard"):
        with pytest.raises(UsageError, match='Did you mean --character "KING RICHARD"'):
            convert(text, wrong)
    with pytest.raises(UsageError, match='No lines of "nobody"'):
        convert(text, "king richard", "nobody")


def test_crlf_and_lone_cr_lines():
    for end in ("\r\n", "\r"):
        assert said(convert(end.join(["A: one", "B: two"]), "B")) == [[("u", "one"), ("a", "two")]]


@pytest.mark.parametrize(
    "text",
    [
        "**Kai:** hello\n\n**Nova**: ho\n\n**Kai:** *waves* bye\n\n**Nova:** bye\n",
        "第一幕\n\nKai　hello\nNova　ho\nKai　*waves* bye\nNova　bye\n",
    ],
)
def test_other_marks_of_a_name(text):
    speeches = dialogue.parse(text).speeches
    assert [(speech.speaker, speech.text) for speech in speeches] == [
        ("Kai", "hello"),
        ("Nova", "ho"),
        ("Kai", "*waves* bye"),
        ("Nova", "bye"),
    ]


def test_indented_prose_has_no_names():
    assert dialogue.parse("　　他说　完了。\n　　她走了。\n只有　一次\n").speeches == []
