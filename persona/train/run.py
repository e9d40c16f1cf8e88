"""One training run from settings to a finished folder: prepare, print the plan, train or continue, and sum up."""

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout

from persona.config import Config, dump_config
from persona.console import GREEN, GREY, duration, excerpt, painted, safe, table
from persona.engine.attention import form_of_model
from persona.engine.memory import Full, attempt
from persona.engine.packing import inputs
from persona.engine.trial import keep_rows, prepare_layout
from persona.errors import UsageError
from persona.files import JsonObject, write_json, write_text
from persona.model.adapters import Persona, model_card, write_adapter
from persona.model.architecture import linear_names, looks_ahead, stacked_experts
from persona.model.dataset import Dataset, Records, read_data, render_records, with_system
from persona.model.device import (
    choose_device,
    choose_precision,
    enough_memory,
    peak_memory_gib,
    stay_in_gpu,
    unused_gpu,
)
from persona.model.folders import text_config
from persona.model.loading import add_adapter, held_in_4_bits, load_base, load_tokenizer, shard_base
from persona.model.render import BUILTIN_TEMPLATE, ChatFormat, chat_format
from persona.model.sources import resolve_model
from persona.model.token_cache import decode
from persona.speak.speaker import Speaker
from persona.train.checkpoints import Progress, latest_checkpoint, load_weights, read_progress
from persona.train.devices import ALONE, Devices, build_accelerator
from persona.train.estimate.forecast import Forecast, compared, forecast_here
from persona.train.history import read_history
from persona.train.loop import (
    Observer,
    Trainer,
    best_checkpoint,
    choose_optimizer,
    log_update,
    run_training,
    stopped_early,
    trained_weights,
)
from persona.train.memory import limits_of
from persona.train.metrics import MetricsWriter, choose_samples, perplexity
from persona.train.run_folder import (
    check_same,
    identity_of,
    log_folder,
    next_commands,
    open_run,
    read_fitted,
    read_identity,
    set_aside,
)
from persona.train.verdict import as_text, of_training

