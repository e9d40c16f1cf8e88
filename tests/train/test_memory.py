"""A full memory during a run: it goes on in halves, learns the same, remembers the size, and ends only with advice."""

import json
import math
import re
import signal
from collections import Counter

import pytest
import torch
from accelerate.state import AcceleratorState
from making.pretended_gpu import PretendedGpu
from making.runs import adapter_bytes, config, metrics

import persona.train.loop
import persona.train.metrics
from persona.errors import Interrupted, OutOfMemory
from persona.train.run import finetune

pytestmark = pytest.mark.usefixtures("one_thread")
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.63 GiB"


@pytest.fixture(autouse=True)
def _a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(True)  # the device too


def train(settings, observers=()):
    lines = []
    return finetune(settings, True, lines.append, observers=observers).parent, "\n".join(lines)


class SmallMemory:
    """A memory for packs of `tokens` tokens while training, and of `measured` in evaluations; others end in an error.

    From update `since` on, after `fine` packs more; in the backward pass if it is `late`, else in the forward pass.
    """

    def __init__(
        self, monkeypatch, tokens=math.inf, measured=math.inf, since=1, fine=0, late=False, checkpointed=math.inf
    ):
        self.tokens, self.measured, self.since, self.late = tokens, measured, since, late
        self.checkpointed, self.fine = checkpointed, fine
        self.step, self.packs, self.refused = 1, [], []
        self.loss = persona.train.loop.negative_log_likelihood
        monkeypatch.setattr(persona.train.loop, "negative_log_likelihood", self)

    def __call__(self, model, packed):
        loss, size = self.loss(model, packed), packed.input_ids.numel()
        room = self.measured if not model.training else self.tokens
        if model.training and model.is_gradient_checkpointing:
            room = self.checkpointed
        self.packs.append((self.step, model.training, size))
        if size <= room or self.step < self.since:
            return loss
        if model.training and self.fine:
            self.fine -= 1
            return loss
        self.refused.append((self.step, size))
        if not (self.late and model.training):
            raise torch.OutOfMemoryError(FULL)
        loss.register_hook(self.fail)
        return loss

    def fail(self, gradient):
        raise torch.OutOfMemoryError(FULL)

    def observe(self, trainer, update):
        self.step = trainer.progress.step + 1


def losses(run, tag="train/loss"):
    return {line["step"]: line[tag] for line in metrics(run) if tag in line}


def made(tmp_path, model, name, tokens=2048, dropout=0.1, **changes):
    training = {
        "output_dir": f"outputs/{name}",
        "max_tokens_per_pack": tokens,
        "num_train_epochs": 4,
        "train_batch_size": 8,
    }
    changes = {"training": training | changes.pop("training", {})} | changes
    return config(tmp_path, model, 24, lora={"lora_dropout": dropout}, **changes)


def test_the_try_before_the_first_update_changes_nothing(tmp_path, tiny_model, monkeypatch):
    without, _ = train(made(tmp_path, tiny_model, "without"))
    monkeypatch.setattr(persona.train.loop, "TRIED_ON", ("cpu",))
    memory = SmallMemory(monkeypatch)
    tried, said = train(made(tmp_path, tiny_model, "tried"))
    assert "memory is full" not in said
    assert memory.packs[0][:2] == (1, True)
    assert memory.packs[0][2] == max(size for _, learns, size in memory.packs if learns)  # the largest, tried first
    assert [learns for _, learns, _ in memory.packs].count(True) == 13
    assert adapter_bytes(tried) == adapter_bytes(without)
    assert losses(tried) == losses(without)
    last = "checkpoint-12/random.safetensors"
    assert (tried / last).read_bytes() == (without / last).read_bytes()
    assert "fitted" not in json.loads((tried / "run.json").read_text(encoding="utf-8"))


def test_a_full_memory_in_the_try_halves_the_packs_of_the_whole_run(tmp_path, tiny_model, monkeypatch):
    half, _ = train(made(tmp_path, tiny_model, "half", 128))
    monkeypatch.setattr(persona.train.loop, "TRIED_ON", ("cpu",))
    memory = SmallMemory(monkeypatch, tokens=128)
    run, said = train(made(tmp_path, tiny_model, "full", 256))
    assert memory.refused
    assert {step for step, _ in memory.refused} == {1}
    assert adapter_bytes(run) == adapter_bytes(half)  # with dropout
    assert losses(run) == losses(half)
    assert re.search(r"The memory is full \(CUDA out of memory\. Tried .*\): going on with packs of 128 tokens", said)
    assert "set training.max_tokens_per_pack to 128 in the settings (now 256)" in said
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["fitted"] == {"training.max_tokens_per_pack": 128}


@pytest.mark.parametrize("late", [False, True])
def test_a_full_memory_in_update_7_starts_it_over_in_halves(tmp_path, tiny_model, monkeypatch, late):
    """The losses are those of the halved setting; with dropout the run is the one that is stopped there and halved."""
    small, _ = train(made(tmp_path, tiny_model, "small", 128, dropout=0))
    with monkeypatch.context() as patch:
        memory = SmallMemory(patch, tokens=128, since=7, fine=1, late=late)
        run, said = train(made(tmp_path, tiny_model, "full", 256, dropout=0), [memory.observe])
    assert {step for step, _ in memory.refused} == {7}
    assert len(memory.refused) == 1
    sizes = [size for step, learns, size in memory.packs if step == 7 and learns]
    assert len([size for size in sizes if size > 128]) == 2  # the first of them was learned in vain
    assert said.count("going on with packs of 128 tokens") == 1
    assert losses(run) == pytest.approx(losses(small), abs=1e-5)
    assert losses(run, "eval/loss") == pytest.approx(losses(small, "eval/loss"), abs=1e-5)
    assert len(losses(run)) == 12

    def stop(trainer, update):
        if trainer.progress.step == 6:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(made(tmp_path, tiny_model, "stopped", 256), [stop])
    stopped, _ = train(made(tmp_path, tiny_model, "stopped", 128))
    memory = SmallMemory(monkeypatch, tokens=128, since=7, fine=1, late=late)
    again, _ = train(made(tmp_path, tiny_model, "again", 256), [memory.observe])
    assert adapter_bytes(again) == adapter_bytes(stopped)


