"""What is written to evaluation.json is plain JSON that is read back equal, and every figure in it is finite."""

import json
import math
from dataclasses import replace

import pytest
from making import evaluations
from pydantic import ValidationError

from persona.evaluate.results import FORMAT, NAME, Estimate, Evaluation, Sides, write_evaluation

WHOLE = evaluations.whole()


def test_everything_is_read_back_equal(tmp_path):
    for evaluation in (WHOLE, evaluations.chinese(), Evaluation("x", "texts", 0, "zh")):
        write_evaluation(tmp_path / NAME, evaluation)
        assert evaluations.stored(tmp_path / NAME) == evaluation


def test_it_is_plain_json(tmp_path):
    write_evaluation(tmp_path / NAME, WHOLE)
    text = (tmp_path / NAME).read_text(encoding="utf-8")
    assert "灯塔" in text
    content = json.loads(text)
    assert content["format"] == FORMAT
    score = WHOLE.scores[0].score.tuned.perplexity
    found = {"value": score.value, "low": score.low, "high": score.high, "reason": None}
    assert content["scores"][0]["score"]["tuned"]["perplexity"] == found
    finding = {"kind": "forgets", "text": WHOLE.verdict[2].text, "advice": "Lower training.learning_rate."}
    assert content["verdict"][2] == finding


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_is_a_finite_number(value):
    with pytest.raises(ValidationError):
        Estimate(value)
    with pytest.raises(ValidationError):
        Sides(Estimate(1), Estimate(1, value, 1))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"kind": "cat"}, "kind"),
        ({"name": 3}, "name"),
        ({"seed": "0"}, "seed"),
        ({"language": None}, "language"),
        ({"scores": [{"file": "val.jsonl"}]}, "sha256"),
        ({"odd": 1}, "odd"),
        ({"verdict": [{"code": "best"}]}, "kind"),
        ({"style": {"headline": {"value": "0.5"}}}, "headline"),
    ],
)
def test_a_file_with_another_field_does_not_pass_for_an_evaluation(tmp_path, change, place):
    """The tests of the page and of the command read every file through this check, so it must be able to fail."""
    write_evaluation(tmp_path / NAME, replace(WHOLE, exchanges=()))
    content = json.loads((tmp_path / NAME).read_text(encoding="utf-8")) | change
    (tmp_path / NAME).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValidationError, match=place):
        evaluations.stored(tmp_path / NAME)
