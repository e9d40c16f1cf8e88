"""A Modelfile: what `ollama create` needs to speak with a GGUF file as the model was trained to.

Form: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx; how its reader treats a text: parser/parser.go.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from persona.config import Generation
from persona.export.ollama_template import Inexpressible, ollama_template
from persona.render import ChatFormat, Message, prompt_text


@dataclass(frozen=True)
class Modelfile:
    """The text, and what a person should know of it, one sentence each."""

    text: str
    notes: list[str]


def modelfile(
    start: Sequence[str], fmt: ChatFormat, adds_bos: bool, system: str | None, generation: Generation, context: int
) -> Modelfile:
    """The Modelfile that begins with the lines `start` (FROM, ADAPTER): template, system prompt, parameters.

    `context` is the longest conversation in tokens that was trained. A template that cannot be said in Go's language,
    and a system prompt that Ollama would read otherwise, are left out with a note.
    """
    lines, notes = list(start), []
    said = _said(system, fmt) if system else None
    try:
        lines.append(f"TEMPLATE {_quoted(ollama_template(fmt, adds_bos, [said] if said else []))}")
    except Inexpressible as reason:
        notes.append(
            f"The chat template has no form in Ollama's language ({reason}), so the Modelfile has none: Ollama will "
            "guess one from the GGUF file. Check what it writes with OLLAMA_DEBUG=1, or use llama.cpp with --jinja, "
            "which takes the chat template itself"
        )
    if said and (lost := _lost(said)):
        notes.append(
            f"Ollama's reader of Modelfiles would change the system prompt ({lost}), so it is left out: send it with "
            "each conversation, or take that out of the prompt and train again"
        )
    elif said:
        lines.append(f"SYSTEM {_quoted(said)}")
    return Modelfile("\n".join([*lines, *_parameters(fmt, generation, context)]) + "\n", notes)


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def _said(system: str, fmt: ChatFormat) -> str:
    """The system prompt as the chat template writes it: many strip white space, which Go's language cannot."""
    asked: Message = {"role": "user", "content": "Who goes there?"}
    texts = [prompt_text([{"role": "system", "content": s}, asked], fmt) for s in (system, system.strip())]
    return system.strip() if texts[0] == texts[1] else system


def _lost(text: str) -> str | None:
    """What Ollama's reader drops of a text in three quotation marks, or takes for its end."""
    if '"""' in text:
        return 'three quotation marks """ end it'
    # it keeps what Go calls printable, and white space at which it looks for the end
    dropped = sorted({character for character in text if not character.isprintable() and character not in "\n\r\t"})
    named = ", ".join(f"U+{ord(character):04X}" for character in dropped[:5])
    return f"it drops what is not printable, here {named}" if dropped else None


def _parameters(fmt: ChatFormat, generation: Generation, context: int) -> list[str]:
    """The settings of `test_model.py` in Ollama's names; those that it has not are switched off."""
    ends = dict.fromkeys((fmt.tokenizer.convert_ids_to_tokens(fmt.end_id), fmt.tokenizer.eos_token))
    stops = [end for end in ends if end and '"' not in end]
    values = {
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "top_k": 0,  # all tokens; Ollama's default is 40
        "repeat_penalty": generation.repetition_penalty,
        "repeat_last_n": -1,  # the whole context; Ollama's default is 64 tokens
        "num_predict": generation.max_new_tokens,
        "num_ctx": context,
    }
    return [f"PARAMETER {name} {value}" for name, value in values.items()] + [f'PARAMETER stop "{s}"' for s in stops]
