"""One training run from settings to a finished folder: prepare, say what will happen, train or continue, and sum up."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout

from persona.artifacts import PersonaCard, model_card, write_adapter
from persona.checkpoints import Progress, latest_checkpoint, load_weights
from persona.config import Config, dump_config
from persona.console import dim, duration, excerpt, green, safe, table
from persona.dataset import (
    Dataset,
    choose_system_prompt,
    read_training_records,
    render_records,
    with_system,
)
from persona.errors import UsageError
from persona.generation import Speaker
from persona.identity import check_same, identity_of, read_identity
from persona.metrics import MetricsWriter, peak_memory_gib, perplexity
from persona.modeling import add_adapter, choose_device, choose_precision, enough_memory, load_base, load_tokenizer
from persona.records import Record, read_records
from persona.render import ChatFormat, Message, chat_format, decode
from persona.sources import resolve_model
from persona.storage import write_json
from persona.training import Trainer, choose_optimizer, run_training, stopped_early

MEMORY_ADVICE = (
    "Lower training.max_tokens_per_pack and evaluation.max_tokens_per_pack (they never change what is learned), set "
    "training.gradient_checkpointing to true, or take a smaller model; then run the same command again to continue."
)


@dataclass(frozen=True)
class Material:
    """Everything that is known before the model's weights are loaded."""

    config: Config
    base: Path
    fmt: ChatFormat
    system: str | None
    train: Dataset
    held_out: Dataset
    sample: list[Message]
    """The first held-out conversation up to its first reply: what the tuned model is asked at the end."""
    day: date


def prepare(config: Config, day: date) -> Material:
    """Resolve the model, read and render the data; raises the errors a user can cause before anything heavy happens."""
    records = read_training_records(config.data, config.seed)
    held_out = read_records(Path(config.data.validation_file)) if config.data.validation_file is not None else []
    system = choose_system_prompt(config.data, records)
    base = resolve_model(config.model.name_or_path)
    fmt = chat_format(load_tokenizer(base, config.model.chat_template, day))
    limit = config.data.max_length
    first = (held_out or records)[0]
    return Material(
        config,
        base,
        fmt,
        system,
        render_records(records, fmt, system, limit),
        render_records(held_out, fmt, system, limit),
        _until_reply(first, system),
        day,
    )


def _until_reply(record: Record, system: str | None) -> list[Message]:
    messages = with_system(record, system)
    return messages[: next(i for i, message in enumerate(messages) if message["role"] == "assistant")]


def show_examples(material: Material, count: int, colour: bool) -> str:
    """`count` rendered examples as text: context grey, supervised text green, each with its numbers of tokens."""
    blocks = []
    for number, example in enumerate(material.train.examples[:count], 1):
        prompt, reply = (safe(decode(ids, material.fmt.tokenizer)) for ids in (example.prompt_ids, example.reply_ids))
        head = (
            f"--- example {number}: {len(example.prompt_ids)} tokens of context, {len(example.reply_ids)} learned ---"
        )
        marked = reply if colour else f"⟦{reply}⟧"
        blocks.append(f"{head}\n{dim(prompt, colour)}{green(marked, colour)}\n")
    return "\n".join(blocks)


def finetune(config: Config, resume: bool, report: Callable[[str], None]) -> Path:
    """Train, or continue, the run that `config` describes; returns the finished adapter's folder."""
    run = Path(config.training.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run / ".lock", timeout=0):
            if not resume:
                _set_aside(run, report)
            with enough_memory(MEMORY_ADVICE):
                return _finetune(config, run, report)
    except Timeout:
        raise UsageError(
            f"Another process is training in {run} right now; wait for it or choose another folder."
        ) from None


