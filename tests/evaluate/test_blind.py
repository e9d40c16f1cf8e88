"""The blind comparison: nothing in a sheet betrays the sides, and scoring gives the figures of an independent hand."""

import json
import math
import random
import re
from collections import Counter
from dataclasses import asdict
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from persona.errors import DataError, UsageError
from persona.evaluate.blind import sheet as blind
from persona.evaluate.blind.scoring import describe, score_sheet
from persona.evaluate.intervals import binomial_p, cohen_kappa, log_odds, preference, wilson


class Prediction(NamedTuple):
    input: str
    predict: str


def predictions(replies):
    return [Prediction(f"Question {i}?", reply) for i, reply in enumerate(replies)]


def make_sheet(first, second, folder, secret, **more):
    options = {"names": ("tuned", "base"), "about": None, "examples": [], "limit": None} | more
    return blind.make_sheet(first, second, folder, secret, **options)


def shown(sheet):
    """What the sheet's script reads."""
    text = sheet.sheet.read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json" id="sheet">(.*?)</script>', text, re.DOTALL)[1])


def key_of(sheet):
    return json.loads(sheet.key.read_text("utf-8"))


def make(folder, count=12, seed="secret", **more):
    tuned = predictions([f"Aye, {i}." for i in range(count)])
    base = predictions([f"Certainly, {i}." for i in range(count)])
    return make_sheet(tuned, base, folder, seed, **more)


def fill(sheet, path, prefer, rater="Ada"):
    """A filled sheet; `prefer` gives the side's name or `tie` for a prediction."""
    key = key_of(sheet)
    answers = []
    for pair in key["pairs"]:
        side = prefer(pair["prediction"])
        choice = side if side == "tie" else "left" if pair["left"] == side else "right"
        answers.append({"id": pair["id"], "choice": choice, "comment": ""})
    value = {"format": "ab-answers-1", "sheet": key["sheet"], "rater": rater, "answers": answers}
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# --- statistics ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 400), st.integers(0, 400))
def test_the_figures_are_those_of_scipy(wins, losses):
    trials = wins + losses
    if not trials:
        return
    theirs = stats.binomtest(wins, trials)
    assert binomial_p(wins, trials) == pytest.approx(theirs.pvalue, rel=1e-9)
    interval = theirs.proportion_ci(method="wilson")
    assert wilson(wins, trials) == pytest.approx((interval.low, interval.high), abs=1e-12)


@given(st.integers(1, 400), st.integers(1, 400))
def test_the_log_odds_are_those_of_a_table_against_even_chances(wins, losses):
    value, low, high = log_odds(wins, losses)
    half = stats.norm.ppf(0.975) * math.sqrt(1 / wins + 1 / losses)
    assert value == pytest.approx(math.log(wins) - math.log(losses), abs=1e-12)
    assert (value - low, high - value) == pytest.approx((half, half))


def test_a_side_that_never_lost_has_finite_odds():
    value, low, high = log_odds(20, 0)
    assert value == pytest.approx(math.log(20.5 / 0.5))
    assert low < value < high < math.inf
    assert log_odds(0, 0)[0] == 0


def test_cohens_kappa():
    # Cohen 1960 as in every textbook: 20 + 15 agreements of 50, marginals 25:25 and 30:20
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1
    assert cohen_kappa(["a"] * 4, ["a"] * 4) is None
    chance = random.Random(1)
    drawn = [[chance.choice("lrt") for _ in range(20000)] for _ in range(2)]
    assert abs(cohen_kappa(*drawn)) < 0.03


def test_ties_only_have_no_rate():
    found = preference(0, 0, 5)
    assert (found.rate, found.rate_low, found.p, found.log_odds) == (None, None, 1.0, 0.0)


# --- blindness -------------------------------------------------------------------------------------------------------


