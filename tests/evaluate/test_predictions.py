"""Replies of any tool are read, and their figures are the field's."""

import json

import pytest
from sacrebleu.metrics.bleu import BLEU

from persona.errors import DataError
from persona.evaluate.lore_recall import Terms, found_in, questions, recall_of
from persona.evaluate.predictions import (
    Prediction,
    asked,
    breaks_character,
    figures_of,
    other_speakers,
    read_predictions,
    rouge_l,
    write_predictions,
)
from persona.evaluate.results import Sides
from persona.records import Record

SAID = [Prediction("Who?", "Aye, I keep the lamp.", "Aye, I keep the lamp."), Prediction("谁？", "灯", "塔\u2028灯")]


def record(question, reply, **meta):
    return Record(({"role": "user", "content": question}, {"role": "assistant", "content": reply}), meta)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "预 测.json"
    write_predictions(path, SAID)
    assert json.loads(path.read_text(encoding="utf-8"))[0] == {
        "input": "Who?",
        "predict": "Aye, I keep the lamp.",
        "target": "Aye, I keep the lamp.",
    }
    assert read_predictions(path) == SAID


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"prompt": "a", "predict": "b", "label": "c"}\n{"prompt": "d", "predict": "", "label": "f"}\n',
            2,
        ),  # LLaMA-Factory
        ('[{"question": "a", "response": "b"}]', 1),
        ('["one", "two", "three"]', 3),
        ("one\ntwo\n\n", 2),
        ("one\nstill one\n\ntwo\n", 2),
        ("one\r\n\r\ntwo\r\n", 2),
        ("[laughs] Aye.\n{grins} Nay.\n", 2),
        ("{grins} Nay.\n", 1),
        ("\ufeff雾来了。\n船回了。", 2),
    ],
)
def test_texts_of_other_tools_are_read(tmp_path, text, expected):
    path = tmp_path / "texts.txt"
    path.write_text(text, encoding="utf-8", newline="")
    found = read_predictions(path)
    assert len(found) == expected
    assert all(one.predict or one.target for one in found)
    assert not found[0].predict.startswith("\ufeff")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b"\n \n", "empty"),
        ("a.txt", b"\xff\xfe1", "not UTF-8"),
        ("a.json", b'[{"predict": "a"}, 3]', "entry 2"),
        ("a.json", b'[{"text": "a"}]', "found no reply"),
        ("a.json", b'[{"predict": "a"},', "not JSON"),
        ("a.jsonl", b'{"predict": "a"}\n{"predict": ', ":2: not JSON"),
        ("a.jsonl", b'{"predict": "a", "predict": "b"}', "is there 2 times"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_predictions(tmp_path / name)


def test_there_is_one_prediction_a_record_and_its_target_is_the_last_reply():
    talk = Record(
        (
            {"role": "system", "content": "s"},
            *({"role": ("user", "assistant")[i % 2], "content": f"m{i}"} for i in range(4)),
        )
    )
    assert asked([talk, record("q", "r")]) == [Prediction("m2", "", "m3"), Prediction("q", "", "r")]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_a_perfect_reply_has_perfect_figures():
    lines = ["Aye, I keep the lamp tonight.", "The tide waits for nobody, mind."]
    found = figures_of([Prediction("?", line, line) for line in lines], "en", (), [True, False])
    assert (found.bleu, found.chrf, found.rouge_l) == (100.0, 100.0, 100.0)
    assert (found.length_ratio, found.stops, found.breaks_character, found.count) == (1.0, 0.5, 0.0, 2)


def test_replies_that_have_nothing_in_common_have_none():
    found = figures_of([Prediction("?", "xxx", "ooo ooo")], "en", (), None)
    assert (found.chrf, found.rouge_l, found.stops) == (0.0, 0.0, None)
    assert figures_of([Prediction("?", "", "ooo")], "en", (), None).length_ratio == 0


def test_chinese_is_cut_into_characters():
    pair = [Prediction("?", "今晚的潮水很大，船都回港了。", "今晚的潮水很大，船都没回港。")]
    zh = figures_of(pair, "zh", (), None)
    assert zh.bleu == pytest.approx(BLEU(tokenize="zh").corpus_score([pair[0].predict], [[pair[0].target]]).score)
    assert zh.bleu > 50
    assert figures_of(pair, "en", (), None).bleu < 20
    assert zh.rouge_l == pytest.approx(100 * 11 / 12)


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat", "the dog and the cat", 2 * (1 * 2 / 5) / (1 + 2 / 5)),
        ("police killed the gunman", "police kill the gunman", 0.75),  # the examples of Lin 2004
        ("gunman kill police the", "police kill the gunman", 0.5),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("x y", "a b", 0.0),
    ],
)
def test_rouge_l(said, wanted, value):
    assert rouge_l(said, wanted) == pytest.approx(value)


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("作为一个AI，我没有猫。", True),
        ("作为AI语言模型，我不能回答。", True),
        ("我只是一个语言模型。", True),
        ("As an AI language model, I cannot.", True),
        ("I'm an AI assistant.", True),
        ("I am just an AI.", True),
        ("Dorcas: Here is the post.", True),
        ("Aye.\nDorcas: And a letter.", True),
        ("User: hello", True),
        ("芽衣：你好", True),
        ("Mind this: the tide waits.", False),
        ("I said to Dorcas: no.", False),
        ("作为灯塔的看守人，我不睡。", False),
        ("Aye, an aim is all I need.", False),
    ],
)
def test_falling_out_of_the_character_is_noticed(reply, found):
    told = [record("Dorcas: Good day!\n芽衣：早上好", "Aye.", character="Tamsin")]
    assert (breaks_character(reply, other_speakers(told)) is not None) is found


