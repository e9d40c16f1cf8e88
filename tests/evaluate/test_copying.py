"""What a reply has copied is found with its source; what everybody says is not."""

import random

import pytest

from persona.evaluate.copying import COMMON, LEAST, copied_spans, index_training

WORDS = [
    f"{a}{b}" for a in ("ba", "ke", "li", "mo", "nu", "sa", "to", "vi") for b in ("dren", "fal", "gos", "run", "tep")
]
PHRASE = "so says old meg and she never lied to me"  # ten words


def speech(generator, words=40):
    return " ".join(generator.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def training():
    generator = random.Random(1)
    return [speech(generator) for _ in range(300)]


def test_a_pasted_reply_is_found_with_its_source(training):
    index = index_training(training)
    for source in (0, 17, 299):
        found = copied_spans(training[source], index)
        assert found.share == 1
        assert found.longest is not None
        assert (found.longest.source, found.longest.tokens) == (source, 40)
        assert found.longest.text == training[source]


def test_the_ranges_mark_the_copied_characters_in_reply_and_source(training):
    copied = " ".join(training[5].split()[10:25])
    reply = f"Well now, {copied.upper()}! That is all."
    found = copied_spans(reply, index_training(training))
    (span,) = found.spans
    assert reply[span.start : span.end] == copied.upper() == span.text
    assert training[5][span.source_start : span.source_end] == copied
    assert (span.source, span.tokens, found.copied_tokens, found.tokens) == (5, 15, 15, 20)
    assert found.share == 15 / 20


@pytest.mark.parametrize("tokens", [LEAST - 1, LEAST])
def test_eight_tokens_are_the_least(training, tokens):
    copied = " ".join(training[5].split()[:tokens])
    assert bool(copied_spans(f"x {copied} y", index_training(training)).spans) is (tokens >= LEAST)


def test_two_sources_are_two_spans(training):
    reply = " ".join(training[3].split()[:12] + training[9].split()[20:])
    found = copied_spans(reply, index_training(training))
    assert [span.source for span in found.spans] == [3, 9]
    assert found.share == 1
    assert found.longest == found.spans[1]


def test_a_common_phrase_is_not_flagged_but_a_rare_one_is(training):
    generator = random.Random(2)
    rare = [*training, f"{speech(generator, 9)} {PHRASE} {speech(generator, 9)}"]
    common = [*rare, *(f"{speech(generator, 9)} {PHRASE}, {speech(generator, 9)}" for _ in range(COMMON - 1))]
    reply = f"Quite another beginning. {PHRASE.capitalize()}. And quite another end."
    assert copied_spans(reply, index_training(rare)).longest.source == len(training)
    assert copied_spans(reply, index_training(common)).spans == ()


def test_a_common_phrase_with_one_more_word_of_a_record_is_still_a_phrase(training):
    generator = random.Random(3)
    common = [f"{speech(generator, 9)} {PHRASE} {WORDS[i]} {speech(generator, 9)}" for i in range(COMMON)]
    reply = f"beginning {PHRASE} {WORDS[0]} end"
    assert copied_spans(reply, index_training([*training, *common])).spans == ()


def test_records_repeated_by_weighting_make_no_common_phrase(training):
    found = copied_spans(training[7], index_training(training * 4))
    assert found.share == 1
    assert found.longest.source == 7


def test_a_long_passage_is_copied_however_many_records_have_it(training):
    passage = speech(random.Random(4), 60)
    records = [f"{speech(random.Random(5 + i), 5)} {passage}" for i in range(5)]
    assert copied_spans(passage, index_training([*training, *records])).share == 1


def test_what_stands_elsewhere_too_is_nobodys(training):
    index = index_training(training, elsewhere=[f"before {training[5]} after"])
    assert copied_spans(training[5], index).spans == ()
    assert copied_spans(training[6], index).share == 1


def test_chinese_counts_characters_and_no_marks():
    training = ["哎呀，客官，白日里的书都忙着赶路，到了夜里才肯开口说话。", "伞骨断了两根，我替您绑上。"]
    found = copied_spans("您听：白日里的书都忙着赶路！到了夜里，才肯开口。", index_training(training))
    (span,) = found.spans
    assert span.text == "白日里的书都忙着赶路！到了夜里，才肯开口"
    assert (span.source, span.tokens) == (0, 18)
    assert training[0][span.source_start : span.source_end] == "白日里的书都忙着赶路，到了夜里才肯开口"


def test_a_tokenizers_ranges_can_be_passed():
    def pairs(text):
        return [(0, 0), *((i, min(i + 2, len(text))) for i in range(0, len(text), 2)), (len(text), len(text))]

    training = ["abcdefghijklmnopqrstuvwxyz"]
    found = copied_spans("__abcdefghijklmnopqr__", index_training(training, pairs))
    assert [(span.start, span.end, span.tokens) for span in found.spans] == [(2, 20, 9)]


def test_nothing_comes_of_nothing(training):
    index = index_training(training)
    assert copied_spans("", index).share is None
    assert copied_spans("…！", index).share is None
    assert copied_spans("short", index).share == 0
    assert copied_spans(training[0], index_training([])).share == 0
    assert copied_spans(training[0], index_training(["", "a b"])).spans == ()


def test_spans_equal_those_of_a_plain_search():
    generator = random.Random(6)
    few = WORDS[:3]  # so few words that much is copied by chance, in overlapping spans
    training = [" ".join(generator.choices(few, k=80)) for _ in range(COMMON - 1)]  # too few texts for a common phrase
    index = index_training(training)
    flagged = 0
    for _ in range(50):
        reply = generator.choices(few, k=25)
        windows = {tuple(text.split()[i : i + LEAST]) for text in training for i in range(80 - LEAST + 1)}
        covered = {
            at + k for at in range(25 - LEAST + 1) if tuple(reply[at : at + LEAST]) in windows for k in range(LEAST)
        }
        found = copied_spans(" ".join(reply), index)
        assert found.copied_tokens == len(covered)
        flagged += bool(covered)
    assert flagged >= 3