def features(pairs, source):
    """All that a sheet's source tells of each pair but for the words of its replies, from both sides."""
    rows = []
    for place, pair in enumerate(pairs):
        at = source.index(pair["id"])
        number = int.from_bytes(pair["id"].encode(), "big")
        rows.append(
            [place, place % 2, place % 3, len(pair["id"]), number % 2, number % 3, number % 7, number >> 56]
            + [at % 2, at % 7, ord(pair["id"][0]), ord(pair["id"][-1]), source[at - 8 : at].count(" ")]
            + [list(pair).index(name) for name in ("id", "prompt", "left", "right")]
        )
    return rows


def guesses(rows, sides):
    """How many sides a classifier tells right on the half it has not seen: the nearest neighbour by every measure,
    and, for each measure alone, the best threshold."""
    half = len(rows) // 2
    width = len(rows[0])
    scale = [max(1e-9, max(abs(row[k]) for row in rows)) for k in range(width)]

    def near(row):
        return sides[min(range(half), key=lambda i: sum(abs(row[k] - rows[i][k]) / scale[k] for k in range(width)))]

    right = [sum(near(rows[i]) == sides[i] for i in range(half, len(rows)))]
    for k in range(width):
        best = max(
            ((cut, way) for cut in {row[k] for row in rows[:half]} for way in (True, False)),
            key=lambda rule: sum(
                (row[k] >= rule[0]) == (rule[1] == side) for row, side in zip(rows[:half], sides, strict=False)
            ),
        )
        right.append(sum((rows[i][k] >= best[0]) == (best[1] == sides[i]) for i in range(half, len(rows))))
    return right, len(rows) - half


def test_nothing_but_the_words_tells_the_sides_apart(tmp_path):
    """Replies of equal length on all 400 pairs, so that a classifier sees order, identifiers and markup alone."""
    tuned = predictions([f"**Aye** {i:03d}  \r\n\r\n\r\n" for i in range(400)])
    base = predictions([f"Sure {i:03d}<|im_end|>"[:20] for i in range(400)])
    sheet = make_sheet(predictions([one.predict.replace("Aye", "Ayes") for one in tuned]), base, tmp_path / "a", "s")
    page = shown(sheet)
    names = {pair["id"]: pair["left"] == "tuned" for pair in key_of(sheet)["pairs"]}
    sides = [names[pair["id"]] for pair in page["pairs"]]
    assert len(sides) == 400
    assert sum(sides) == 200
    assert {len(pair["left"]) for pair in page["pairs"]} == {len(pair["right"]) for pair in page["pairs"]} == {8}
    right, asked = guesses(features(page["pairs"], sheet.sheet.read_text("utf-8")), sides)
    # 18 classifiers on 200 pairs; 100 are right by chance, 5 standard deviations are 35
    assert len(right) == 18
    assert max(abs(count - asked / 2) for count in right) < 36, right


def test_a_classifier_would_find_a_side_that_does_betray_itself(tmp_path):
    sheet = make(tmp_path, 400)
    names = {pair["id"]: pair["left"] == "tuned" for pair in key_of(sheet)["pairs"]}
    pairs = sorted(shown(sheet)["pairs"], key=lambda pair: names[pair["id"]])
    page = [pair | {"id": pair["id"][:-1] + "bz"[names[pair["id"]]]} for pair in pairs]
    random.Random(0).shuffle(page)
    source = json.dumps(page)
    right, _ = guesses(features(page, source), [pair["id"][-1] == "z" for pair in page])
    assert max(right) == 200


def test_the_sheet_names_no_side_and_its_size_is_the_same_either_way(tmp_path):
    sizes = set()
    for number in range(8):
        sheet = make(tmp_path / str(number), 40, f"secret {number}")
        text = sheet.sheet.read_text("utf-8")
        assert not re.search("tuned|base|secret", text)
        assert {len(pair["id"]) for pair in shown(sheet)["pairs"]} == {8}
        assert [list(pair) for pair in shown(sheet)["pairs"]] == [["id", "prompt", "left", "right"]] * 40
        sizes.add(len(text))
    assert len(sizes) == 1


