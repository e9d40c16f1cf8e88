"""Each measure of style by itself: what it counts, and the values it must have."""

import json
import math
from collections import Counter
from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
import pytest
from making.writers import texts

from persona.evaluate.results import Sides
from persona.evaluate.style import counting
from persona.evaluate.style import words as lexicon
from persona.evaluate.style.compare import compare
from persona.evaluate.style.distances import jensen_shannon
from persona.evaluate.style.phrases import (
    catch_phrases,
    distinct,
    diversity,
    log_odds,
    moving_type_token_ratio,
    self_bleu,
)
from persona.evaluate.style.words import bigrams, language, passages, segmenter, sentences, units, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("你好！走吧。", ["你好！", "走吧。"]),
        ("「走吧。」他说……好", ["「走吧。」", "他说……", "好"]),
        ('He said "No." Then 3.14 e.g. this?! Yes', ['He said "No."', " Then 3.14 e.g.", " this?!", " Yes"]),
        ("没有标点  也有句子\n换行", ["没有标点  ", "也有句子\n", "换行"]),
        ("", []),
        ("。。。", ["。。。"]),
    ],
)
def test_sentences_keep_their_delimiters(text, expected):
    assert sentences(text) == expected
    assert "".join(sentences(text)) == text


def test_passages_lose_no_character():
    for text in ("x" * 3000, " ".join(texts("en", "a", 60)), "".join(texts("zh", "a", 90)), "short"):
        parts = passages(text)
        assert "".join(parts) == text
        assert len(text) <= 1000 or max(map(len, parts)) <= 500


def test_words_are_cut_as_the_result_says():
    assert words("Don’t 我喜欢书, OK", bigrams) == ["don't", "我喜", "喜欢", "欢书", "ok"]
    assert [("𠮷a b")[start:end] for start, end in units("𠮷a b")] == ["𠮷", "a", "b"]
    assert segmenter("en") == (bigrams, "words")
    assert segmenter("zh")[1].startswith("jieba" if find_spec("jieba") else "character bigrams")
    assert (language(["你好 world"]), language(["hello world"]), language([])) == ("zh", "en", "en")


@pytest.mark.skipif(find_spec("jieba") is None, reason="jieba is not installed")
def test_jieba_cuts_words():
    cut, name = segmenter("zh")
    assert name.startswith("jieba")
    assert words("我喜欢读书", cut) == ["我", "喜欢", "读书"]


def test_marks_count_every_character_once():
    text = "好，OK！ 12 😀…\n\n～"
    found = Counter(lexicon.marks(text))
    assert found["，"] == found["！"] == found["…"] == found["～"] == found["emoji"] == 1
    assert (found["Latin letters"], found["digits"], found["new lines and double spaces"]) == (2, 2, 1)
    assert found.total() == len(text)


def test_the_stop_words_are_28():
    assert len(set(lexicon.STOP_WORDS)) == 28
    assert lexicon.STOP_WORD.findall("一个人没有自己") == ["一个", "人", "没有", "自己"]


def test_jensen_shannon_has_its_known_values():
    found = jensen_shannon(np.array([[1.0, 0], [0.5, 0.5], [1, 0]]), np.array([[0, 1.0], [0.5, 0.5], [0.5, 0.5]]))
    assert found == pytest.approx([1, 0, 1.5 - 0.75 * math.log2(3)], abs=1e-12)


def test_samples_have_the_length_asked_for_and_share_no_text():
    generator = np.random.default_rng(1)
    characters = generator.integers(10, 90, 40).astype(float)
    order = counting.orders(generator, 30, 40)
    times = counting.multiplicities(generator, 30, 40)
    first = counting.weights(order, times, characters, 400)
    second = counting.weights(order, times * (first == 0), characters, 400)
    assert first @ characters == pytest.approx(np.full(30, 400), rel=1e-5)
    assert second @ characters == pytest.approx(np.full(30, 400), rel=1e-5)
    assert not (first * second).any()


def test_diversity_has_its_known_values():
    assert distinct(["a", "b", "a", "b"], 1) == 0.5
    assert distinct(["a", "b", "a", "b"], 2) == pytest.approx(2 / 3)
    several = list("abcabdeaafg")
    windows = [several[at : at + 4] for at in range(len(several) - 3)]
    assert moving_type_token_ratio(several, 4) == pytest.approx(np.mean([len(set(w)) / 4 for w in windows]))
    assert moving_type_token_ratio(list("aba"), 50) == pytest.approx(2 / 3)


