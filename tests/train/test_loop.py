"""The loop and what hangs on it: the same learning however it is laid out, and nothing lost when it is interrupted."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from making.packs import tokens
from making.runs import adapter_bytes, config, conversations, metrics, settings, write_jsonl
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import persona.train.loop
from persona.config import Config
from persona.console import excerpt
from persona.errors import Diverged, Interrupted, UsageError
from persona.files import MARKER, file_sha256
from persona.train import checkpoints
from persona.train.run import finetune

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state()  # a real run is one process; accelerate keeps the precision of the first for good


def train(settings, resume=True, observers=()):
    """The folder of the run and everything that it printed."""
    lines = []
    folder = finetune(settings, resume, lines.append, observers=observers)
    return folder.parent, "\n".join(lines)


def signal_after(step, number):
    """An observer that sends this process a signal after update `step`."""

    def observe(trainer, update):
        if trainer.progress.step == step:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    return observe


def forget_after(best, again=()):
    """An observer that makes every held-out loss after update `best` that of the base, and after `again` the best."""
    kept = {}

    def observe(trainer, update):
        step = trainer.progress.step
        for name, weight in trainer.model.named_parameters():
            if step == best and "lora_" in name:
                kept[name] = weight.detach().clone()
            elif step in again and "lora_" in name:
                weight.data.copy_(kept[name])
            elif step > best and "lora_B" in name:
                weight.data.zero_()

    return observe


def poison(trainer):
    """Make every logit from now on not a number."""

    def fill(model, inputs, output):
        output.logits = output.logits * math.nan
        return output

    trainer.model.register_forward_hook(fill)


def samples(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def train_losses(run):
    return {line["step"]: line["train/loss"] for line in metrics(run) if "train/loss" in line}


def test_a_line_is_learned_by_heart_and_its_end_with_it(tmp_path, tiny_model):
    write_jsonl(tmp_path / "one.jsonl", conversations(1))
    made = config(
        tmp_path,
        tiny_model,
        lora={"lora_dropout": 0, "r": 16, "lora_alpha": 32},
        data={"train_file": "one.jsonl", "validation_file": None},
        training={"num_train_epochs": 80, "lr_scheduler_type": "constant"},
        generation={"max_new_tokens": 60},
    )
    _, said = train(made)
    assert "says:  Aye, I keep the lamp. Mind the tide, 0.\n" in said


def test_free_memory_is_returned_after_every_pack(tmp_path, tiny_model, monkeypatch):
    returned = []
    monkeypatch.setattr(persona.train.loop, "return_free_memory", returned.append)
    alone = {"num_train_epochs": 1, "max_tokens_per_pack": 16}  # fewer tokens than an example has
    train(config(tmp_path, tiny_model, training=alone))
    assert [device.type for device in returned] == ["cpu"] * (12 + 6)  # every second conversation has two replies


@pytest.mark.parametrize("save_steps", [1, 3, None])
def test_stops_after_patience_evaluations_and_keeps_the_best(tmp_path, tiny_model, save_steps):
    made = config(
        tmp_path,
        tiny_model,
        training={"num_train_epochs": 10, "save_steps": save_steps},
        evaluation={"eval_steps": 1, "early_stopping_patience": 3},
    )
    run, said = train(made, observers=[forget_after(2, again=[4])])
    losses = {line["step"]: line["eval/loss"] for line in metrics(run) if "eval/loss" in line}
    assert list(losses) == [0, 1, 2, 3, 4, 5]
    assert losses[0] > losses[1] > losses[2]
    assert losses[3] == losses[5] == losses[0]
    assert losses[4] == losses[2]  # the best again is no improvement
    assert "stopped early" in said
    best = run / "checkpoint-2" / "adapter_model.safetensors"
    assert best.read_bytes() == adapter_bytes(run)
    newest = {1: 5, 3: 3, None: 3}[save_steps]  # the last one that was due
    assert checkpoints.checkpoints(run)[-1].name == f"checkpoint-{newest}"
    assert (run / f"checkpoint-{newest}" / "adapter_model.safetensors").read_bytes() != adapter_bytes(run)


def test_without_patience_all_updates_are_done(tmp_path, tiny_model):
    made = config(tmp_path, tiny_model, evaluation={"eval_steps": 1, "early_stopping_patience": None})
    run, _ = train(made)
    assert max(train_losses(run)) == 6


def test_the_layout_in_memory_does_not_change_what_is_learned(tmp_path, tiny_model):
    seen = {}
    for size in (16, 100, 10_000):
        made = config(
            tmp_path,
            tiny_model,
            lora={"lora_dropout": 0},
            training={"output_dir": f"outputs/{size}", "max_tokens_per_pack": size},
            evaluation={"max_tokens_per_pack": size},
        )
        run, _ = train(made)
        seen[size] = metrics(run)
    for size in (16, 100):
        for ours, theirs in zip(seen[size], seen[10_000], strict=True):
            for tag in ("train/loss", "eval/loss"):
                assert (tag in ours) == (tag in theirs)
                assert ours.get(tag, 0) == pytest.approx(theirs.get(tag, 0), rel=1e-5)


def test_checkpointed_activations_change_nothing(tmp_path, tiny_model):
    losses = []
    for on in (False, True):
        made = config(tmp_path, tiny_model, training={"output_dir": f"outputs/{on}", "gradient_checkpointing": on})
        run, _ = train(made)
        losses.append(list(train_losses(run).values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_tensorboard_has_every_tag_and_perplexity_is_exp_of_loss(tmp_path, tiny_model):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(tmp_path, tiny_model))
    events = EventAccumulator("logs/tiny")
    events.Reload()
    wanted = {"train/loss", "train/perplexity", "train/learning_rate", "train/grad_norm", "train/tokens_per_second",
              "train/peak_memory_gib", "eval/loss", "eval/perplexity"}  # fmt: skip
    assert wanted <= set(events.Tags()["scalars"])
    losses, perplexities = events.Scalars("eval/loss"), events.Scalars("eval/perplexity")
    assert [event.step for event in losses] == [0, 2, 4, 6]
    for loss, perplexity in zip(losses, perplexities, strict=True):
        assert math.exp(loss.value) == pytest.approx(perplexity.value, rel=1e-6)
    assert all(event.value > 0 for event in events.Scalars("train/tokens_per_second"))


def test_the_held_out_loss_is_weighted_by_tokens(tmp_path, tiny_model):
    run, _ = train(config(tmp_path, tiny_model, held_out=5))
    from accelerate import Accelerator

    from persona.config import Quantization
    from persona.engine.attention import NAME
    from persona.model.loading import load_base
    from persona.train.loop import mean_loss
    from persona.train.run import prepare

    saved = config(tmp_path, tiny_model, held_out=5)
    held_out = prepare(saved, date.today()).held_out
    model = load_base(tiny_model, Quantization(load_in_4bit=False), "fp32", torch.device("cpu"))
    total = supervised = 0
    for example in held_out.examples:
        ids = torch.tensor([[*example.prompt_ids, *example.reply_ids]])
        with torch.no_grad():
            steps = model(ids).logits[0].log_softmax(-1)[:-1]
        chosen = steps[len(example.prompt_ids) - 1 :].gather(1, ids[0, len(example.prompt_ids) :, None])
        total -= chosen.sum().item()
        supervised += len(example.reply_ids)
    model.set_attn_implementation(NAME)
    ours = mean_loss(model, held_out.conversations, tokens(300), Accelerator(cpu=True), True)
    assert ours == pytest.approx(total / supervised, rel=1e-5)
    assert metrics(run)[0]["eval/loss"] == pytest.approx(total / supervised, rel=1e-5)


@pytest.mark.parametrize("in_4bit", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_survive_an_evaluation_in_the_middle(tmp_path, tiny_model, in_4bit, precision):
    seen = []

    def watch(optimizer, *_):
        halves = [w for group in optimizer.param_groups for w in group["params"] if w.shape[1] == 4]  # lora_B
        assert len(halves) == 14
        seen.append(all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in halves))

    hook = register_optimizer_step_pre_hook(watch)
    made = config(
        tmp_path,
        tiny_model,
        quantization={"load_in_4bit": in_4bit},
        training={"precision": precision},
        evaluation={"eval_steps": 1},
    )
    try:
        run, _ = train(made)
    finally:
        hook.remove()
    assert seen == [True] * 6
    losses = train_losses(run)
    assert losses[6] < losses[1]


LAYOUTS = {
    "float32": {"training": {"precision": "fp32"}},
    "4 bits, bf16, activations computed again": {
        "training": {"precision": "bf16", "gradient_checkpointing": True},
        "quantization": {"load_in_4bit": True},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_interrupted_and_continued_is_the_same_run(tmp_path, tiny_model, layout):
    changes = LAYOUTS[layout]

    def made(name):
        training = {**changes["training"], "output_dir": name}
        return config(tmp_path, tiny_model, **changes | {"training": training, "evaluation": {"sample_prompts": 2}})

    whole, _ = train(made("outputs/whole"))
    cut = made("outputs/cut")
    with pytest.raises(Interrupted) as stopped:
        train(cut, observers=[signal_after(3, signal.SIGINT)])
    assert stopped.value.exit_code == 130
    assert "same command" in str(stopped.value)
    run, said = train(cut)
    assert "Continuing after update 3" in said
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert samples(run) == samples(whole)
    assert len(samples(run)) == 2 * 4
    drop = ("train/tokens_per_second", "train/peak_memory_gib")
    ours, theirs = ([{k: v for k, v in line.items() if k not in drop} for line in metrics(r)] for r in (run, whole))
    assert ours == theirs


def test_killed_and_continued_is_the_same_run(tmp_path, tiny_model):
    values = settings(tmp_path, tiny_model, training={"num_train_epochs": 60, "save_steps": 5})
    values["evaluation"] = {"early_stopping_patience": None, "eval_steps": 12, "sample_prompts": 1}
    (tmp_path / "run.json").write_text(json.dumps(values), encoding="utf-8")
    command = [sys.executable, str(ROOT / "finetune.py"), "--config", "run.json", "--set"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    whole = subprocess.Popen(
        [*command, "training.output_dir=outputs/whole"], stdout=subprocess.DEVNULL, env=environment
    )
    assert whole.wait(300) == 0
    killed = subprocess.Popen([*command, "training.output_dir=outputs/cut"], stdout=subprocess.DEVNULL, env=environment)
    run = tmp_path / "outputs" / "cut"
    until = time.monotonic() + 200
    while not (run / "checkpoint-25").is_dir():
        assert time.monotonic() < until
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (run / "adapter").exists()
    again = subprocess.run(
        [*command, "training.output_dir=outputs/cut"], capture_output=True, text=True, env=environment
    )
    assert again.returncode == 0, again.stderr
    assert "Continuing after update" in again.stdout
    assert adapter_bytes(run) == adapter_bytes(tmp_path / "outputs" / "whole")
    assert samples(run) == samples(tmp_path / "outputs" / "whole")
    assert [line["step"] for line in samples(run)] == list(range(0, 181, 12))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_do_not_touch_what_is_learned(tmp_path, tiny_model, layout):
    changes = LAYOUTS[layout]
    runs = []
    for count in (0, 2):
        training = {**changes["training"], "output_dir": f"outputs/{count}"}
        made = config(
            tmp_path,
            tiny_model,
            **changes | {"training": training, "evaluation": {"eval_steps": 1, "sample_prompts": count}},
        )
        runs.append(train(made)[0])
    without, with_samples = runs
    assert adapter_bytes(without) == adapter_bytes(with_samples)
    assert train_losses(without) == train_losses(with_samples)
    assert samples(without) == []
    assert len(samples(with_samples)) == 2 * 7
    assert (with_samples / "checkpoint-6" / "random.safetensors").read_bytes() == (
        without / "checkpoint-6" / "random.safetensors"
    ).read_bytes()


def test_samples_are_what_the_model_says_at_that_moment(tmp_path, tiny_model):
    """The same held-out prompts at every evaluation; the last are what the finished model says in chat."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from persona.model.adapters import locate
    from persona.speak.speaker import load_speaker

    made = config(tmp_path, tiny_model, held_out=5, evaluation={"sample_prompts": 3, "early_stopping_patience": None})
    run, said = train(made)
    lines = samples(run)
    assert [line["step"] for line in lines] == [0, 0, 0, 2, 2, 2, 4, 4, 4, 6, 6, 6]
    for first, later in zip(lines[:3] * 3, lines[3:], strict=True):
        assert (first["input"], first["target"]) == (later["input"], later["target"])
    assert lines[:3] != [line | {"step": 0} for line in lines[-3:]]
    held_out = conversations(17)[12:]
    exchanges = [
        (record["messages"][:place], record["messages"][place]["content"])
        for record in held_out
        for place in range(1, len(record["messages"]), 2)
    ]
    speaker = load_speaker(made, *locate(made, str(run / "checkpoint-6"), False), False)
    for line in lines[-3:]:
        ((before, target),) = [one for one in exchanges if one[0][-1]["content"] == line["input"]]
        assert line["target"] == target
        asked = [{"role": "system", "content": "You keep the lamp."}, *before]
        assert speaker.reply(asked, lambda _: None) == line["predict"]
    assert f"  says: {excerpt(lines[-3]['predict'], 110)}\n" in said
    events = EventAccumulator("logs/tiny")
    events.Reload()
    shown = events.Tensors("samples/1/text_summary")
    assert [event.step for event in shown] == [0, 2, 4, 6]
    assert f"author: {lines[0]['target']}" in shown[-1].tensor_proto.string_val[0].decode("utf-8")


