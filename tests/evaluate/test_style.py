"""How far from base to author: what must be 0, what 1, what half, and when there is no number."""

import json
import random
from dataclasses import asdict

import numpy as np
import pytest
from making.writers import texts

from persona.evaluate import style
from persona.evaluate.style.compare import along
from persona.evaluate.style.distances import MEASURES

REPEATS = 25


def compare(language, tuned, count=60, **options):
    author, base = texts(language, "author", count), texts(language, "base", count)
    return style.compare(author, base, tuned, seed=1, repeats=REPEATS, segmentation="bigrams", **options)


def up_to(characters, found):
    """The first of `found` that make up so many characters."""
    kept = []
    while characters > 0:
        kept.append(found.pop(0))
        characters -= len(kept[-1])
    return kept


def mixture(language, share, characters=6000):
    """Texts of the author and of the base, none of which stands in what they are compared with."""
    author, base = (texts(language, name, 600, seed=9) for name in ("author", "base"))
    return up_to(share * characters, author) + up_to((1 - share) * characters, base)


@pytest.fixture(scope="module", params=["en", "zh"])
def halfway(request):
    return compare(request.param, mixture(request.param, 0.5))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_text_against_itself_has_distance_0_and_score_1(language):
    author = texts(language, "author", 60)
    matrix = style.distance_matrix([author], [author], reference=[texts(language, "base", 60)])
    assert set(matrix) == {"style", *(measure.name for measure in MEASURES)}
    for name, value in matrix.items():
        assert value == pytest.approx(0, abs=1e-5), name
    assert compare(language, author).score.value == 1


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_the_score_is_the_share_of_the_way(language, share):
    score = compare(language, mixture(language, share)).score
    assert score.value == pytest.approx(share, abs=0.2)  # the curve is flat at its end
    assert score.low <= score.value <= score.high <= 1


def test_every_distance_stands_between_its_anchors(halfway):
    assert len(halfway.distances) == len(MEASURES)
    shown = {each.name: each for each in (*halfway.distances, halfway.distance)}
    for name in ("style", "words", "cosine_delta", "function_words", "word_distribution"):
        each = shown[name]
        assert each.ceiling.value < each.tuned.value < each.floor.value, name
        for estimate in (each.ceiling, each.floor, each.tuned):
            assert estimate.low <= estimate.value <= estimate.high


def test_who_is_like_neither_has_gone_no_way():
    assert compare("en", texts("en", "third", 60)).score.value == pytest.approx(0, abs=0.1)


def test_farther_than_the_base_is_below_0():
    assert compare("en", ["qzx jjw!? ##xx 12 " * 5] * 60).score.value < -0.05


def test_the_same_seed_gives_the_same_and_it_is_json(halfway):
    tuned = mixture(halfway.language, 0.5)
    again = compare(halfway.language, tuned)
    assert again == halfway
    assert json.loads(json.dumps(asdict(again), allow_nan=False))["language"] == halfway.language


def test_shuffled_sentences_and_texts_keep_what_does_not_look_at_their_order():
    author = texts("en", "author", 50)
    sentences = [[sentence.strip() for sentence in style.sentences(text)] for text in author]
    generator = random.Random(3)
    shuffled = [" ".join(generator.sample(found, len(found))) for found in sentences]
    generator.shuffle(shuffled)
    base = texts("en", "base", 50)
    matrix = style.distance_matrix([author], [shuffled, base])
    for name in ("words", "cosine_delta", "burrows_delta", "function_words", "word_distribution", "text_length"):
        assert matrix[name][0, 0] < 1e-5 < matrix[name][0, 1], name
    assert matrix["sentence_length"][0, 0] < 0.2 * matrix["sentence_length"][0, 1]  # a text may end without a stop
    assert matrix["character_ngrams"][0, 0] < 0.1 * matrix["character_ngrams"][0, 1]  # grams across two sentences


@pytest.mark.parametrize("language", ["en", "zh"])
def test_halves_of_one_writer_find_each_other(language):
    names = [f"writer {number}" for number in range(12)]
    first = [texts(language, name, 25, seed=1) for name in names]
    second = [texts(language, name, 25, seed=2) for name in names]
    whole = style.distance_matrix(first, second)["style"]
    assert (np.diag(whole)[:, None] < whole).sum() >= 0.97 * 12 * 11
    assert (whole.argmin(axis=1) == np.arange(12)).mean() >= 0.75


