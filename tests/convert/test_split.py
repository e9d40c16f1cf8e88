"""The split: groups whole, replies on one side only, counted shares; the set of fingerprints; the shuffle's order."""

import random

import pytest

from persona.convert.cleaning import fold, fold_conversation, replies_of
from persona.convert.command import choose
from persona.convert.output import Shuffle
from persona.convert.split import Seen, Split, fingerprint, once_more
from persona.errors import UsageError
from persona.records import rank


def divide(folder, groups, ratio, replies=None, pinned=()):
    """What is held out of records with these groups, each with the replies given."""
    split = Split(folder)
    for number, group in enumerate(groups):
        bonds = [fingerprint(f"group {group}"), *(fingerprint(text) for text in (replies or {}).get(number, ()))]
        split.add(int(rank(0, str(group))[:16], 16), bonds, number in pinned)
    return split.held_out(ratio)


def test_groups_stay_whole_and_are_counted(tmp_path):
    groups = [number % 10 for number in range(60)]
    held = divide(tmp_path, groups, 0.3)
    assert sum(held) == 18
    assert len({group for group, out in zip(groups, held, strict=True) if out}) == 3
    assert all(held[number] == held[number % 10] for number in range(60))


def test_the_split_depends_on_the_groups_not_on_their_order(tmp_path):
    groups = [number % 10 for number in range(60)]
    shuffled = random.Random(3).sample(groups, 60)
    out = [
        {group for group, held in zip(rows, divide(tmp_path, rows, 0.3), strict=True) if held}
        for rows in (groups, shuffled)
    ]
    assert out[0] == out[1]


@pytest.mark.parametrize(
    ("ratio", "groups", "expected"), [(0, 9, 0), (0.01, 9, 1), (0.5, 1, 0), (0.99, 2, 1), (0.2, 9, 2), (0.5, 0, 0)]
)
def test_number_held_out(tmp_path, ratio, groups, expected):
    assert sum(divide(tmp_path, range(groups), ratio)) == expected


def test_bad_ratios():
    for ratio in (-0.1, 1, float("nan")):
        with pytest.raises(UsageError, match="ratio"):
            choose({"val_ratio": ratio})


def test_records_with_a_reply_in_common_are_on_one_side(tmp_path):
    chain = {number: (f"r{number}", f"r{number + 1}") for number in range(40)}
    assert sum(divide(tmp_path, range(60), 0.2, chain)) == 12, "the others are enough"
    chain = {number: (f"r{number}", f"r{number + 1}") for number in range(59)}
    held = divide(tmp_path, range(60), 0.2, chain)
    assert sum(held) == 1
    assert held[59]


def test_what_is_pinned_is_learned(tmp_path):
    held = divide(tmp_path, range(20), 0.5, {0: ("x",), 5: ("x",)}, pinned={0})
    assert not held[0]
    assert not held[5]
    assert sum(held) == 9
    assert sum(divide(tmp_path, range(3), 0.5, pinned={0, 1, 2})) == 0


def test_many_bonds_go_over_the_disk(tmp_path):
    split = Split(tmp_path)
    for number in range(300_000):
        split.add(number, [number % 1000])
    assert any(tmp_path.iterdir())
    held = split.held_out(0.1)
    assert sum(held) == 30_000
    assert all(held[number] == held[number % 1000] for number in range(0, 300_000, 77))
    assert not any(tmp_path.iterdir())


def test_the_set_of_fingerprints():
    seen, values = Seen(), [random.Random(number).getrandbits(64) for number in range(5000)]
    assert all(seen.add(value) for value in values)
    assert not any(seen.add(value) for value in values)
    assert seen.add(0)
    assert not seen.add(0)


def test_lines_come_back_by_rank(tmp_path):
    shuffle = Shuffle(tmp_path)
    for number in range(500):
        shuffle.add(rank(0, str(number % 400))[:16], number, 0, f"线 {number}".encode())
    out = list(shuffle.in_order())
    ranks = [(rank(0, str(number % 400))[:16], number) for number, _, _ in out]
    assert ranks == sorted(ranks)
    assert all(line.decode() == f"线 {number}" for number, _, line in out)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("weight", "extra"), [(1, 0), (5, 0), (2.5, 5), (1.96, 10)])
def test_the_fraction_of_a_weight(weight, extra):
    ranks = {number: random.Random(number).random() for number in range(10)}
    chosen = once_more(ranks, weight)
    assert len(chosen) == extra
    assert chosen == set(sorted(ranks, key=ranks.__getitem__)[:extra])


@pytest.mark.parametrize(
    "texts", [("a b", "a\nb"), ("a b", "a  b"), ("a b", "a\t\n b"), ("灯 塔", "灯\u3000塔"), ("é", "e\u0301")]
)
def test_conversations_fold_like_their_texts(texts):
    one, other = ([{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts)
    assert fold_conversation(one) == fold_conversation(other)
    assert fold_conversation(one) == "\0".join(["user", fold(texts[0]), "assistant", fold(texts[0])])
    assert replies_of(fold_conversation(other)) == [fold(texts[1])]