def _finetune(config: Config, run: Path, report: Callable[[str], None]) -> Path:
    identity = read_identity(run)
    day = date.fromisoformat(identity["date"]) if identity else date.today()
    material = prepare(config, day)
    current = identity_of(config, material.base, material.system, day)
    if identity:
        check_same(run, identity, current)
        if identity.get("summary") and (run / "adapter").is_dir():
            report(f"This run has already finished. Its adapter is {run / 'adapter'}.\n")
            report(_next_commands(run))
            return run / "adapter"
    device = choose_device(config.model.device)
    precision = choose_precision(config.training.precision, device)
    # the card is the one choose_device found; accelerate may add scaling of the loss (fp16), not change the device
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=device.type == "cpu")
    if accelerator.num_processes > 1:
        raise UsageError(
            "Training on several devices at once is not possible yet; start finetune.py without accelerate."
        )
    report(f"Loading {config.model.name_or_path} ...")
    base = load_base(material.base, config.quantization, precision, accelerator.device)
    if config.training.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = add_adapter(base, config.lora, config.seed, current["base"]["name"])
    checkpoint, passed_over = latest_checkpoint(run)
    (run / "config.json").write_text(dump_config(config), encoding="utf-8", newline="\n")
    write_json(run / "run.json", current)
    start = _start_of(checkpoint)
    metrics = MetricsWriter(run, Path("logs") / run.name, start.history_bytes, start.step)
    trainer = Trainer(
        run=run,
        model=model,
        train=material.train.conversations,
        held_out=material.held_out.conversations,
        training=config.training,
        evaluation=config.evaluation,
        seed=config.seed,
        accelerator=accelerator,
        metrics=metrics,
        report=report,
        progress=Progress(),
    )
    report(_arithmetic(material, trainer, precision))
    for line in passed_over:
        report(line)
    if checkpoint is not None:
        trainer.resume(checkpoint)
        report(f"Continuing after update {trainer.progress.step} ({checkpoint}).")
    try:
        run_training(trainer)
    finally:
        metrics.close()
    return _finish(material, trainer, current, precision, report)


def _start_of(checkpoint: Path | None) -> Progress:
    if checkpoint is None:
        return Progress()
    return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))["progress"])


def _set_aside(run: Path, report: Callable[[str], None]) -> None:
    """Move what an earlier run left in `run` to a folder of its own, so that a new one starts from nothing."""
    left = [path for path in run.iterdir() if path.name != ".lock"]
    if not left:
        return
    number = next(n for n in range(1, 10_000) if not run.with_name(f"{run.name}.{n}").exists())
    target = run.with_name(f"{run.name}.{number}")
    target.mkdir()
    for path in left:
        path.rename(target / path.name)
    logs = Path("logs") / run.name
    if logs.is_dir():
        shutil.move(logs, Path("logs") / target.name)
    report(f"The earlier run was set aside as {target}.")


def _arithmetic(material: Material, trainer: Trainer, precision: str) -> str:
    config, train, held_out = material.config, material.train, material.held_out
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    share = train.supervised / train.tokens
    bits = f"4 bits ({config.quantization.bnb_4bit_quant_type})" if config.quantization.load_in_4bit else "16 bits"
    if not config.quantization.load_in_4bit and precision == "fp32":
        bits = "32 bits"
    per_update = train.supervised / trainer.per_epoch
    rows = [
        ("base model", f"{config.model.name_or_path} in {bits}"),
        ("device", f"{trainer.device} in {precision}, {torch.get_num_threads()} threads"),
        ("training", f"{len(train.conversations)} conversations, {len(train.examples)} examples (one a reply)"),
        ("tokens", f"{train.tokens:,}, of which {train.supervised:,} ({share:.0%}) are learned: replies, end tokens"),
        ("computed", _sharing(trainer)),
        ("held out", f"{len(held_out.examples)} examples, {held_out.supervised:,} measured tokens"),
        ("updates", f"{trainer.per_epoch} an epoch of {config.training.train_batch_size} conversations, "
         f"about {per_update:.0f} learned tokens each; {trainer.total} in all"),
        ("adapter", f"r={config.lora.r} on {len(set(_adapted(trainer.model)))} kinds of layers, {trainable:,} weights"),
        ("optimizer", f"{choose_optimizer(config.training.optim, trainer.device)}, "
         f"{config.training.lr_scheduler_type}, peak {config.training.learning_rate:g}"),
        ("TensorBoard", f"tensorboard --logdir logs  (this run: logs/{Path(config.training.output_dir).name})"),
    ]  # fmt: skip
    notes = [
        f"  note: {note}" for note in material.fmt.notes if material.system is None or "without a system" not in note
    ]
    left_out = [*train.left_out, *held_out.left_out]
    if left_out:
        notes.append(f"  note: {len(left_out)} conversations are left out, as they cannot be learned exactly:")
        notes += [f"    {excerpt(line, 160)}" for line in left_out[:5]]
    return "\n".join([table(rows), *notes])