def test_self_bleu_equals_a_plain_computation():
    sets = [text.split() for text in texts("en", "a", 12)] + [["the", "river", "of", "the", "river", "of", "it"]] * 2
    matched, possible, length, closest = [0] * 4, [0] * 4, 0, 0
    for at, text in enumerate(sets):
        rest = sets[:at] + sets[at + 1 :]
        for n in range(1, 5):
            grams = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
            for gram, count in grams.items():
                most = max(sum(tuple(o[i : i + n]) == gram for i in range(len(o) - n + 1)) for o in rest)
                matched[n - 1] += min(count, most)
                possible[n - 1] += count
        length += len(text)
        closest += min((abs(len(o) - len(text)), len(o)) for o in rest)[1]
    expected = math.prod(m / p for m, p in zip(matched, possible, strict=True)) ** 0.25
    assert expected > 0
    assert self_bleu(sets) == pytest.approx(expected * min(1, math.exp(1 - closest / length)))
    assert self_bleu([["a", "b", "c", "d", "e"]] * 3) == 1
    assert self_bleu([["a"], ["b"]]) == 0


def test_diversity_does_not_rise_with_the_number_of_texts():
    sets = {"author": texts("en", "a", 40), "base": texts("en", "a", 160, seed=2), "tuned": ["too little"]}
    found = {
        level.name: level
        for level in diversity({k: [t.split() for t in v] for k, v in sets.items()}, np.random.default_rng(1))
    }
    assert list(found) == ["distinct-1", "distinct-2", "moving-average type-token ratio", "self-BLEU"]
    for name, level in found.items():
        assert level.side.base.value == pytest.approx(level.author.value, rel=0.25), name
        assert (level.side.tuned.value, level.side.tuned.reason) == (None, "tuned: too little text"), name


def test_log_odds_are_those_of_the_formula():
    first, second = Counter({("a",): 30, ("b",): 10}), Counter({("a",): 10, ("b",): 30})
    found = log_odds(first, second)
    assert found["a",] == pytest.approx(-found["b",])
    inside = (30 + 250, 10 + 250)  # a prior of 500 words, half of them each
    odds = sum(sign * math.log(k / (540 - k)) for k, sign in zip(inside, (1, -1), strict=True))
    assert found["a",] == pytest.approx(odds / math.sqrt(1 / inside[0] + 1 / inside[1]))


def test_catch_phrases_are_found_with_their_rates():
    plain = texts("zh", "base", 40)
    author = [text + "雨停了再走罢。" if at % 2 else text for at, text in enumerate(texts("zh", "base", 40, seed=2))]
    found = catch_phrases({"author": author, "base": plain, "tuned": author[:20]}, "zh")
    assert found[0].text == "雨停了再走罢"  # the whole of it, and none of its parts
    assert not any(phrase.text in found[0].text for phrase in found[1:])
    characters = sum(len(units(text)) for text in author)
    assert found[0].author == pytest.approx(20 * 1000 / characters)
    assert found[0].rate.base == 0 < found[0].rate.tuned


def test_levels_and_distributions_are_those_of_the_texts():
    author, base = ["你好，世界！！", "我有一个苹果。", "走吧。", "好吧，那就这样。"] * 3, texts("zh", "base", 30)
    found = compare(author, Sides(base, base), 1, 10)
    level = {each.name: each.author.value for each in found.levels}
    assert level["text length"] == pytest.approx((7 + 7 + 3 + 8) / 4)
    assert level["sentence length"] == pytest.approx((4 + 6 + 2 + 6) / 4)
    assert level["punctuation marks"] == pytest.approx(1000 * (3 + 1 + 1 + 2) / 25)
    if found.words == "character bigrams":  # 你 好, 我 有 一个, 好 就 这
        assert level["the 28 stop words of older reports"] == pytest.approx((2 + 4 + 0 + 3) / 18)
    drawn = {each.name: each for each in found.distributions}
    assert list(drawn) == ["text length", "sentence length", "punctuation", "function words"]
    for each in found.distributions[:2]:
        assert sum(each.author) == pytest.approx(1)
        assert len(each.author) == len(each.labels) == len(each.side.base)
    marks = dict(zip(drawn["punctuation"].labels, drawn["punctuation"].author, strict=True))
    assert marks["！"] == pytest.approx(1000 * 2 / 25)
    json.dumps(asdict(found), allow_nan=False)
