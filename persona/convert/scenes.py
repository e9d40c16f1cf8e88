"""Speeches made into conversations: the character's lines are the replies, what others said before them the questions.

Shared by every format with named speakers; nothing crosses a scene, and every speech is accounted for.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby

from persona.convert.clean import clean_text
from persona.convert.dialogue import Script, Speech, fold_name
from persona.convert.draft import Draft, Message
from persona.records import RecordFault

# Without scene heads a long silence of the character stands for one. Of 3,309 silences of the 30 leading characters in
# tinyshakespeare 94 % are at most 20 speeches long; most of the others run over the end of a scene or a play.
MAX_SILENCE = 20

NO_WORDS = "no words"
NO_CHARACTER = "scene without the character"
TOO_EARLY = "more than {turns} lines before the reply"
AFTER_LAST = "after the last reply"
NO_CONTEXT = "no line before it"


@dataclass(frozen=True)
class Exchange:
    """What others say, and the character's answer."""

    prompt: list[Speech]
    reply: list[Speech]


def conversations(
    script: Script, characters: Collection[str], context_turns: int, max_exchanges: int
) -> tuple[list[Draft], Counter[str]]:
    """One draft for each stretch of at most `max_exchanges` exchanges, and the speeches not used, by reason."""
    names = {fold_name(name) for name in characters}
    spoken = [speech for speech in script.speeches if speech.text]
    not_used = Counter({NO_WORDS: len(script.speeches) - len(spoken)})
    if script.has_borders:
        scenes = [list(group) for _, group in groupby(spoken, key=lambda speech: speech.scene)]
    else:
        scenes = list(_cut_at_silence(spoken, names, context_turns))
    drafts: list[Draft] = []
    for number, scene in enumerate(scenes, 1):
        exchanges, unused = _exchanges(scene, names, context_turns)
        not_used += unused
        for start in range(0, len(exchanges), max_exchanges):
            drafts.append(_draft(exchanges[start : start + max_exchanges], f"scene-{number}"))
    return drafts, not_used


def _is_mine(speech: Speech, names: set[str]) -> bool:
    return fold_name(speech.speaker) in names


def _cut_at_silence(speeches: list[Speech], names: set[str], context_turns: int) -> Iterator[list[Speech]]:
    """Scenes by MAX_SILENCE; a long silence is a scene of its own, save the lines that lead to the reply."""
    scene: list[Speech] = []
    for mine, group in groupby(speeches, key=lambda speech: _is_mine(speech, names)):
        stretch = list(group)
        if mine or len(stretch) <= MAX_SILENCE:
            scene += stretch
            continue
        kept = min(context_turns, len(stretch))
        yield from (part for part in (scene, stretch[: len(stretch) - kept]) if part)
        scene = stretch[len(stretch) - kept :]
    if scene:
        yield scene


def _exchanges(scene: list[Speech], names: set[str], context_turns: int) -> tuple[list[Exchange], Counter[str]]:
    unused: Counter[str] = Counter()
    exchanges: list[Exchange] = []
    waiting: list[Speech] = []
    for speech in scene:
        if not _is_mine(speech, names):
            waiting.append(speech)
        elif waiting:
            unused[TOO_EARLY.format(turns=context_turns)] += max(0, len(waiting) - context_turns)
            exchanges.append(Exchange(waiting[-context_turns:], [speech]))
            waiting = []
        elif exchanges:
            exchanges[-1].reply.append(speech)
        else:
            unused[NO_CONTEXT] += 1
    absent = not any(_is_mine(speech, names) for speech in scene)
    unused[NO_CHARACTER if absent else AFTER_LAST] += len(waiting)
    return exchanges, unused


def _draft(exchanges: list[Exchange], scene: str) -> Draft:
    messages: list[Message] = []
    repairs: Counter[str] = Counter()
    fault = None
    try:
        for exchange in exchanges:
            messages.append({"role": "user", "content": clean_text(_prompt(exchange.prompt), "$", repairs)})
            reply = "\n".join(speech.text for speech in exchange.reply)
            messages.append({"role": "assistant", "content": clean_text(reply, "$", repairs)})
    except RecordFault as found:
        fault = found
    return Draft(
        messages,
        repairs,
        group=scene,
        line=exchanges[0].prompt[0].line,
        path=scene,
        fault=fault,
        source_text=exchanges[0].reply[0].text,
        learned=sum(len(exchange.reply) for exchange in exchanges),
        context=sum(len(exchange.prompt) for exchange in exchanges),
    )


def _prompt(speeches: list[Speech]) -> str:
    """Bare words of one speaker; where several speak, each line says who."""
    if len({fold_name(speech.speaker) for speech in speeches}) == 1:
        return "\n".join(speech.text for speech in speeches)
    return "\n".join(f"{speech.speaker}: {speech.text}" for speech in speeches)
