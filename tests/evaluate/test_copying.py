"""What a reply has copied is found with its source; what everybody says is not."""

import random

import pytest
from making.runs import config

from persona.evaluate.copying import COMMON, LEAST, copied, copied_spans, index_training
from persona.evaluate.results import Sides
from persona.evaluate.subject import Measured, Subject
from persona.records import Record


def share(found):
    """Copied tokens over all tokens."""
    return found.copied / found.tokens


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
    index = index_training(training, ())
    for source in (0, 17, 299):
        found = copied_spans(training[source], index)
        assert share(found) == 1
        (span,) = found.spans
        assert (span.source, span.tokens) == (source, 40)
        assert training[source][span.start : span.end] == training[source]


def test_the_ranges_mark_the_copied_characters(training):
    piece = " ".join(training[5].split()[10:25])
    reply = f"Well now, {piece.upper()}! That is all."
    found = copied_spans(reply, index_training(training, ()))
    (span,) = found.spans
    assert reply[span.start : span.end] == piece.upper()
    assert (span.source, span.tokens, found.copied, found.tokens) == (5, 15, 15, 20)
    assert share(found) == 15 / 20


@pytest.mark.parametrize("tokens", [LEAST - 1, LEAST])
def test_eight_tokens_are_the_least(training, tokens):
    piece = " ".join(training[5].split()[:tokens])
    assert bool(copied_spans(f"x {piece} y", index_training(training, ())).spans) is (tokens >= LEAST)


def test_two_sources_are_two_spans(training):
    reply = " ".join(training[3].split()[:12] + training[9].split()[20:])
    found = copied_spans(reply, index_training(training, ()))
    assert [span.source for span in found.spans] == [3, 9]
    assert share(found) == 1
    assert [span.tokens for span in found.spans] == [12, 20]


def test_a_common_phrase_is_not_flagged_but_a_rare_one_is(training):
    generator = random.Random(2)
    rare = [*training, f"{speech(generator, 9)} {PHRASE} {speech(generator, 9)}"]
    common = [*rare, *(f"{speech(generator, 9)} {PHRASE}, {speech(generator, 9)}" for _ in range(COMMON - 1))]
    reply = f"Quite another beginning. {PHRASE.capitalize()}. And quite another end."
    assert [span.source for span in copied_spans(reply, index_training(rare, ())).spans] == [len(training)]
    assert copied_spans(reply, index_training(common, ())).spans == ()


def test_a_common_phrase_with_one_more_word_of_a_record_is_still_a_phrase(training):
    generator = random.Random(3)
    common = [f"{speech(generator, 9)} {PHRASE} {WORDS[i]} {speech(generator, 9)}" for i in range(COMMON)]
    reply = f"beginning {PHRASE} {WORDS[0]} end"
    assert copied_spans(reply, index_training([*training, *common], ())).spans == ()


def test_records_repeated_by_weighting_make_no_common_phrase(training):
    found = copied_spans(training[7], index_training(training * 4, ()))
    assert share(found) == 1
    assert [span.source for span in found.spans] == [7]


def test_a_long_passage_is_copied_however_many_records_have_it(training):
    passage = speech(random.Random(4), 60)
    records = [f"{speech(random.Random(5 + i), 5)} {passage}" for i in range(5)]
    assert share(copied_spans(passage, index_training([*training, *records], ()))) == 1


def test_what_stands_elsewhere_too_is_nobodys(training):
    index = index_training(training, elsewhere=[f"before {training[5]} after"])
    assert copied_spans(training[5], index).spans == ()
    assert share(copied_spans(training[6], index)) == 1


def test_chinese_counts_characters_and_no_marks():
    training = ["哎呀，客官，白日里的书都忙着赶路，到了夜里才肯开口说话。", "伞骨断了两根，我替您绑上。"]
    reply = "您听：白日里的书都忙着赶路！到了夜里，才肯开口。"
    found = copied_spans(reply, index_training(training, ()))
    (span,) = found.spans
    assert reply[span.start : span.end] == "白日里的书都忙着赶路！到了夜里，才肯开口"
    assert (span.source, span.tokens) == (0, 18)


def subject(tmp_path, trained, held_out):
    def records(replies, **meta):
        pairs = [({"role": "user", "content": "?"}, {"role": "assistant", "content": reply}) for reply in replies]
        return [Record(pair, meta) for pair in pairs]

    own = Measured(tmp_path / "val.jsonl", records(held_out), None, True)
    known = records(trained, source="letters.txt", group="letter 3")
    return Subject("x", config(tmp_path, tmp_path), None, None, None, None, None, own, known, tmp_path, ())


def test_the_figures_of_both_sides_are_shares_of_all_their_tokens(tmp_path, training):
    tuned = [f"{training[3]}. Well!", "Quite another thing. " * 3, "", f"{training[9]} And more of it."]
    copying, spans = copied(subject(tmp_path, training[:20], [training[5], "Well."]), Sides(tuned, ["No."] * 4))
    side = copying.side.tuned
    assert side.share.value == pytest.approx(80 / (41 + 9 + 44))
    assert side.share.low is None, "four replies are too few for an interval"
    assert (side.longest, side.text, side.source) == (40, training[3], "letters.txt letter 3")
    assert [len(each) for each in spans] == [1, 0, 0, 1]
    assert (spans[3][0].start, spans[3][0].end, spans[3][0].source) == (0, len(training[9]), side.source)
    assert (copying.side.base.share.value, copying.side.base.longest, copying.side.base.source) == (0, 0, "")
    assert copying.author == 40 / 41
    assert copied(subject(tmp_path, [], ["Well."]), Sides(tuned)) is None


def test_nothing_comes_of_nothing(training):
    index = index_training(training, ())
    assert copied_spans("", index).tokens == 0
    assert copied_spans("…！", index).tokens == 0
    assert share(copied_spans("short", index)) == 0
    assert share(copied_spans(training[0], index_training([], ()))) == 0
    assert copied_spans(training[0], index_training(["", "a b"], ())).spans == ()


def test_spans_equal_those_of_a_plain_search():
    generator = random.Random(6)
    few = WORDS[:3]  # so few words that much is copied by chance, in overlapping spans
    training = [" ".join(generator.choices(few, k=80)) for _ in range(COMMON - 1)]  # too few texts for a common phrase
    index = index_training(training, ())
    flagged = 0
    for _ in range(50):
        reply = generator.choices(few, k=25)
        windows = {tuple(text.split()[i : i + LEAST]) for text in training for i in range(80 - LEAST + 1)}
        covered = {
            at + k for at in range(25 - LEAST + 1) if tuple(reply[at : at + LEAST]) in windows for k in range(LEAST)
        }
        found = copied_spans(" ".join(reply), index)
        assert found.copied == len(covered)
        flagged += bool(covered)
    assert flagged >= 3
