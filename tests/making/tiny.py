"""Tokenizers, chat templates and models that are built in the test and take no time.

    family("qwen3")                          a tokenizer with the template and the special tokens of that family
    tokenizer(special, template, eos)        one of your own; kind is "bpe", "spm" or "unk"
    save_model(folder, "llama", tokenizer)   a random two-layer model as a Hugging Face folder

The templates are written for the tests after what the families do, each with the trait that makes it hard.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from persona.model.render import BUILTIN_TEMPLATE

CORPUS = (
    "You are Tamsin, keeper of the lighthouse. Answer in one or two short sentences, and never explain the joke.",
    "The lamp wants oil before the tide turns, and the tide waits for nobody.",
    "Who goes there? Say your name, stranger, and say it twice.",
    "What do you do when the fog comes in? I ring the bell, and I count the ships that answer.",
    "system user assistant model developer think question answer hello world, good morning, thank you very much.",
    "Zsystemz Zquestionz Zreplyz Ztextz Zonez Ztwoz",
    "### User:\n### Assistant:\n\n\n[INST] [/INST] helpful assistant\n\n",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 !\"#$%&'()*+,-./:;<=>?@[]^_`{|}~",
    "你好，世界。你是谁？我是灯塔的看守人。雾来了，我就敲钟。",
    "莫言秋说：今晚的潮水很大，船都回港了。你为什么还不睡？",
)


@cache
def _trained(kind: str) -> str:
    """The tokenizer of `kind` as JSON text, without special tokens, trained on the corpus."""
    if kind == "bpe":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
        raw.train_from_iterator(CORPUS, trainer)
        return raw.to_str()
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "spm", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    lines = [line for text in CORPUS for line in text.splitlines()]  # SentencePiece learns no token with a line break
    raw.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False))
    # as in Mistral's tokenizer.json: words are not split before merging, and unknown characters are written in bytes
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    data = json.loads(raw.to_str())
    if kind == "spm":
        vocabulary = data["model"]["vocab"]
        for byte in range(256):
            vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    return json.dumps(data)


def tokenizer(
    special: Sequence[str],
    template: str,
    eos: str,
    bos: str | None = None,
    kind: str = "bpe",
    added: Sequence[str] = (),
) -> Any:
    """A tokenizer of transformers with `special` tokens and the chat template `template`.

    `kind` is `bpe` (bytes, as in GPT-2 and Qwen), `spm` (SentencePiece with byte fallback, as in Llama 2 and Mistral),
    or `unk` (what the corpus does not hold becomes <unk>). `added` are tokens of their own that are not special.
    """
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer.from_str(_trained(kind))
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    raw.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    named = {"bos_token": bos, "eos_token": eos, "unk_token": None if kind == "bpe" else "<unk>"}
    loaded = PreTrainedTokenizerFast(tokenizer_object=raw, **{k: v for k, v in named.items() if v is not None})
    loaded.chat_template = template
    return loaded


def _chatml(before: str) -> str:
    return (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n' + " + before + " + '<|im_end|>\\n' }}"
        "{% endif %}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


_ALTERNATE = (
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant') }}{% endif %}{% endfor %}"
)

TEMPLATES: dict[str, str] = {
    # SmolLM2, Qwen2.5: a system prompt of the template's own where there is none
    "chatml_default": _chatml("'You are a helpful assistant.'"),
    # Granite: the same with the day of rendering in it
    "granite_date": _chatml("'Knowledge from April 2024. Today is ' + strftime_now('%B %d, %Y') + '.'"),
    # thinking is taken out of earlier replies; the last reply has a block, an empty one when thinking is off
    "qwen3": (
        "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% set said = message['content'].split('</think>')[-1].lstrip('\\n') %}"
        "{% set thought = '' if '</think>' not in message['content'] else "
        "message['content'].split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
        "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + said if loop.index0 > ns.last else said }}"
        "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{% endif %}"
    ),
    # begins with BOS itself and strips every text
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # the system prompt stands in the last user turn, and nowhere when the last message is a reply
    "mistral_nemo": (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
        "{% set turns = messages[1:] if system is not none else messages %}" + _ALTERNATE + "{{ bos_token }}"
        "{% for message in turns %}{% if message['role'] == 'user' %}"
        "{{ '[INST]' + (system + '\\n\\n' if loop.last and system is not none else '') + message['content'] "
        "+ '[/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    # SentencePiece, no system role, and a space before each reply
    "mistral_v1": (
        "{% set turns = messages %}" + _ALTERNATE + "{{ bos_token }}{% for message in turns %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    # no system role, texts stripped, replies come from "model"
    "gemma2": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% set turns = messages %}" + _ALTERNATE + "{% for message in turns %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' "
        "+ message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # the reply begins with a channel that the generation prompt lacks; only a last reply ends with <|return|>
    "gpt_oss": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<|start|>developer<|message|># Instructions\\n\\n' + message['content'] + '<|end|>' }}"
        "{% elif message['role'] == 'user' %}{{ '<|start|>user<|message|>' + message['content'] + '<|end|>' }}"
        "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] + "
        "('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    ),
    # the generation prompt adds an empty thought that the text of a whole conversation lacks
    "gemma4": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' "
        "+ message['content'] | trim + '<turn|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}"
        "{% if not enable_thinking %}{{ '<|channel>thought\\n<channel|>' }}{% endif %}{% endif %}"
    ),
    # the generation prompt opens a thought, and no switch closes it; earlier replies lose theirs
    "deepseek_r1": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
        "{% else %}{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
    ),
    # nothing marks the end of a reply
    "no_end": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    # only the last message is shown to the model: must be refused
    "drops_history": (
        "{% for message in messages %}{% if message['role'] == 'system' or loop.last %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # replies end with a marker of another model's tokenizer: must be refused
    "wrong_end": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
        "+ '<|eot_of_other_model|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # a base model without a template of its own
    "builtin": BUILTIN_TEMPLATE,
}

_CHATML = {"special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "eos": "<|im_end|>"}
_GEMMA4 = ["<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"]
_DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
# What the tokenizer of each family is made with
FAMILIES: dict[str, dict[str, Any]] = {
    "chatml_default": _CHATML,
    "granite_date": _CHATML,
    "qwen3": {**_CHATML, "added": ["<think>", "</think>"]},
    "llama3": {
        "special": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "eos": "<|end_of_text|>",
        "bos": "<|begin_of_text|>",
    },
    "mistral_nemo": {"special": ["<s>", "</s>", "[INST]", "[/INST]"], "eos": "</s>", "bos": "<s>"},
    "mistral_v1": {"special": ["<s>", "</s>"], "eos": "</s>", "bos": "<s>", "kind": "spm"},
    "gemma2": {
        "special": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "eos": "<eos>",
        "bos": "<bos>",
        "kind": "spm",
        "added": ["\n\n"],  # Gemma's own tokens for white space
    },
    "gpt_oss": {
        "special": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"],
        "eos": "<|return|>",
    },
    "gemma4": {"special": _GEMMA4, "eos": "<eos>", "bos": "<bos>", "kind": "spm", "added": ["\n\n"]},
    "deepseek_r1": {
        "special": _DEEPSEEK,
        "eos": "<｜end▁of▁sentence｜>",
        "bos": "<｜begin▁of▁sentence｜>",
        "added": ["<think>", "</think>"],
    },
    "no_end": {"special": ["<|endoftext|>"], "eos": "<|endoftext|>"},
    "drops_history": _CHATML,
    "wrong_end": _CHATML,
    "builtin": {"special": ["<s>", "</s>"], "eos": "</s>", "bos": "<s>"},
}
REFUSED = ("drops_history", "wrong_end")
USABLE = tuple(name for name in TEMPLATES if name not in REFUSED)


def family(name: str) -> Any:
    """A fresh tokenizer with the template TEMPLATES[name] and the tokens of that family."""
    return tokenizer(template=TEMPLATES[name], **FAMILIES[name])


# What the architectures call their sizes otherwise than Llama
_SLIDES: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT: dict[str, Any] = {  # keys and values from one small vector, and values of another size (DeepSeek)
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DELTA: dict[str, Any] = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"]},
}
_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "apertus": {},
    "arcee": {},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**_SLIDES, "head_dim": 16, "logit_scale": 0.5},
    "deepseek_v2": {**_MIXTURE, **_LATENT, "q_lora_rank": None},
    "deepseek_v3": {**_MIXTURE, **_LATENT, "q_lora_rank": 16},
    "ernie4_5": {},
    "exaone4": _SLIDES,
    "gemma": {"head_dim": 16},
    "gemma2": {**_SLIDES, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_SLIDES, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma4_text": {
        **_SLIDES,
        "head_dim": 16,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 512,
        "num_kv_shared_layers": 0,
    },
    "gemma4_unified_text": {  # in its layers without a window the keys are the values too
        **{**_SLIDES, "head_dim": 16, "global_head_dim": 32},
        **{"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {**_MIXTURE, "head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "lfm2": {"block_ff_dim": 128, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "minicpm3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "ministral": {**_SLIDES, "head_dim": 16},
    "ministral3": {"head_dim": 16, "sliding_window": None},
    "olmo2": {},
    "olmo3": _SLIDES,
    "qwen2_moe": {**_MIXTURE, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**_DELTA, "head_dim": 16},
    "qwen3_5_moe_text": {**_DELTA, **_FEW_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32},
    "qwen3_next": {**_DELTA, **_FEW_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32},
    "seed_oss": {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "starcoder2": {"sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "stablelm": {},
    "nemotron": {},
    "gpt_oss": {**_SLIDES, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "dropout": 0.0,
    },
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {
        "state_size": 8,
        "intermediate_size": None,
        "num_attention_heads": None,
        "num_key_value_heads": None,
        "max_position_embeddings": None,
    },
    "jetmoe": {"num_experts_per_tok": 2},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    "qwen3_moe": {**_MIXTURE, "head_dim": 16, "num_experts": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 1024,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
}


_TEXT: dict[str, Any] = {"head_dim": 16, "pad_token_id": 0}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_TOWER: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
_QWEN_TOWER: dict[str, Any] = {
    **{"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64},
    **{"patch_size": 14, "spatial_merge_size": 1, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
# Models that read pictures: what their decoder of text has beside the common sizes, and their tower
WRAPPERS: dict[str, dict[str, dict[str, Any]]] = {
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "ministral3"},
        "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 16},
    },
    "gemma3": {"text_config": {**_TEXT, "sliding_window": 16}, "vision_config": _TOWER},
    "gemma4": {
        "text_config": {**_TEXT, "global_head_dim": 16, "hidden_size_per_layer_input": 16, "sliding_window": 16},
        "vision_config": {**_TOWER, "num_key_value_heads": 2, "head_dim": 16},
        "audio_config": {  # its attention is of one kind only
            **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32},
            **{"subsampling_conv_channels": [8, 4], "conv_kernel_size": 3},
        },
    },
    "gemma4_unified": {
        "text_config": {
            **{**_TEXT, "global_head_dim": 16, "sliding_window": 16},
            **{"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        },
        "vision_config": {
            **{"patch_size": 2, "pooling_kernel_size": 1, "mm_embed_dim": 32, "mm_posemb_size": 8},
            **{"output_proj_dims": 32},
        },
        "audio_config": {"audio_embed_dim": 24},
    },
    "qwen3_5": {"text_config": {**_TEXT, **_DELTA}, "vision_config": _QWEN_TOWER},
    "qwen3_5_moe": {
        "text_config": {**_TEXT, **_DELTA, **_FEW_EXPERTS, "shared_expert_intermediate_size": 32},
        "vision_config": _QWEN_TOWER,
    },
    "qwen3_vl": {"text_config": {**_TEXT, **_ROPE}, "vision_config": _QWEN_TOWER},
    "llama4": {
        "text_config": {**_TEXT, "num_local_experts": 4, "intermediate_size_mlp": 64},
        "vision_config": {
            **{**_TOWER, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        },
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_TOWER, "model_type": "clip_vision_model"},
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
    },
    "paligemma": {
        "text_config": {**_TEXT, "model_type": "gemma"},
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model", "projection_dim": 64},
    },
}


def wrapper_config(kind: str, **text: Any) -> Any:
    """The configuration of a tiny model of a `kind` in WRAPPERS; `text` goes into its part for the text."""
    from transformers import AutoConfig

    parts = {name: dict(part) for name, part in WRAPPERS[kind].items()}
    parts["text_config"] = text | parts["text_config"]
    parts["text_config"].setdefault("vocab_size_per_layer_input", text["vocab_size"])  # Gemma 4's alone
    if kind != "gemma4":
        del parts["text_config"]["vocab_size_per_layer_input"]
    more: dict[str, Any] = {"mm_tokens_per_image": 4} if kind == "gemma3" else {}
    return AutoConfig.for_model(kind, **parts, **more)


def model(architecture: str = "llama", vocabulary: int = 512, **config: Any) -> Any:
    """A random two-layer model of 64 dimensions in float32, the same for the same arguments."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,  # far from uniform, so that mistakes show
    }
    chosen = {k: v for k, v in (sizes | _SHAPES.get(architecture, {}) | config).items() if v is not None or k in config}
    if architecture == "mistral":
        chosen.setdefault("sliding_window", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if architecture in WRAPPERS:
            chosen = wrapper_config(architecture, **sizes | config)
            return AutoModelForImageTextToText.from_config(chosen, dtype=torch.float32)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **chosen), dtype=torch.float32)
        for name, weight in made.named_parameters():
            if not weight.isfinite().all() or weight.abs().max() > 1e4 or "sinks" in name:  # not initialised
                torch.nn.init.normal_(weight, std=0.1)
            if name.endswith("A_log"):  # as strong as some begin, transformers' own chunks lose gradients by 1e-4
                torch.nn.init.uniform_(weight, -4, -1)
        return made


def save_model(
    folder: Path, architecture: str = "llama", tokenizer: Any = None, dtype: str = "float32", **config: Any
) -> Path:
    """Write a tiny random model and its tokenizer (ChatML when None) to `folder` in Hugging Face form; returns it.

    `dtype` is that of the safetensors file; `config` changes the model's configuration.
    """
    import torch

    tokenizer = family("chatml_default") if tokenizer is None else tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    made = model(architecture, len(tokenizer), **(ids | config))
    made.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