def test_the_own_name_is_no_other_speaker():
    told = [record("Tamsin: I said so.\nDorcas: You did.", "Aye.", character="Tamsin")]
    others = other_speakers(told)
    assert "dorcas" in others
    assert "tamsin" not in others


# --- the lore --------------------------------------------------------------------------------------------------------

WORLD = [
    record("What is your cat called?", "Aye, he's Admiral Biscuit, ginger and fat.", type="lore_qa"),
    record(
        "What is your boat?",
        "Aye, the Soup Ladle, and she leaks.",
        type="lore_qa",
        keywords=["Soup Ladle", "leaks"],
    ),
    record("What is your cat called?", "Aye, another answer.", type="lore_qa"),
    record("Good day.", "Aye, says Old Meg. Admiral Biscuit sleeps.", type="dialogue"),
]


def texts(records):
    return [one.turns[1]["content"] for one in records]


def test_facts_are_the_given_keywords_or_the_names_of_the_reference():
    found = questions([(one, number < 2) for number, one in enumerate(WORLD)], texts(WORLD))
    assert [(one.question, one.trained, one.given) for one in found] == [
        ("What is your cat called?", True, False),
        ("What is your boat?", True, True),
    ]
    assert found[0].facts[0] == "Admiral Biscuit"
    assert found[1].facts == ("Soup Ladle", "leaks")


def test_what_the_question_says_and_what_is_always_said_are_no_facts():
    always = ["Aye, little barnacle, mind the tide, says Old Meg."] * 20
    terms = Terms([*always, "Aye, little barnacle, I knit by the lamp, says Old Meg.", "The lamp is lit."])
    facts = terms.facts("Where is the lamp?", "Aye, little barnacle, the lamp is in Pellow Cove, says Old Meg.")
    assert facts[0] == "Pellow Cove"
    assert not {"Old Meg", "barnacle", "little", "lamp", "tide"} & set(facts)


def test_in_chinese_facts_are_strings_that_come_back():
    world = ["我的猫叫镇纸先生，是灰毛。", "镇纸先生又睡了。", "小店打烊了。", "雨停了再走罢。", "今晚的潮水很大。"] + [
        "客官请坐。"
    ] * 60
    assert Terms(world).facts("你的猫叫什么？", "哎呀客官，它叫镇纸先生。")[0] == "镇纸先生"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("He is ADMIRAL BISCUIT.", ("Admiral Biscuit",)),
        ("Admiral Biscuits are good.", ()),
        ("三十年前，镇纸就来了，1984年。", ("镇纸", "1984")),
        ("In 19845 I forgot.", ()),
        ("", ()),
    ],
)
def test_a_fact_is_found_as_a_whole_word(reply, expected):
    assert found_in(reply, ("Admiral Biscuit", "镇纸", "1984")) == expected


def test_the_share_of_the_facts_is_the_mean_over_the_questions():
    found = questions([(one, True) for one in WORLD], texts(WORLD))
    facts = found[0].facts
    knows = [" ".join(facts), "The Soup Ladle."]
    tuned, nothing = Sides(knows, ["Hm.", "No."]), Sides(["", ""], None)
    recall = recall_of(found, tuned, nothing, 0)
    assert recall.with_system.tuned.value == 0.75
    assert recall.with_system.base.value == 0.0
    assert (recall.without_system.tuned.value, recall.without_system.base) == (0.0, None)
    assert recall.questions[1].with_system.tuned.found == ("Soup Ladle",)
    assert recall.questions[1].without_system.base is None
    assert not recall.facts_given
