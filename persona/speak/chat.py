"""The conversation on the terminal: what a person types, what the model says, and the commands in between."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from persona.config import Config
from persona.console import safe
from persona.engine.memory import Full, attempt
from persona.errors import OutOfMemory, PersonaError
from persona.model.dataset import read_system_prompt
from persona.model.device import enough_memory
from persona.model.render import Message
from persona.speak.speaker import Speaker, load_speaker

HELP = """\
/reset         forget the conversation so far
/base          switch the adapter off, or on again
/system TEXT   set the system prompt to TEXT, or to the text in @FILE; alone: show it
/save FILE     write the conversation as a line of JSON, ready for training
/help          this list
/quit          leave"""


@dataclass
class Conversation:
    """The turns so far, under one system prompt, with the tuned model or with the base."""

    speaker: Speaker
    system: str | None
    adapter: bool = True
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """System prompt and turns."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def say(self, text: str, write: Callable[[str], None]) -> str:
        """The reply to `text`; both join the conversation."""
        asked: Message = {"role": "user", "content": text}
        reply = self.speaker.reply([*self.messages, asked], write, self.adapter)
        self.turns += [asked, {"role": "assistant", "content": reply}]
        return reply


def start(speaker: Speaker, system: str | None) -> Conversation:
    """A conversation under `system`, or under the system prompt the model was trained with."""
    trained = speaker.persona.system_prompt if speaker.persona is not None else None
    return Conversation(speaker, read_system_prompt(system, "--system") if system is not None else trained)


def talk(
    config: Config,
    folders: tuple[Path, Path | None],
    merged_in_4bit: bool | None,
    system: str | None,
    prompt: str | None,
) -> None:
    """Load a model, and reply to `prompt` once, or chat if it is None.

    `folders` are those of base and adapter, held as in training; `merged_in_4bit`, if set, is for a merged model.
    """
    base, adapter = folders
    in_4bit = config.quantization.load_in_4bit if adapter is not None or merged_in_4bit is None else merged_in_4bit
    with enough_memory("Lower data.max_length, or take a smaller model; --load-in-4bit holds a merged one in 4 bits."):
        speaker = load_speaker(config, base, adapter, in_4bit)
        if prompt is not None:
            answer_once(speaker, system, prompt)
        else:
            chat(speaker, system)


def answer_once(speaker: Speaker, system: str | None, prompt: str) -> None:
    """Print the reply to `prompt`."""
    start(speaker, system).say(prompt, _write)
    print()


def chat(speaker: Speaker, system: str | None) -> None:
    """Read lines and reply until end of input or /quit."""
    conversation = start(speaker, system)
    who = {"adapter": "the tuned model", "model": "the merged model", "base": "the base model"}[speaker.kind]
    print(f"You are talking to {who}. /help lists the commands; Ctrl-C stops a reply.\n")
    for line in _typed(speaker.generation.prompt_label):
        if line.startswith("/"):
            if not run_command(conversation, line):
                return
            continue
        try:
            full = attempt(partial(conversation.say, line, _write), speaker.model.device)
            if isinstance(full, Full):
                raise OutOfMemory(
                    f"The memory is full ({full.reason}) with {len(conversation.turns) + 1} messages, and your line is "
                    "forgotten. For longer conversations start with a smaller data.max_length: --set data.max_length=N."
                )
        except PersonaError as error:
            print(f"{error}\nType /reset to begin again.", end="")
        print("\n")


def _typed(label: str) -> Iterable[str]:
    """The typed lines, without empty ones, until end of input or Ctrl-C at the prompt."""
    while True:
        try:
            line = input(label).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


def _write(text: str) -> None:
    print(safe(text), end="", flush=True)


def run_command(conversation: Conversation, line: str) -> bool:
    """Carry out a line that begins with a slash; returns False when the chat is to end."""
    name, _, argument = (part.strip() for part in line.partition(" "))
    if name == "/quit":
        return False
    if name == "/help":
        print(HELP)
    elif name == "/reset":
        conversation.turns.clear()
        print("The conversation begins again.")
    elif name == "/base":
        _switch_adapter(conversation)
    elif name == "/system":
        _set_system(conversation, argument)
    elif name == "/save":
        _save(conversation, argument)
    else:
        print(
            f"There is no command {safe(name)}; /help lists them. To say a line that begins with /, put a space first."
        )
    print()
    return True


def _switch_adapter(conversation: Conversation) -> None:
    if conversation.speaker.kind != "adapter":
        print("There is no adapter to switch: this model was loaded without one.")
        return
    conversation.adapter = not conversation.adapter
    heard = ("off: you hear the base", "on: you hear the tuned model")[conversation.adapter]
    print(f"The adapter is {heard}.")


def _set_system(conversation: Conversation, argument: str) -> None:
    if not argument:
        print(safe(conversation.system) if conversation.system else "There is no system prompt.")
        return
    try:
        conversation.system = read_system_prompt(argument, "/system")
    except PersonaError as error:
        print(error)
        return
    conversation.turns.clear()
    print("The system prompt is set, and the conversation begins again.")


def _save(conversation: Conversation, argument: str) -> None:
    if not argument or not conversation.turns:
        print("Say something first." if argument else "Name a file: /save FILE")
        return
    path = Path(argument).expanduser()
    pairs = list(zip(conversation.turns[::2], conversation.turns[1::2], strict=True))
    answered = [pair for pair in pairs if pair[1]["content"].strip()]
    if not answered:
        print("There is nothing to save: no exchange has a reply.")
        return
    saved = replace(conversation, turns=[message for pair in answered for message in pair])
    record = {"messages": saved.messages, "meta": {"source": "chat", "type": "dialogue"}}
    try:
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        print(f"{path} cannot be written: {error.strerror}")
        return
    count = "1 exchange" if len(answered) == 1 else f"{len(answered)} exchanges"
    left_out = f"; {len(pairs) - len(answered)} without a reply were left out" if len(answered) < len(pairs) else ""
    print(f"Saved {count} to {path}{left_out}.")