def test_sides_and_order_come_from_the_seed_alone(tmp_path):
    one, same, other = (make(tmp_path / name, 40, seed) for name, seed in (("a", "x"), ("b", "x"), ("c", "y")))
    assert one.sheet.read_bytes() == same.sheet.read_bytes()
    assert one.key.read_bytes() == same.key.read_bytes()
    lefts = [{pair["prediction"]: pair["left"] for pair in key_of(sheet)["pairs"]} for sheet in (one, other)]
    assert 5 < sum(lefts[0][i] == lefts[1][i] for i in range(40)) < 35
    orders = [[pair["prediction"] for pair in key_of(sheet)["pairs"]] for sheet in (one, other)]
    assert orders[0] != orders[1] != sorted(orders[1])


def test_swapped_sides_give_a_sheet_of_another_name(tmp_path):
    sheet = make(tmp_path / "a")
    changed = make_sheet(
        predictions([f"Ay, {i}." for i in range(12)]), predictions(["No."] * 12), tmp_path / "b", "secret"
    )
    assert shown(sheet)["sheet"] != shown(changed)["sheet"]


def test_what_betrays_a_side_at_a_glance_is_taken_out(tmp_path):
    tuned = "  Aye,\u200b little\u00a0 barnacle. \r\n\r\n\r\n\r\nMind   the tide. \n"
    base = (
        "<think>\nhm\n</think>\n## Answer\n**Certainly!** Here is *one* __thing__:\n```text\n2 * 3 ** 2\n```<|im_end|>"
    )
    page = shown(make_sheet(predictions([tuned]), predictions([base]), tmp_path, "s"))["pairs"][0]
    assert {page["left"], page["right"]} == {
        "Aye, little barnacle.\n\nMind the tide.",
        "Answer\nCertainly! Here is *one* thing:\n2 * 3 ** 2",
    }


def test_identical_and_empty_replies(tmp_path):
    tuned = predictions(["Same.", "Aye.", "", "", "a b"])
    base = predictions(["Same.<|im_end|>", "", "Yes.", " ", "a  b"])
    sheet = make_sheet(tuned, base, tmp_path, "s")
    assert (sheet.pairs, sheet.identical) == (2, 3)
    assert key_of(sheet)["identical"] == [0, 3, 4]
    assert sorted(pair["prompt"] for pair in shown(sheet)["pairs"]) == ["Question 1?", "Question 2?"]
    with pytest.raises(DataError, match="All 5 pairs"):
        make_sheet(tuned, tuned, tmp_path / "b", "s")


def test_predictions_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(DataError, match="2 predictions of tuned but 1 of base"):
        make_sheet(predictions(["a", "b"]), predictions(["c"]), tmp_path, "s")
    with pytest.raises(DataError, match="no predictions"):
        make_sheet([], [], tmp_path, "s")
    other = [Prediction("Else?", "c")]
    with pytest.raises(DataError, match="Prediction 1 .* different prompts"):
        make_sheet(predictions(["a"]), other, tmp_path, "s")
    assert not list(tmp_path.iterdir())


def test_a_key_is_not_overwritten_by_that_of_another_sheet(tmp_path):
    make(tmp_path, seed="one")
    make(tmp_path, seed="one")
    with pytest.raises(UsageError, match="key of another sheet"):
        make(tmp_path, seed="two")


def test_a_limit_draws_pairs_at_random(tmp_path):
    drawn = [pair["prediction"] for pair in key_of(make(tmp_path, 100, limit=10))["pairs"]]
    assert len(set(drawn)) == 10
    assert max(drawn) > 20


