"""Where each token of a text stands, by a model's tokenizer: what the converter needs of it, without torch."""

from collections.abc import Callable
from pathlib import Path

from persona.errors import UsageError
from persona.sources import resolve_model

CONFIG = Path(__file__).resolve().parent.parent / "config" / "default.json"


def load_offsets(name: str) -> Callable[[str], list[tuple[int, int]]]:
    """A function from a text to the places of its tokens, by the tokenizer of the model called `name`."""
    folder = Path(name).expanduser()
    if not (folder / "tokenizer.json").is_file():
        folder = resolve_model(name)
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"--tokenizer {name}: {folder} holds no tokenizer.json. Name another model, to count with.")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).offsets)
