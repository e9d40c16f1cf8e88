"""A Modelfile, with which `ollama create` speaks with a GGUF file as the model was trained to.

Form: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx; how its reader treats a text: parser/parser.go.

Its template is the chat template said in Go's template language. No compiler does it: conversations of marked messages
are rendered, and the text between the marks is the text of the template. A Go template is built of these pieces and
then proven: it has to give the chat template's text for other conversations, letter by letter. What cannot be proven is
left out, and Ollama is told nothing wrong.
"""

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from persona.config import Generation
from persona.errors import PersonaError, UsageError
from persona.export.go_template import render
from persona.model.render import ChatFormat, Message, prompt_text

_SYSTEM = "Zsystemz"
_MARK = re.compile(r"Zsystemz|Zuserz\d|Zassistantz\d")
_TURNS = range(1, 5)
_BOTH = (False, True)
# Text that needs quoting: a brace would join the action behind it, and Ollama's reader of Modelfiles ends a text at
# three quotation marks and drops what is not printable (parser/parser.go)
_UNSAFE = re.compile(r'\{\{|\{$|"""|"$')
Gap = tuple[str, ...]  # what stands before a message: its text, or the texts before and after the system prompt


class Inexpressible(PersonaError):
    """The chat template does something that the Go template cannot say, with what it is."""


@dataclass(frozen=True)
class _Pieces:
    """The text that a chat template writes around the messages."""

    user: dict[tuple[bool, bool, bool], Gap]
    """Before a user's message: by system prompt or none, first message or not, last message or not."""
    greeting: dict[bool, Gap] | None
    """Before a reply that opens the conversation, by system prompt or none; None where the template refuses it."""
    close: str
    """After each user's message."""
    reply: str
    """Between that and an earlier reply."""
    generate: str
    """Between that and the reply that is to come."""


def ollama_template(fmt: ChatFormat, adds_bos: bool, systems: Sequence[str] = ()) -> str:
    """The Go template that renders as `fmt` does, for a runtime that puts BOS before a prompt by itself or does not.

    It is proven on conversations under no system prompt and under each of `systems`. Raises `Inexpressible`.
    """
    bos = (fmt.tokenizer.bos_token or "") if adds_bos else ""
    if not prompt_text(_probe(False, 1), fmt).startswith(bos):
        raise Inexpressible(f"the runtime puts {bos} in front, which the chat template does not write")
    pieces = _pieces(fmt, bos)
    template = _written(pieces)
    for messages in _proofs(systems, pieces.greeting is not None):
        if ollama_text(template, messages) != prompt_text(messages, fmt).removeprefix(bos):
            roles = " ".join(message["role"] for message in messages)
            raise Inexpressible(f"it treats a conversation of {roles} by rules of its own")
    return template


