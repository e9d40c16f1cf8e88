"""Speeches made into conversations: the character's lines are the replies, the lines of others before them the prompts.

Every format with named speakers ends here. No conversation goes beyond its scene, and every speech is counted as
learned, as context, or as not used with the reason.
"""

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from persona.convert.cleaning import fill
from persona.convert.draft import Draft
from persona.convert.formats.format import Contents
from persona.convert.formats.turns import opening
from persona.convert.ledger import Counts
from persona.convert.options import Options

# Without scene heads a long silence of the character ends a scene. Of 3,309 silences of the 30 leading characters in
# tinyshakespeare 94 % are at most 20 speeches long; most of the others run over the end of a scene or a play.
MAX_SILENCE = 20

NO_CONTEXT = "no line before it"
NARRATOR = "旁白"  # the speaker of lines without a speaker
_NARRATORS = {NARRATOR, "叙述", "解说", "narrator", "narration", "画外音"}


@dataclass(frozen=True, slots=True)
class Speech:
    """The words of one speaker at one place."""

    speaker: str
    text: str
    line: int
    scene: int


@dataclass
class Script(Contents):
    """The speeches of a file in order, and how they were read."""

    speeches: list[Speech]
    has_borders: bool
    repairs: Counter[str] = field(default_factory=Counter)
    narration: int = 0  # lines that belong to no speech
    left_out: Counter[str] = field(default_factory=Counter)  # messages that are not speech, by reason

    def __post_init__(self) -> None:
        self.speakers = Counter(speech.speaker for speech in self.speeches)

    def drafts(self, options: Options, counts: Counts) -> Iterator[Draft]:
        """A draft for each run of at most `max_exchanges` exchanges of the character."""
        counts.speeches += len(self.speeches) + self.left_out.total()
        counts.repairs += self.repairs
        names = {fold_name(name) for name in options.characters}
        spoken = [speech for speech in self.speeches if speech.text]
        counts.not_used += Counter({"no words": len(self.speeches) - len(spoken)}) + self.left_out
        if options.narration == "drop":
            without = [speech for speech in spoken if not _is_narration(speech, names)]
            counts.not_used += Counter({"narration": len(spoken) - len(without)})
            spoken = without
        for number, scene in enumerate(_scenes(self, spoken, names, options), 1):
            exchanges, unused = _exchanges(scene, names, options)
            counts.not_used += unused
            for start in range(0, len(exchanges), options.max_exchanges):
                yield _draft(exchanges[start : start + options.max_exchanges], f"scene-{number}", options)


@dataclass(frozen=True)
class Exchange:
    """Lines of others and the character's answer; with --narration system also the narration between them."""

    prompt: list[Speech]
    reply: list[Speech]
    narration: list[Speech] = field(default_factory=list)


def fold_name(name: str) -> str:
    """The same for spellings of a name that differ in case, spaces or Unicode form."""
    return " ".join(unicodedata.normalize("NFC", name).split()).casefold()


def is_narrator(name: str) -> bool:
    """Whether a speaker is the narrator of the story."""
    return fold_name(name) in _NARRATORS


def _scenes(script: Script, spoken: list[Speech], names: set[str], options: Options) -> list[list[Speech]]:
    if options.flat:
        return list(_pairs(spoken, names))
    if script.has_borders:
        return [list(group) for _, group in groupby(spoken, key=lambda speech: speech.scene)]
    return list(_cut_at_silence(spoken, names, options.context_turns))


def _pairs(spoken: list[Speech], names: set[str]) -> Iterator[list[Speech]]:
    """Each line of the character with the line before it, if another speaks it; every other line by itself."""
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


def _is_narration(speech: Speech, names: set[str]) -> bool:
    return is_narrator(speech.speaker) and not _is_mine(speech, names)


def _cut_at_silence(speeches: list[Speech], names: set[str], context_turns: int) -> Iterator[list[Speech]]:
    """Scenes cut at MAX_SILENCE. A long silence is its own scene, except the last lines, which lead to the reply."""
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
    narration: list[Speech] = []
    for mine, group in groupby(scene, key=lambda speech: _is_mine(speech, names)):
        stretch = list(group)
        if not mine:
            apart = options.narration == "system"
            narration += [speech for speech in stretch if apart and _is_narration(speech, names)]
            waiting += [speech for speech in stretch if not (apart and _is_narration(speech, names))]
        elif sum(len(speech.text) for speech in stretch) < options.min_chars:
            unused["reply shorter than --min-chars"] += len(stretch)
        elif waiting:
            unused[f"more than {turns} lines before the reply"] += max(0, len(waiting) - turns)
            exchanges.append(Exchange(waiting[-turns:], stretch, narration))
            waiting, narration = [], []
        elif exchanges:
            exchanges[-1].reply.extend(stretch)
        elif options.leading_assistant == "keep":
            exchanges.append(Exchange([], stretch, narration))
            narration = []
        else:
            unused[NO_CONTEXT] += len(stretch)
    absent = not any(_is_mine(speech, names) for speech in scene)
    unused["scene without the character" if absent else "after the last reply"] += len(waiting) + len(narration)
    return exchanges, unused


def _draft(exchanges: list[Exchange], scene: str, options: Options) -> Draft:
    draft = Draft(
        [],
        group=scene,
        line=(exchanges[0].prompt or exchanges[0].reply)[0].line,
        path=scene,
        source_text=exchanges[0].reply[0].text,
        learned=sum(len(exchange.reply) for exchange in exchanges),
        context=sum(len(exchange.prompt) + len(exchange.narration) for exchange in exchanges),
    )
    return fill(draft, list(_texts(exchanges, options)))


def _texts(exchanges: list[Exchange], options: Options) -> Iterator[tuple[str, str]]:
    if narration := "\n".join(speech.text for exchange in exchanges for speech in exchange.narration):
        yield "system", f"{options.system}\n{narration}" if options.system else narration
    for exchange in exchanges:
        reply = "\n".join(speech.text for speech in exchange.reply)
        yield "user", prompt_of(exchange.prompt) if exchange.prompt else opening(reply)
        yield "assistant", reply


def prompt_of(speeches: Collection[Speech]) -> str:
    """The words alone if one person speaks, else each line with its name; narration in brackets."""
    speakers = {fold_name(speech.speaker) for speech in speeches if not is_narrator(speech.speaker)}
    return "\n".join(
        f"（{speech.text}）"
        if is_narrator(speech.speaker)
        else speech.text
        if len(speakers) == 1
        else f"{speech.speaker}: {speech.text}"
        for speech in speeches
    )
