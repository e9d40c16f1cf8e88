"""Advice in words: what in these records will hurt training, and what to do about it."""

from collections.abc import Sequence
from typing import Any

from persona.convert.scenes import NO_CONTEXT

FEW_RECORDS = 20
SAME_PROMPT_SHARE = 0.3
SAME_PROMPT_RECORDS = 10  # below that a share says nothing
LONG = 2048  # tokens; data.max_length as it stands in config/default.json's class

_TRAITS = {
    "placeholders": "The model would say them literally: replace them; --character and --user-name fill in {{char}} "
    "and {{user}}.",
    "characters lost (U+FFFD)": "Characters were lost before. Export the text again as UTF-8.",
    "garbled": "UTF-8 was read in another encoding before: --fix-text mends what can be mended.",
    "very short replies": "They teach little: --min-chars N leaves them out.",
    "replies that copy the prompt": "They teach the model to repeat the question: delete them.",
    "names or roles left before the words": "The model would say them too: --strip-speaker removes names.",
    "refusals of an assistant": "They will be learned as the character's own words: delete them.",
    "thinking blocks": "They will be learned as spoken words: delete them, unless that is wanted.",
    "code, HTML or encoded data": "Is that how the character speaks? Else delete it.",
    "one character over and over": "It will be learned: shorten it.",
    "media or links instead of words": "They are no speech: delete them.",
}


def about_speeches(speeches: dict[str, Any] | None) -> str | None:
    """What to do when more of the character's lines stand alone than are learned; None otherwise."""
    alone = speeches["not_used"].get(NO_CONTEXT, 0) if speeches else 0
    if speeches is None or alone <= speeches["learned"]:
        return None
    return (
        f"{alone:,} lines of the character have no line before them, so only {speeches['learned']:,} are learned: "
        "--leading-assistant keep learns them too; in a chat --max-gap MINUTES allows longer pauses."
    )


def warnings_of(report: dict[str, Any], sample: Sequence[dict[str, Any]]) -> list[str]:
    """What a person should know before training on these records."""
    if not report["written"]:
        return []
    found = []
    written, statistics = report["written"], report["statistics"]
    if written < FEW_RECORDS:
        found.append(f"Only {written} records: the model will hardly change, or learn them by heart. Add more.")
    if report["val_ratio"] and not report["val"]:
        found.append(
            "All records belong to one group, so there is no validation part. Conversations that share a scene, a "
            "title or the words of a reply are one group."
        )
    alone = about_speeches(report["speeches"])
    return found + ([alone] if alone else []) + _same_prompts(sample) + _about_persona(report) + _traits(statistics)


def _same_prompts(sample: Sequence[dict[str, Any]]) -> list[str]:
    prompts: dict[str, int] = {}
    for record in sample:
        prompt = next(message["content"] for message in record["messages"] if message["role"] == "user")
        prompts[prompt] = prompts.get(prompt, 0) + 1
    if len(sample) < SAME_PROMPT_RECORDS:
        return []
    prompt, count = max(prompts.items(), key=lambda item: item[1])
    if count <= SAME_PROMPT_SHARE * len(sample):
        return []
    shown = prompt if len(prompt) <= 40 else prompt[:39] + "…"
    return [
        f"{count:,} of {len(sample):,} records begin with the same prompt ({shown!r}). A model that is asked one thing "
        "only learns to answer beside the question: add what was said before each reply (--context-turns where the "
        "file has other speakers), and settings data."
    ]


def _about_persona(report: dict[str, Any]) -> list[str]:
    """What a character needs besides its lines."""
    found = []
    kinds, statistics = report["kinds"], report["statistics"]
    spoken = report["speeches"] is not None or report["characters"]
    if (
        spoken
        and not report["settings_beside"]
        and not any(kind.startswith("settings") for kind in kinds)
        and report["written"] >= FEW_RECORDS
    ):
        found.append(
            "There are no settings (questions and answers about the character's life and world), so facts will be "
            "invented: a settings.jsonl beside the lines helps more than many more lines."
        )
    lengths = statistics["record_tokens"]
    if lengths and lengths["longest"] > LONG:
        long = sum(count for bound, count in lengths["histogram"] if bound is None or bound > LONG)
        found.append(
            f"{long:,} of {statistics['measured']:,} records are longer than {LONG} tokens "
            f"({statistics['tokens_by']}): raise data.max_length, or earlier turns are not seen and replies that are "
            "too long are left out."
        )
    shares = statistics["languages"]
    if len(shares) > 1 and 0.02 < min(shares.values()) / statistics["measured"] < 0.1:
        odd = min(shares, key=lambda name: shares[name])
        found.append(f"{shares[odd]:,} of {statistics['measured']:,} records answer in another language ({odd}).")
    return found


def _traits(statistics: dict[str, Any]) -> list[str]:
    found = []
    for name, count in statistics["traits"].items():
        if name in _TRAITS:
            shown = f" ({', '.join(statistics['placeholders'])})" if name == "placeholders" else ""
            found.append(f"{count:,} of {statistics['measured']:,} records hold {name}{shown}. {_TRAITS[name]}")
    if statistics["personal_data"]:
        listed = ", ".join(f"{kind} {count:,}" for kind, count in statistics["personal_data"].items())
        found.append(f"Personal data was found ({listed}); the model may say it again: --redact masks it.")
    if statistics["near_duplicates"]:
        found.append(
            f"Records that differ from another one only in case or punctuation: {statistics['near_duplicates']:,}; "
            "they are kept and learned twice."
        )
    if statistics["repeated_ids"]:
        found.append(f"{statistics['repeated_ids']:,} records have an id that another one has too; both are kept.")
    return found
