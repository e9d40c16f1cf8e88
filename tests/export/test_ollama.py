"""Modelfiles: the template gives the chat template's text, in Go too, and Ollama's reader finds what was meant."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from making.tiny import FAMILIES, TEMPLATES, USABLE, family, tokenizer

from persona.config import Generation
from persona.export.go_template import render
from persona.export.ollama import Inexpressible, modelfile, ollama_template, ollama_text
from persona.model.render import chat_format, prompt_text

SYSTEM = 'You are Tamsin.\n\nSay "Aye" {{ .Messages }} 你好, and no more.'
SAID = (
    ("Who goes there?", "Aye, {{ .Content }} {% who %} asks?"),
    ("Two\n\nlines, please.", "你好，世界。🙂\n- one"),
    ("And <|now|>?", ""),
)
# What real templates do and those of tiny.py do not
MORE = {
    # Llama 2: the system prompt inside the first question, each question with its own begin token
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
        "{% set system = messages[0]['content'] %}"
        "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for message in turns %}"
        "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        {"special": ["<s>", "</s>"], "eos": "</s>", "bos": "<s>", "kind": "spm"},
    ),
    # Phi-3: every turn ends alike
    "phi3": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        {"special": ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "eos": "<|endoftext|>"},
    ),
    # braces, quotation marks and what is not printable in the text that the template writes
    "odd": (
        "{% for message in messages %}{{ '{{' + message['role'] + '\"\"\"\\u3000{' "
        "+ message['content'] + '<|end|>{\\n' }}"
        '{% endfor %}{% if add_generation_prompt %}{{ \'{{assistant"""\\u3000{\' }}{% endif %}',
        {"special": ["<|end|>"], "eos": "<|end|>"},
    ),
}


def loaded(name):
    if name in MORE:
        template, tokens = MORE[name]
        return chat_format(tokenizer(template=template, **tokens))
    return chat_format(family(name))


