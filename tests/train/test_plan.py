"""What stands behind an update: a pure function of seed and counts that costs no more than the update itself."""

import random

from persona.train.schedule import conversations_of, updates_per_epoch


def epoch(number, count=50, batch=8, seed=0):
    updates = updates_per_epoch(count, batch)
    return [i for place in range(updates) for i in conversations_of(number * updates + place, count, batch, seed)]


def test_an_epoch_has_every_conversation_once_in_an_order_of_its_own():
    orders = [epoch(0), epoch(1), epoch(0, seed=1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert epoch(1) == orders[1]  # whatever was asked for in between


def test_an_epoch_is_shuffled_once(monkeypatch):
    shuffled = []
    shuffle = random.Random.shuffle
    monkeypatch.setattr(
        random.Random, "shuffle", lambda self, order: shuffled.append(len(order)) or shuffle(self, order)
    )
    epoch(5, count=1000, seed=3)
    assert shuffled == [1000]
