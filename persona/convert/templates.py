"""What is asked of an author's model: to go on, to write about something, to say something in the author's own voice.

The prompt of a rewriting never holds a stretch of its answer, for that would teach copying.
"""

import re
from collections import Counter

from persona.convert.chunking import halves, sentences

CONTINUE = "请用我的风格续写下面的文字："
EXPAND = "用我的写作风格，围绕以下内容写一段文字："
REWRITE = "用我的口吻改写下面这段材料："
SPAN = 20  # characters that a prompt must not have in common with its answer
_PIECE = 14  # characters of a clause in a plain version
_PARTICLES = re.compile(r"[啊呢吧嘛呀哦啦哇哎唉噢喔哈咯]+(?=[，。！？；、…\s]|$)|^[啊哎唉哦噢哈嘿喂]+[，、！]?")
_ORNAMENTS = re.compile(r"[~～●★☆♪♥❤✨]+|[\U0001f300-\U0001faff]|\*+|…+|—{2,}")
_EXCLAMATIONS = re.compile(r"[！!]+")
_CLAUSES = re.compile(r"[，。！？；：、,.!?;:\s“”「」『』\"（）()]+")
_STOP = set("的了是在我你他她它们这那有和就不都也很到说要去会着没看好自己上下里个一为以而于与及其之但还又被把让从对")


def continuation(chunk: str) -> tuple[str, str] | None:
    """The first half as the prompt, the second as the answer."""
    first, second = halves(chunk)
    return (f"{CONTINUE}\n{first.strip()}", second.strip()) if first.strip() and second.strip() else None


def expansion(chunk: str, title: str) -> tuple[str, str] | None:
    """A title, keywords and the sentence that says most as the prompt, the chunk as the answer."""
    words = keywords(chunk)
    key = _key_sentence(chunk, words)
    parts = [
        f"标题：{title}" if title else "",
        f"关键词：{'、'.join(words)}" if words else "",
        f"要点：{key}" if key else "",
    ]
    outline = "\n".join(part for part in parts if part)
    return (f"{EXPAND}\n{outline}", chunk.strip()) if outline else None


def rewriting(chunk: str) -> tuple[str, str] | None:
    """A plainer version as the prompt, the chunk as the answer; None where the two have a stretch in common."""
    material = f"{REWRITE}\n{plain(chunk)}"
    return None if shares_span(material, chunk) else (material, chunk.strip())


def plain(chunk: str) -> str:
    """The chunk without its voice: particles, exclamations and ornaments removed, clauses split and reordered."""
    lines = []
    for sentence in sentences(chunk):
        text = _EXCLAMATIONS.sub("。", _ORNAMENTS.sub("", sentence))
        clauses = [_PARTICLES.sub("", clause) for clause in _CLAUSES.split(text)]
        pieces = [piece for clause in clauses for piece in _pieces(clause) if piece]
        if pieces:  # the second before the first, the fourth before the third: facts stay near, the wording goes
            order = [i + 1 if i % 2 == 0 and i + 1 < len(pieces) else i - i % 2 for i in range(len(pieces))]
            lines.append("；".join(pieces[i] for i in order) + "。")
    return "\n".join(lines)


def _pieces(clause: str) -> list[str]:
    if clause.isascii():
        words = clause.split()
        return [" ".join(words[i : i + 3]) for i in range(0, len(words), 3)]
    return [clause[i : i + _PIECE] for i in range(0, len(clause), _PIECE)]


def shares_span(prompt: str, answer: str, span: int = SPAN) -> bool:
    """Whether `prompt` and `answer` have a stretch of `span` characters in common."""
    spans = {answer[i : i + span] for i in range(len(answer) - span + 1)}
    return any(prompt[i : i + span] in spans for i in range(len(prompt) - span + 1))


def keywords(chunk: str, count: int = 6) -> list[str]:
    """The words that a chunk says most often: pairs of Chinese characters, and Latin words of four letters and more."""
    found: Counter[str] = Counter(word.lower() for word in re.findall(r"[A-Za-z]{4,}", chunk))
    for run in re.findall(r"[\u4e00-\u9fff]{2,}", chunk):
        found.update(run[i : i + 2] for i in range(len(run) - 1) if not _STOP & set(run[i : i + 2]))
    ranked = sorted((word for word, times in found.items() if times > 1), key=lambda word: (-found[word], word))
    return ranked[:count]


def _key_sentence(chunk: str, words: list[str]) -> str:
    """The sentence of at most 40 characters that holds the most keywords."""
    short = [sentence for sentence in sentences(chunk) if 6 <= len(sentence) <= 40]
    return max(short, key=lambda sentence: sum(word in sentence.lower() for word in words), default="")
