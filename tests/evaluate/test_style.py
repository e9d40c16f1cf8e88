"""How far from base to author: what must be 0, what 1, what half, and when there is no number."""

import json
import random
import re
from dataclasses import asdict

import numpy as np
import pytest
from making.writers import distance_matrix, texts

from persona.evaluate.results import Sides
from persona.evaluate.style.compare import along, compare
from persona.evaluate.style.distances import MEASURES
from persona.evaluate.style.words import sentences as sentences_of

REPEATS = 25
MEAN = "weighted mean of the first five"


def compared(language, tuned, count=60):
    author, base = texts(language, "author", count), texts(language, "base", count)
    return compare(author, Sides(tuned, base), 1, REPEATS)


def distances(report):
    return {each.name: each for each in report.distances}


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
    return request.param, compared(request.param, mixture(request.param, 0.5))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_text_against_itself_has_distance_0_and_score_1(language):
    author = texts(language, "author", 60)
    matrix = distance_matrix([author], [author, texts(language, "base", 60)])
    assert set(matrix) == {"style", *(measure.name for measure in MEASURES)}
    for name, value in matrix.items():
        assert value[0, 0] == pytest.approx(0, abs=1e-5) != value[0, 1], name
    assert compared(language, author).headline.value == 1


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_the_score_is_the_share_of_the_way(language, share):
    score = compared(language, mixture(language, share)).headline
    assert score.value == pytest.approx(share, abs=0.2)  # the curve is flat at its end
    assert score.low <= score.value <= score.high <= 1


def test_every_distance_is_between_its_anchors(halfway):
    _, report = halfway
    assert len(report.distances) == len(MEASURES) + 1
    assert report.distances[-1].name == MEAN
    shown = distances(report)
    for name in (MEAN, "words", "function words, cosine Delta", "function words", "word distribution"):
        each = shown[name]
        assert each.author.value < each.distance.tuned.value < each.distance.base.value, name
        for estimate in (each.author, each.distance.tuned, each.distance.base):
            assert estimate.low <= estimate.value <= estimate.high


def test_who_is_like_neither_has_gone_no_way():
    assert compared("en", texts("en", "third", 60)).headline.value == pytest.approx(0, abs=0.1)


def test_farther_than_the_base_is_below_0():
    assert compared("en", ["qzx jjw!? ##xx 12 " * 5] * 60).headline.value < -0.05


def test_the_same_seed_gives_the_same_and_it_is_json(halfway):
    language, report = halfway
    again = compared(language, mixture(language, 0.5))
    assert again == report
    assert json.loads(json.dumps(asdict(again), allow_nan=False))["words"] == report.words


def test_shuffled_sentences_and_texts_keep_what_does_not_look_at_their_order():
    author = texts("en", "author", 50)
    sentences = [[sentence.strip() for sentence in sentences_of(text)] for text in author]
    generator = random.Random(3)
    shuffled = [" ".join(generator.sample(found, len(found))) for found in sentences]
    generator.shuffle(shuffled)
    base = texts("en", "base", 50)
    matrix = distance_matrix([author], [shuffled, base])
    for name in ("words", "cosine_delta", "burrows_delta", "function_words", "word_distribution", "text_length"):
        assert matrix[name][0, 0] < 1e-5 < matrix[name][0, 1], name
    assert matrix["sentence_length"][0, 0] < 0.2 * matrix["sentence_length"][0, 1]  # a text may end without a stop
    assert matrix["character_ngrams"][0, 0] < 0.1 * matrix["character_ngrams"][0, 1]  # grams across two sentences


@pytest.mark.parametrize("language", ["en", "zh"])
def test_halves_of_one_writer_find_each_other(language):
    names = [f"writer {number}" for number in range(12)]
    first = [texts(language, name, 25, seed=1) for name in names]
    second = [texts(language, name, 25, seed=2) for name in names]
    whole = distance_matrix(first, second)["style"]
    assert (np.diag(whole)[:, None] < whole).sum() >= 0.97 * 12 * 11
    assert (whole.argmin(axis=1) == np.arange(12)).mean() >= 0.75


