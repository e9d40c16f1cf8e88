"""Runs on a pretended GPU: no operation mixes devices, and nothing waits for the GPU outside a list of known places."""

import pytest
import torch
from accelerate.state import AcceleratorState
from making import runs
from making.pretended_gpu import DeviceMix, PretendedGpu
from making.tiny import family, save_model

from persona.engine import packing
from persona.train.run import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the modes belong to one thread
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", family("chatml_default"))


def settings(folder, model, **changes):
    training = {"precision": "bf16", "num_train_epochs": 1, "train_batch_size": 4, "max_tokens_per_pack": 200}
    training |= changes.pop("training", {})
    evaluation = {"eval_steps": 2, "sample_prompts": 2}
    return runs.config(folder, model, train=8, held_out=2, training=training, evaluation=evaluation, **changes)


@pytest.mark.parametrize("in_4bit", [False, True])
def test_a_run_touches_one_device_at_a_time(tmp_path, model, in_4bit):
    messages = []
    with PretendedGpu() as gpu:
        finetune(settings(tmp_path, model, quantization={"load_in_4bit": in_4bit}), True, messages.append)
    text = "\n".join(messages)
    assert "cuda in bf16" in text
    assert "shared prefixes" in text
    assert sum(gpu.launches.values()) > 1000
    assert gpu.mixes == []


def test_a_tensor_left_on_the_cpu_is_seen(tmp_path, model, monkeypatch):
    block = packing._block
    monkeypatch.setattr(packing, "_block", lambda group, device: block(group, torch.device("cpu")))
    with PretendedGpu(), pytest.raises(DeviceMix, match="same device.*add_"):
        finetune(settings(tmp_path, model), True, lambda _: None)
