"""Random damage to adapters and random chat templates: taken, or refused in one line with a hint; never a traceback,
never a hang. `tests/soak/fuzz.py` tries 2,000 of each."""

import json
import os
import shutil
import signal
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from qcft.data.encode import Encoder
from qcft.data.rows import Message, Row
from qcft.events import Watch
from qcft.models.adapter_config import CONFIG, MERGED, PREFIX, REFUSED, WEIGHTS, WITHOUT_EFFECT, read_adapter_config
from qcft.prepare.checks import check_adapter
from qcft.prepare.prepared import Prepared
from qcft.recipe import recipe_from

from .test_fuzz import refused_or_accepted

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
some = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
PATIENCE = 90  # seconds: what exceeds a limit on CPU time takes longer on a busy machine


@pytest.fixture(scope="module")
def prepared(tiny_model, color_data):
    data = [{"path": str(color_data / "en.jsonl"), "lang": "en", "take": 12}]
    raw = {"name": "r", "model": str(tiny_model), "phases": [{"name": "a", "data": data}]}
    found = Prepared(recipe_from(raw), Watch())
    assert found.meta_model is not None
    return found


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


words = st.sampled_from(
    ["LORA", "q_proj", "up_proj", "lm_head", "embed_tokens", "all", "lora_only", "all-linear", "CAUSAL_LM", "SEQ_CLS",
     "pissa", "(a+)+$", "[", "model.layers.0.self_attn.q_proj", "os", "", "\0", "x" * 3000, "0.20.0"]
)  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | words
values = st.recursive(
    scalars | st.sampled_from([10**30, -1, 0, 2**31, 1e308]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(words | st.text(max_size=4), below, max_size=3),
    max_leaves=5,
)
KNOWN = st.sampled_from(sorted(MERGED | WITHOUT_EFFECT))
configs = st.dictionaries(KNOWN | KNOWN | KNOWN | st.sampled_from(sorted(REFUSED)) | st.text(), values, max_size=3)
Q = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
names = st.sampled_from([Q, Q.replace("lora_A", "lora_B"), Q.replace("lora_A.weight", "lora_magnitude_vector")])
names |= st.sampled_from([Q.replace("q_proj", "k_proj"), Q.replace("layers.0", "layers.9"), f"{PREFIX}lm_head.weight"])
names |= names | st.text(max_size=8).map(lambda text: PREFIX + text) | st.text(max_size=8)
dtypes = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
shapes = st.lists(st.sampled_from([0, 1, 4, 64, 128]), max_size=3)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E8M0", "X"]) | values,
        "shape": st.lists(st.integers(-1, 2**40), max_size=3) | values,
        "data_offsets": st.lists(st.integers(-8, 2**50), min_size=2, max_size=2) | values,
    },
)


def tensor(shape, dtype):
    made = torch.ones(shape)
    return made.to(dtype)


