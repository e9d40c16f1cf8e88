"""Models that read pictures are trained and merged as models of text: their targets change, and no other byte."""

import json
import re

import pytest
import torch
from making.merging import merge
from making.runs import config
from making.tiny import WRAPPERS, save_model
from safetensors.torch import load_file, save_file

from persona.config import Quantization
from persona.errors import UsageError
from persona.merge.changes import FourBits, dequantized_weights
from persona.model.adapters import locate
from persona.model.architecture import skeleton
from persona.model.folders import tensor_index
from persona.model.loading import load_adapter, load_base
from persona.speak.speaker import load_speaker
from persona.train.run import finetune

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, PLAIN = torch.device("cpu"), Quantization(load_in_4bit=False)
# The names of the targets as the hub has them, and how many there are in two layers
TARGETS = {
    "mistral3": (r"language_model\.model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.weight", 14),
    "gemma3": (r"language_model\.model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.weight", 14),
    "gemma4": (
        r"model\.language_model\.(layers\.\d\.((self_attn|mlp)\.\w+_proj|per_layer_\w+)|per_layer_model_projection)"
        r"\.weight",
        19,
    ),
    "gemma4_unified": (r"model\.language_model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.weight", 13),
    "qwen3_5": (r"model\.language_model\.layers\.\d\.(self_attn|mlp|linear_attn)\.\w+\.weight", 15),
    "qwen3_5_moe": (
        r"model\.language_model\.layers\.\d\.(self_attn|linear_attn|mlp\.shared_expert)\.\w+\.weight",
        15,
    ),
    "qwen3_vl": (r"model\.language_model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.weight", 14),
    "llama4": (r"language_model\.model\.layers\.\d\.(self_attn|feed_forward\.shared_expert)\.\w+_proj\.weight", 14),
    "llava": (r"language_model\.model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.weight", 14),
    "internvl": (r"language_model\.model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.weight", 14),
}
TRAINED = ("mistral3", "gemma3", "gemma4", "gemma4_unified", "qwen3_5", "llama4")  # a run of two updates each


def test_every_kind_is_tried():
    assert set(TARGETS) == set(WRAPPERS) - {"paligemma"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of each kind in bfloat16 as on the hub: in two files, with tensors that transformers does not read."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = save_model(tmp_path_factory.mktemp(kind) / "a 基 base", kind, dtype="bfloat16")
            tensors = load_file(folder / "model.safetensors")
            prefix = "vision_tower.vision_model." if kind == "gemma3" else "vision_tower."
            tensors = {name.replace("vision_tower.", prefix): tensor for name, tensor in tensors.items()}
            tensors["mtp.fc.weight"], tensors["extra.counter"] = torch.randn(8, 4), torch.arange(5)
            names = sorted(tensors)
            parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
            for file, inside in parts.items():
                save_file({name: tensors[name].contiguous() for name in inside}, folder / file, {"format": "pt"})
            index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
            (folder / "model.safetensors").unlink()
            (folder / "preprocessor_config.json").write_text('{"size": 28}', encoding="utf-8")
            made[kind] = folder
        return made[kind]

    return of


def contents(folder):
    """Type, shape and bytes of every tensor of a model."""
    tensors = {}
    for name, (path, start, info) in tensor_index(folder).items():
        begin, end = info["data_offsets"]
        tensors[name] = (info["dtype"], info["shape"], path.read_bytes()[start + begin : start + end])
    return tensors


def compared(kind, base, merged, report, dtype="BF16"):
    """Checks that the targets changed and nothing else did."""
    before, after = contents(base), contents(merged)
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    pattern, count = TARGETS[kind]
    assert len(changed) == report.weights.changed == count
    assert not [name for name in changed if not re.fullmatch(pattern, name) or "norm" in name]
    assert report.weights.untouched == len(before) - count > 20
    assert {after[name][0] for name in changed} == {dtype}


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("kind", TRAINED)
def test_two_updates_change_the_targets_alone(base, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    changes = {"lora": {"lora_dropout": 0}, "training": {"num_train_epochs": 1}, "evaluation": {"eval_steps": 100}}
    settings, lines = config(tmp_path, base(kind), train=8, **changes), []
    adapter = finetune(settings, True, lines.append)
    assert re.search(r"; 2 in all", "\n".join(lines))
    report = merge(base(kind), adapter, tmp_path / "merged", torch.bfloat16, 10**9)
    compared(kind, base(kind), tmp_path / "merged", report)
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text(encoding="utf-8") == '{"size": 28}'
    assert not json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8")).get("torch_dtype")
    # reopened: it says what base + adapter say, and not what the base says
    plain, merged = (load_base(folder, PLAIN, "fp32", CPU) for folder in (base(kind), tmp_path / "merged"))
    own = logits(plain)
    expected = logits(load_adapter(plain, adapter))
    assert (logits(merged) - expected).norm() < 0.3 * (own - expected).norm()  # the rest is rounding to bfloat16
    for target in (tmp_path / "merged", adapter):
        speaker = load_speaker(settings, *locate(settings, str(target), False), False)
        speaker.reply([{"role": "user", "content": "Who are you?"}], lambda _: None)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_random_adapter_is_merged_as_it_computes(base, tmp_path, kind):
    from persona.config import Lora
    from persona.model.loading import add_adapter

    tuned = add_adapter(load_base(base(kind), PLAIN, "fp32", CPU), Lora(r=2, lora_dropout=0), 0, "tiny")
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    report = merge(base(kind), tmp_path / "adapter", tmp_path / "merged", torch.float32, 10**9)
    before, after = contents(base(kind)), contents(tmp_path / "merged")
    outside = [name for name in before if re.search(r"vision|visual|audio|projector|mtp|extra", name)]
    assert len(outside) > 10
    assert [name for name in outside if before[name] != after[name]] == []  # whatever the type of the language part
    assert report.weights.changed == TARGETS[kind][1]
    expected, apart = logits(tuned), logits(load_base(tmp_path / "merged", PLAIN, "fp32", CPU))
    assert (apart - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_model_that_sees_the_reply_it_learns_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="paligemma model .* sees those behind it"):
        finetune(config(tmp_path, base("paligemma")), True, lambda _: None)


def test_towers_and_routers_are_not_dequantized(base):
    four = FourBits(Quantization(), torch.bfloat16)
    for kind, (_, count) in TARGETS.items():
        names = dequantized_weights(skeleton(base(kind)), four)
        assert not [name for name in names if re.search(r"vision|visual|projector|\.gate\.|router", name)]
        assert len(names) == count + (2 if kind == "qwen3_5_moe" else 0)  # the gates of the shared experts
