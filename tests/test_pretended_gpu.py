"""Runs on a pretended GPU: no operation mixes devices, nothing waits for the GPU outside a list of known places."""

import contextlib
import io
import signal
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from accelerate.state import AcceleratorState
from making import runs
from making.pretended_gpu import DeviceMix, PretendedGpu
from making.tiny import family, save_model

from persona.config import Lora, Quantization
from persona.engine.loss import negative_log_likelihood
from persona.engine.packing import pack
from persona.engine.trial import prepare_layout
from persona.errors import Interrupted
from persona.evaluate.command import Request, evaluate
from persona.merge.command import merge_and_verify
from persona.model.adapters import locate
from persona.model.loading import add_adapter, load_base
from persona.model.render import Example
from persona.speak.chat import chat
from persona.speak.speaker import load_speaker
from persona.train import loop
from persona.train import run as training
from persona.train.devices import build_accelerator
from persona.train.run import finetune

pytestmark = pytest.mark.usefixtures("one_thread", "own_process")

# Where an update waits for the GPU: how often for each pack, update or trained weight, and why
UPDATE = {
    "engine/loss.py supervised_logits via transformers/masking_utils.py find_packed_sequence_indices": (
        *(1, "pack"),
        "transformers looks whether a row holds several texts; only in rows",
    ),
    "train/loop.py _backward": (1, "update", "its loss is read"),
    "train/loop.py _step": (1, "update", "its norm is read"),
    "train/loop.py _step via accelerate/optimizer.py AcceleratedOptimizer.step": (1, "update", "did fp16 overflow?"),
    "train/loop.py _step via bitsandbytes/utils.py sync_gpu": (1, "weight", "bitsandbytes 0.50.2 waits after each"),
}
# Where else a program waits, and why it may; a name of a module means all of it
ELSEWHERE = {
    "engine/attention.py _fault": "once a process, to prove a fused kernel",
    "engine/trial.py": "once a run, before the first update",
    "evaluate/perplexity.py": "losses of a pack are read, and whether a layout agrees",
    "merge/": "once a merge",
    "model/architecture.py looks_ahead": "once a run, to see that no token depends on those behind it",
    "model/loading.py": "weights are copied to the GPU once",
    "speak/batches.py": "rounding is measured once a model",
    "speak/choices.py": "the choice of a token is made in Python",
    "speak/past.py": "the tokens of each pass are copied to the GPU",
    "speak/speaker.py": "transformers asks after each token whether the reply ends",
    "train/checkpoints.py": "once a checkpoint",
    "train/loop.py mean_loss": "a loss for each pack of held-out text",
}
LAUNCHES_A_LAYER = 350  # of the pack in `wide_examples`: 338 with attention in two calls of FlashAttention


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models by architecture."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = family("chatml_default")
    return {name: save_model(folder / name, name, tokenizer) for name in ("llama", "qwen3", "gpt2", "qwen2")}


def settings(folder, path, **changes):
    """Two updates of two packs each."""
    training = {"precision": "bf16", "num_train_epochs": 1, "train_batch_size": 4, "max_tokens_per_pack": 200}
    sections = {
        "training": training | changes.pop("training", {}),
        "evaluation": {"eval_steps": 2, "sample_prompts": 0} | changes.pop("evaluation", {}),
        "generation": {"max_new_tokens": 2},
    }
    return runs.config(folder, path, train=8, held_out=2, **sections, **changes)


@dataclass
class Seen:
    """The GPU after a run, its messages, and the waits of each update with the packs of it."""

    gpu: PretendedGpu
    messages: str
    updates: list[tuple[Counter, int]]
    weights: int


def train(config, gpu=None, observers=()):
    """Train on a pretended GPU and watch each update."""
    updates, packs, weights, messages = [], [], set(), []
    one_update, own_pack = loop._one_update, loop.pack

    def update(trainer):
        before, done = Counter(gpu.waits), len(packs)
        result = one_update(trainer)
        updates.append((gpu.waits - before, len(packs) - done))
        weights.add(len(loop.trained_weights(trainer.model)))
        return result

    def counted(*arguments):
        packs.append(None)
        return own_pack(*arguments)

    gpu = gpu or PretendedGpu()
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch, gpu:
        patch.setattr(loop, "_one_update", update)
        patch.setattr(loop, "pack", counted)
        finetune(config, True, messages.append, observers=observers)
    return Seen(gpu, "\n".join(messages), updates, weights.pop())


