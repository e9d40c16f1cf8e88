"""Messages in, reply out: a loaded model with the prompts it was trained on."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from persona.config import Config, Generation
from persona.engine.attention import take_over
from persona.model.adapters import Persona, check_base, read_persona
from persona.model.device import choose_device, choose_precision, stay_in_gpu
from persona.model.loading import load_adapter, load_base, stop_ids, trained_format
from persona.model.render import ChatFormat, Message, fit, prompt_room


class _Streamer(BaseStreamer):
    """Writes the text of new tokens as soon as it is certain, whole characters only."""

    def __init__(self, fmt: ChatFormat, write: Callable[[str], None]) -> None:
        self.fmt, self.write = fmt, write
        self.ids: list[int] = []
        self.shown = ""
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        text = text_of(self.ids, self.fmt)
        # a character of several tokens decodes to U+FFFD until its last one has come
        if not text.endswith("\ufffd"):
            self._show(text)

    def _show(self, text: str) -> None:
        if text.startswith(self.shown):
            self.write(text[len(self.shown) :])
            self.shown = text

    def end(self) -> None:
        self._show(text_of(self.ids, self.fmt))


def text_of(ids: Sequence[int], fmt: ChatFormat) -> str:
    """A reply's text: no control tokens, and without the space that a template writes before a reply."""
    text = fmt.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removeprefix(fmt.lead) if fmt.lead else text


@dataclass
class Speaker:
    """A model ready to reply."""

    model: Any
    fmt: ChatFormat
    generation: Generation
    max_length: int
    """`data.max_length`; older exchanges are dropped from a prompt to fit, as in training."""
    persona: Persona | None
    kind: str
    """`adapter`, `model` (merged) or `base`."""

    def reply(self, messages: Sequence[Message], write: Callable[[str], None], adapter: bool = True) -> str:
        """The reply to `messages`, piece by piece also to `write`; Ctrl-C ends it.

        Raises `Untrainable` if the system prompt and the last message alone are too long.
        """
        prompt, _ = fit(messages, self.fmt, prompt_room(self.max_length))
        streamer = _Streamer(self.fmt, write)
        plain = isinstance(self.model, PeftModel) and not adapter
        with self.model.disable_adapter() if plain else nullcontext(), torch.no_grad():
            try:
                self._generate(prompt, streamer)
            except KeyboardInterrupt:
                write(" [stopped]")
        return text_of(streamer.ids, self.fmt)

    def _generate(self, prompt: Sequence[int], streamer: _Streamer) -> None:
        how = self.generation
        sampling = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0} if how.temperature > 0 else {}
        stops = stop_ids(self.model, self.fmt.end_id, self.fmt.tokenizer)
        config = GenerationConfig(
            max_new_tokens=how.max_new_tokens,
            do_sample=how.temperature > 0,
            repetition_penalty=how.repetition_penalty,
            eos_token_id=stops,
            pad_token_id=stops[0],
            use_cache=True,
            **sampling,
        )
        ids = torch.tensor([prompt], device=self.model.device)
        self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer)


def load_speaker(config: Config, base: Path, adapter: Path | None, in_4bit: bool) -> Speaker:
    """The model in `base`, with `adapter` on top when there is one, held in 4 bits or in the run's precision."""
    persona = check_base(adapter, base) if adapter is not None else read_persona(base)
    device = choose_device(config.model.device)
    stay_in_gpu(device)
    precision = choose_precision(config.training.precision, device)
    fmt = trained_format(base, adapter, config.model.chat_template)
    quantization = config.quantization.model_copy(update={"load_in_4bit": in_4bit})
    model = take_over(load_base(base, quantization, precision, device))
    if adapter is not None:
        model = load_adapter(model, adapter)
    kind = "adapter" if adapter is not None else "model" if persona is not None else "base"
    return Speaker(model.eval(), fmt, config.generation, config.data.max_length, persona, kind)
