"""What is written to evaluation.json is read back equal, and nothing else is taken for it."""

import json
import math

import pytest
from pydantic import ValidationError

from persona.errors import UsageError
from persona.evaluate.results import (
    NAME,
    Answer,
    Copying,
    Curve,
    DataStatistics,
    Distance,
    Distribution,
    Diversity,
    Estimate,
    Evaluation,
    Exchange,
    FileScore,
    Finding,
    Phrase,
    Question,
    Recall,
    Replies,
    Score,
    Sides,
    Span,
    StyleReport,
    read_evaluation,
    write_evaluation,
)

ABOUT = Estimate(0.5, 0.25, 0.75)
BOTH = Sides(ABOUT, Estimate(1))
SCORE = Score(Estimate(20.5, 18.0, 23.0), Estimate(1.5))
VARIED = Diversity(0.5, 0.9, 0.8, None)
ANSWER = Sides(Answer("Admiral Biscuit.", ("Biscuit",)), Answer("A cat.", ()))
WHOLE = Evaluation(
    name="灯塔",
    kind="adapter",
    seed=0,
    language="en",
    scores=(
        FileScore("val.jsonl", "ab", "held_out", 2, 3, 40, 200, Sides(SCORE, SCORE), ABOUT),
        FileScore("neutral.jsonl", "cd", "control", 2, 3, 40, 200, Sides(SCORE), None, ("record 1: too long",)),
    ),
    replies=Sides(Replies(3, 1.0, 20.0, 15.0, 0.9, 0.0, 1.0)),
    recall=Recall(BOTH, BOTH, (Question("Cat?", "Biscuit.", ("Biscuit",), ANSWER, ANSWER, True),), False),
    copying=Sides(Copying(0.1, 9, "the tide waits", "val 3")),
    style=StyleReport(
        ABOUT,
        "letters",
        3,
        (Distance("words", ABOUT, Sides(0.2, 0.4)),),
        (Distribution("length", ("1", "2"), (0.5, 0.5), Sides((1.0, 0.0), (0.0, 1.0))),),
        (Phrase("Mind the tide", 9.0, Sides(8.0, 0.0)),),
        Sides(VARIED),
        VARIED,
    ),
    exchanges=(Exchange("Who?", "Me.", Sides("Aye.", "I am an AI."), (Span(0, 3, "train 1"),)),),
    verdict=(Finding("best_at", "Best at update 3 (2.9).", "training.num_train_epochs"),),
    curve=Curve(((1, 4.0),), ((0, 4.0), (3, 2.9)), 3),
    data=(DataStatistics("train.jsonl", "ef", 9, 12, 900, 70, {"dialogue": 9}),),
    settings={"lora": {"r": 16}},
    versions={"torch": "2"},
    hashes={"base": "12"},
)


def test_everything_is_read_back_equal(tmp_path):
    write_evaluation(tmp_path / NAME, WHOLE)
    assert read_evaluation(tmp_path) == WHOLE
    assert read_evaluation(tmp_path / NAME) == WHOLE
    least = Evaluation("x", "texts", 0, "zh")
    write_evaluation(tmp_path / "least.json", least)
    assert read_evaluation(tmp_path / "least.json") == least


def test_it_is_plain_json(tmp_path):
    write_evaluation(tmp_path / NAME, WHOLE)
    text = (tmp_path / NAME).read_text(encoding="utf-8")
    assert "灯塔" in text
    assert json.loads(text)["scores"][0]["score"]["tuned"]["perplexity"] == {"value": 20.5, "low": 18.0, "high": 23.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_is_a_finite_number(value):
    with pytest.raises(ValidationError):
        Estimate(value)
    with pytest.raises(ValidationError):
        Sides(Estimate(1), Estimate(1, value, 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no evaluation"),
        ("[]", "no evaluation"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "name": "x", "kind": "adapter", "seed": 0}', "language"),
        ('{"format": 1, "name": "x", "kind": "cat", "seed": 0, "language": "en"}', "kind"),
        ('{"format": 1, "name": 3, "kind": "texts", "seed": 0, "language": "en"}', "name"),
        ('{"format": 1, "name": "x", "kind": "texts", "seed": 0, "language": "en", "odd": 1}', "odd"),
    ],
)
def test_another_file_is_refused_with_the_place(tmp_path, text, words):
    (tmp_path / NAME).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        read_evaluation(tmp_path)


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(UsageError, match=r"evaluate_model\.py report"):
        read_evaluation(tmp_path)
