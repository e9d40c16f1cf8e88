"""The proof of a merge: the merged folder, loaded again, against base + adapter on conversations they have not seen.

The two are never in memory together; of the first only its logits at the replies' tokens are kept.
"""

import gc
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from persona.config import Data, Quantization
from persona.engine.attention import take_over
from persona.engine.loss import supervised_logits
from persona.engine.packing import pack
from persona.errors import DataError, PersonaError, VerificationFailed
from persona.merge.changes import FourBits, dequantized_weights
from persona.model.adapters import read_persona
from persona.model.architecture import skeleton
from persona.model.dataset import render_records
from persona.model.device import enough_memory
from persona.model.loading import load_adapter, load_base, trained_format
from persona.model.render import ChatFormat, Example, Message, Untrainable, prompt_ids, prompt_text
from persona.model.template import SENT, Sent
from persona.records import Record, read_records

TOKENS = 512  # tokens of replies that are compared
# Compared if there is no held-out file. Any text will do: both models only have to predict it alike.
_BUILT_IN = (
    ("Who are you, and what do you do all day?", "I keep the lamp, and I count the ships that come home. Some do not."),
    (
        "Tell me what happened last winter.",
        "The fog came in for nine days. On the tenth, somebody rang the bell from outside.",
    ),  # fmt: skip
    ("你是谁？今天过得怎么样？", "我是看灯的人。今天风很大，海上只有一条船，它一直没有靠岸。"),
    ("Write two lines about rain.", "It fell on the roofs as if it had a list of them,\nand mine was the last."),
)
_PLAIN = Quantization(load_in_4bit=False)


@dataclass(frozen=True)
class Proof:
    """How the merged model is compared with base + adapter: on which examples, on which device, in which precision."""

    examples: list[Example]
    """Their replies have at most `TOKENS` tokens together."""
    source: str
    """The file of the examples, or why they are built-in texts."""
    device: torch.device
    precision: str


@dataclass(frozen=True)
class Tolerance:
    """The largest difference from base + adapter that passes."""

    loss: float
    """Relative difference of the mean loss."""
    differing: float
    """Share of tokens at which top-1 may differ."""


# By the format of the merged weights, computed in float32. SmolLM2-135M with an adapter of rank 16 on 1,197 tokens:
# float32 no difference of loss or top-1, float16 3e-5 of the loss and no top-1, bfloat16 1e-4 and 0.2 %.
TOLERANCES = {
    torch.float32: Tolerance(1e-5, 0.001),
    torch.float16: Tolerance(1e-3, 0.005),
    torch.bfloat16: Tolerance(1e-2, 0.03),
}
# Share of the logits' standard deviation by which one has to be ahead to be top-1: in a random Qwen3.5 of 49,152 words
# rounding to float16 turned three of 512 tokens, which were 5e-4 ahead at most
TIE = 1e-3
ROUGH = Tolerance(2e-2, 0.05)  # computed in 16 bits, where the order of sums alone changes as much


@dataclass(frozen=True)
class Verdict:
    """Merged model against base + adapter."""

    tokens: int
    expected: float
    """Mean loss of base + adapter in nats a token."""
    merged: float
    agreement: float
    """Share of tokens with the same top-1, or with another that is as probable but for rounding."""
    largest: float
    """Largest difference of a logit."""
    passed: bool

    def __str__(self) -> str:
        off = abs(self.merged - self.expected) / self.expected
        return (
            f"loss {self.merged:.4f} merged, {self.expected:.4f} base + adapter ({off:.1e} apart), top-1 agreement "
            f"{100 * self.agreement:.2f} % over {self.tokens} tokens, largest logit difference {self.largest:.3f}"
        )


def plan_proof(base: Path, adapter: Path, data: Data | None) -> Proof | None:
    """How to verify a merge on the held-out file of `data`, or None if the memory cannot hold the model even in bf16.

    `data` is that of the adapter's run; None for an adapter of another tool.
    """
    parameters = sum(parameter.numel() for parameter in skeleton(base).parameters())
    memories = [("cpu", psutil.virtual_memory().available)]
    if torch.cuda.is_available():
        memories.insert(0, ("cuda", torch.cuda.mem_get_info()[0]))
    for device, free in memories:
        for precision, size in (("fp32", 4), ("bf16", 2)):
            if parameters * size * 1.25 + 2**30 < free:
                persona = read_persona(adapter)
                system = persona.system_prompt if persona is not None else None
                examples, source = held_out(data, trained_format(base, adapter), system)
                return Proof(examples, source, torch.device(device), precision)
    return None


def held_out(data: Data | None, fmt: ChatFormat, system: str | None) -> tuple[list[Example], str]:
    """The beginning of the held-out file that `data` names, or of built-in texts, and which of the two it is."""
    source, records, max_length = "built-in texts", [], 2048
    if data is not None and data.validation_file is not None:
        try:
            records = read_records(Path(data.validation_file))
            source, max_length = data.validation_file, data.max_length
        except PersonaError:
            source = f"built-in texts, since {data.validation_file} cannot be read here"
    if not records:
        pairs = ((("user", question), ("assistant", reply)) for question, reply in _BUILT_IN)
        records = [Record(tuple({"role": role, "content": text} for role, text in pair)) for pair in pairs]
    examples, room = list[Example](), TOKENS
    for example in render_records(records, fmt, system, max_length).examples:
        if room > 0:
            examples.append(Example(example.prompt_ids, example.reply_ids[:room]))
            room -= len(examples[-1].reply_ids)
    return examples, source


