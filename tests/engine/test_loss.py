"""The loss in chunks is that of all logits at once, for every architecture whose output layer it takes over."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from making.kept import Kept
from making.packs import CPU, assert_same, cases, measured, packed_result, plain_loss, with_adapter
from making.tiny import model

from persona.engine import loss as loss_module
from persona.engine.fused import fuse
from persona.engine.packing import pack

pytestmark = pytest.mark.usefixtures("one_thread")

BEHIND = {  # small enough that most logits are bent
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "gemma4_text": {"final_logit_softcapping": 2.0},
    "gemma4_unified_text": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
}


def trained(architecture):
    made = with_adapter(model(architecture, pad_token_id=None, **BEHIND.get(architecture, {})))
    fuse(made)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", sorted(loss_module.LINEAR | loss_module.CAPPED))
def test_the_loss_in_chunks_is_that_of_the_whole_model(architecture, monkeypatch):
    tuned = trained(architecture)
    words = len(tuned.get_output_embeddings().weight)
    monkeypatch.setattr(loss_module, "CHUNK", words * 10)
    monkeypatch.setattr(loss_module, "PIECE", words * 3)
    examples = cases()["nothing in common"]
    right = measured(tuned, (plain_loss(tuned, example) for example in examples))
    assert_same(packed_result(tuned, examples, 300, False), right)
    packed = pack(examples, CPU, False)
    assert loss_module.token_losses(tuned, packed).sum().item() == pytest.approx(right[0], rel=1e-6)


@pytest.mark.parametrize("architecture", [*BEHIND, "llama"])
def test_a_chunk_of_logits_exists_at_a_time(architecture, monkeypatch):
    tuned = with_adapter(model(architecture, vocabulary=50_000, **BEHIND.get(architecture, {})))
    fuse(tuned)
    monkeypatch.setattr(loss_module, "CHUNK", 50_000 * 4)
    monkeypatch.setattr(loss_module, "PIECE", 50_000)
    examples = cases()["nothing in common"] * 3
    packed = pack(examples, CPU, False)
    peaks = []
    for take in (loss_module._before_output_layer, lambda *_: None):
        monkeypatch.setattr(loss_module, "_before_output_layer", take)
        with Kept() as alive:
            loss_module.negative_log_likelihood(tuned, packed).backward()
        peaks.append(alive.peak)
    assert peaks[0] < peaks[1] - 2 * 4 * 50_000 * len(packed.targets)  # logits and probabilities


def test_an_output_layer_with_a_bias_or_of_an_unknown_architecture_is_left_to_the_model():
    biased = model("llama")
    biased.lm_head.bias = torch.nn.Parameter(torch.randn(512))
    packed = pack(cases()["nothing in common"], CPU, False)
    with torch.no_grad():
        for made in (biased, model("opt")):
            assert loss_module._before_output_layer(made, packed) is None
            right = F.cross_entropy(loss_module.supervised_logits(made, packed), packed.targets, reduction="sum")
            assert loss_module.negative_log_likelihood(made, packed).item() == pytest.approx(right.item(), rel=1e-6)


def test_the_output_layer_is_the_models_again():
    tuned = trained("gemma2")
    packed = pack(cases()["nothing in common"], CPU, False)
    with torch.no_grad():
        right = tuned(input_ids=packed.input_ids).logits
        loss_module.negative_log_likelihood(tuned, packed)
        assert torch.equal(tuned(input_ids=packed.input_ids).logits, right)
    with pytest.raises(IndexError):
        loss_module.negative_log_likelihood(tuned, replace(packed, positions=torch.tensor([10**6])))
    assert torch.equal(tuned(input_ids=packed.input_ids).logits, right)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_loss_made_in_parts_is_that_of_the_whole(cap, monkeypatch):
    hidden, weight = torch.randn(23, 16), torch.randn(50, 16)
    targets = torch.randint(50, (23,))
    rows = hidden.clone().requires_grad_()
    logits = rows @ weight.T
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    right = F.cross_entropy(logits, targets, reduction="sum")
    (2 * right).backward()
    monkeypatch.setattr(loss_module, "CHUNK", 50 * 10)
    monkeypatch.setattr(loss_module, "PIECE", 50 * 3)
    found = hidden.clone().requires_grad_()
    total = loss_module._NegativeLogLikelihood.apply(found, weight, targets, cap)
    (2 * total).backward()
    torch.testing.assert_close(found.grad, rows.grad, rtol=1e-5, atol=1e-6)
    assert total.item() == pytest.approx(right.item(), rel=1e-6)
