"""The same loop on a GPU, with real 4-bit weights, 8-bit optimizer states and fp16 scaling."""

import re

import pytest
import torch
from accelerate.state import AcceleratorState
from making.runs import adapter_bytes, config, metrics

from persona.train.run import finetune

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
@pytest.mark.parametrize("in_4bit", [True, False])
def test_it_learns_with_the_8_bit_optimizer(tmp_path, tiny_model, precision, in_4bit):
    said = []
    made = config(
        tmp_path,
        tiny_model,
        quantization={"load_in_4bit": in_4bit},
        training={"precision": precision, "num_train_epochs": 8},
    )
    run = finetune(made, True, said.append).parent
    assert re.search(r"optimizer +adamw_8bit,", "\n".join(said))
    losses = [line["train/loss"] for line in metrics(run) if "train/loss" in line]
    assert losses[-1] < losses[0]


def test_packs_of_any_size_learn_the_same(tmp_path, tiny_model):
    losses = []
    for tokens in (64, 4096):
        made = config(
            tmp_path,
            tiny_model,
            lora={"lora_dropout": 0},
            training={"max_tokens_per_pack": tokens, "output_dir": f"outputs/{tokens}"},
        )
        run = finetune(made, True, lambda _: None).parent
        losses.append([line["train/loss"] for line in metrics(run) if "train/loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_peak_memory_is_that_of_the_gpu(tmp_path, tiny_model):
    run = finetune(config(tmp_path, tiny_model), True, lambda _: None).parent
    peak = max(line["train/peak_memory_gib"] for line in metrics(run) if "train/peak_memory_gib" in line)
    assert 0 < peak <= torch.cuda.get_device_properties(0).total_memory / 2**30
    assert adapter_bytes(run)
