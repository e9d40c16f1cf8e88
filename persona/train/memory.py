"""Training when the memory is full: a try before the first update, and updates that are started over in smaller packs.

Each process halves its own packs: how an update is laid out does not change what the processes exchange. They agree on
the smallest size once the update is whole. Only with a sharded base can a process not start over by itself, since the
others wait for it in the middle of a layer: that ends the run, with advice.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from persona.config import Config
from persona.engine.memory import LEAST_TOKENS, Full, Limit, attempt, heaviest_pack
from persona.engine.packing import plan_packs
from persona.errors import OutOfMemory
from persona.files import JsonObject
from persona.model.render import Example
from persona.train.checkpoints import put_random_state_back, random_state
from persona.train.devices import Devices

# On a CPU the system grants more memory than there is and kills the process that uses it; a try tells nothing there and
# took 14 s of the default run.
TRIED_ON = ("cuda",)
LOOKED_AT = 1000  # updates among which the heaviest pack is looked for: seconds for any data
STATES = {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0}  # bytes a weight; paged ones are not on the GPU

Learn = Callable[[Sequence[Example], float], torch.Tensor]


def sum_over_packs(
    work: Learn,
    examples: Sequence[Example],
    spare: Sequence[Example],
    limit: Limit,
    share: bool,
    device: torch.device,
    devices: Devices,
    undo: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """The sum of `work(pack, its weight)` over the packs of `examples`, in halves when the memory is full.

    Then `undo` undoes the packs before. Every process must call it; `spare` is as in `Devices.passes`.
    """
    while True:
        total = torch.zeros((), device=device)
        for group, weight in devices.passes(plan_packs(examples, limit.size, share), spare):
            result = attempt(lambda group=group, weight=weight: work(group, weight), device)
            if isinstance(result, Full):
                _halve(limit, result, group, share, devices)
                undo()
                break
            total += result
        else:
            agree(limit, devices)
            return total


def _halve(limit: Limit, full: Full, group: Sequence[Example], share: bool, devices: Devices) -> None:
    if devices.sharded:
        raise OutOfMemory(
            f"The memory is full ({full.reason}). With a sharded base packs are not halved during a run: set "
            f"{limit.setting} to {limit.size // 2} (now {limit.size}), which does not change what is learned, and run "
            f"the same command again to continue. {limit.advice}"
        )
    limit.halve_pack(full, group, share)


def agree(limit: Limit, devices: Devices) -> None:
    """Give `limit` the smallest size that a process has."""
    smallest = -int(devices.largest(-limit.size))
    if smallest < limit.size:
        limit.lower(smallest, "in another process")


def start_over(weights: Sequence[torch.nn.Parameter], random: dict[str, torch.Tensor]) -> None:
    """Clear the gradients of `weights` and put the random state back."""
    for weight in weights:
        weight.grad = None
    put_random_state_back(random)


def try_heaviest(
    learn: Learn,
    model: Any,
    updates: Callable[[], Iterable[Sequence[Example]]],
    states: int,
    spare: Sequence[Example],
    limit: Limit,
    share: bool,
    device: torch.device,
    devices: Devices,
) -> None:
    """Learn from the pack of `updates` that takes the most memory, and forget it; lowers `limit` until one fits.

    Gradients and `states`, the optimizer's bytes that do not exist yet, take their place meanwhile. What is learned
    afterwards is the same as without.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    random = random_state()

    def with_all_else(group: Sequence[Example], weight: float) -> torch.Tensor:
        held = torch.empty(states, dtype=torch.uint8, device=device)
        for one in weights:
            one.grad = torch.zeros_like(one)
        loss = learn(group, weight)
        del held
        return loss

    full = True
    while full:
        group = heaviest_pack(model, updates(), limit.size, share)
        full = False
        for one, weight in devices.passes([group] if group else [], spare):
            result = attempt(lambda one=one, weight=weight: with_all_else(one, weight), device)
            start_over(weights, random)
            if full := isinstance(result, Full):
                _halve(limit, result, one, share, devices)
    agree(limit, devices)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def limits_of(config: Config, fitted: JsonObject, report: Callable[[str], None]) -> tuple[Limit, Limit, Limit]:
    """The limits of packs that are learned, of packs that are measured, and of samples at a time.

    `fitted` has the sizes to which an earlier start of the run had to go down.
    """
    anew = "shorten data.max_length or take a smaller lora.r or model, and start over with --resume never."
    if not config.quantization.load_in_4bit:
        anew = f"set quantization.load_in_4bit to true, {anew}"
    measured = anew[0].upper() + anew[1:]
    learned = measured
    if not config.training.gradient_checkpointing:
        learned = (
            "Set training.gradient_checkpointing to true and run the same command again to continue; if that is not "
            f"enough, {anew}"
        )

    def limit(setting: str, asked: int, least: int, unit: str, advice: str) -> Limit:
        size = fitted.get(setting, asked)
        known = isinstance(size, int) and least <= size < asked
        return Limit(setting, asked, size if known else asked, least, unit, advice, report)

    training, held_out = config.training.pack_limit, config.evaluation.max_tokens_per_pack
    samples = "There are none from now on; the run goes on."
    return (
        limit("training.max_tokens_per_pack", training, LEAST_TOKENS, "packs of {} tokens", learned),
        limit("evaluation.max_tokens_per_pack", held_out, LEAST_TOKENS, "evaluations in packs of {} tokens", measured),
        limit("evaluation.sample_prompts", config.evaluation.sample_prompts, 1, "{} samples at a time", samples),
    )
