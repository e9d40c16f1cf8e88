"""Messages in, replies out: in order, counted, kept in a file and never generated twice."""

import pytest
from making.tiny import model as tiny

from persona.config import Generation
from persona.errors import DataError
from persona.model.render import chat_format
from persona.speak import replies
from persona.speak.choices import greedy
from persona.speak.replies import Reply, ReplyFile, reply_to_all
from persona.speak.rounding import LOOSE
from persona.speak.speaker import Speaker, text_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory, chatml):
    model = tiny(vocabulary=len(chatml)).eval()
    return Speaker(model, chat_format(chatml), Generation(), 256, None, "model")


def asking(count):
    return [
        [{"role": "system", "content": "You keep the lamp."}, {"role": "user", "content": f"Who is number {n % 7}?"}]
        for n in range(count)
    ]


def silent(*_):
    pass


def test_replies_come_in_order_with_their_counts(speaker):
    seen = []
    said = reply_to_all(speaker, asking(9), greedy(8), 2, LOOSE, True, None, lambda *told: seen.append(told))
    assert len(said) == 9
    assert said[0] == said[7]
    assert said[1] == said[8]
    assert said[0] != said[1]
    assert all(reply.text == text_of(reply.ids, speaker.fmt) and (len(reply.ids) == 8) != reply.ended for reply in said)
    assert seen[0] == (0, 7, None)
    assert [told[0] for told in seen] == list(range(8))
    assert seen[-1][2] == 0
    assert all(told[2] > 0 for told in seen[1:-1])


def test_what_is_finished_is_not_generated_again(speaker, tmp_path, monkeypatch):
    path = tmp_path / "目录" / "replies.jsonl"
    whole = reply_to_all(speaker, asking(7), greedy(8), 3, LOOSE, True, None, silent)
    counted = []
    original = replies.generate

    def counting(model, missing, *rest):
        counted.append(len(missing))
        original(model, missing, *rest)

    monkeypatch.setattr(replies, "generate", counting)
    with ReplyFile(path, "m") as file:
        reply_to_all(speaker, asking(7)[:4], greedy(8), 3, LOOSE, True, file, silent)
    content = path.read_bytes()
    path.write_bytes(content[:-20])  # killed while it wrote
    for _ in range(2):
        with ReplyFile(path, "m") as file:
            assert reply_to_all(speaker, asking(7), greedy(8), 3, LOOSE, True, file, silent) == whole
    assert counted == [4, 4]
    assert len(path.read_bytes().splitlines()) == 7
    for how, model, adapter in ((greedy(9), "m", True), (greedy(8), "other", True), (greedy(8), "m", False)):
        with ReplyFile(path, model) as file:
            reply_to_all(speaker, asking(1), how, 3, LOOSE, adapter, file, silent)
    assert counted == [4, 4, 1, 1, 1]


def test_an_interrupted_run_has_kept_what_was_finished(speaker, tmp_path):
    path = tmp_path / "replies.jsonl"

    def stop_at_three(done, count, left):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ReplyFile(path, "m") as file:
        reply_to_all(speaker, asking(7), greedy(8), 2, LOOSE, True, file, stop_at_three)
    assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize(
    "line", [b"not json", b'{"key": "a"}', b'["a"]', b"\xff\xfe", b'{"key": 1, "text": "", "ids": 5}']
)
def test_a_file_of_something_else_is_refused_by_line(tmp_path, line):
    path = tmp_path / "replies.jsonl"
    with ReplyFile(path, "m") as file:
        file.add("k", Reply("Aye.", (1, 2), True))
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=r"replies\.jsonl:2: not a finished reply.*Delete the file"):
        ReplyFile(path, "m")


def test_a_prompt_that_is_too_long_is_named(speaker):
    asked = [*asking(1), [{"role": "user", "content": "why " * 400}]]
    with pytest.raises(DataError, match="Prompt 2 of 2 cannot be asked: .* over the limit of 192"):
        reply_to_all(speaker, asked, greedy(8), 2, LOOSE, True, None, silent)
