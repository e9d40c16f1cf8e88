"""Speeches made into conversations: the character's lines are the replies, what others said before them the questions.

Shared by every format with named speakers; nothing crosses a scene, and every speech is accounted for.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from persona.convert.cleaning import clean_text
from persona.convert.draft import Draft, Message
from persona.convert.formats.dialogue import Script, Speech, fold_name
from persona.convert.formats.turns import opening
from persona.convert.options import Options
from persona.records import RecordFault

# Without scene heads a long silence of the character stands for one. Of 3,309 silences of the 30 leading characters in
# tinyshakespeare 94 % are at most 20 speeches long; most of the others run over the end of a scene or a play.
MAX_SILENCE = 20

NO_WORDS = "no words"
NO_CHARACTER = "scene without the character"
TOO_EARLY = "more than {turns} lines before the reply"
AFTER_LAST = "after the last reply"
NO_CONTEXT = "no line before it"
NARRATION = "narration"
TOO_SHORT = "reply shorter than --min-chars"
_NARRATORS = {"旁白", "叙述", "解说", "narrator", "narration", "画外音"}


@dataclass(frozen=True)
class Exchange:
    """What others say, and the character's answer; with --narration system also what was told between them."""

    prompt: list[Speech]
    reply: list[Speech]
    narration: list[Speech] = field(default_factory=list)


def is_narrator(name: str) -> bool:
    """Whether a speaker is the narrator of the story."""
    return fold_name(name) in _NARRATORS


def conversations(script: Script, options: Options) -> tuple[list[Draft], Counter[str]]:
    """One draft for each stretch of at most `max_exchanges` exchanges, and the speeches not used, by reason."""
    names = {fold_name(name) for name in options.characters}
    spoken = [speech for speech in script.speeches if speech.text]
    not_used = Counter({NO_WORDS: len(script.speeches) - len(spoken)}) + script.left_out
    if options.narration == "drop":
        told = [speech for speech in spoken if not _is_told(speech, names)]
        not_used[NARRATION] += len(spoken) - len(told)
        spoken = told
    drafts: list[Draft] = []
    for number, scene in enumerate(_scenes(script, spoken, names, options), 1):
        exchanges, unused = _exchanges(scene, names, options)
        not_used += unused
        for start in range(0, len(exchanges), options.max_exchanges):
            drafts.append(_draft(exchanges[start : start + options.max_exchanges], f"scene-{number}", options))
    return drafts, not_used


def _scenes(script: Script, spoken: list[Speech], names: set[str], options: Options) -> list[list[Speech]]:
    if options.flat:
        return list(_pairs(spoken, names))
    if script.has_borders:
        return [list(group) for _, group in groupby(spoken, key=lambda speech: speech.scene)]
    return list(_cut_at_silence(spoken, names, options.context_turns))


def _pairs(spoken: list[Speech], names: set[str]) -> Iterator[list[Speech]]:
    """Each line of the character with the line of another before it; every other line is a scene by itself."""
    before: Speech | None = None
    for speech in spoken:
        mine = _is_mine(speech, names)
        if before is not None:
            yield [before, speech] if mine else [before]
        elif mine:
            yield [speech]
        before = None if mine else speech
    if before is not None:
        yield [before]


def _is_mine(speech: Speech, names: set[str]) -> bool:
    return fold_name(speech.speaker) in names


def _is_told(speech: Speech, names: set[str]) -> bool:
    return is_narrator(speech.speaker) and not _is_mine(speech, names)


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


def _exchanges(scene: list[Speech], names: set[str], options: Options) -> tuple[list[Exchange], Counter[str]]:
    turns = options.context_turns
    unused: Counter[str] = Counter()
    exchanges: list[Exchange] = []
    waiting: list[Speech] = []
    told: list[Speech] = []
    for mine, group in groupby(scene, key=lambda speech: _is_mine(speech, names)):
        stretch = list(group)
        if not mine:
            apart = options.narration == "system"
            told += [speech for speech in stretch if apart and _is_told(speech, names)]
            waiting += [speech for speech in stretch if not (apart and _is_told(speech, names))]
        elif sum(len(speech.text) for speech in stretch) < options.min_chars:
            unused[TOO_SHORT] += len(stretch)
        elif waiting:
            unused[TOO_EARLY.format(turns=turns)] += max(0, len(waiting) - turns)
            exchanges.append(Exchange(waiting[-turns:], stretch, told))
            waiting, told = [], []
        elif exchanges:
            exchanges[-1].reply.extend(stretch)
        elif options.leading_assistant == "keep":
            exchanges.append(Exchange([], stretch, told))
            told = []
        else:
            unused[NO_CONTEXT] += len(stretch)
    absent = not any(_is_mine(speech, names) for speech in scene)
    unused[NO_CHARACTER if absent else AFTER_LAST] += len(waiting) + len(told)
    return exchanges, unused


def _draft(exchanges: list[Exchange], scene: str, options: Options) -> Draft:
    messages: list[Message] = []
    repairs: Counter[str] = Counter()
    fault = None
    try:
        if told := "\n".join(speech.text for exchange in exchanges for speech in exchange.narration):
            system = f"{options.system}\n{told}" if options.system else told
            messages.append({"role": "system", "content": clean_text(system, "$", repairs)})
        for exchange in exchanges:
            reply = "\n".join(speech.text for speech in exchange.reply)
            prompt = prompt_of(exchange.prompt) if exchange.prompt else opening(reply)
            messages.append({"role": "user", "content": clean_text(prompt, "$", repairs)})
            messages.append({"role": "assistant", "content": clean_text(reply, "$", repairs)})
    except RecordFault as found:
        fault = found
    return Draft(
        messages,
        repairs,
        group=scene,
        line=(exchanges[0].prompt or exchanges[0].reply)[0].line,
        path=scene,
        fault=fault,
        source_text=exchanges[0].reply[0].text,
        learned=sum(len(exchange.reply) for exchange in exchanges),
        context=sum(len(exchange.prompt) + len(exchange.narration) for exchange in exchanges),
    )


def prompt_of(speeches: Collection[Speech]) -> str:
    """Bare words of one speaker; where several speak, each line says who; narration stands in brackets."""
    speakers = {fold_name(speech.speaker) for speech in speeches if not is_narrator(speech.speaker)}
    return "\n".join(
        f"（{speech.text}）"
        if is_narrator(speech.speaker)
        else speech.text
        if len(speakers) == 1
        else f"{speech.speaker}: {speech.text}"
        for speech in speeches
    )
