"""The proof of a merge: the merged folder, loaded again, against base + adapter on conversations they have not seen.

The two are never in memory together; of the first only its logits at the replies' tokens are kept.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from persona.config import Data, Quantization
from persona.engine.loss import supervised_logits
from persona.engine.packing import pack
from persona.errors import DataError, PersonaError, VerificationFailed
from persona.files import read_json
from persona.merge.changes import held_in_4_bits
from persona.merge.merge import Check
from persona.merge.weights import skeleton
from persona.model.adapters import read_persona
from persona.model.dataset import render_records
from persona.model.loading import DTYPES, enough_memory, load_adapter, load_base, trained_format
from persona.model.render import ChatFormat, Example
from persona.records import Record, read_records

POSITIONS = 512  # tokens of replies that are compared
# Where no held-out file is at hand. What they say does not matter: both models only have to say the same of it.
_BUILT_IN = (
    ("Who are you, and what do you do all day?", "I keep the lamp, and I count the ships that come home. Some do not."),
    (
        "Tell me what happened last winter.",
        "The fog came in for nine days. On the tenth, somebody rang the bell from outside.",
    ),  # fmt: skip
    ("你是谁？今天过得怎么样？", "我是看灯的人。今天风很大，海上只有一条船，它一直没有靠岸。"),
    ("Write two lines about rain.", "It fell on the roofs as if it had a list of them,\nand mine was the last."),
)


@dataclass(frozen=True)
class HeldOut:
    """What is compared: examples of at most `POSITIONS` tokens in their replies, and where they come from."""

    examples: list[Example]
    source: str

    @property
    def positions(self) -> int:
        """Tokens of all replies."""
        return sum(len(example.reply_ids) for example in self.examples)


@dataclass(frozen=True)
class Tolerance:
    """How far a merged model may be from base + adapter."""

    loss: float
    """Relative difference of the mean loss."""
    differing: float
    """Share of positions at which the most probable token may be another one."""


# By the format of the merged weights, computed in float32. SmolLM2-135M with an adapter of rank 16 on 1,197 positions:
# float32 no difference of the loss and of the first choices, float16 3e-5 and none, bfloat16 1e-4 and 0.2 %.
TOLERANCES = {
    torch.float32: Tolerance(1e-5, 0.001),
    torch.float16: Tolerance(1e-3, 0.005),
    torch.bfloat16: Tolerance(1e-2, 0.03),
}
ROUGH = Tolerance(2e-2, 0.05)  # computed in 16 bits, where the order of sums alone changes as much


@dataclass(frozen=True)
class Verdict:
    """Merged model against base + adapter."""

    positions: int
    expected: float
    """Mean loss of base + adapter in nats a token."""
    merged: float
    agreement: float
    """Share of positions with the same most probable token."""
    largest: float
    """Largest difference of a logit."""
    passed: bool

    def __str__(self) -> str:
        off = abs(self.merged - self.expected) / self.expected
        return (
            f"loss {self.merged:.4f} merged, {self.expected:.4f} base + adapter ({off:.1e} apart), the same first "
            f"choice at {self.agreement:.2%} of {self.positions} positions, largest difference of a logit "
            f"{self.largest:.3f}"
        )


def held_out(data: Data | None, fmt: ChatFormat, system: str | None, positions: int = POSITIONS) -> HeldOut:
    """The beginning of the held-out file that `data` names, or built-in texts where there is none."""
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
    chosen: list[Example] = []
    for conversation in render_records(records, fmt, system, max_length).conversations:
        for example in conversation:
            room = positions - sum(len(other.reply_ids) for other in chosen)
            if room > 0:
                chosen.append(Example(example.prompt_ids, example.reply_ids[:room]))
    return HeldOut(chosen, source)


def place_for(base: Path) -> tuple[torch.device, str] | None:
    """Device and precision in which the model in `base` can be computed here, or None when no memory holds it."""
    parameters = sum(parameter.numel() for parameter in skeleton(base).parameters())
    rooms = [("cpu", psutil.virtual_memory().available)]
    if torch.cuda.is_available():
        rooms.insert(0, ("cuda", torch.cuda.mem_get_info()[0]))
    for device, free in rooms:
        for precision, size in (("fp32", 4), ("bf16", 2)):
            if parameters * size * 1.25 + 2**30 < free:
                return torch.device(device), precision
    return None


def prepare(
    base: Path, adapter: Path, data: Data | None, dtype: torch.dtype, say: Callable[[str], None]
) -> Check | None:
    """The check of a merge on the held-out file of `data`, telling `say`; None where no memory holds the model.

    `data` is that of the adapter's run; None for an adapter of another tool.
    """
    place = place_for(base)
    if place is None:
        return None
    persona = read_persona(adapter)
    texts = held_out(data, trained_format(base, adapter), persona.system_prompt if persona is not None else None)

    def tell(held: Quantization | None, verdict: Verdict) -> None:
        into = "" if held is None else " into the weights as training in 4 bits saw them"
        say(f"Verified{into}, pass: {verdict} ({texts.source}).")

    return verifier(base, adapter, texts, dtype, place, trained_in(adapter), tell)


def trained_in(adapter: Path) -> torch.dtype:
    """The number format in which the run behind `adapter` computed; bfloat16 where nothing says it."""
    path = adapter.resolve().parent / "run.json"
    resolved = read_json(path).get("resolved") if path.is_file() else None
    return DTYPES.get(resolved.get("precision", "") if isinstance(resolved, dict) else "", torch.bfloat16)


def verifier(
    base: Path,
    adapter: Path,
    texts: HeldOut,
    dtype: torch.dtype,
    place: tuple[torch.device, str],
    compute: torch.dtype,
    say: Callable[[Quantization | None, Verdict], None],
) -> Check:
    """A check for `merge` that compares with base + adapter on `texts`, tells `say`, and raises `VerificationFailed`.

    A base held in 4 bits is the one that training with the type `compute` saw.
    """
    device, precision = place
    plain = Quantization(load_in_4bit=False)
    tolerance = TOLERANCES[dtype] if precision == "fp32" else ROUGH

    def check(folder: Path, held: Quantization | None) -> float:
        with enough_memory("Close other programs, or leave the comparison out with --no-verify."):
            return measured(folder, held)

    def measured(folder: Path, held: Quantization | None) -> float:
        model = load_base(base, plain, precision, device)
        if held is not None:
            _pass_through_4_bits(model, held, compute)
        expected = reply_logits(load_adapter(model, adapter), texts.examples, device)
        del model
        gc.collect()  # PEFT's layers refer to each other, and two models may be more than the memory holds
        merged = reply_logits(load_base(folder, plain, precision, device), texts.examples, device)
        verdict = compare(expected, merged, texts.examples, tolerance)
        if not verdict.passed:
            raise VerificationFailed(
                f"The merged model is not base + adapter: {verdict}. Nothing was published, and what was merged has "
                "been removed. This should not happen: please report it with the model's name. --no-verify writes it "
                "nevertheless."
            )
        say(held, verdict)
        return verdict.merged

    return check


def _pass_through_4_bits(model: Any, held: Quantization, compute: torch.dtype) -> None:
    for name, changes in held_in_4_bits(model, held, compute).items():
        parameter = model.get_parameter(name)
        for change in changes:
            parameter.data = change.apply(parameter.data.float(), 0).to(parameter.dtype)


def reply_logits(model: Any, examples: Sequence[Example], device: torch.device) -> torch.Tensor:
    """Logits (tokens of all replies, vocabulary) in float32 on the CPU."""
    model.eval()
    with torch.no_grad():
        found = [supervised_logits(model, pack([example], device, share=False)).float().cpu() for example in examples]
    return torch.cat(found)


def compare(expected: torch.Tensor, merged: torch.Tensor, examples: Sequence[Example], tolerance: Tolerance) -> Verdict:
    """Both models' logits (positions, vocabulary) on the replies of `examples`."""
    targets = torch.tensor([token for example in examples for token in example.reply_ids])
    losses = [F.cross_entropy(logits, targets).item() for logits in (expected, merged)]
    if not all(map(math.isfinite, losses)):
        raise DataError(f"The loss is not finite: {losses[0]} with base + adapter, {losses[1]} merged.")
    differing = int((expected.argmax(-1) != merged.argmax(-1)).sum())
    # one position may always differ: two tokens can be as good as equally probable
    alike = differing <= max(1, tolerance.differing * len(targets))
    passed = alike and abs(losses[1] - losses[0]) <= tolerance.loss * losses[0]
    largest = max((a - b).abs().max().item() for a, b in zip(expected, merged, strict=True))
    return Verdict(len(targets), losses[0], losses[1], 1 - differing / len(targets), largest, passed)