def test_text_of_others_cannot_leave_its_element(tmp_path):
    evil = "</script><script>alert(1)</script><!-- \u2028 & \" '"
    sheet = make_sheet(predictions([evil]), predictions(["No."]), tmp_path, "s", about=evil, examples=[evil])
    text = sheet.sheet.read_text("utf-8")
    assert "alert(1)<" not in text
    assert text.count("</script>") == 2
    assert text.count("<!--") == 0
    assert evil.replace("\u2028", " ").split("<!--")[0] in "".join(shown(sheet)["pairs"][0].values())


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_known_answers_give_the_figures_of_scipy(tmp_path):
    sheet = make(tmp_path, 40)
    path = fill(sheet, tmp_path / "a.json", lambda i: "tuned" if i < 26 else "base" if i < 36 else "tie")
    found = score_sheet([path], sheet.key).overall
    theirs = stats.binomtest(26, 36)
    interval = theirs.proportion_ci(method="wilson")
    assert (found.wins, found.losses, found.ties) == (26, 10, 4)
    assert found.rate == pytest.approx(26 / 36)
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.rate_low, found.rate_high) == pytest.approx((interval.low, interval.high))
    assert found.log_odds == pytest.approx(math.log(2.6))
    said = describe(score_sheet([path], sheet.key))
    assert "tuned was preferred to base in 26 of 36 decided pairs: 72 %, 95 % interval 56 % to 84 %" in said
    assert "exact p = 0.0113; 4 ties" in said


def test_several_readers_count_by_their_majority(tmp_path):
    sheet = make(tmp_path, 12)
    paths = [
        fill(sheet, tmp_path / "a.json", lambda i: "tuned", "Ada"),
        fill(sheet, tmp_path / "b.json", lambda i: "tuned" if i < 8 else "base", "Bo"),
        fill(sheet, tmp_path / "c.json", lambda i: "base" if i < 2 else "tie", "Cy"),
    ]
    score = score_sheet(paths, sheet.key)
    assert (score.overall.wins, score.overall.losses, score.overall.ties) == (8, 0, 4)
    assert [(rater.name, rater.preference.wins) for rater in score.raters] == [("Ada", 12), ("Bo", 8), ("Cy", 0)]
    assert [agreement.raters for agreement in score.agreement] == [("Ada", "Bo"), ("Ada", "Cy"), ("Bo", "Cy")]
    assert score.agreement[0].share == pytest.approx(8 / 12)
    chosen = [[answer["choice"] for answer in json.loads(path.read_text("utf-8"))["answers"]] for path in paths]
    counts = [Counter(choices) for choices in chosen]
    chance = sum(counts[0][c] * counts[1][c] for c in ("left", "right", "tie")) / 144
    assert score.agreement[0].kappa == pytest.approx((8 / 12 - chance) / (1 - chance))
    assert "Ada and Bo gave the same answer to 67 % of the pairs" in describe(score)
    assert json.loads(json.dumps(asdict(score)))["overall"]["wins"] == 8


def test_a_reader_who_clicks_one_side_is_noticed(tmp_path):
    sheet = make(tmp_path, 40)
    left = {pair["prediction"]: pair["left"] for pair in key_of(sheet)["pairs"]}
    score = score_sheet([fill(sheet, tmp_path / "a.json", lambda i: left[i])], sheet.key)
    assert (score.overall.wins, score.overall.losses) == (20, 20)
    assert "took the left reply in 40 of 40" in describe(score)
    assert "That may be chance" in describe(score)


def test_a_comment_is_read_with_its_pair_and_cannot_steer_the_terminal(tmp_path):
    sheet = make(tmp_path)
    path = fill(sheet, tmp_path / "a.json", lambda i: "base", "Bad\x1b[2J")
    value = json.loads(path.read_text("utf-8"))
    value["answers"][0]["comment"] = "too \x1b[31mlong"
    path.write_text(json.dumps(value), encoding="utf-8")
    said = describe(score_sheet([path], sheet.key))
    assert "\x1b" not in said
    assert f"pair {key_of(sheet)['pairs'][0]['prediction'] + 1}, Bad\\x1b[2J (base): too" in said