MEMORY_ADVICE = (
    "This is not about packs, which are halved by themselves. Close other programs that use this memory, and run the "
    "same command again to continue; or start over with --resume never and quantization.load_in_4bit true, "
    "training.optim adamw_8bit, a smaller lora.r, or a smaller model."
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
    notes: list[str]
    day: date


def finetune(
    config: Config,
    resume: bool,
    report: Callable[[str], None],
    devices: Devices = ALONE,
    observers: Sequence[Observer] = (),
) -> Path:
    """Train, or continue, the run that `config` describes; returns the finished adapter's folder.

    All processes of `devices` call it; the main one alone reports and writes. `observers` are called after each update.
    """
    run = devices.on_main(lambda: open_run(Path(config.training.output_dir)))
    try:
        lock = FileLock(run / ".lock", timeout=0) if devices.main else nullcontext()
        with lock, enough_memory(MEMORY_ADVICE):
            if not resume and devices.main:
                set_aside(run, report)
            return _finetune(config, run, report if devices.main else lambda _: None, devices, observers)
    except Timeout:
        raise UsageError(
            f"Another process is training in {run} right now; wait for it or choose another folder."
        ) from None


def _finetune(
    config: Config, run: Path, report: Callable[[str], None], devices: Devices, observers: Sequence[Observer]
) -> Path:
    earlier, fitted, (checkpoint, passed_over) = devices.on_main(
        lambda: (read_identity(run), read_fitted(run, dump_config(config)), latest_checkpoint(run))
    )
    day = date.fromisoformat(earlier["date"]) if earlier and checkpoint else date.today()
    material = prepare(config, day)
    device = choose_device(config.model.device)
    devices.take_gpu(device)
    stay_in_gpu(device)
    precision = devices.same(choose_precision(config.training.precision, device), "training.precision")
    optimizer = choose_optimizer(config.training.optim, device)
    resolved = {"device": device.type, "precision": precision, "optimizer": optimizer}
    identity = identity_of(config, material.base, material.system, day, resolved)
    forecast = forecast_here(config, material.base, material.train.conversations, device, precision, optimizer)
    progress = Progress()
    if checkpoint is not None:  # before the first one there is nothing that could be continued wrongly
        check_same(run, earlier, identity)
        if earlier and earlier.get("summary") and (run / "adapter").is_dir():
            report(f"This run has already finished. Its adapter is {run / 'adapter'}.\n\n{next_commands(run)}")
            return run / "adapter"
        progress = read_progress(checkpoint)
    if config.training.max_tokens_per_pack == "auto":
        earlier_limit = earlier.get("max_tokens_per_pack") if earlier and checkpoint else None
        limit = -int(devices.largest(-float(earlier_limit or forecast().limit)))  # that of the fullest device
        training = config.training.model_copy(update={"max_tokens_per_pack": limit})
        material = replace(material, config=config.model_copy(update={"training": training}))
        identity["max_tokens_per_pack"] = limit
    accelerator = build_accelerator(precision, device, devices)
    report(f"Loading {config.model.name_or_path} ...")
    model = _load_model(material, identity["base"]["name"], precision, accelerator, devices)
    unshared = _agreed_layout(model, material, accelerator, devices)
    devices.own_random_numbers(config.seed)
    identity |= {"fitted": fitted} if fitted else {}

    def remember(line: str) -> None:
        report(line)
        identity["fitted"] = {limit.setting: limit.size for limit in limits if limit.halved}
        if devices.main:
            write_json(run / "run.json", identity)

    limits = limits_of(material.config, fitted, remember)
    samples = config.evaluation.sample_prompts if devices.main and not devices.sharded else 0
    kept = progress.history_bytes, progress.sample_bytes, progress.step
    with closing(MetricsWriter(run, log_folder(run), *kept)) if devices.main else nullcontext() as metrics:
        trainer = Trainer(
            run=run,
            model=model,
            train=material.train.conversations,
            held_out=material.held_out.conversations,
            share=unshared is None,
            training=material.config.training,
            evaluation=config.evaluation,
            seed=config.seed,
            accelerator=accelerator,
            metrics=metrics,
            report=report,
            progress=progress,
            observers=(log_update, *observers),
            sampler=choose_samples(material.held_out, material.fmt, samples, config.generation.max_new_tokens),
            devices=devices,
            packs=limits[0],
            held_out_packs=limits[1],
            samples_at_once=limits[2],
        )
        if devices.main:
            write_text(run / "config.json", dump_config(config))
            write_json(run / "run.json", identity)
        report(_plan(material, trainer, precision, unshared))
        for line in [*passed_over, *(trainer.resume(checkpoint) if checkpoint is not None else [])]:
            report(line)
        run_training(trainer)
    return devices.on_main(lambda: _finish(material, trainer, identity, precision, forecast, report))


def prepare(config: Config, day: date, weights: bool = True) -> Material:
    """Read and render the data with the model's tokenizer; raises the errors a user can cause.

    Without `weights` the model may consist of its config and tokenizer.
    """
    data, limit = read_data(config.data, config.seed), config.data.max_length
    base = resolve_model(config.model.name_or_path, weights)
    longest = text_config(base).get("max_position_embeddings")
    if longest is not None and limit > longest:
        raise UsageError(f"data.max_length is {limit}, but this model reads at most {longest} tokens; lower it.")
    fmt = chat_format(load_tokenizer(base, config.model.chat_template, day))
    train = render_records(data.train, fmt, data.system, limit)
    held_out = render_records(data.held_out, fmt, data.system, limit)
    return Material(config, base, fmt, data.system, train, held_out, _notes(data, fmt, train, held_out), day)


def _notes(data: Records, fmt: ChatFormat, train: Dataset, held_out: Dataset) -> list[str]:
    """Sentences about the template and the data that a person should know before training."""
    injected = "without a system prompt"
    notes = [note for note in fmt.notes if data.system is None or injected not in note]
    if data.shared:
        notes.append(
            f"{data.shared} of {len(data.held_out)} held-out conversations are also in the training data: the held-out "
            "loss will look too good"
        )
    if data.system is not None and all(record.system not in (None, data.system) for record in train.records):
        notes.append("every conversation has a system prompt of its own; data.system_prompt is learned by none of them")
    if fmt.tokenizer.chat_template.endswith(BUILTIN_TEMPLATE):
        notes.append(
            "this model has no chat template, so it learns the built-in one (### User: ..., ### Assistant: ...), which "
            "the adapter, a merged model and a GGUF file carry with them (docs/models.md)"
        )
    left_out = [*train.left_out, *held_out.left_out]
    if left_out:
        notes.append(f"{len(left_out)} conversations are left out, as they cannot be learned exactly:")
        notes += [f"  {excerpt(line, 160)}" for line in left_out[:5]]
    return notes


def show_examples(material: Material, count: int, colour: bool) -> str:
    """`count` rendered examples as text: context grey, supervised text green, each with its numbers of tokens."""
    blocks = []
    for number, example in enumerate(material.train.examples[:count], 1):
        prompt, reply = (safe(decode(ids, material.fmt.tokenizer)) for ids in (example.prompt_ids, example.reply_ids))
        head = (
            f"--- example {number}: {len(example.prompt_ids)} tokens of context, {len(example.reply_ids)} learned ---"
        )
        marked = reply if colour else f"⟦{reply}⟧"
        blocks.append(f"{head}\n{painted(prompt, GREY, colour)}{painted(marked, GREEN, colour)}\n")
    return "\n".join(blocks)


def _load_model(material: Material, base_name: str, precision: str, accelerator: Accelerator, devices: Devices) -> Any:
    """The base model with a fresh adapter, on its device or sharded over all of them."""
    config = material.config
    # a base that is sharded may be larger than one device
    place = torch.device("cpu") if devices.sharded else accelerator.device
    base = load_base(material.base, config.quantization, precision, place)
    if looks_ahead(base):
        raise UsageError(
            f"In the {base.config.model_type} model {base_name} each token sees those behind it: in training it would "
            "copy the reply instead of learning to write it. Choose a model that reads from left to right."
        )
    if config.training.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = add_adapter(base, config.lora, config.seed, base_name)
    if devices.sharded:
        shard_base(model, accelerator.device, devices.count)
    return model


def _agreed_layout(model: Any, material: Material, accelerator: Accelerator, devices: Devices) -> str | None:
    """The reason why each example gets a row of its own, or None; the same in all processes."""
    longest = max(len(inputs(one)) for data in (material.train, material.held_out) for one in data.examples)
    devices.in_passes = devices.sharded  # a sharded base computes only when all processes do
    own = prepare_layout(model, material.train.examples, longest, accelerator)
    devices.in_passes = False
    reasons = devices.gather(own)
    if len(set(reasons)) > 1:
        keep_rows(model)
    return next((reason for reason in reasons if reason is not None), None)


def _plan(material: Material, trainer: Trainer, precision: str, unshared: str | None) -> str:
    """The run in figures before it begins, as a table, and notes; `unshared` says why examples are in rows, if so."""
    config, train, held_out = material.config, material.train, material.held_out
    trained = sum(weight.numel() for weight in trained_weights(trainer.model))
    lora: Any = trainer.model.peft_config["default"]
    kinds = {name.rpartition(".")[2] for name in lora.target_modules}
    bits = "32 bits" if precision == "fp32" else "16 bits"
    if config.quantization.load_in_4bit:
        share, others = held_in_4_bits(trainer.model)
        rest = f": {share:.0%} of its weights; {others / 2**30:.2f} GiB stay in {bits}"
        # a sharded weight has lost its shape
        bits = f"4 bits ({config.quantization.bnb_4bit_quant_type}){'' if trainer.devices.sharded else rest}"
    layout = "shared prefixes once a pack: the system prompt, and earlier turns if the template does not rewrite them"
    attention = []
    if unshared is None and trainer.device.type == "cuda":
        choice = form_of_model(trainer.model)
        attention = [("attention", f"{choice.form}: {choice.reason}")]
    rows = [
        ("base model", f"{config.model.name_or_path} in {bits}"),
        ("device", f"{_device(trainer)} in {precision}, {torch.get_num_threads()} threads"),
        ("training", f"{len(train.conversations)} conversations, {len(train.examples)} examples (one a reply)"),
        ("tokens", f"{train.tokens:,}, of which {train.supervised:,} ({train.supervised / train.tokens:.0%}) are "
         "learned: replies, end tokens"),
        ("packs", f"up to {config.training.pack_limit:,} tokens at a time"),
        ("computed", layout if unshared is None else f"one example a row: {unshared}"),
        *attention,
        ("held out", f"{len(held_out.examples)} examples, {held_out.supervised:,} measured tokens"),
        ("updates", f"{trainer.per_epoch} an epoch of {config.training.train_batch_size} conversations, "
         f"about {train.supervised / trainer.per_epoch:.0f} learned tokens each; {trainer.total} in all"),
        ("adapter", f"r={config.lora.r} on {len(kinds)} kinds of layers, {trained:,} weights"),
        ("optimizer", f"{choose_optimizer(config.training.optim, trainer.device)}, "
         f"{config.training.lr_scheduler_type}, peak {config.training.learning_rate:g}"),
        ("TensorBoard", f"tensorboard --logdir logs  (this run: {log_folder(trainer.run).as_posix()})"),
    ]  # fmt: skip
    notes = [*material.notes, *filter(None, [unused_gpu(config.model.device, trainer.device)])]
    base = trainer.model.get_base_model()
    if experts := 0 if trainer.devices.sharded else stacked_experts(base):
        notes.append(
            f"the experts, {experts:,} weights, stay as they are; the adapter is on {', '.join(linear_names(base))}"
        )
    text: Any = base.config
    dropped = getattr(text.get_text_config(), "attention_dropout", 0)
    if dropped and unshared is None:
        notes.append(
            f"no attention weights are dropped, though the model's attention_dropout is {dropped:g}: a shared "
            "beginning is computed once for all; lora.lora_dropout is the remedy against overfitting here"
        )
    limits = (trainer.packs, trainer.held_out_packs, trainer.samples_at_once)
    notes += [f"{limit.unit.format(limit.size)}, since the memory was full before" for limit in limits if limit.halved]
    if trainer.devices.sharded and config.evaluation.sample_prompts and held_out.records:
        notes.append("no samples during training: no process can speak with its part of the base alone")
    return "\n".join([table(rows), *(f"  note: {note}" for note in notes)])


def _device(trainer: Trainer) -> str:
    count = trainer.devices.count
    kind = f"{trainer.device.type} sharing out the base" if trainer.devices.sharded else trainer.device.type
    return str(trainer.device) if count == 1 else f"{count} of {kind}"


def _finish(
    material: Material,
    trainer: Trainer,
    identity: JsonObject,
    precision: str,
    forecast: Callable[[], Forecast],
    report: Callable[[str], None],
) -> Path:
    """Keep the best adapter, sum up, let it speak once, and list the next commands."""
    run, train, held_out = trainer.run, material.train, material.held_out
    checkpoint = best_checkpoint(trainer)
    load_weights(trainer.model, checkpoint)
    facts = _summary(trainer, checkpoint, precision)
    estimate = compared(forecast, trainer.packs.size, _peak(trainer))
    facts["estimated memory"] = str(estimate["text"])
    counts = (
        f"{len(train.conversations)} conversations with {len(train.examples)} replies ({train.supervised} tokens) "
        f"learned, {len(held_out.conversations)} held out"
    )
    base, day = identity["base"], material.day.isoformat()
    persona = Persona(base["name"], base["fingerprint"], material.system, day)
    text = model_card(persona, run.name, {"data": counts} | facts, material.base)
    adapter = write_adapter(run, checkpoint, material.base, material.fmt.tokenizer.chat_template, persona, text)
    findings = of_training(read_history(run), held_out.supervised, trainer.per_epoch)
    verdict = [asdict(finding) for finding in findings]
    results = {"counts": {"data": counts}, "summary": facts, "memory": estimate, "verdict": verdict}
    write_json(run / "run.json", identity | results)
    report("\nDone: stopped early, the held-out loss no longer improves." if stopped_early(trainer) else "\nDone.")
    report(table([("adapter", adapter.as_posix()), *facts.items()]))
    for limit in (trainer.packs, trainer.held_out_packs, trainer.samples_at_once):
        if limit.halved:
            report(f"  The memory was full: set {limit.setting} to {limit.size} in the settings (now {limit.asked}).")
    if not trainer.devices.sharded:  # this process alone cannot compute with its part of the model
        report(_spoken_once(material, trainer, persona))
    report(f"Verdict:\n{as_text(findings)}\n")
    report(next_commands(run))
    return adapter


def _summary(trainer: Trainer, best: Path, precision: str) -> dict[str, str]:
    """The results of the run, by name."""
    progress = trainer.progress
    facts = {"best": f"update {best.name.removeprefix('checkpoint-')} of {trainer.total}"}
    if progress.base_loss is not None and progress.best_loss is not None:
        base, tuned = perplexity(progress.base_loss), perplexity(progress.best_loss)
        facts["held-out loss"] = f"{progress.base_loss:.4f} base, {progress.best_loss:.4f} tuned"
        facts["held-out perplexity"] = f"{base:.2f} base, {tuned:.2f} tuned ({tuned / base:.0%})"
    facts["time"] = f"{duration(progress.seconds)}, {progress.tokens / max(progress.seconds, 1e-9):.0f} tokens/s"
    facts["peak memory"] = f"{_peak(trainer):.1f} GiB ({_device(trainer)}, {precision})"
    return facts


def _peak(trainer: Trainer) -> float:
    return max(trainer.peak_memory_gib, peak_memory_gib(trainer.device))


def _spoken_once(material: Material, trainer: Trainer, persona: Persona) -> str:
    """The tuned model's reply to the first held-out question, and that question."""
    messages = with_system((material.held_out.records or material.train.records)[0], material.system)
    question = messages[: next(i for i, message in enumerate(messages) if message["role"] == "assistant")]
    config = material.config
    torch.manual_seed(config.seed)
    trainer.model.eval()
    speaker = Speaker(trainer.model, material.fmt, config.generation, config.data.max_length, persona, "adapter")
    with trainer.accelerator.autocast():
        reply = attempt(lambda: speaker.reply(question, lambda _: None), trainer.device)
    if isinstance(reply, Full):
        return f"\n  The memory is full for a reply here ({reply.reason}); the adapter is whole. Try test_model.py.\n"
    return f"\n  asked: {safe(question[-1]['content'])}\n  says:  {safe(reply)}\n"
