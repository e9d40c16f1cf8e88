"""The verdict: what made-up runs are told, a number in every sentence, and silence where it may have been chance."""

import json
import re
from dataclasses import replace

import pytest
from making import evaluations
from making.runs import config

from persona.config import all_settings
from persona.evaluate.results import (
    Answer,
    Copied,
    Copying,
    Estimate,
    Evaluation,
    FileScore,
    Question,
    Recall,
    Replies,
    Score,
    Sides,
)
from persona.evaluate.verdict import on_replies
from persona.train.history import History
from persona.train.verdict import as_text, noise, of_training

TOKENS, PER_EPOCH = 10_000, 10  # differences below 0.008 may be chance


def course(evaluations, train=()):
    every = PER_EPOCH
    points = [(every * number, loss) for number, loss in enumerate(evaluations)]
    steps = len(points) * every - every
    first, last = train or (evaluations[0], evaluations[-1])
    losses = [(step, first + (last - first) * (step - 1) / max(steps - 1, 1)) for step in range(1, steps + 1)]
    return History("made up", losses, points, [])


def said(*args, tokens=TOKENS):
    findings = of_training(course(*args), tokens, PER_EPOCH)
    for finding in findings:
        assert re.search(r"\d", finding.text)
    return {finding.kind: finding for finding in findings}


def test_still_learning_asks_for_more_epochs():
    found = said([4.0, 3.5, 3.2, 3.0])
    assert list(found) == ["best", "still_learning"]
    assert (
        found["best"].text
        == "Best at update 30 of 30: held-out perplexity 20.1, from 54.6 before training (37% of it)."
    )
    assert (
        "over the last 10 updates the held-out loss fell by 0.200, from 3.200 to 3.000" in found["still_learning"].text
    )
    assert found["still_learning"].advice == "Raise training.num_train_epochs (this run did 3.0)."


def test_a_loss_that_has_settled_is_left_alone():
    found = said([4.0, 3.2, 3.01, 3.005, 3.0, 3.002])
    assert list(found) == ["best", "levelled_off"]
    assert "since update 20 the held-out loss has stayed within 0.050 of 3.002" in found["levelled_off"].text
    assert found["levelled_off"].advice is None


def test_overfitting_names_the_best_update_and_the_epochs_to_set():
    found = said([4.0, 3.2, 3.0, 3.1, 3.3], (4.0, 2.9))
    assert list(found) == ["best", "overfitting"]
    text = found["overfitting"].text
    assert text.startswith(
        "Overfitting since update 20: the held-out loss rose from 3.000 to 3.300 at update 40, while"
    )
    assert "The adapter of update 20 was kept" in text
    assert "num_train_epochs to about 2.0" in found["overfitting"].advice


def test_a_training_loss_that_did_not_fall_is_not_said_to():
    assert "training loss" not in said([4.0, 3.2, 3.0, 3.1, 3.3], (4.0, 4.2))["overfitting"].text


def test_a_rise_within_chance_is_no_overfitting():
    losses = [4.0, 3.2, 3.0, 3.01, 3.03]
    assert "overfitting" in said(losses)
    assert "overfitting" not in said(losses, tokens=400)
    assert noise(400) == pytest.approx(0.04)


def test_lines_learned_by_heart_are_told_from_lines_that_were_easy_before():
    losses = [4.0, 3.3, 3.1, 3.1]
    found = said(losses, (4.0, 0.5))
    assert list(found) == ["best", "levelled_off", "memorised"]
    assert re.search(
        r"on its training lines the loss fell by 3\.\d\d, on held-out lines by only 0\.90", found["memorised"].text
    )
    assert "num_train_epochs" in found["memorised"].advice
    assert "memorised" not in said(losses, (2.0, 0.9))
    assert "on held-out lines it rose by 0.20" in said([4.0, 3.9, 4.2], (4.0, 0.5))["memorised"].text


def test_what_has_not_learned_is_told_nothing_else():
    for losses in ([4.0, 4.1, 4.2], [4.0, 3.995, 3.99]):
        found = said(losses)
        assert list(found) == ["not_learned"]
        assert "learning_rate" in found["not_learned"].advice


def test_one_evaluation_says_no_more_than_that_it_is_the_best():
    assert list(said([4.0, 3.0])) == ["best"]


def test_values_that_are_not_finite_are_passed_over():
    assert list(said([4.0, 3.2, float("nan"), 3.2, 3.2], (4.0, 3.9))) == ["best", "levelled_off"]


def test_without_held_out_conversations_nothing_is_claimed():
    (finding,) = of_training(History("x", [(1, 4.0), (9, 2.5)], [], []), 0, 9)
    assert finding.kind == "not_measured"
    assert "from 4.00 to 2.50 in 9 updates" in finding.text
    assert "data.validation_file" in finding.advice