def unknown_waits(seen):
    """Places where an update waits that are not in the list, or wait more often than it says."""
    faults = []
    for waits, packs in seen.updates:
        units = {"pack": packs, "update": 1, "weight": seen.weights + 1}  # bitsandbytes waits once before the first
        places = Counter()
        for (where, _), count in waits.items():
            places[where] += count
        for where, count in places.items():
            most, unit, _ = UPDATE.get(where, (0, "update", ""))
            if count > most * units[unit]:
                faults.append(f"{where}: {count}")
    return faults


def faults(gpu):
    """Mixes of devices, and places that wait and are in neither list."""
    places = {where for where, _ in gpu.waits}
    return [*gpu.mixes, *sorted(where for where in places if not where.startswith((*UPDATE, *ELSEWHERE)))]


# Each value of a column meets each value of every other column
PAIRS = [
    ("llama", "bf16", True, True, 0.1),
    ("llama", "fp16", False, False, 0),
    ("llama", "fp32", True, False, 0.1),
    ("qwen3", "bf16", False, False, 0.1),
    ("qwen3", "fp16", True, True, 0),
    ("qwen3", "fp32", False, True, 0),
    ("gpt2", "bf16", True, False, 0),
    ("gpt2", "fp16", False, True, 0.1),
    ("gpt2", "fp32", True, True, 0),
]


def test_the_combinations_hold_every_pair():
    columns = list(zip(*PAIRS, strict=True))
    for first in range(5):
        for second in range(first):
            pairs = {(row[first], row[second]) for row in PAIRS}
            assert len(pairs) == len(set(columns[first])) * len(set(columns[second])), (first, second)


@pytest.mark.parametrize(("architecture", "precision", "in_4bit", "checkpointing", "dropout"), PAIRS)
def test_training_touches_one_device_and_waits_where_it_is_known(
    tmp_path, models, architecture, precision, in_4bit, checkpointing, dropout
):
    seen = train(
        settings(
            tmp_path,
            models[architecture],
            quantization={"load_in_4bit": in_4bit},
            lora={"lora_dropout": dropout},
            training={"precision": precision, "gradient_checkpointing": checkpointing},
        )
    )
    assert f"cuda in {precision}" in seen.messages
    assert ("shared prefixes" in seen.messages) == (architecture != "gpt2")
    assert [packs for _, packs in seen.updates] == ([2, 2] if architecture != "gpt2" else [4, 4])
    assert sum(seen.gpu.launches.values()) > 1000
    assert unknown_waits(seen) == []
    assert faults(seen.gpu) == []