def ollama_text(template: str, messages: Sequence[Message]) -> str:
    """The text that Ollama feeds the model for `messages`, whose first one may be the system prompt."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return render(template, system, messages[1:] if system else messages)


def _probe(system: bool, turns: int, greeting: bool = False) -> list[Message]:
    messages = [{"role": "system", "content": _SYSTEM}] if system else []
    messages += [{"role": "assistant", "content": "Zassistantz0"}] if greeting else []
    for turn in range(1, turns + 1):
        messages.append({"role": "user", "content": f"Zuserz{turn}"})
        messages += [{"role": "assistant", "content": f"Zassistantz{turn}"}] if turn < turns else []
    return messages


def _proofs(systems: Sequence[str], greeting: bool) -> list[list[Message]]:
    """Conversations of one, two, three and six turns unlike the probes, with every system prompt and without."""
    exchanges = (
        ("Who goes there?", "Aye, who asks? {{ .System }} and {% if %} are but words."),
        ('"Quoted", and\n\ntwo lines;  two spaces', "你好，世界。\n\n- one\n- two"),
        ("## Title <b>bold</b> & \\n", "user\nassistant\nsystem"),
    )
    conversations = []
    every = ["", "You keep the lamp.\n\nSay 你好.", *systems]
    for system, turns, greeted in product(every, (1, 2, 3, 6), _BOTH if greeting else (False,)):
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "assistant", "content": "Hark."}] if greeted else []
        for turn in range(turns):
            question, answer = exchanges[turn % 3]
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        conversations.append(messages[:-1])
    return conversations


def _pieces(fmt: ChatFormat, bos: str) -> _Pieces:
    user: dict[tuple[bool, bool, bool], Gap] = {}
    replies, ends = set[Gap](), set[str]()
    for system, turns in product(_BOTH, _TURNS):
        spoken, end = _gaps(fmt, _probe(system, turns), bos)
        ends.add(end)
        replies.update(spoken[1::2])
        for number, gap in list(enumerate(spoken))[::2]:
            if user.setdefault((system, number == 0, number == len(spoken) - 1), gap) != gap:
                raise Inexpressible("what it writes before a user's message depends on the number of turns")
    if len(replies) != 1 or len(ends) != 1:
        raise Inexpressible("what it writes after a user's message differs from turn to turn")
    (reply, *system_there), generate = replies.pop(), ends.pop()
    if system_there:
        raise Inexpressible("it writes the system prompt before a reply")
    close = os.path.commonprefix([reply, generate])
    return _Pieces(user, _greeting(fmt, user, bos), close, reply[len(close) :], generate[len(close) :])


def _greeting(fmt: ChatFormat, user: dict[tuple[bool, bool, bool], Gap], bos: str) -> dict[bool, Gap] | None:
    gaps = {}
    for system in _BOTH:
        try:
            (gaps[system], after), _ = _gaps(fmt, _probe(system, 1, greeting=True), bos)
        except (UsageError, Inexpressible):
            return None
        if after != user[system, False, True]:
            return None
    return gaps


def _gaps(fmt: ChatFormat, messages: Sequence[Message], bos: str) -> tuple[list[Gap], str]:
    """The texts before each message of a probe but the system prompt, and the text after the last one."""
    text = prompt_text(messages, fmt).removeprefix(bos)
    marks, texts = _MARK.findall(text), _MARK.split(text)
    if sorted(marks) != sorted(message["content"] for message in messages):
        raise Inexpressible("it changes, repeats or leaves out messages")
    gaps: list[Gap] = []
    before: Gap = ()
    for mark, piece in zip(marks, texts, strict=False):
        before = (*before, piece)
        if mark != _SYSTEM:
            gaps.append(before)
            before = ()
    spoken = [message["content"] for message in messages if message["role"] != "system"]
    if before or [mark for mark in marks if mark != _SYSTEM] != spoken:
        raise Inexpressible("it changes the order of messages")
    return gaps, texts[-1]


def _written(pieces: _Pieces) -> str:
    """The Go template; line breaks between two actions are for the reader and taken away by `{{-`."""
    shared = os.path.commonprefix([gap[-1][::-1] for gap in pieces.user.values()])[::-1]
    shorter = {place: (*gap[:-1], gap[-1].removesuffix(shared)) for place, gap in pieces.user.items()}
    user = _by_place({place: _gap(gap) for place, gap in shorter.items()}) + _quoted_go(shared)
    reply = _quoted_go(pieces.reply)
    if pieces.greeting is not None:
        first = _choice("$.System", *(_gap(pieces.greeting[system]) for system in (True, False)))
        answer = _choice("$first", first, reply) + "{{ .Content }}{{ $first = false }}"
    else:  # one that opens the conversation would be refused by the chat template
        answer = _choice("not $first", reply + "{{ .Content }}", "")
    return (
        "{{- $first := true }}\n"
        "{{- range $i, $_ := .Messages }}\n"
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
        '{{- if eq .Role "user" }}'
        f"{user}{{{{ .Content }}}}{_quoted_go(pieces.close)}{_choice('$last', _quoted_go(pieces.generate), '')}"
        "{{ $first = false }}\n"
        f'{{{{- else if eq .Role "assistant" }}}}{answer}\n'
        "{{- end }}\n"
        "{{- end }}"
    )


def _by_place(user: dict[tuple[bool, bool, bool], str]) -> str:
    """The choice between what is written before a user's message, with the fewest conditions."""

    def by_last(system: bool, first: bool) -> str:
        return _choice("$last", user[system, first, True], user[system, first, False])

    def by_system(first: bool) -> str:
        return _choice("$.System", by_last(True, first), by_last(False, first))

    return _choice("$first", by_system(True), by_system(False))


def _choice(condition: str, yes: str, no: str) -> str:
    if yes == no:
        return yes
    return f"{{{{ if {condition} }}}}{yes}" + (f"{{{{ else }}}}{no}" if no else "") + "{{ end }}"


def _gap(gap: Gap) -> str:
    return "{{ $.System }}".join(_quoted_go(text) for text in gap)


def _quoted_go(text: str) -> str:
    """`text` as it stands where a template and a Modelfile keep it, else as a Go string literal."""
    if not _UNSAFE.search(text) and all(c.isprintable() or c in "\n\t" for c in text):
        return text
    return '{{ "' + "".join(map(_escaped, text)) + '" }}'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable() and character not in "{}":
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def modelfile(
    start: Sequence[str], fmt: ChatFormat, adds_bos: bool, system: str | None, generation: Generation, context: int
) -> tuple[str, list[str]]:
    """The Modelfile that begins with the lines `start` (FROM, ADAPTER), and notes for a person, one sentence each.

    `context` is the longest conversation in tokens that was trained. A template that cannot be said in Go's language,
    and a system prompt that Ollama would read otherwise, are left out with a note.
    """
    lines, notes = list(start), []
    prompt = _stripped_as(fmt, system) if system else None
    try:
        template = ollama_template(fmt, adds_bos, [prompt] if prompt else [])
        lines.append(f'TEMPLATE """{template}"""')
    except Inexpressible as reason:
        notes.append(
            f"The chat template has no form in Ollama's language ({reason}), so the Modelfile has none: Ollama will "
            "guess one from the GGUF file. Check what it writes with OLLAMA_DEBUG=1, or use llama.cpp with --jinja, "
            "which takes the chat template itself"
        )
    if prompt and (lost := _lost(prompt)):
        notes.append(
            f"Ollama's reader of Modelfiles would change the system prompt ({lost}), so it is left out: send it with "
            "each conversation, or take that out of the prompt and train again"
        )
    elif prompt:
        lines.append(f'SYSTEM """{prompt}"""')
    return "\n".join([*lines, *_parameters(fmt, generation, context)]) + "\n", notes


def _stripped_as(fmt: ChatFormat, system: str) -> str:
    """The system prompt as the chat template writes it: many strip white space, which Go's language cannot."""
    asked: Message = {"role": "user", "content": "Who goes there?"}
    texts = [prompt_text([{"role": "system", "content": s}, asked], fmt) for s in (system, system.strip())]
    return system.strip() if texts[0] == texts[1] else system


def _lost(text: str) -> str | None:
    """The part of a text in three quotation marks that Ollama's reader drops or takes for its end."""
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