def with_header(content, change):
    """A safetensors file's bytes with another header."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


@some
@given(st.data())
def test_adapters(prepared, whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("a") / "adapter"
    shutil.copytree(whole, folder)
    file = folder / WEIGHTS
    how = data.draw(st.sampled_from([*["config"] * 4, *["tensors"] * 3, "config bytes", "header", "bytes"]))
    if how == "config":
        known = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(known | data.draw(configs)))
    elif how == "config bytes":
        (folder / CONFIG).write_bytes(data.draw(st.binary(max_size=40)) or b"[" * 100_000)
    elif how == "tensors":
        more = data.draw(st.dictionaries(names, st.tuples(shapes, dtypes), max_size=3))
        kept = dict(list(load_file(file).items())[: data.draw(st.sampled_from([0, 3, 99, 99]))])
        file.write_bytes(save(kept | {name: tensor(*made) for name, made in more.items()}))
    elif how == "header":
        added = data.draw(st.dictionaries(names | st.just("__metadata__"), entries | values, max_size=2))
        file.write_bytes(with_header(file.read_bytes(), lambda header: header.update(added)))
    else:
        content = bytearray(file.read_bytes())
        for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)))):
            content[place if byte % 2 else place % 900] = byte
        file.write_bytes(content[: data.draw(st.sampled_from([None, None, -1, 8, 0]))])
    with refused_or_accepted():
        read_adapter_config(folder)
        check_adapter(prepared, folder)
    shutil.rmtree(folder)


leaves = st.sampled_from(
    ["messages", "messages[0]", "messages[0].content", "message.role", "message['content']", "bos_token", "x", "loop",
     "loop.index", "add_generation_prompt", "1", "-1", "2.5", "'a'", "''", "none", "true", "[]", "{}", "range(9)",
     "namespace(t='x')", "range(10**6)", "10**9", "'<|im_end|>'", "self", "cycler(1, 2)", "dict(a=1)", "lipsum",
     "'\\ud800'", "messages[0].content * 999"]
)  # fmt: skip
FILTERS = [
    "upper", "trim", "length", "list", "join", "first", "last", "tojson", "string", "int", "center(9)", "reverse",
    "replace('a', 'b')", "map(attribute='content')", "selectattr('role')", "batch(2)", "sort", "sum", "random",
    "center(10**9)", "indent(4)", "format(1)", "default('d')", "items", "nosuch", "tojson(indent=9)",
]  # fmt: skip
ATTRIBUTES = ["content", "role", "__class__", "_x", "upper()", "items()", "t", "split('a')", "format(1)", "mro()"]


def compound(below):
    return st.one_of(
        st.tuples(below, st.sampled_from(FILTERS)).map(lambda p: f"({p[0]})|{p[1]}"),
        st.tuples(below, st.sampled_from(ATTRIBUTES)).map(lambda p: f"({p[0]}).{p[1]}"),
        st.tuples(below, st.sampled_from(["+", "~", "*", "%", "==", "<", "in", "and", "//", "**", "-"]), below).map(
            lambda p: f"({p[0]}) {p[1]} ({p[2]})"
        ),
        st.tuples(below, below).map(lambda p: f"({p[0]})[{p[1]}]"),
        st.tuples(below, below).map(lambda p: f"({p[0]} if {p[1]} else 'z')"),
        st.tuples(below, below).map(lambda p: f"raise_exception({p[0]})"),
    )


expressions = st.recursive(leaves, compound, max_leaves=6)
TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
texts = st.sampled_from(
    ["a", "\n", "<think>", "</think>", "<|im_start|>", "{% generation %}x{% endgeneration %}", TURN]
)


def block(below):
    return st.one_of(
        st.tuples(st.sampled_from(["message", "x"]), expressions, below).map(
            lambda p: f"{{% for {p[0]} in {p[1]} %}}{p[2]}{{% endfor %}}"
        ),
        st.tuples(expressions, below, below).map(lambda p: f"{{% if {p[0]} %}}{p[1]}{{% else %}}{p[2]}{{% endif %}}"),
        st.tuples(expressions).map(lambda p: f"{{% set x = {p[0]} %}}"),
        st.tuples(below).map(lambda p: f"{{% macro m(x) %}}{p[0]}{{% endmacro %}}{{{{ m(1) }}}}"),
        st.tuples(below, below).map("".join),
        st.tuples(below).map(lambda p: f"{{% for message in messages %}}{p[0]}{{% endfor %}}"),
    )


templates = st.recursive(texts | expressions.map(lambda e: f"{{{{ {e} }}}}"), block, max_leaves=8)
WHOLE = f"{{% for message in messages %}}{TURN}{{% endfor %}}"
ODD = ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**9 }}",
       "{% include 'x' %}", "{% extends 'x' %}", "{%", "{{ m(1) }}", "{{ '%0999999999d' % 1 }}"]  # fmt: skip
ROWS = [
    Row((Message("user", "what color"),), (Message("assistant", "red"),)),
    Row(
        (Message("system", "be kind"), Message("user", "a <|im_end|>")),
        (Message("assistant", "b", reasoning="c"), Message("user", "d"), Message("assistant", "e" * 500)),
    ),
    Row((Message("user", ""),), (Message("assistant", "{{ 7 * 7 }}"),)),
]


@some
@given(
    templates
    | templates.map(lambda text: WHOLE + text)
    | templates.map(lambda text: text + WHOLE)
    | st.text(alphabet="{}%# abm'\"()[]|.\n", max_size=40)
    | st.tuples(st.integers(0, 19), st.sampled_from(ODD)).map(lambda p: p[1] if p[0] == 0 else WHOLE + "{{ x }}")
)
def test_templates(tokenizer, template):
    own = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        with refused_or_accepted():
            signal.alarm(PATIENCE)
            encoder = Encoder(tokenizer, max_length=200)
            encoded = encoder.encode_all(ROWS)
            assert all(len(reason) < 300 for reason in encoded.left_out)
            assert len(encoded.rows) + sum(encoded.left_out.values()) >= len(ROWS)
            for row in ROWS:
                encoder.prompt(row)
            assert isinstance(encoder.template.traits, tuple)
    finally:
        tokenizer.chat_template = own