def test_a_full_memory_in_an_evaluation_and_in_samples(tmp_path, tiny_model, monkeypatch):
    changes = {"evaluation": {"max_tokens_per_pack": 256, "sample_prompts": 4}, "held_out": 5}
    whole, _ = train(made(tmp_path, tiny_model, "whole", **changes))
    memory = SmallMemory(monkeypatch, measured=128)
    at_once, generate = [], persona.train.metrics.generate

    def of_two(model, prompts, stops, decoding, batch_size, *rest):
        at_once.append(batch_size)
        if min(batch_size, len(prompts)) > 2:
            raise torch.OutOfMemoryError(FULL)
        return generate(model, prompts, stops, decoding, batch_size, *rest)

    monkeypatch.setattr(persona.train.metrics, "generate", of_two)
    run, said = train(made(tmp_path, tiny_model, "full", **changes))
    assert memory.refused
    assert at_once[:2] == [4, 2]
    assert set(at_once[2:]) == {2}
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert losses(run, "eval/loss") == pytest.approx(losses(whole, "eval/loss"), abs=1e-5)
    texts = [(folder / "samples.jsonl").read_text(encoding="utf-8") for folder in (run, whole)]
    assert texts[0] == texts[1]
    assert "going on with evaluations in packs of 128 tokens" in said
    assert "going on with 2 samples at a time" in said
    fitted = {"evaluation.max_tokens_per_pack": 128, "evaluation.sample_prompts": 2}
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["fitted"] == fitted


def test_without_room_for_one_sample_the_run_goes_on_without(tmp_path, tiny_model, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(persona.train.metrics, "generate", full)
    run, said = train(made(tmp_path, tiny_model, "run", evaluation={"sample_prompts": 2}))
    assert said.count("no samples: The memory is full") == 1
    assert len(losses(run)) == 12


def test_an_example_that_does_not_fit_alone_ends_the_run_with_advice_that_works(tmp_path, tiny_model, monkeypatch):
    memory = SmallMemory(monkeypatch, tokens=50, checkpointed=256)
    asked = made(tmp_path, tiny_model, "run", 256)
    with pytest.raises(OutOfMemory, match=r"with a single example of \d+ tokens\. Set training\.gradient_chec") as end:
        train(asked)
    assert end.value.exit_code == 5
    assert "quantization.load_in_4bit" in str(end.value)
    assert "data.max_length" in str(end.value)
    memory.packs.clear()
    with_advice = made(tmp_path, tiny_model, "run", 256, training={"gradient_checkpointing": True})
    run, said = train(with_advice)
    assert "memory is full" not in said  # the whole size is tried again, since a setting is another
    assert max(size for _, learns, size in memory.packs if learns) > 128
    assert len(losses(run)) == 12


def test_a_continued_run_begins_with_the_size_that_fitted(tmp_path, tiny_model, monkeypatch):
    memory = SmallMemory(monkeypatch, tokens=128)
    asked = made(tmp_path, tiny_model, "run", 256)

    def stop(trainer, update):
        if trainer.progress.step in (3, 5):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(asked, [stop])
    assert memory.refused
    memory.refused.clear()
    with pytest.raises(Interrupted):
        train(asked, [stop])
    assert not memory.refused
    run, said = train(asked)
    assert not memory.refused
    assert "packs of 128 tokens, since the memory was full before" in said
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["fitted"] == {"training.max_tokens_per_pack": 128}
    assert max(size for _, learns, size in memory.packs if learns) <= 256


def test_other_settings_try_the_whole_size_again(tmp_path, tiny_model, monkeypatch):
    memory = SmallMemory(monkeypatch, tokens=128)

    def stop(trainer, update):
        if trainer.progress.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(made(tmp_path, tiny_model, "run", 256), [stop])
    memory.refused.clear()
    memory.tokens = math.inf
    run, said = train(made(tmp_path, tiny_model, "run", 255))
    assert "since the memory was full" not in said
    assert max(Counter(size for step, learns, size in memory.packs if learns)) > 128
    assert "fitted" not in json.loads((run / "run.json").read_text(encoding="utf-8"))


def test_a_gpu_that_is_too_small_is_found_out_before_the_first_update(tmp_path, tiny_model, monkeypatch):
    """The memory of the pretended GPU, which counts tensors, is between the peaks of the two settings."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")

    def on_gpu(name, tokens, room=2**34):
        AcceleratorState._reset_state(True)
        with PretendedGpu() as gpu:
            gpu.allowed = room / gpu.total
            asked = made(tmp_path, tiny_model, name, tokens, training={"optim": "adamw_torch"})
            return *train(asked), gpu.peak, gpu.mixes

    half, _, least, _ = on_gpu("half", 250)
    _, _, most, _ = on_gpu("whole", 500)
    assert most > 1.2 * least
    run, said, peak, mixes = on_gpu("full", 500, (most + least) / 2)
    assert not mixes
    assert peak < (most + least) / 2
    assert said.index("going on with packs of 250 tokens") < said.index("update    1/12")
    assert said.count("The memory is full") == 1
    assert adapter_bytes(run) == adapter_bytes(half)