def estimate(value, half):
    return Estimate(value, value - half, value + half)


def evaluation(**figures):
    return replace(Evaluation("x", "adapter", 0, "en"), **figures)


def style(headline):
    return evaluation(style=replace(evaluations.style(), headline=headline))


def copies(share, author, longest):
    return evaluation(copying=Copying(author, Sides(Copied(share, longest, "", ""))))


def control(ratio):
    score = Sides(Score(Estimate(1.0), Estimate(1.0)))
    return evaluation(scores=(FileScore("a", "", "control", 9, 9, 9, 9, score, ratio),))


def replies(count, ended=None, broken=0):
    stops = None if ended is None else ended / count
    return evaluation(replies=Sides(Replies(count, 0.0, 0.0, 0.0, 1.0, broken / count, stops)))


def recall(facts, remembered):
    names = tuple(map(str, range(facts)))
    answer = Sides(Answer("", names[:remembered]))
    nothing = Sides(Estimate(0.0))
    return evaluation(recall=Recall(nothing, nothing, (Question("?", "", names, answer, answer, True),), True))


IN_CHARACTER = {"in_character"}
CASES = [
    (style(estimate(0.6, 0.1)), "style", "gone 60% of the way"),
    (style(estimate(0.1, 0.2)), "style_unproven", "interval -10% to 30%"),
    (copies(estimate(0.4, 0.05), 0.1, 31), "copies", "40% of .*10%.*31 tokens"),
    (copies(estimate(0.4, 0.2), 0.1, 0), "copied_share", "^40%"),
    (copies(estimate(0.4, 0.05), 0.35, 0), "copied_share", "^40%"),
    (control(estimate(1.3, 0.1)), "forgets", r"changed by \+30% \(95 % interval 20% to 40%\)"),
    (control(estimate(1.0, 0.05)), "keeps", r"changed by \+0%"),
    (control(estimate(1.1, 0.05)), "forgetting_unproven", r"\+10%"),
    (replies(40, 39), "stops", "^39 of 40 replies"),
    (replies(40, 20), "does_not_stop", "only 20 of 40"),
    (replies(10, 8), "stops", "8 of 10"),
    (replies(40), "in_character", "^0 of 40"),
    (replies(40, broken=1), "in_character", "^1 of 40"),
    (replies(40, broken=5), "breaks_character", "5 of 40"),
    (recall(60, 40), "remembers", "40 of 60"),
    (recall(60, 10), "does_not_remember", "10 of 60"),
]
WRONG = {"style_unproven", "copies", "forgets", "does_not_stop", "breaks_character", "does_not_remember"}


@pytest.mark.parametrize(("measured", "kind", "text"), CASES)
def test_what_was_measured_is_judged_by_its_whole_interval(measured, kind, text):
    found = on_replies(measured)
    (finding,) = [one for one in found if one.kind == kind]
    assert {one.kind for one in found} - {kind} <= IN_CHARACTER  # which is judged wherever there are replies
    assert re.search(text, finding.text)
    assert (finding.advice is not None) == (kind in WRONG)
    if finding.advice:
        assert any(name in finding.advice for name in all_settings())


def test_what_was_not_measured_is_not_mentioned():
    assert on_replies(evaluation()) == []
    assert on_replies(style(Estimate(None, reason="too little text"))) == []
    assert on_replies(copies(Estimate(0.9), 0.0, 9)) == [], "without an interval it may be chance"
    assert on_replies(control(None)) == []
    assert on_replies(recall(0, 0)) == []


def test_of_several_controls_the_worst_is_judged():
    worse, better = (control(estimate(value, 0.05)).scores[0] for value in (1.3, 1.0))
    (finding,) = on_replies(evaluation(scores=(better, worse, better)))
    assert finding.kind == "forgets"


def test_a_run_ends_with_its_verdict(tmp_path, tiny_model, monkeypatch):
    from persona.train.run import finetune

    monkeypatch.chdir(tmp_path)
    printed = []
    adapter = finetune(config(tmp_path, tiny_model), False, printed.append)
    stored = json.loads((adapter.parent / "run.json").read_text(encoding="utf-8"))["verdict"]
    assert stored
    assert all(finding["text"] in "\n".join(printed) for finding in stored)
    assert "Verdict:" in "\n".join(printed)


def test_advice_stands_below_what_it_is_about():
    text = as_text(on_replies(replies(40, 20)))
    lines = text.splitlines()
    assert lines[0].startswith("  - It does not stop")
    assert lines[1].startswith("    To change it: Raise generation.max_new_tokens")
    assert lines[2].startswith("  - 0 of 40")
