"""finetune.py: the mistakes first, then the model, and only then the libraries that take seconds to import."""

from datetime import date
from pathlib import Path

from persona.config import load_config
from persona.console import colour_wanted
from persona.model.dataset import read_data
from persona.model.sources import prepare_libraries, resolve_model
from persona.train.devices import Devices
from persona.train.estimate.gpus import find_gpu

SHOWN = 2  # examples in a dry run


def tune(
    settings: Path, changes: list[str], resume: bool, show: int | None, dry: bool, for_gpu: str | None, devices: Devices
) -> None:
    """Train with the file `settings` and its `changes`, and draw the curves.

    Or only print `show` examples, or if `dry` a forecast of the run here or on the GPU called `for_gpu`.
    """
    config = load_config(settings, changes)
    if for_gpu is not None:
        find_gpu(for_gpu)
    read_data(config.data, config.seed)  # mistakes in the data come before a download
    if show is None and not dry and config.model.device == "cuda":
        prepare_libraries(offline=False)
        from persona.model.device import choose_device

        choose_device("cuda")  # a missing GPU comes before a download
    # before transformers is imported: a local model switches the hub off
    devices.first_on_each_machine(lambda: resolve_model(config.model.name_or_path, not dry))

    from persona.train.run import finetune, prepare, show_examples

    if show is not None or dry:
        material = prepare(config, date.today(), not dry)
        if devices.main:
            print(show_examples(material, show or SHOWN, colour_wanted()))
            if dry:
                from persona.train.estimate.dry_run import dry_run

                print(dry_run(config, material, for_gpu))
            print("".join(f"note: {note}\n" for note in material.notes), end="")
        return
    adapter = finetune(config, resume, lambda text: print(text, flush=True), devices)
    if devices.main:
        from persona.train.curves import draw
        from persona.train.history import read_history

        draw([read_history(adapter.parent)], adapter.parent / "loss.png", 0.9)
