"""What a GGUF file says of its model, compared with the model as it was trained, and put right where one value does.

A model that answers well in training and never stops, or answers gibberish, in a runtime mostly differs in one of
these: the chat template, the token that ends a reply, the begin token, or the kind of a token.
"""

from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType

from persona.errors import DataError
from persona.export.gguf_check import fields_of, open_gguf
from persona.folders import read_config
from persona.render import ChatFormat, Message, prompt_text

# Tokens that llama.cpp takes as the end of a reply by their text, whatever the metadata say (src/llama-vocab.cpp)
_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>"),
    "<｜end▁of▁sentence｜>",
}
# Kinds of a tokenizer that put the begin token in front unless the metadata say otherwise (the same file)
_BOS_BY_DEFAULT = {"llama", "bert"}
_BOS_BY_PRE_TOKENIZER = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken", "chameleon", "pixtral", "lfm2")
_ASKED: tuple[Message, ...] = ({"role": "user", "content": "Who goes there?"},)


def adds_bos(fields: dict[str, Any]) -> bool:
    """Whether a runtime puts the begin token before every prompt of a GGUF file with the metadata `fields`."""
    said = fields.get("tokenizer.ggml.add_bos_token")
    by_default = fields.get("tokenizer.ggml.model") in _BOS_BY_DEFAULT
    by_pre = str(fields.get("tokenizer.ggml.pre")) in _BOS_BY_PRE_TOKENIZER
    return bool(said) if said is not None else by_default or by_pre


def settle(path: Path, fmt: ChatFormat) -> list[str]:
    """Change single values in the file at `path` so that it begins and ends texts as trained; returns what was done."""
    reader, done = open_gguf(path, "r+"), []
    fields = fields_of(reader)
    bos = fmt.tokenizer.bos_token
    unwritten = adds_bos(fields) and not (bos and prompt_text(_ASKED, fmt).startswith(bos))
    if unwritten and _set(reader, "tokenizer.ggml.add_bos_token", False):
        done.append("the runtime will not put a begin token in front, which the chat template does not write")
    if fields.get("tokenizer.ggml.add_eos_token") and _set(reader, "tokenizer.ggml.add_eos_token", False):
        done.append("the runtime will not put an end token behind each prompt")
    if not stops(fields, fmt) and _set(reader, "tokenizer.ggml.eos_token_id", fmt.end_id):
        done.append(f"the end token is {fmt.tokenizer.convert_ids_to_tokens(fmt.end_id)}, with which replies end")
    del reader  # Windows cannot rename a file that is mapped
    return done


def _set(reader: GGUFReader, name: str, value: int | bool) -> bool:
    field = reader.get_field(name)
    if field is None:
        return False
    field.parts[field.data[0]][0] = value
    return True


def stops(fields: dict[str, Any], fmt: ChatFormat) -> bool:
    """Whether llama.cpp ends a reply at the token with which replies were trained to end."""
    named = {fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    return fmt.end_id in named or fmt.tokenizer.convert_ids_to_tokens(fmt.end_id) in _ENDS


def problems_of(fields: dict[str, Any], model: Path, fmt: ChatFormat) -> list[str]:
    """What in the metadata differs from the model in `model`, one sentence each."""
    outer = read_config(model)
    config = outer.get("text_config") or outer
    architecture = fields.get("general.architecture")
    found = []
    for name, key in (
        ("context_length", "max_position_embeddings"),
        ("block_count", "num_hidden_layers"),
        ("embedding_length", "hidden_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ):
        has, wants = fields.get(f"{architecture}.{name}"), config.get(key)
        if wants is not None and has is not None and has != wants and has != [wants] * len(_list(has)):
            found.append(f"{architecture}.{name} is {has}, but config.json says {key} {wants}")
    for kind, wants in (("bos", fmt.tokenizer.bos_token_id), ("eos", fmt.tokenizer.eos_token_id)):
        has = fields.get(f"tokenizer.ggml.{kind}_token_id")
        if wants is not None and has is not None and has not in (wants, fmt.end_id):
            found.append(f"its {kind} token is {has}, but the tokenizer's is {wants}")
    if not stops(fields, fmt):
        found.append(f"no runtime would stop at token {fmt.end_id}, with which replies end")
    template = fields.get("tokenizer.chat_template")
    if template != fmt.tokenizer.chat_template:
        found.append("it has no chat template" if template is None else "its chat template is not the trained one")
    return found + _vocabulary_problems(fields, fmt)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _vocabulary_problems(fields: dict[str, Any], fmt: ChatFormat) -> list[str]:
    texts, kinds = fields.get("tokenizer.ggml.tokens") or [], fields.get("tokenizer.ggml.token_type") or []
    vocabulary: dict[str, int] = fmt.tokenizer.get_vocab()
    if len(texts) <= max(vocabulary.values()):
        return [f"it has {len(texts)} tokens, but the tokenizer's reach {max(vocabulary.values())}"]
    plain = [text.replace("▁", " ") for text in texts]  # SentencePiece's space, which the converter sometimes resolves
    wrong = [text for text, number in vocabulary.items() if plain[number] != text.replace("▁", " ")]
    found = [f"{len(wrong)} tokens have another text, such as {sorted(wrong)[0]!r}"] if wrong else []
    steering = {int(TokenType.CONTROL), int(TokenType.USER_DEFINED)}
    unmarked = [text for text in sorted(fmt.control) if kinds and kinds[vocabulary[text]] not in steering]
    if unmarked:
        found.append(f"{', '.join(unmarked[:3])} would be read as plain text")
    return found


def check_metadata(fields: dict[str, Any], model: Path, fmt: ChatFormat) -> None:
    """Raise `DataError` when the metadata are not those of the model in the folder `model`, with all differences."""
    if problems := problems_of(fields, model, fmt):
        raise DataError("; ".join(problems[:5]))
