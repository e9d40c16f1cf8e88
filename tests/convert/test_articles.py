"""Articles: nothing of the author lost, chunks of the wanted length, prompts that do not hold their answers."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making.converting import convert_data, convert_paths

from persona.convert.formats import articles
from persona.errors import UsageError


def characters(text):
    return [(place, place + 1) for place in range(len(text))]


def words(text):
    """Tokens of one to four characters, cut where the text decides."""
    places, start = [], 0
    while start < len(text):
        end = min(len(text), start + 1 + ord(text[start]) % 4)
        places.append((start, end))
        start = end
    return places


PIECES = st.sampled_from(
    [*"。！，", "雾来了", "我没有开门", "\n\n", "\n", "  ", "The tide waits. ", "x" * 40, "灯" * 30, "……」"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=400).map("".join), st.sampled_from([characters, words]))
def test_joined_chunks_are_the_text_and_have_the_length(text, tokenize):
    chunks = articles.cut(text, tokenize, 60, 160)
    assert "".join(chunks) == text
    if len(tokenize(text)) >= 60:
        assert all(60 <= len(tokenize(chunk)) <= 160 for chunk in chunks)
    else:
        assert len(chunks) == 1


@pytest.mark.parametrize("text", ["灯" * 2000, "灯塔  看守人  " * 250, "字，" * 1000])
def test_paragraphs_without_sentences_are_cut(text):
    chunks = articles.cut(text, characters, 300, 800)
    assert "".join(chunks) == text
    assert len(chunks) >= 3
    assert all(300 <= len(chunk) <= 800 for chunk in chunks)


def test_borders_are_taken_in_order():
    text = "字" * 100 + "\n\n" + "字" * 60 + "。" + "字" * 200
    assert articles.cut(text, characters, 50, 190)[0].endswith("\n\n")
    assert articles.cut(text.replace("\n\n", "字字"), characters, 50, 190)[0].endswith("。")


def test_cleaning():
    text = "# 雾\n\n![图](a.png)看[这里](http://x)。\n\n\n\n- 一\n2. 二\n> 引\n**粗**<br>\n"
    assert articles.clean(text) == "雾\n\n看这里。\n\n一\n二\n引\n粗"
    from collections import Counter

    dropped = Counter()
    kept = articles.without_footers("词\n●●●\ngh_0a1b2c3d4e5f\n长按关注\n尾", {"长按关注"}, dropped)
    assert kept == "词\n尾"
    assert dropped == {"footers and ornaments": 2, "lines that recur in many articles": 1}
    assert articles.recurring_lines(["a\nb", "a\nc", "a\nd", "e"]) == {"a"}


def prose(seed, sentences=60):
    draw = random.Random(seed)
    made = [
        "".join(draw.choices("灯塔看守人今晚有雾船已经回港你为什么还不睡", k=draw.randint(6, 30)))
        for _ in range(sentences)
    ]
    return "".join(sentence + draw.choice("。！？啊。…") for sentence in made)


@pytest.mark.parametrize("seed", range(20))
def test_templates(seed):
    chunk = prose(seed, 20) + (
        "一个非常长而没有任何标点符号的句子用来试试改写的时候会不会出现很长的重复片段" if seed % 2 else ""
    )
    prompt, answer = articles.continuation(chunk) or ("", "")
    first = prompt.removeprefix(f"{articles.CONTINUE}\n")
    assert first + answer == chunk
    assert answer not in prompt
    made = articles.rewriting(chunk)
    if made is not None:
        assert not articles.shares_span(made[0], made[1])
    prompt, answer = articles.expansion(chunk, "题") or ("", "")
    assert "标题：题" in prompt
    assert answer == chunk.strip()


def test_a_span_in_common_is_found():
    assert articles.shares_span("x" + "灯塔" * 10, "灯塔" * 10)
    assert not articles.shares_span("灯塔" * 9, "灯塔" * 10)


def tokenizer():
    return "characters", characters


def test_articles_are_split_whole_and_counted(tmp_path):
    for number in range(12):
        folder = tmp_path / "in" / f"{number:02}"
        folder.mkdir(parents=True)
        (folder / "a.md").write_text(f"# 题{number}\n\n{prose(number)}\n\n长按关注\n", encoding="utf-8")
        (folder / "meta.json").write_text(json.dumps({"date": f"20{10 + number % 2}-01-01"}), encoding="utf-8")
    (tmp_path / "in" / "目录.md").write_text("# 目录\n\n" + "[一](1)\n" * 99, encoding="utf-8")
    conversion = convert_paths(tmp_path / "in", output=tmp_path / "out", tokenizer=tokenizer, val_ratio=0.25)
    assert conversion.names[:3] == ["sft_train.jsonl", "sft_val.jsonl", "dataset_stats.json"]
    found = json.loads((tmp_path / "out" / "dataset_stats.json").read_text(encoding="utf-8"))
    assert (found["total_articles"], found["years"]) == (12, {"2010": 6, "2011": 6})
    assert found["total_samples"] == found["train_samples"] + found["val_samples"] == len(conversion.records)
    assert found["dropped"]["lines that recur in many articles"] == 12
    assert found["chunks_outside"] == 0
    assert {record.meta["type"] for record in conversion.records} <= {"style_continue", "style_expand", "style_rewrite"}
    assert {record.system for record in conversion.records} == {"你是该公众号作者，保持其叙述节奏与转折。"}
    half = convert_paths(tmp_path / "in", tokenizer=tokenizer, templates={"continue": 1, "expand": 0.5, "rewrite": 0})
    kinds = half.report["kinds"]
    assert "style_rewrite" not in kinds
    assert 0 < kinds["style_expand"] < kinds["style_continue"] == found["chunks"]


def test_articles_need_a_tokenizer_and_some_length():
    with pytest.raises(UsageError, match="--tokenizer"):
        convert_data(prose(1))
    short = convert_data("# 题\n\n太短。", format="articles", tokenizer=tokenizer)
    assert short.report["articles"]["dropped"] == {"articles too short": 1}
