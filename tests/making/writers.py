"""Made-up writers, Chinese and English, who differ in how often they use the same words and marks."""

import math
import random

import numpy as np

from persona.evaluate.style import counting
from persona.evaluate.style.distances import MEASURES, Samples, distance, headline, prepare, represent, scales
from persona.evaluate.style.words import language, segmenter

_ENGLISH = """the a of and to in that it is was i you he she but not with for on as at this my so what all no if
there when river lamp stone window garden road letter winter morning bread horse paper silver mother friend door water
night go come see tell hold carry leave open wait speak think turn keep find old dark quiet little bright slow heavy"""
_CHINESE = """的 了 在 是 我 有 和 就 不 人 都 一个 上 也 很 到 说 要 去 你 会 着 没有 看 好 自己 这
吗 呢 吧 啊 呀 那 还 又 只 客官 书摊 灯火 雨水 石桥 先生 夜里 旧书 茶水 故事 小猫 街角 月亮 早晨 春天 老板 桌子
朋友 声音 走路 回家 打开 等着 想起"""
ENGLISH, CHINESE = _ENGLISH.split(), _CHINESE.split()
MARKS = {"en": [". ", ", ", "! ", "? ", "; "], "zh": ["。", "，", "！", "？", "……"]}


def writer(spoken, name):
    """A function that writes one text with a given random generator, in this writer's own manner."""
    own = random.Random(f"{spoken} {name}")
    words = ENGLISH if spoken == "en" else CHINESE
    rates = [own.gammavariate(0.6, 1) for _ in words]
    marks = [own.gammavariate(1, 1) for _ in MARKS[spoken]]
    length = own.choice((4, 6, 9, 12))

    def write(generator):
        text = ""
        for _ in range(generator.randint(2, 6)):
            count = max(1, round(generator.gauss(length, 2)))
            text += (" " if spoken == "en" else "").join(generator.choices(words, rates, k=count))
            text += generator.choices(MARKS[spoken], marks)[0]
        return text.strip()

    return write


def texts(spoken, name, count, seed=0):
    """`count` texts of one writer; another seed gives others."""
    write, generator = writer(spoken, name), random.Random(f"{name} {seed}")
    return [write(generator) for _ in range(count)]


def distance_matrix(rows, columns):
    """Every distance of each set of texts in `rows` from each in `columns`, and the headline's, as (rows, columns).

    It is made of the parts that `compare` is made of, but takes the sets whole: no sample is drawn. Chance makes short
    texts look far from all others.
    """
    passages = [counting.passages_of(texts) for texts in (*rows, *columns)]
    spoken = language([passage.text for group in passages for passage in group])
    cut, _ = segmenter(spoken)
    found = [[counting.features(passage, spoken, cut) for passage in group] for group in passages]
    known = counting.vocabulary(found, spoken)
    counts = [counting.count(group, there, known) for group, there in zip(found, passages, strict=True)]
    sums = [
        counting.Counts(
            {family: matrix.sum(axis=0, keepdims=True) for family, matrix in each.families.items()},
            each.characters.sum(keepdims=True),
        )
        for each in counts
    ]
    piece = math.inf if len(counts) >= 10 else 1000
    one = prepare(counting.joined(sums), scales(counts, counts, known, piece))
    first = np.repeat(np.arange(len(rows)), len(columns))
    second = np.tile(np.arange(len(rows), len(rows) + len(columns)), len(rows))
    values = {}
    for measure in MEASURES:
        every = represent(measure, one, np.eye(len(counts), dtype=np.float32))
        middle = centre(every, np.flatnonzero(~every.empty), len(first))
        values[measure.name] = distance(measure, taken(every, first), taken(every, second), middle)
    values["style"] = headline(values)
    return {name: value.reshape(len(rows), len(columns)) for name, value in values.items()}


def taken(samples, rows):
    """The samples in these rows, as often as they are named."""
    return Samples(samples.shares[rows], samples.image[rows], samples.empty[rows])


def centre(samples, rows, times):
    """The point between the samples in these rows, so many times."""
    middle = Samples(samples.shares[rows].mean(0)[None], samples.image[rows].mean(0)[None], np.array([False]))
    return taken(middle, np.zeros(times, int))