def test_the_score_does_not_drift_with_the_amount_of_text():
    scores = {}
    for count in (40, 200):
        found = [
            compare(
                texts("en", "author", count, seed),
                Sides(mixture("en", 0.5, 60 * count), texts("en", "base", count, seed)),
                seed,
                20,
            ).headline.value
            for seed in (1, 2)
        ]
        scores[count] = sum(found) / len(found)
    assert max(scores.values()) - min(scores.values()) < 0.15, scores


def test_the_score_does_not_drift_with_the_length_of_a_text():
    base, tuned = texts("en", "base", 60), mixture("en", 0.5)
    author = texts("en", "author", 60)
    joined = [" ".join(tuned[at : at + 3]) for at in range(0, len(tuned), 3)]
    one, other = (compare(author, Sides(each, base), 1, REPEATS).headline for each in (tuned, joined))
    assert other.value == pytest.approx(one.value, abs=0.15)


def test_without_a_base_the_tuned_side_is_measured_from_the_author():
    author, tuned = texts("en", "author", 60), texts("en", "base", 60)
    found = compare(author, Sides(tuned), 1, REPEATS)
    mean = distances(found)[MEAN]
    assert mean.author.value < mean.distance.tuned.value
    assert mean.distance.base is None
    assert (found.headline.value, found.headline.reason) == (None, "no texts of a base model")
    assert all(level.side.base is None and level.side.tuned.value is not None for level in found.levels)
    assert not any("base" in note for note in found.notes)
    # as far as a base is that writes like it
    floor = distances(compare(author, Sides(author, tuned), 1, REPEATS))[MEAN].distance.base
    assert mean.distance.tuned.value == pytest.approx(floor.value, rel=0.1)


@pytest.mark.parametrize(
    ("author", "base", "tuned", "reason"),
    [
        ([], 60, 60, "author: 0 texts"),
        (["Only this."], 60, 60, "author: 1 texts"),
        (60, [], 60, "base: 0 texts"),
        (60, 60, [], "tuned: 0 texts"),
        (60, 60, ["", " \n"], "tuned: 0 texts"),
        (60, 60, ["a"] * 50, "tuned: 50 texts with 50 characters"),
        ([], [], [], "author: 0 texts"),
        ([], None, [], "tuned: 0 texts"),
    ],
)
def test_too_little_text_gives_a_reason_and_no_number(author, base, tuned, reason):
    sets = [
        texts("en", name, each) if isinstance(each, int) else each
        for name, each in (("author", author), ("tuned", tuned), ("base", base))
    ]
    found = compare(sets[0], Sides(*sets[1:]), 1, 20)
    assert found.headline.value is None
    assert reason in found.headline.reason
    assert any(reason in note for note in found.notes)
    json.dumps(asdict(found), allow_nan=False)
    if author == base == 60:
        mean = distances(found)[MEAN]
        assert mean.distance.base.value > mean.author.value
        assert mean.distance.tuned.value is None
    else:
        assert found.distances == ()


def test_a_base_that_writes_like_the_author_gives_no_score():
    author, base, tuned = (texts("en", "author", 60, seed) for seed in (1, 2, 3))
    found = compare(author, Sides(tuned, base), 1, REPEATS)
    assert found.headline.value is None
    assert "not measurably farther" in found.headline.reason


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
        json.dumps(asdict(compare(each, Sides(odd, texts("zh", "base", 30)), 1, 10)), allow_nan=False)


def test_a_novel_in_one_piece_is_cut_into_passages():
    author = [" ".join(texts("en", "author", 200))]
    found = compare(author, Sides(mixture("en", 0.5), texts("en", "base", 60)), 1, REPEATS)
    (note,) = [note for note in found.notes if note.startswith("author: long texts were cut into passages")]
    assert int(re.search(r"(\d+) in all", note)[1]) > 20
    lengths = next(level for level in found.levels if level.name == "text length")
    assert lengths.author.value == pytest.approx(len(author[0]), rel=0.01)
    assert found.headline.value == pytest.approx(0.5, abs=0.25)


def test_along_reads_the_way_off_the_mixtures():
    curve = np.array([[1.0, 0.9, 0.6, 0.3, 0.2]])
    for value, share in ((1.0, 0), (0.75, 0.375), (0.2, 1), (0.1, 1), (1.4, -0.5)):
        assert along(curve, np.array([value]))[0] == pytest.approx(share)
    assert np.isnan(along(curve[:, ::-1], np.array([0.5]))[0])