def conversations():
    for system in (None, SYSTEM):
        for turns in (1, 3):
            messages = [{"role": "system", "content": system}] if system else []
            for question, answer in SAID[3 - turns :]:
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer or "Aye."}]
            yield messages[:-1]


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """Go's own engine as a function of a list of (template, messages)."""
    compiler = shutil.which("go")
    if compiler is None:
        pytest.skip("needs Go, to render templates with its own engine; none is installed")
    folder = tmp_path_factory.mktemp("go")
    program = folder / ("render.exe" if os.name == "nt" else "render")
    source = Path(__file__).with_name("ollama_render.go")
    settings = {"GO111MODULE": "off", "GOFLAGS": "", "GOPROXY": "off", "GOTOOLCHAIN": "local"}
    command = [compiler, "build", "-o", str(program), str(source)]
    subprocess.run(command, check=True, cwd=folder, env=os.environ | settings)

    def rendered(pairs):
        asked = []
        for template, messages in pairs:
            system = messages[0]["content"] if messages[0]["role"] == "system" else ""
            listed = [{"Role": m["role"], "Content": m["content"]} for m in messages]
            asked.append(json.dumps({"Template": template, "System": system, "Messages": listed}))
        done = subprocess.run([program], input="\n".join(asked), capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return rendered


@pytest.mark.parametrize("name", [*USABLE, *MORE])
def test_the_template_gives_the_chat_templates_text(name):
    fmt = loaded(name)
    template = ollama_template(fmt, adds_bos=False)
    for messages in conversations():
        assert ollama_text(template, messages) == prompt_text(messages, fmt)


def test_go_gives_the_chat_templates_text(go):
    pairs, expected = [], []
    for name in (*USABLE, *MORE):
        fmt = loaded(name)
        template = ollama_template(fmt, adds_bos=False)
        pairs += [(template, messages) for messages in conversations()]
        expected += [prompt_text(messages, fmt) for messages in conversations()]
    assert len(pairs) >= 60
    assert go(pairs) == expected


def test_our_renderer_and_go_agree_on_what_it_understands(go):
    templates = [
        "a  {{- /* gone */ -}}  b{{ .System }}",
        '{{ $x := "q\\"u\\u3000{{" }}{{ $x }}{{ if eq $x .System }}a{{ else if not .System }}b{{ else }}c{{ end }}',
        "{{ range $i, $m := .Messages }}{{ if $i }}, {{ end }}{{ $i }}{{ .Role }}{{ end }}",
        "{{ $n := 1 }}{{ range $i, $_ := slice .Messages 1 }}{{ $n = len $.Messages }}{{ end }}{{ $n }}",
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" "assistant" }}{{ .Content }}\n\t{{- end }}{{ end -}} }',
    ]
    pairs = [(template, messages) for template in templates for messages in conversations()]
    assert go(pairs) == [ollama_text(*pair) for pair in pairs]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("{{ if .System }}", "a block has no {{ end }}"),
        ("{{ end }}", "{{ end }} has no beginning"),
        ("{{ .System | upper }}", "not understood: '.System | upper'"),
        ("{{ x }}", "not understood: 'x'"),
        ("{{ len", "an action is not closed: '{{ len'"),
        ("{{ ( }}", "a value is missing"),
    ],
)
def test_what_our_renderer_does_not_understand_is_refused(broken, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        render(broken, "", [{"role": "user", "content": "q"}])


@pytest.mark.parametrize("name", ["llama3", "mistral_v1", "gemma2", "deepseek_r1", "llama2"])
def test_a_begin_token_that_the_runtime_writes_is_left_out(name):
    fmt = loaded(name)
    template = ollama_template(fmt, adds_bos=True)
    for messages in conversations():
        assert fmt.tokenizer.bos_token + ollama_text(template, messages) == prompt_text(messages, fmt)


def test_a_begin_token_that_training_never_saw_is_refused():
    fmt = chat_format(tokenizer(template=TEMPLATES["qwen3"], **{**FAMILIES["qwen3"], "bos": "<|endoftext|>"}))
    with pytest.raises(Inexpressible, match=r"puts <\|endoftext\|> in front"):
        ollama_template(fmt, adds_bos=True)


def test_a_greeting_before_the_first_question_stands_where_the_chat_template_puts_it():
    greeted = [{"role": "system", "content": SYSTEM}, {"role": "assistant", "content": "Hark!"}]
    greeted.append({"role": "user", "content": "Who calls?"})
    fmt = loaded("llama3")
    assert ollama_text(ollama_template(fmt, False), greeted) == prompt_text(greeted, fmt)
    # where it is refused it is left out, and the system prompt keeps its place
    strict = loaded("mistral_nemo")
    assert ollama_text(ollama_template(strict, False), greeted) == prompt_text([greeted[0], greeted[2]], strict)


UNLIKE = {
    "numbered": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + loop.index|string + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "shouting": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] "
    "| upper if message['role'] == 'user' and '?' in message['content'] else message['content']) + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_template_with_rules_of_its_own_is_left_out_and_said(name):
    fmt = chat_format(tokenizer(template=UNLIKE[name], **FAMILIES["qwen3"]))
    with pytest.raises(Inexpressible):
        ollama_template(fmt, False)
    text, notes = modelfile(["FROM ./x.gguf"], fmt, False, "You are Tamsin.", Generation(), 1024)
    assert "TEMPLATE" not in text
    assert 'SYSTEM """You are Tamsin."""' in text
    assert "--jinja" in notes[0]


# --- the file ---------------------------------------------------------------------------------------------------------


def read_as_ollama(text):
    """What parser/parser.go finds: a text in three quotation marks keeps white space and loses the unprintable."""
    found = {}
    for match in re.finditer(r'^([A-Z]+) (?:"""(.*?)"""|(.*?))$', text, re.DOTALL | re.MULTILINE):
        name, value = match[1], match[2] if match[2] is not None else match[3]
        kept = "".join(c for c in value if c.isprintable() or c in "\n\r\t")
        found.setdefault(name, []).append(kept)
    return found


@pytest.mark.parametrize("name", ["chatml_default", "gemma2", "odd", "deepseek_r1"])
def test_ollama_reads_what_was_meant(name):
    fmt = loaded(name)
    settings = Generation(temperature=0.6, top_p=0.8, repetition_penalty=1.1, max_new_tokens=99)
    text, notes = modelfile(["FROM ./t.gguf", "ADAPTER ./a.gguf"], fmt, False, SYSTEM, settings, 777)
    found = read_as_ollama(text)
    assert not notes
    assert (found["FROM"], found["ADAPTER"]) == (["./t.gguf"], ["./a.gguf"])
    messages = [{"role": "system", "content": found["SYSTEM"][0]}, {"role": "user", "content": "Who?"}]
    asked = [{"role": "system", "content": SYSTEM}, messages[1]]
    assert ollama_text(found["TEMPLATE"][0], messages) == prompt_text(asked, fmt)
    parameters = found["PARAMETER"]
    for line in ("temperature 0.6", "top_p 0.8", "repeat_penalty 1.1", "num_predict 99", "num_ctx 777", "top_k 0"):
        assert line in parameters
    end = fmt.tokenizer.convert_ids_to_tokens(fmt.end_id)
    assert f'stop "{end}"' in parameters


def test_a_system_prompt_that_the_template_strips_is_stripped():
    fmt = loaded("llama3")
    text, notes = modelfile(["FROM ./t.gguf"], fmt, True, "  You are Tamsin.\n", Generation(), 64)
    assert 'SYSTEM """You are Tamsin."""' in text
    assert "TEMPLATE" in text


@pytest.mark.parametrize(
    ("prompt", "what"), [("　全角", "U\\+3000"), ('Say """ twice', "end it"), ("a\u200db", "U\\+200D")]
)
def test_a_system_prompt_that_ollama_would_change_is_left_out_and_said(prompt, what):
    text, notes = modelfile(["FROM ./t.gguf"], loaded("chatml_default"), False, prompt, Generation(), 64)
    assert "SYSTEM" not in text.replace("$.System", "")
    assert re.search(what, notes[0])


def test_without_a_system_prompt_there_is_none():
    text, notes = modelfile(["FROM ./t.gguf"], loaded("chatml_default"), False, None, Generation(temperature=0), 64)
    assert "\nSYSTEM" not in text
    assert "PARAMETER temperature 0" in text