def test_a_damaged_checkpoint_is_passed_over(tmp_path, tiny_model):
    made = config(tmp_path, tiny_model, training={"save_steps": 2})
    run, _ = train(made)
    weights = run / "checkpoint-6" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    found, skipped = checkpoints.latest_checkpoint(run)
    assert found == run / "checkpoint-4"
    assert skipped == ["checkpoint-6 passed over: adapter_model.safetensors has changed since it was written"]
    (run / "checkpoint-4" / MARKER).unlink()
    assert checkpoints.latest_checkpoint(run)[0] != run / "checkpoint-4"


def test_another_tools_checkpoint_is_refused(tmp_path):
    folder = tmp_path / "outputs" / "theirs" / "checkpoint-100"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="another tool"):
        checkpoints.latest_checkpoint(folder.parent)


def test_a_checkpoint_holds_no_pickle(tmp_path, tiny_model):
    run, _ = train(config(tmp_path, tiny_model))
    names = {path.suffix for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert names == {".json", ".jsonl", ".safetensors", ".jinja", ".md"}


def test_two_checkpoints_and_the_best_are_kept(tmp_path, tiny_model):
    patience = {"eval_steps": 1, "early_stopping_patience": None}
    made = config(tmp_path, tiny_model, training={"save_steps": 1}, evaluation=patience)
    run, _ = train(made, observers=[forget_after(1)])
    assert [folder.name for folder in checkpoints.checkpoints(run)] == ["checkpoint-1", "checkpoint-5", "checkpoint-6"]


def test_a_finished_run_is_not_trained_again(tmp_path, tiny_model):
    made = config(tmp_path, tiny_model)
    run, _ = train(made)
    before = adapter_bytes(run), metrics(run)
    _, said = train(made)
    assert "already finished" in said
    assert (adapter_bytes(run), metrics(run)) == before


def test_another_setting_is_refused_by_name_and_free_ones_are_not(tmp_path, tiny_model):
    train(config(tmp_path, tiny_model))
    other = config(tmp_path, tiny_model, training={"learning_rate": 0.02}, lora={"r": 8})
    with pytest.raises(UsageError) as refused:
        train(other)
    assert "training.learning_rate: was 0.01, is 0.02" in str(refused.value)
    assert "lora.r: was 4, is 8" in str(refused.value)
    assert "--resume never" in str(refused.value)
    train(config(tmp_path, tiny_model, training={"max_tokens_per_pack": 99}, generation={"temperature": 1}))


def test_other_data_is_refused_and_never_starts_over(tmp_path, tiny_model):
    made = config(tmp_path, tiny_model)
    run, _ = train(made)
    old = adapter_bytes(run)
    write_jsonl(tmp_path / "train.jsonl", conversations(7))
    with pytest.raises(UsageError, match=r"the contents of .*train\.jsonl"):
        train(made)
    again, said = train(made, resume=False)
    assert "set aside as" in said
    assert adapter_bytes(run.with_name("tiny.1")) == old
    assert adapter_bytes(again) != old


@pytest.mark.parametrize(("step", "figure"), [(3, "loss of update 4"), (4, "held-out loss after update 4")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, tiny_model, step, figure):
    weights = {}

    def observe(trainer, update):
        if trainer.progress.step == step:
            poison(trainer)
            weights.update({name: w for name, w in trainer.model.named_parameters() if w.requires_grad})
            weights["before"] = [w.detach().clone() for w in weights.values()]

    made = config(tmp_path, tiny_model, training={"save_steps": 1})
    with pytest.raises(Diverged, match=f"The {figure} is not finite.*learning_rate") as stopped:
        train(made, observers=[observe])
    assert stopped.value.exit_code == 6
    before = weights.pop("before")
    assert len(before) == 28
    assert all(torch.equal(now, then) for now, then in zip(weights.values(), before, strict=True))
    newest, _ = checkpoints.latest_checkpoint(tmp_path / "outputs" / "tiny")
    assert newest == tmp_path / "outputs" / "tiny" / "checkpoint-3"


@pytest.mark.parametrize("optim", ["adamw_8bit"])
def test_the_8_bit_optimizer_trains_and_continues_on_the_cpu(tmp_path, tiny_model, optim):
    # matrices of 4,096 values and more have 8-bit states; r=64 makes them that large
    changes = {"lora": {"r": 64, "lora_dropout": 0}}
    saves = {"optim": optim, "save_steps": 3}
    whole, _ = train(config(tmp_path, tiny_model, training={**saves, "output_dir": "outputs/a"}, **changes))
    losses = train_losses(whole)
    assert losses[6] < losses[1]
    state = load_file(whole / "checkpoint-4" / "optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in state.values())
    again = config(tmp_path, tiny_model, training={**saves, "output_dir": "outputs/b"}, **changes)
    shutil.copytree(whole, "outputs/b", ignore=shutil.ignore_patterns("adapter", "checkpoint-6"))
    identity = json.loads((tmp_path / "outputs" / "b" / "run.json").read_text(encoding="utf-8"))
    del identity["summary"]  # as it was before the run had finished
    (tmp_path / "outputs" / "b" / "run.json").write_text(json.dumps(identity), encoding="utf-8")
    run, said = train(again)
    assert "Continuing after update 4" in said
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_lore_is_mixed_in_by_its_weight(tmp_path, tiny_model):
    write_jsonl(tmp_path / "lore.jsonl", conversations(4))
    for weight, expected in ((0, 12), (1, 16), (2.5, 22), (5, 32)):
        changes = {"lore_file": "lore.jsonl", "lore_weight": weight}
        made = config(
            tmp_path, tiny_model, data=changes, training={"num_train_epochs": 0.01, "output_dir": f"o/{weight}"}
        )
        _, said = train(made)
        assert f"{expected} conversations" in said


def test_a_wrong_target_module_names_the_right_ones(tmp_path, tiny_model):
    made = config(tmp_path, tiny_model, lora={"target_modules": ["q_proj", "v_pro"]})
    with pytest.raises(UsageError) as refused:
        train(made)
    assert "'v_pro'" in str(refused.value)
    assert "Did you mean 'v_proj'?" in str(refused.value)
    assert "down_proj" in str(refused.value)
    run, _ = train(config(tmp_path, tiny_model, lora={"target_modules": ["q_proj"]}, training={"output_dir": "o/q"}))
    assert all(".q_proj." in name for name in load_file(run / "adapter" / "adapter_model.safetensors"))


def test_the_saved_run_loads_back_equal(tmp_path, tiny_model):
    from persona.config import load_config

    made = config(tmp_path, tiny_model)
    run, _ = train(made)
    assert load_config(run / "config.json", []) == made


def test_show_marks_what_is_learned(tmp_path, tiny_model):
    from datetime import date

    from persona.train.run import prepare, show_examples

    material = prepare(config(tmp_path, tiny_model), date(2026, 1, 2))
    text = show_examples(material, 1, colour=False)
    assert "<|im_start|>assistant\n⟦Aye, I keep the lamp. Mind the tide, 0.<|im_end|>⟧" in text
    assert text.count("⟦") == 1
    green = show_examples(material, 2, colour=True)
    assert "\x1b[32mAye, I keep the lamp. Mind the tide, 0.<|im_end|>\x1b[0m" in green


def test_newly_written_checkpoints_outlive_damaged_newer_ones(tmp_path, tiny_model):
    best_is_1 = {"eval_steps": 1, "early_stopping_patience": None}
    made = config(tmp_path, tiny_model, training={"save_steps": 1}, evaluation=best_is_1)
    forget = forget_after(1)
    run, _ = train(made, observers=[forget])
    whole = adapter_bytes(run)
    left = checkpoints.checkpoints(run)
    assert [folder.name for folder in left] == ["checkpoint-1", "checkpoint-5", "checkpoint-6"]
    for folder in left[1:]:
        (folder / MARKER).write_text("{", encoding="utf-8")
    shutil.rmtree(run / "adapter")
    again, said = train(made, observers=[forget])
    assert "checkpoint-6 passed over: no readable COMPLETE.json\ncheckpoint-5 passed over" in said
    assert "Continuing after update 1 " in said
    assert adapter_bytes(again) == whole
    assert checkpoints.latest_checkpoint(again)[0] == again / "checkpoint-6"


def test_a_lost_best_checkpoint_is_said_and_not_a_crash(tmp_path, tiny_model):
    changes = {"training": {"save_steps": 1}, "evaluation": {"eval_steps": 1, "early_stopping_patience": None}}
    made = config(tmp_path, tiny_model, **changes)
    forget = forget_after(1)
    with pytest.raises(Interrupted) as stopped:
        train(made, observers=[forget, signal_after(4, signal.SIGTERM)])
    assert stopped.value.exit_code == 143
    shutil.rmtree(tmp_path / "outputs" / "tiny" / "checkpoint-1")
    run, said = train(made, observers=[forget])
    assert "of update 1, is lost" in said
    assert (run / "checkpoint-5" / "adapter_model.safetensors").read_bytes() == adapter_bytes(run)


def test_checkpoints_without_their_identity_are_refused(tmp_path, tiny_model):
    made = config(tmp_path, tiny_model)
    run, _ = train(made)
    identity = (run / "run.json").read_text(encoding="utf-8")
    (run / "run.json").unlink()
    with pytest.raises(UsageError, match=r"no run\.json"):
        train(made)
    values = json.loads(identity)
    broken = [identity[:40], "[1]", *(json.dumps(values | change) for change in ({"date": 5}, {"settings": None}))]
    for text in broken:
        (run / "run.json").write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=r"run\.json.* Start over with --resume never"):
            train(made)


def reseal(folder):
    """Make a changed checkpoint whole again, as another version or a person with a tool may."""
    files = [path for path in folder.iterdir() if path.name != MARKER]
    entries = {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
    (folder / MARKER).write_text(json.dumps({"files": entries}), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("progress.json", "{", "not valid JSON"),
        ("progress.json", "[]", "expected an object"),
        ("progress.json", '{"progress": {"step": 6}}', "scaler, scheduler missing"),
        ("progress.json", '{"progress": {"step": 6}, "scaler": null, "scheduler": {}}', "other keys"),
        ("optimizer.json", "{", "not valid JSON"),
    ],
)
def test_a_broken_file_of_a_checkpoint_is_named_with_a_way_out(tmp_path, tiny_model, name, text, found):
    made = config(tmp_path, tiny_model)
    run, _ = train(made)
    shutil.rmtree(run / "adapter")
    (run / "checkpoint-6" / name).write_text(text, encoding="utf-8")
    reseal(run / "checkpoint-6")
    with pytest.raises(UsageError, match=f"{name}.*{found}.* Delete .*checkpoint-6 to continue"):
        train(made)


def test_before_the_first_checkpoint_settings_may_change(tmp_path, tiny_model):
    no_evaluation = {"validation_file": None}
    with pytest.raises(Diverged):
        train(config(tmp_path, tiny_model, data=no_evaluation), observers=[lambda trainer, _: poison(trainer)])
    assert (tmp_path / "outputs" / "tiny" / "run.json").is_file()
    assert not checkpoints.checkpoints(tmp_path / "outputs" / "tiny")
    run, _ = train(config(tmp_path, tiny_model, data=no_evaluation, training={"learning_rate": 0.001}))
    assert len(train_losses(run)) == 6


def test_another_chat_template_is_another_run(tmp_path, tiny_model, chatml):
    template = tmp_path / "mine.jinja"
    template.write_text(chatml.chat_template, encoding="utf-8")
    values = settings(tmp_path, tiny_model)
    values["model"]["chat_template"] = str(template)
    made = Config.model_validate(values)
    train(made)
    template.write_text(chatml.chat_template.replace("helpful", "surly"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"the contents of .*mine\.jinja"):
        train(made)


def test_folders_that_are_no_run_are_left_alone(tmp_path, tiny_model):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years", encoding="utf-8")
    with pytest.raises(UsageError, match="left alone"):
        train(config(tmp_path, tiny_model, training={"output_dir": str(precious)}), resume=False)
    assert (precious / "thesis.txt").is_file()
    for wrong in (".", "..", str(tmp_path), str(precious / "thesis.txt")):
        with pytest.raises(UsageError, match="output_dir"):
            train(config(tmp_path, tiny_model, training={"output_dir": wrong}))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_then_takes_its_course_and_is_never_zero(tmp_path, tiny_model, kind):
    made = config(
        tmp_path, tiny_model, training={"lr_scheduler_type": kind, "warmup_ratio": 0.5, "num_train_epochs": 2}
    )
    run, _ = train(made)
    rates = [line["train/learning_rate"] for line in metrics(run) if "train/learning_rate" in line]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    course = {"constant": [1, 1], "linear": [2 / 3, 1 / 3], "cosine": [0.75, 0.25]}[kind]
    assert rates[4:] == pytest.approx([0.01 * share for share in course])


def test_a_run_of_one_update_learns(tmp_path, tiny_model):
    run, _ = train(config(tmp_path, tiny_model, training={"num_train_epochs": 0.01}))
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


def test_held_out_lines_that_are_trained_on_are_pointed_out(tmp_path, tiny_model):
    made = config(tmp_path, tiny_model, data={"validation_file": str(tmp_path / "train.jsonl")})
    _, said = train(made)
    assert "12 of 12 held-out conversations are also in the training data" in said


def test_the_system_prompt_comes_from_the_conversations_and_not_from_the_settings(tmp_path, tiny_model):
    from persona.model.dataset import read_data

    made = config(tmp_path, tiny_model, data={"system_prompt": None, "lore_file": "s.jsonl", "lore_weight": 50})
    card = {"role": "system", "content": "You are the keeper."}
    records = conversations(3)
    records[0]["messages"].insert(0, card)
    write_jsonl(tmp_path / "train.jsonl", records)
    write_jsonl(tmp_path / "s.jsonl", conversations(2))
    assert read_data(made.data, 0).system == "You are the keeper."


def test_a_model_with_missing_weights_is_refused(tmp_path, tiny_model):
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj"):
        train(config(tmp_path, folder))


def test_a_length_beyond_the_model_is_refused(tmp_path, tiny_model):
    with pytest.raises(UsageError, match="reads at most"):
        train(config(tmp_path, tiny_model, data={"max_length": 10**6}))


def test_a_long_history_is_cut_alike_in_training_and_chat(tmp_path, tiny_model):
    from persona.speak.speaker import Speaker
    from persona.train.run import prepare

    write_jsonl(tmp_path / "long.jsonl", conversations(2, turns=9))
    data = {"train_file": str(tmp_path / "long.jsonl"), "validation_file": None, "max_length": 256}
    made = config(tmp_path, tiny_model, data=data)
    material = prepare(made, date(2026, 1, 2))
    fed = []
    speaker = Speaker(None, material.fmt, made.generation, made.data.max_length, None, "adapter")
    speaker.__class__ = type(
        "Deaf", (Speaker,), {"_generate": lambda self, prompt, streamer: fed.append(tuple(prompt))}
    )
    cut = 0
    for record in material.train.records:
        messages = [{"role": "system", "content": material.system}, *record.turns]
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                speaker.reply(messages[:position], print)
                cut += len(fed[-1]) < len(messages[:position]) * 12
    assert fed == [example.prompt_ids for example in material.train.examples]
    assert max(map(len, fed)) <= 192
    assert cut > 3


def test_nohup_is_obeyed(monkeypatch):
    from persona.train.checkpoints import stop_requests

    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stop_requests(True) as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        assert signals == []
    finally:
        signal.signal(signal.SIGTERM, previous)