def test_the_score_does_not_drift_with_the_amount_of_text():
    scores = {}
    for count in (40, 200):
        found = [
            style.compare(
                texts("en", "author", count, seed), texts("en", "base", count, seed),
                mixture("en", 0.5, 60 * count),
                seed=seed, repeats=20,
            ).score.value
            for seed in (1, 2)
        ]  # fmt: skip
        scores[count] = sum(found) / len(found)
    assert max(scores.values()) - min(scores.values()) < 0.15, scores


def test_the_score_does_not_drift_with_the_length_of_a_text():
    base, tuned = texts("en", "base", 60), mixture("en", 0.5)
    author = texts("en", "author", 60)
    joined = [" ".join(tuned[at : at + 3]) for at in range(0, len(tuned), 3)]
    one, other = (style.compare(author, base, each, seed=1, repeats=REPEATS).score for each in (tuned, joined))
    assert other.value == pytest.approx(one.value, abs=0.15)


def test_reference_authors_are_taken_into_account():
    others = [texts("en", f"other {number}", 30) for number in range(3)]
    found = compare("en", mixture("en", 0.5), reference=others)
    assert found.score.value == pytest.approx(0.5, abs=0.2)
    assert found.distance.floor != compare("en", mixture("en", 0.5)).distance.floor


def test_without_a_tuned_model_the_anchors_stand():
    found = compare("en", None)
    assert found.tuned is None
    assert found.distance.ceiling.value < found.distance.floor.value
    assert found.score.value is None
    assert "no texts of a tuned model" in found.score.reason
    assert all(level.tuned.value is None and level.tuned.reason for level in found.levels)


@pytest.mark.parametrize(
    ("author", "base", "tuned", "reason"),
    [
        ([], 60, 60, "author: 0 texts"),
        (["Only this."], 60, 60, "author: 1 texts"),
        (60, [], 60, "base: 0 texts"),
        (60, 60, [], "tuned: 0 texts"),
        (60, 60, ["", " \n"], "tuned: 0 texts"),
        (60, 60, ["a"] * 50, "tuned: 50 texts with 50 characters"),
        ([], [], None, "author: 0 texts"),
    ],
)
def test_too_little_text_gives_a_reason_and_no_number(author, base, tuned, reason):
    sets = [
        texts("en", name, each) if isinstance(each, int) else each
        for name, each in (("author", author), ("base", base), ("tuned", tuned))
    ]
    found = style.compare(*sets, seed=1, repeats=20)
    assert found.score.value is None
    assert reason in found.score.reason
    json.dumps(asdict(found), allow_nan=False)
    if author == base == 60:
        assert found.distance.floor.value > found.distance.ceiling.value


def test_a_base_that_writes_like_the_author_gives_no_score():
    author, base, tuned = (texts("en", "author", 60, seed) for seed in (1, 2, 3))
    found = style.compare(author, base, tuned, seed=1, repeats=REPEATS)
    assert found.score.value is None
    assert "not measurably farther" in found.score.reason


def test_texts_without_marks_words_or_sense_do_no_harm():
    odd = [
        "……！！" * 30,
        "12345 67890 " * 20,
        "😀" * 100,
        "𠮷" * 80,
        "\u200b\u0301" * 90,
        "a" * 5000,
        "no marks at all  " * 30,
    ]
    for each in (odd, odd * 3):
        json.dumps(asdict(style.compare(each, texts("zh", "base", 30), odd, seed=1, repeats=10)), allow_nan=False)


def test_a_novel_in_one_piece_is_cut_into_passages():
    author = [" ".join(texts("en", "author", 200))]
    found = style.compare(author, texts("en", "base", 60), mixture("en", 0.5), seed=1, repeats=REPEATS)
    assert (found.author.texts, found.author.passages > 20) == (1, True)
    assert any("passages" in note for note in found.notes)
    assert found.score.value == pytest.approx(0.5, abs=0.25)


def test_along_reads_the_way_off_the_mixtures():
    curve = np.array([[1.0, 0.9, 0.6, 0.3, 0.2]])
    for value, share in ((1.0, 0), (0.75, 0.375), (0.2, 1), (0.1, 1), (1.4, -0.5)):
        assert along(curve, np.array([value]))[0] == pytest.approx(share)
    assert np.isnan(along(curve[:, ::-1], np.array([0.5]))[0])