def test_it_learns_the_same_as_on_the_cpu(tmp_path, models):
    losses = []
    for name, device in (("gpu", "auto"), ("cpu", "cpu")):
        config = settings(
            tmp_path,
            models["qwen3"],
            lora={"lora_dropout": 0},
            training={"precision": "fp32", "optim": "adamw_torch", "output_dir": f"outputs/{name}"},
        )
        config = config.model_copy(update={"model": config.model.model_copy(update={"device": device})})
        AcceleratorState._reset_state(True)
        train(config) if device == "auto" else finetune(config, True, lambda _: None)
        lines = runs.metrics(tmp_path / "outputs" / name)
        losses.append([value for line in lines for key, value in line.items() if key in ("train/loss", "eval/loss")])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_stopped_run_continues_bit_for_bit(tmp_path, models):
    def config(name):
        return settings(
            tmp_path,
            models["qwen3"],
            quantization={"load_in_4bit": True},
            training={"precision": "fp16", "output_dir": f"outputs/{name}", "gradient_checkpointing": True},
        )

    def stop(trainer, update):
        if trainer.progress.step == 1:
            signal.raise_signal(signal.SIGINT)

    train(config("whole"))
    with pytest.raises(Interrupted):
        train(config("stopped"), observers=[stop])
    seen = train(config("stopped"))
    assert "Continuing after update 1" in seen.messages
    assert len(seen.updates) == 1
    assert faults(seen.gpu) == []
    assert runs.adapter_bytes(tmp_path / "outputs/stopped") == runs.adapter_bytes(tmp_path / "outputs/whole")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, models):
    """A folder with a finished run in 4 bits in outputs/tiny, and its settings."""
    folder = tmp_path_factory.mktemp("finished")
    config = settings(folder, models["qwen3"], quantization={"load_in_4bit": True}, evaluation={"sample_prompts": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
        train(config)
    return folder, config


def test_a_chat(monkeypatch, capsys, finished):
    folder, config = finished
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n/base\nAnd now?\n"))
    with PretendedGpu() as gpu:
        base, adapter = locate(config, "outputs/tiny", False)
        chat(load_speaker(config, base, adapter, True), None)
    assert gpu.launches["gemm_4bit"]
    assert faults(gpu) == []


def test_a_report(monkeypatch, finished):
    folder, _ = finished
    monkeypatch.chdir(folder)
    with PretendedGpu() as gpu:
        evaluate(Request("report", "outputs/tiny", batch_size=2, limit=2), lambda _: None)
    assert (folder / "outputs/tiny/report.html").is_file()
    assert sum(gpu.launches.values()) > 1000
    assert faults(gpu) == []


def test_a_merge_into_both_bases(monkeypatch, finished):
    folder, config = finished
    monkeypatch.chdir(folder)
    with PretendedGpu() as gpu:
        base, adapter = locate(config, "outputs/tiny", False)
        lines = list(merge_and_verify(config, base, adapter, folder / "merged", True, True))
    assert sum(line.startswith("Verified") for line in lines) == 2
    assert sum(gpu.launches.values()) > 1000
    assert faults(gpu) == []


# --- launches ---------------------------------------------------------------------------------------------------------


def wide_examples():
    """A character card of 300 tokens with 16 branches of 100, of which 70 are learned: 1,900 tokens, four blocks."""
    prefix = tuple(i % 400 for i in range(300))
    return [Example((*prefix, *(400 + number,) * 31), tuple(range(number, number + 70))) for number in range(16)]


def launches(path, plant):
    """Kernels of a pack in 4 bits with checkpointing and dropout, forward and backward."""
    AcceleratorState._reset_state(True)
    examples = wide_examples()
    with PretendedGpu() as gpu:
        accelerator = build_accelerator("bf16", torch.device("cuda"), training.ALONE)
        base = load_base(path, Quantization(load_in_4bit=True), "bf16", torch.device("cuda"))
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted = add_adapter(base, Lora(r=4, lora_alpha=8, lora_dropout=0.05), 0, "tiny")
        assert prepare_layout(adapted, examples, 4096, accelerator) is None
        if plant is not None:
            plant(adapted)
        packed = pack(examples, torch.device("cuda"), True)
        assert packed.input_ids.numel() == 1900
        adapted.train()
        before = sum(gpu.launches.values())
        with accelerator.autocast():
            loss = negative_log_likelihood(adapted, packed)
        accelerator.backward(loss)
        return sum(gpu.launches.values()) - before


def launches_a_layer(folder, plant=None):
    """Kernels of a pack for each layer; `plant` gets the model."""
    tokenizer = family("chatml_default")
    counts = []
    for layers in (1, 2):
        path = save_model(folder / f"{layers}", "qwen3", tokenizer, num_hidden_layers=layers)
        counts.append(launches(path, plant))
    return counts[1] - counts[0]


def test_launches_do_not_creep(tmp_path):
    count = launches_a_layer(tmp_path)
    assert LAUNCHES_A_LAYER * 0.8 < count <= LAUNCHES_A_LAYER, "lower the bound, or find the new kernels"


# --- planted faults are seen ------------------------------------------------------------------------------------------


def layers_of(model):
    return model.get_base_model().get_decoder().layers


@contextlib.contextmanager
def planted(fault):
    """Inside, `fault` gets each model that is loaded for training."""
    load = training._load_model

    def faulty(*arguments):
        model = load(*arguments)
        fault(model)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_load_model", faulty)
        yield


def test_a_bias_left_on_the_cpu_is_seen(tmp_path, models):
    def leave(model):
        bias = layers_of(model)[1].self_attn.q_proj.base_layer.bias
        bias.data = bias.data.cpu()

    with planted(leave), pytest.raises(DeviceMix, match="same device.*addmm"):
        train(settings(tmp_path, models["qwen2"]))
    gpu = PretendedGpu(strict=False)
    with planted(leave):
        train(settings(tmp_path, models["qwen2"]), gpu)
    assert len(gpu.mixes) > 10


def test_an_item_inside_the_layers_is_seen(tmp_path, models):
    def read(model):
        layers_of(model)[0].register_forward_hook(lambda module, inputs, output: output.sum().item() and None)

    with planted(read):
        seen = train(settings(tmp_path, models["qwen3"]))
    assert unknown_waits(seen) != []


def test_a_hundred_launches_a_layer_are_seen(tmp_path):
    def launch(module, inputs, output):
        for _ in range(100):
            output = output + 0
        return output

    def plant(model):
        for layer in layers_of(model):
            layer.register_forward_hook(launch)

    count = launches_a_layer(tmp_path, plant)
    assert count > LAUNCHES_A_LAYER
