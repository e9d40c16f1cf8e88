"""Made-up writers, Chinese and English, who differ in how often they use the same words and marks."""

import random

_ENGLISH = """the a of and to in that it is was i you he she but not with for on as at this my so what all no if
there when river lamp stone window garden road letter winter morning bread horse paper silver mother friend door water
night go come see tell hold carry leave open wait speak think turn keep find old dark quiet little bright slow heavy"""
_CHINESE = """的 了 在 是 我 有 和 就 不 人 都 一个 上 也 很 到 说 要 去 你 会 着 没有 看 好 自己 这
吗 呢 吧 啊 呀 那 还 又 只 客官 书摊 灯火 雨水 石桥 先生 夜里 旧书 茶水 故事 小猫 街角 月亮 早晨 春天 老板 桌子
朋友 声音 走路 回家 打开 等着 想起"""
ENGLISH, CHINESE = _ENGLISH.split(), _CHINESE.split()
MARKS = {"en": [". ", ", ", "! ", "? ", "; "], "zh": ["。", "，", "！", "？", "……"]}


def writer(language, name):
    """A function that writes one text with a given random generator, in this writer's own manner."""
    own = random.Random(f"{language} {name}")
    words = ENGLISH if language == "en" else CHINESE
    rates = [own.gammavariate(0.6, 1) for _ in words]
    marks = [own.gammavariate(1, 1) for _ in MARKS[language]]
    length = own.choice((4, 6, 9, 12))

    def write(generator):
        text = ""
        for _ in range(generator.randint(2, 6)):
            count = max(1, round(generator.gauss(length, 2)))
            text += (" " if language == "en" else "").join(generator.choices(words, rates, k=count))
            text += generator.choices(MARKS[language], marks)[0]
        return text.strip()

    return write


def texts(language, name, count, seed=0):
    """`count` texts of one writer; another seed gives others."""
    write, generator = writer(language, name), random.Random(f"{name} {seed}")
    return [write(generator) for _ in range(count)]