def _sharing(trainer: Trainer) -> str:
    if not trainer.share:
        return f"one example a row: {trainer.model.config.model_type} is not among the models that share beginnings"
    return "shared beginnings once a pack: the card, and earlier turns where the template leaves them alone"


def _adapted(model: Any) -> list[str]:
    return sorted(model.peft_config["default"].target_modules)


def _finish(
    material: Material, trainer: Trainer, identity: dict[str, Any], precision: str, report: Callable[[str], None]
) -> Path:
    """Keep the best adapter, measure, let it speak once, and say what comes next."""
    progress, run, config = trainer.progress, trainer.run, material.config
    best = progress.best_step if progress.best_step is not None else progress.step
    checkpoint = run / f"checkpoint-{best}"
    load_weights(trainer.model, checkpoint)
    facts = _summary(trainer, best, precision)
    card = PersonaCard(
        identity["base"]["name"], identity["base"]["fingerprint"], material.system, material.day.isoformat()
    )
    note = "The base model's licence applies to this adapter too; read it before you publish."
    text = model_card(card, run.name, facts, note)
    adapter = write_adapter(run, checkpoint, material.base, material.fmt.tokenizer.chat_template, card, text)
    pieces: list[str] = []
    torch.manual_seed(config.seed)
    trainer.model.eval()
    speaker = Speaker(trainer.model, material.fmt, config.generation, config.data.max_length, card, "adapter")
    with trainer.accelerator.autocast():
        speaker.reply(material.sample, pieces.append)
    write_json(run / "run.json", identity | {"summary": facts})
    report("\nDone." if not stopped_early(trainer) else "\nDone: stopped early, the held-out loss no longer improves.")
    report(table([("adapter", adapter.as_posix()), *facts.items()]))
    report(f"\n  asked: {safe(material.sample[-1]['content'])}\n  says:  {safe(''.join(pieces))}\n")
    report(_next_commands(run))
    return adapter


def _summary(trainer: Trainer, best: int, precision: str) -> dict[str, str]:
    progress = trainer.progress
    facts = {"best": f"update {best} of {trainer.total}"}
    if progress.base_loss is not None and progress.best_loss is not None:
        base, tuned = perplexity(progress.base_loss), perplexity(progress.best_loss)
        facts["held-out loss"] = f"{progress.base_loss:.4f} base, {progress.best_loss:.4f} tuned"
        facts["held-out perplexity"] = f"{base:.2f} base, {tuned:.2f} tuned ({tuned / base:.0%})"
    facts["time"] = f"{duration(progress.seconds)}, {progress.tokens / max(progress.seconds, 1e-9):.0f} tokens/s"
    facts["peak memory"] = f"{peak_memory_gib(trainer.device):.1f} GiB ({trainer.device}, {precision})"
    return facts


def _next_commands(run: Path) -> str:
    name = run.as_posix()
    name = f'"{name}"' if " " in name else name
    commands = [
        ("talk to it", f"python test_model.py {name}"),
        ("see how it learned", f"python plot_loss.py {name}"),
        ("make one model of it", f"python merge_lora_to_fp16.py {name}"),
    ]
    return "Next:\n" + table(commands)
