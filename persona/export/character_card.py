"""A character card, version 2: the persona for SillyTavern and other front ends of role play.

Form: https://github.com/malfoyslastname/character-card-spec-v2/blob/main/spec_v2.md; all its fields are required.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from persona.render import Message


def character_card(
    name: str, system: str | None, greeting: str, examples: Sequence[Sequence[Message]], model: str
) -> dict[str, Any]:
    """The card of the persona `name`, whose tuned model is called `model`.

    The system prompt stands in `system_prompt` alone, which front ends send in place of their own: the model was
    trained with this text in this place, and a description would be sent beside it.
    """
    return {
        "spec": "chara_card_v2",
        "spec_version": "2.0",
        "data": {
            "name": name,
            "description": "",
            "personality": "",
            "scenario": "",
            "first_mes": greeting,
            "mes_example": "".join(map(_example, examples)),
            "creator_notes": (
                f"For the model {model}, which was tuned to speak as {name}. Use its own chat template, and let the "
                "card's system prompt replace the front end's (in SillyTavern: Prefer Char. Prompt)."
            ),
            "system_prompt": system or "",
            "post_history_instructions": "",
            "alternate_greetings": [],
            "tags": ["persona"],
            "creator": "",
            "character_version": "1",
            "extensions": {},
        },
    }


def _example(messages: Iterable[Message]) -> str:
    who = {"user": "{{user}}", "assistant": "{{char}}"}
    spoken = [f"{who[message['role']]}: {message['content']}\n" for message in messages if message["role"] in who]
    return "<START>\n" + "".join(spoken)


def macros_in(*texts: str) -> bool:
    """Whether a front end would replace something in one of `texts`: it reads {{...}}, <USER>, <BOT> as macros."""
    return any(mark in text for text in texts for mark in ("{{", "<USER>", "<BOT>", "<user>", "<bot>"))
