"""Chat templates are programs: each is rendered within limits, or refused in one line that says why."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from qcft import InputError
from qcft.data import render
from qcft.data.encode import Encoder
from qcft.data.render import TemplateRefused
from qcft.data.rows import Message, Row
from qcft.data.template import CHATML
from qcft.events import Watch
from qcft.models.load import load_tokenizer
from qcft.models.sources import described_folder, resolve
from qcft.recipe import Model

PLAIN = CHATML.replace("END", "<|im_end|>")
LONG = "{% if messages[0].content|length > 40 %}PART{% endif %}"
ENDLESS = "{{ 9**(9**(messages[0].content|length // 5)) % 7 }}"  # which no signal handler interrupts


@pytest.fixture
def templated(tokenizer):
    """The tokenizer with another chat template."""
    own = tokenizer.chat_template

    def give(template):
        tokenizer.chat_template = template
        return tokenizer

    yield give
    tokenizer.chat_template = own


def row(text):
    return Row((Message("user", text),), (Message("assistant", "red"),))


@pytest.mark.parametrize(
    ("template", "says"),
    {
        "an empty reason": ("{{ raise_exception('') }}", "the chat template refuses it: TemplateError"),
        "a reason of lines": ("{{ raise_exception('\n\nno\nway') }}", "the chat template refuses it: no"),
        "a wide number": ("{{ '%0999999999d' % 1 }}", "exceeds the limits"),
        "a wide number by a filter": ("{{ '%0999999999d'|format(1) }}", "exceeds the limits"),
        "a long text": ("{{ 'x' * 10**9 }}", "exceeds the limits"),
        "a longer text": ("{{ 'x' * 10**12 }}", "exceeds the limits"),
        "a text that doubles": (
            "{% set n = namespace(t='x') %}{% for i in range(64) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
            "exceeds the limits",
        ),
        "a long range": ("{{ range(10**9)|list|length }}", "Range too big"),
        "macros in macros": ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "recursion"),
        "a deep expression": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "the chat template"),
        "no template": ("{% for %}", "the chat template refuses it: Expected"),
        "half a character": ("{{ messages[0].content }}\ud800", "the chat template"),
    }.values(),
    ids=lambda value: value[:30].replace(" ", "-"),
)
def test_what_a_template_may_do_is_limited(templated, template, says):
    began = time.monotonic()
    with pytest.raises(InputError) as error:
        Encoder(templated(template))
    assert says in error.value.message
    assert "\n" not in error.value.message
    assert error.value.hint
    assert time.monotonic() - began < 60


def test_a_row_that_starts_an_endless_loop_is_limited_too(templated):
    encoder = Encoder(templated(LONG.replace("PART", ENDLESS) + PLAIN))
    assert len(encoder.encode_all([row("what color")]).rows) == 1
    with pytest.raises(InputError, match="exceeds the limits"):
        encoder.encode_all([row("what color"), row("what color is the cat " * 4)])
    assert len(encoder.encode_all([row("what color")]).rows) == 1


def test_rows_that_each_take_long_are_limited_together(templated):
    slow = LONG.replace("PART", "{% for i in range(3000) %}{% for j in range(999) %}{% endfor %}{% endfor %}")
    with pytest.raises(InputError, match="exceeds the limits"):
        Encoder(templated(slow + PLAIN)).encode_all(
            [row(f"what color is the cat number {i} " * 4) for i in range(2000)]
        )


def test_rendering_equals_the_librarys_own(templated):
    template = "{{ bos_token }}{% for m in messages %}{{ m|tojson }}{{ m.role.upper() }}{% endfor %}{{ flag }}"
    tokenizer = templated(template + "{% if add_generation_prompt %}>{% endif %}")
    turns = [{"role": "user", "content": "a 🦜 <\n\u2028ñ"}, {"role": "assistant", "content": "", "thinking": "b"}]
    for options in ({"add_generation_prompt": True, "flag": True}, {"continue_final_message": False, "flag": None}):
        whole = tokenizer.apply_chat_template(turns, tokenize=False, **options)
        assert render.render(tokenizer, turns, **options) == whole


def test_one_process_renders_and_is_started_again(tokenizer):
    turns = [{"role": "user", "content": "red"}]
    first = render.render(tokenizer, turns)
    process = render._WORKER._process
    assert render.render(tokenizer, turns) == first
    assert render._WORKER._process is process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert render.render(tokenizer, turns) == first


def test_an_answer_that_was_not_awaited_is_not_given_to_the_next_request(templated):
    tokenizer = templated(ENDLESS.replace("// 5", "// 4") + "{{ messages[0].content }}")

    def late(*_):
        raise KeyboardInterrupt

    render.render(tokenizer, [{"role": "user", "content": "one"}])
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            render.render(tokenizer, [{"role": "user", "content": "what color is the cat " * 4}])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert render.render(tokenizer, [{"role": "user", "content": "two"}]).endswith("two")


def test_several_at_once(templated):
    tokenizer = templated("{% if messages[0].content == 'no' %}{{ raise_exception('why') }}{% endif %}yes")
    asked = [([{"role": "user", "content": text}], {}) for text in ("a", "no", "b")]
    found = render.render_all(tokenizer, asked)
    assert found[::2] == ["yes", "yes"]
    assert isinstance(found[1], TemplateRefused)
    assert str(found[1]) == "the chat template refuses it: why"


def test_the_process_ends_with_its_parent(tokenizer_folder):
    script = (
        "import sys; from transformers import AutoTokenizer; from qcft.data import render\n"
        f"render.render(AutoTokenizer.from_pretrained({str(tokenizer_folder)!r}), [dict(role='user', content='a')])\n"
        "print(render._WORKER._process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("it is still there")


@pytest.mark.parametrize(
    ("template", "says"),
    [("{{ raise_exception('') }}", "refuses it: TemplateError"), ("{{ '%0999999999d' % 1 }}", "exceeds the limits")],
)
def test_templates_of_gguf_files_too(tokenizer, tmp_path, monkeypatch, template, says):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    model = Model(name=str(gguf_of(tokenizer, template, tmp_path / "m.gguf")))
    with pytest.raises(InputError) as error:
        Encoder(load_tokenizer(described_folder(resolve(model), Watch()), model))
    assert says in error.value.message


def gguf_of(tokenizer, template, path):
    """A GGUF file with a model's description and tokenizer, and hardly any weights."""
    from gguf import GGUFWriter

    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    writer = GGUFWriter(path, "llama")
    for add, value in {
        writer.add_block_count: 1,
        writer.add_context_length: 64,
        writer.add_embedding_length: 64,
        writer.add_feed_forward_length: 64,
        writer.add_head_count: 4,
        writer.add_layer_norm_rms_eps: 1e-5,
        writer.add_vocab_size: len(words),
        writer.add_tokenizer_model: "gpt2",
        writer.add_token_list: [word for word, _ in words],
        writer.add_token_types: [3 if word.startswith("<|") else 1 for word, _ in words],
        writer.add_token_merges: [" ".join(merge) for merge in parts["merges"]],
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_bos_token_id: tokenizer.eos_token_id,  # as every real file has one
        writer.add_chat_template: template,
    }.items():
        add(value)
    writer.add_tensor("token_embd.weight", np.ones((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
