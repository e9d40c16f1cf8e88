"""An evaluation with everything in it, about the sample character, for the tests of the report page."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from persona.evaluate.results import (
    Answer,
    Copied,
    Copying,
    Curve,
    DataStatistics,
    Distance,
    Distribution,
    Estimate,
    Evaluation,
    Exchange,
    FileScore,
    Level,
    Phrase,
    Question,
    Recall,
    Replies,
    Score,
    Sides,
    Span,
    StyleReport,
)
from persona.speak.rounding import Rounding
from persona.train.verdict import Finding

TAMSIN = Path(__file__).parents[2] / "data" / "tamsin"
BASE = (
    "As a lighthouse keeper, I don't have personal feelings, but I can certainly help you with that! "
    "Here are some steps that you may want to consider: first, take a deep breath."
)
EVIL = "</div></section><script>alert(1)</script><img src=http://example.com/x onerror=alert(2)> & “q” \u202e"


def score(chance, perplexity):
    bits = perplexity / 16
    spread = chance.uniform(0.03, 0.1)
    return Score(
        Estimate(perplexity, perplexity * (1 - spread), perplexity * (1 + spread)),
        Estimate(bits, bits * (1 - spread), bits * (1 + spread)),
    )


def curve():
    chance = random.Random(3)
    train = tuple((step, 2.6 + 1.5 * math.exp(-step / 12) + chance.gauss(0, 0.12)) for step in range(1, 55))
    held_out = tuple((step, 3.0 + 0.96 * math.exp(-step / 9) + 0.002 * max(0, step - 40)) for step in range(0, 55, 9))
    return Curve(train, held_out, min(held_out, key=lambda point: point[1])[0])


def spread(chance, count, sharpness):
    values = [math.exp(-((i - count * sharpness) ** 2) / count) + chance.random() * 0.08 for i in range(count)]
    return tuple(value / sum(values) for value in values)


def distribution(chance, name, labels):
    sides = [spread(chance, len(labels), middle) for middle in (0.3, 0.4, 0.7)]
    return Distribution(name, "share", tuple(labels), sides[0], Sides(sides[1], sides[2]))


def level(name, unit, author, tuned, base):
    def about(value):
        return Estimate(value, value * 0.9, value * 1.1)

    return Level(name, unit, about(author), Sides(about(tuned), about(base)))


def style():
    chance = random.Random(5)
    names = (
        "text length",
        "sentence length",
        "punctuation",
        "words",
        "function words",
        "Burrows' Delta",
        "character 3-5-grams",
    )
    distances = []
    for name in names:
        author, base = chance.uniform(0.05, 0.2), chance.uniform(0.4, 0.9)
        tuned = author + (base - author) * chance.uniform(0.15, 0.6)
        sides = Sides(*(Estimate(value, value * 0.9, value * 1.1) for value in (tuned, base)))
        distances.append(Distance(name, "0 to 1", Estimate(author, author * 0.8, author * 1.25), sides))
    lengths = ["1–5", "6–10", "11–20", "21–40", "41–80", "81–160", "161–320", "321+"]
    return StyleReport(
        headline=Estimate(0.6213, 0.5387, 0.7044),
        words="letters",
        texts=30,
        sample=2500,
        distances=tuple(distances),
        levels=(
            level("text length", "characters", 180, 170, 640),
            level("emoji", "per 1,000 characters", 0.5, 0.25, 8),
        ),
        distributions=(
            distribution(chance, "text length (characters)", lengths),
            distribution(chance, "sentence length (words)", lengths),
            distribution(
                chance, "punctuation per 1,000 characters", list(".,!?'\"-;:…()~") + ["emoji", "digits", "Latin"]
            ),
            distribution(
                chance,
                "function words",
                list("abcdefghijklmnopqrs"),
            ),
        ),
        phrases=(
            Phrase("little barnacle", 21.4, Sides(19.8, 0.0)),
            Phrase("keep yer wick trimmed", 6.1, Sides(7.3, 0.0)),
            Phrase("so says Old Meg", 5.25, Sides(0.4, 0.12)),
        ),
        diversity=(
            level("distinct-1", "different words among all words, of 900 words", 0.34, 0.31, 0.28),
            level("self-BLEU", "0 to 100, likeness of 30 texts to each other", 12, 21.5, 30.25),
        ),
        notes=("Only 30 texts of each side: below 100 the interval is wide.",),
    )


def exchanges():
    found = []
    for line in (TAMSIN / "val.jsonl").read_text("utf-8").splitlines()[:10]:
        prompt, target = (message["content"] for message in json.loads(line)["messages"][:2])
        tuned = target[: len(target) // 2] + " The Grey Lady has her moods, and I've a stew on. Mind the tide."
        spans = (Span(0, 28, "dialogue.txt#scene-12"),) if len(found) % 3 == 0 else ()
        found.append(Exchange(prompt, target, Sides(tuned, BASE), spans))
    found[1] = Exchange(EVIL, EVIL, Sides(EVIL, ""), (Span(0, 9, EVIL), Span(5, 500, "b")))
    return tuple(found)


def question(text, reference, facts, found, trained=True):
    answer = Answer(f"Aye, little barnacle, {' and '.join(found) or 'who can tell'}. Mind the tide.", found)
    blank = Answer("I'm sorry, I don't know that.", ())
    return Question(text, reference, facts, Sides(answer, Answer(BASE, found[:1])), Sides(answer, blank), trained)


def whole():
    """The default run as it might have been, with a control file and text that wants to break the page."""
    chance = random.Random(1)
    return Evaluation(
        name="tamsin <灯塔>",
        kind="adapter",
        seed=0,
        language="en",
        scores=(
            FileScore(
                "data/tamsin/val.jsonl",
                "ab" * 32,
                "held_out",
                30,
                47,
                2874,
                9120,
                Sides(score(chance, 20.284519), score(chance, 52.311233)),
                Estimate(0.3878, 0.3512, 0.4261),
            ),
            FileScore(
                "data/neutral.jsonl",
                "cd" * 32,
                "control",
                12,
                24,
                1503,
                6211,
                Sides(score(chance, 14.93), score(chance, 14.11)),
                Estimate(1.058, 1.021, 1.097),
                ("data/neutral.jsonl:7: 1,312 tokens are more than 1,024; left out",),
                "fp32",
            ),
        ),
        replies=Sides(
            Replies(47, 4.31, 24.87, 19.02, 1.084, 0.0213, 0.9787),
            Replies(47, 0.62, 16.4, 10.75, 2.413, 0.3617, 0.6383),
        ),
        rounding=Rounding(0.0000558, 0.001, None),
        recall=Recall(
            Sides(Estimate(0.78, 0.66, 0.89), Estimate(0.61, 0.47, 0.74)),
            Sides(Estimate(0.34, 0.2, 0.49), Estimate(0.02, 0.0, 0.05)),
            (
                question(
                    "What is yer cat called?",
                    "Admiral Biscuit, the old pirate.",
                    ("Admiral", "Biscuit"),
                    ("Admiral", "Biscuit"),
                ),
                question(
                    "Who brings the post?", "Dorcas Pascoe, on Thursdays.", ("Dorcas", "Thursdays"), ("Dorcas",), False
                ),
                question("What is your boat?", "The Soup Ladle.", ("Soup Ladle",), ()),
            ),
            False,
        ),
        copying=Copying(
            0.0173,
            Sides(
                Copied(
                    Estimate(0.0612, 0.031, 0.0987),
                    23,
                    "Sit down a full lantern. Let somebody else carry the bucket tonight.",
                    "dialogue.txt#scene-47",
                ),
                Copied(Estimate(0.0), 0, "", ""),
            ),
        ),
        style=style(),
        exchanges=exchanges(),
        verdict=(
            Finding("best_at", "Best at update 54 of 54: held-out perplexity 20.3, 61 % below the base's 52.3."),
            Finding(
                "still_learning",
                "Still learning: the last evaluation lowered the loss by 0.02.",
                "Raise training.num_train_epochs (this run did 2.0).",
            ),
            Finding(
                "forgets",
                "Forgets a little: perplexity on neutral.jsonl rose by 5.8 %.",
                "Lower training.learning_rate.",
            ),
        ),
        curve=curve(),
        data=(
            DataStatistics(
                "data/tamsin/train.jsonl", "6a" * 32, 213, 343, 66120, 181, {"dialogue": 160, "lore_qa": 53}
            ),
            DataStatistics("data/tamsin/val.jsonl", "64" * 32, 30, 47, 9120, 188, {"dialogue": 30}),
        ),
        settings={
            "model": {"name_or_path": "smollm2-135m-instruct"},
            "lora": {"r": 16, "lora_dropout": 0.0},
            "seed": 0,
        },
        versions={"persona-toolkit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        hashes={"base": "12" * 32, "adapter": "34" * 32},
    )


def chinese():
    """Somebody else's generations in Chinese: no model, no base, hardly anything else."""
    labels = ["，", "。", "！", "？", "…", "、", "；", "~", "emoji"]
    chance = random.Random(2)
    drawn = replace(distribution(chance, "标点（每千字）", labels), side=Sides(spread(chance, 9, 0.4)))
    lengths = replace(
        distribution(chance, "句长（字）", ["1–5", "6–10", "11–20", "21–40"]), side=Sides(spread(chance, 4, 0.4))
    )
    made = style()
    return Evaluation(
        name="别家模型的输出.txt",
        kind="texts",
        seed=0,
        language="zh",
        replies=Sides(Replies(2, 8.2, 31.0, 25.5, 0.93, 0.5)),
        style=replace(
            made,
            headline=Estimate(None, reason="no texts of a base model"),
            words="character bigrams",
            distances=tuple(replace(one, distance=Sides(one.distance.tuned)) for one in made.distances),
            distributions=(lengths, drawn),
            phrases=(Phrase("你管得着吗", 4.2, Sides(3.9)),),
            levels=tuple(replace(one, side=Sides(one.side.tuned)) for one in made.levels),
            diversity=tuple(replace(one, side=Sides(one.side.tuned)) for one in made.diversity),
        ),
        exchanges=(
            Exchange("今天过得怎么样？", "哼，你管得着吗？反正灯塔还亮着。", Sides("作为AI，我没有感情。"), ()),
        ),
    )


def stored(path):
    """The evaluation in a file, checked in full: every field is there, none is unknown, every figure is finite."""
    return TypeAdapter(Evaluation).validate_json(path.read_text(encoding="utf-8"))