def verify(
    folder: Path, base: Path, adapter: Path, dtype: torch.dtype, proof: Proof, four_bits: FourBits | None
) -> Verdict:
    """The merged model in `folder`, of type `dtype`, against base + adapter; with `four_bits` on the dequantized base.

    Raises `VerificationFailed` if they differ by more than rounding explains, and `OutOfMemory`.
    """
    with enough_memory("Close other programs, or leave the comparison out with --no-verify."):
        expected = _base_logits(base, adapter, proof, four_bits)
        gc.collect()  # PEFT's layers refer to each other, and two models may be more than the memory holds
        merged = _logits(take_over(load_base(folder, _PLAIN, proof.precision, proof.device)), proof)
    tolerance = TOLERANCES[dtype] if proof.precision == "fp32" else ROUGH
    verdict = compare(expected, merged, proof.examples, tolerance)
    if not verdict.passed:
        raise VerificationFailed(
            f"The merged model is not base + adapter: {verdict}. Nothing was published, and the merged files have been "
            "removed. This should not happen: please report it with the model's name. --no-verify writes them "
            "nevertheless."
        )
    return verdict


def trained_prompts(fmt: ChatFormat) -> list[tuple[list[Message], Sent, list[int]]]:
    """Conversations with everything that runtimes may send for the switches, and the ids that were trained."""
    prompts = []
    for turns in ((0,), (0, 1), (2, 0, 1)):
        texts = [text for turn in turns for text in _BUILT_IN[turn]][:-1]
        asked = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
        for messages in (asked, [{"role": "system", "content": "You keep the lamp.\n\nSay 你好."}, *asked]):
            with suppress(Untrainable):  # refused by the template in training too
                ids = prompt_ids(messages, fmt)
                prompts += [(messages, sent, ids) for sent in SENT]
    return prompts


def check_folder_prompts(folder: Path, base: Path, adapter: Path) -> None:
    """Raise `VerificationFailed` unless the template that transformers takes from `folder` gives the trained prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_prompts(tokenizer, tokenizer.chat_template, trained_format(base, adapter))


def check_prompts(tokenizer: Any, template: str, fmt: ChatFormat) -> None:
    """Raise `VerificationFailed` unless `template` gives the trained prompt, id by id, whatever a runtime sends."""
    for messages, sent, trained in trained_prompts(fmt):
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **sent
        )
        if tokenizer.encode(text, add_special_tokens=False) != trained:
            raise VerificationFailed(
                f"{other_prompt('transformers', messages, sent, text, fmt)} Train with a simpler template "
                "(model.chat_template)."
            )


def other_prompt(program: str, messages: Sequence[Message], sent: Sent, text: str, fmt: ChatFormat) -> str:
    """A sentence on the prompt `text` that `program` makes of `messages`, which is not the trained one."""
    trained = prompt_text(messages, fmt)
    roles, switches = " ".join(message["role"] for message in messages), json.dumps(sent) if sent else "no switch"
    difference = "in other tokens" if text == trained else f"as {text!r}, trained was {trained!r}"
    return (
        f"The exported model would be asked otherwise than it was trained, so nothing was kept: {program} writes a "
        f"conversation of {roles} with {switches} {difference}."
    )


def _base_logits(base: Path, adapter: Path, proof: Proof, four_bits: FourBits | None) -> torch.Tensor:
    model = take_over(load_base(base, _PLAIN, proof.precision, proof.device))
    if four_bits is not None:
        for name, change in dequantized_weights(model, four_bits).items():
            parameter = model.get_parameter(name)
            parameter.data = change.apply(parameter.data.float(), 0).to(parameter.dtype)
    return _logits(load_adapter(model, adapter), proof)


def _logits(model: torch.nn.Module, proof: Proof) -> torch.Tensor:
    """Logits (tokens of all replies, vocabulary) in float32 on the CPU."""
    model.eval()
    with torch.no_grad():
        packs = (pack([example], proof.device, share=False) for example in proof.examples)
        return torch.cat([supervised_logits(model, one).float().cpu() for one in packs])


def compare(expected: torch.Tensor, merged: torch.Tensor, examples: Sequence[Example], tolerance: Tolerance) -> Verdict:
    """The verdict on both models' logits (tokens, vocabulary) on the replies of `examples`."""
    targets = torch.tensor([token for example in examples for token in example.reply_ids])
    losses = [F.cross_entropy(logits, targets).item() for logits in (expected, merged)]
    if not all(map(math.isfinite, losses)):
        raise DataError(f"The loss is not finite: {losses[0]} with base + adapter, {losses[1]} merged.")
    first, other = (logits.argmax(-1, keepdim=True) for logits in (expected, merged))
    ahead = (expected.gather(1, first) - expected.gather(1, other)).flatten()
    differing = int((ahead > TIE * expected.std(-1)).sum())
    # one may always differ: two tokens can be all but equally probable
    alike = differing <= max(1, tolerance.differing * len(targets))
    passed = alike and abs(losses[1] - losses[0]) <= tolerance.loss * losses[0]
    largest = max((a - b).abs().max().item() for a, b in zip(expected, merged, strict=True))
    return Verdict(len(targets), losses[0], losses[1], 1 - differing / len(targets), largest, passed)