def test_a_wrong_key_is_refused(tmp_path):
    sheet, other = make(tmp_path / "a"), make(tmp_path / "b", seed="other")
    path = fill(sheet, tmp_path / "a.json", lambda i: "tuned")
    with pytest.raises(DataError, match="do not belong together"):
        score_sheet([path], other.key)
    with pytest.raises(UsageError, match="is not a key"):
        score_sheet([path], path)
    with pytest.raises(UsageError, match="is a key, not answers"):
        score_sheet([sheet.key], sheet.key)
    with pytest.raises(UsageError, match="cannot be read"):
        score_sheet([path], tmp_path / "none.json")


def broken(change):
    def apply(value):
        change(value)
        return json.dumps(value)

    return apply


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (broken(lambda v: v["answers"].pop()), "11 of 12 pairs are answered"),
        (broken(lambda v: v["answers"].append(v["answers"][0])), "a second time"),
        (
            broken(lambda v: v["answers"][3].update(choice="both")),
            "answer 4: a choice is left, right or tie, found 'both'",
        ),
        (broken(lambda v: v["answers"][3].update(choice=1)), "must be text"),
        (broken(lambda v: v["answers"][3].update(id="zzz")), "no pair 'zzz'"),
        (broken(lambda v: v["answers"].__setitem__(0, 5)), "expected an object"),
        (broken(lambda v: v.update(answers=None)), 'no list under "answers"'),
        (broken(lambda v: v.update(format="x")), "does not hold answers of this version"),
        (broken(lambda v: v.pop("sheet")), "do not belong together"),
        (lambda v: json.dumps(v)[:200], "broken JSON"),
        (lambda v: "[1, 2]", "does not hold answers"),
        (lambda v: "", "expected JSON or the columns"),
        (lambda v: "sheet,rater,id,choice\n", "no answers in it"),
        (lambda v: "<!DOCTYPE html><title>A/B</title>", "is a page, not the answers"),
        (lambda v: "sheet,id,choice\na,b,left\nc,d,left\n", "answers of several sheets"),
    ],
)
def test_broken_answers_are_refused(tmp_path, spoil, said):
    sheet = make(tmp_path)
    path = fill(sheet, tmp_path / "a.json", lambda i: "tuned")
    path.write_text(spoil(json.loads(path.read_text("utf-8"))), encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(said)) as fault:
        score_sheet([path], sheet.key)
    assert str(path) in str(fault.value)


@pytest.mark.parametrize("spoil", ["", "{}", "[]", '{"format": "ab-key-1"}', "no"])
def test_a_broken_key_is_refused(tmp_path, spoil):
    sheet = make(tmp_path)
    path = fill(sheet, tmp_path / "a.json", lambda i: "tuned")
    sheet.key.write_text(spoil, encoding="utf-8")
    with pytest.raises(UsageError, match="ab_key.json"):
        score_sheet([path], sheet.key)


def test_the_same_reader_twice_is_refused(tmp_path):
    sheet = make(tmp_path)
    paths = [fill(sheet, tmp_path / name, lambda i: "tuned") for name in ("a.json", "b.json")]
    with pytest.raises(DataError, match="2 files are of the rater 'Ada'"):
        score_sheet(paths, sheet.key)
    nameless = [fill(sheet, tmp_path / name, lambda i: "tuned", "") for name in ("a.json", "b.json")]
    assert [rater.name for rater in score_sheet(nameless, sheet.key).raters] == ["a", "b"]


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8-sig"), (";", "utf-8"), ("\t", "utf-16"), (",", "gb18030")]
)
def test_answers_that_a_spreadsheet_saved_again(tmp_path, delimiter, encoding):
    sheet = make(tmp_path)
    whole = json.loads(fill(sheet, tmp_path / "a.json", lambda i: "tuned").read_text("utf-8"))
    rows = [f"{whole['sheet']}|小王|{a['id']}|{a['choice']}|像" for a in whole["answers"]]
    text = "\r\n".join(["sheet|rater|id|choice|comment", *rows, "||||", ""]).replace("|", delimiter)
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    score = score_sheet([tmp_path / "a.csv"], sheet.key)
    assert (score.overall.wins, score.raters[0].name, score.comments[0].text) == (12, "小王", "像")
