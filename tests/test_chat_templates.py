"""Chat templates as models have them: answers are trained, with their ends, under the model's own prompt."""

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from qcft import InputError
from qcft.data.encode import IGNORED, SPLIT, Encoder
from qcft.data.rows import Message, Row
from qcft.data.template import CHATML, REASONING_DROPPED, REASONING_OFF, SYSTEM_MERGED, set_chat_template

OWN = Path(__file__).parent / "helpers" / "chat_templates"
TRL = Path(find_spec("trl").origin).parent / "chat_templates"
CONTROL = re.compile(
    "<[|\uff5c][^<>|\uff5c]*[|\uff5c]>|</?(?:s|think|bos|eos|sop|start_of_turn|end_of_turn)>|\\[gMASK]"
)


@dataclass(frozen=True)
class Family:
    """A template and its tokenizer's marks. `between`: what the template writes between its generation prompt and an
    answer without thoughts; `thoughts`: a trained answer `blue` with the thought `why` before it, None where it has no
    place for one; `split`: whether turns of one conversation become training rows of their own."""

    name: str
    bos: str | None
    eos: str
    end: str
    between: str = ""
    thoughts: str | None = None
    split: bool = False
    system: bool = True
    more: tuple[str, ...] = field(default=())


CHANNEL = "<|channel|>{}<|message|>"
FAMILIES = [
    Family("llama2", "<s>", "</s>", "</s>"),
    Family("llama3", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    Family("llama3_2", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    Family("qwen2_5", None, "<|im_end|>", "<|im_end|>"),
    Family("qwen3", None, "<|im_end|>", "<|im_end|>", thoughts="<think>\nwhy\n</think>\n\nblue", split=True),
    Family("gemma", "<bos>", "<eos>", "<end_of_turn>", system=False),
    Family("gemma3", "<bos>", "<eos>", "<end_of_turn>"),
    Family("mistral_v01", "<s>", "</s>", "</s>", system=False),
    Family("mistral_v03", "<s>", "</s>", "</s>", system=False),
    Family("mistral_v03_last", "<s>", "</s>", "</s>"),
    Family("phi3", "<s>", "<|endoftext|>", "<|end|>"),
    Family("phi4", "<|endoftext|>", "<|im_end|>", "<|im_end|>"),
    Family("smollm2", "<|im_start|>", "<|im_end|>", "<|im_end|>"),
    Family("smollm3", None, "<|im_end|>", "<|im_end|>", thoughts="<think>\nwhy\n</think>\n\nblue"),
    Family(
        "glm4", None, "<|endoftext|>", "<|endoftext|>", split=True, more=("<|user|>", "<|assistant|>", "<|system|>")
    ),
    Family("glm4moe", None, "<|endoftext|>", "<|endoftext|>", thoughts="<think>why</think>\nblue", split=True),
    Family(
        "gptoss",
        "<|startoftext|>",
        "<|return|>",
        "<|return|>",
        between=CHANNEL.format("final"),
        thoughts=f"{CHANNEL.format('analysis')}why<|end|><|start|>assistant{CHANNEL.format('final')}blue",
        split=True,
    ),
    Family(
        "deepseek_r1_distill",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        between="\n</think>\n\n",
        thoughts="why\n</think>\n\nblue",
        split=True,
    ),
    Family("granite", None, "<|end_of_text|>", "<|end_of_text|>"),
    Family("olmo2", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    Family("cohere", "<s>", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    Family("zephyr", "<s>", "</s>", "</s>"),
    Family("vicuna", "<s>", "</s>", "</s>"),
    Family("chatml", None, "<|endoftext|>", "<|im_end|>"),
]


def template_of(name):
    if name == "chatml":
        return CHATML.replace("END", "<|im_end|>")
    file = OWN / f"{name}.jinja"
    return (file if file.is_file() else TRL / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_for(template, bos=None, eos="<|im_end|>", more=()):
    """A byte-level tokenizer with the control tokens that a template writes; `<think>` is an added token like others,
    as in the models that have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    found = dict.fromkeys([*CONTROL.findall(template), *more])
    added = [AddedToken(t, special="think" not in t, normalized=False) for t in found if t not in ("<|", "|>")]
    fast.add_tokens(added)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(family):
    made = tokenizer_for(template_of(family.name), family.bos, family.eos, (family.end, *family.more))
    set_chat_template(made, None)
    return made


def row(*turns):
    messages = [turn if isinstance(turn, Message) else Message(*turn) for turn in turns]
    first = next(i for i, m in enumerate(messages) if m.role == "assistant")
    return Row(tuple(messages[:first]), tuple(messages[first:]))


def asked(tokenizer, messages, think=False):
    """The tokens that transformers gives a model to answer."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    options = {"enable_thinking": think, "thinking": think}
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **options)


def spans(encoded):
    """[start, end) of each stretch of tokens that have loss."""
    edges = [i for i in range(len(encoded.labels) + 1) if trained(encoded, i) != trained(encoded, i - 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def trained(encoded, i):
    return 0 <= i < len(encoded.labels) and encoded.labels[i] != IGNORED


def test_a_cut_answer_is_trained_to_the_end_of_its_text(tokenizer, family):
    """Whatever the template writes after an answer: its end, a blank, a new line."""
    cut = Row((Message("user", "what color"),), (Message("assistant", "red an", finished=False),))
    encoder = Encoder(tokenizer)
    (encoded,), (whole,) = (encoder.encode_all([one]).encoded for one in (cut, row(*ONE)))
    ((start, end),) = spans(encoded)
    assert end == len(encoded.input_ids)
    assert tokenizer.decode(encoded.input_ids[start:]).strip() == "red an"
    assert encoded.input_ids[:start] == whole.input_ids[: spans(whole)[0][0]]


SYSTEM = ("system", "be brief")
ONE, TWO = (("user", "what color"), ("assistant", "red")), (("user", "and then"), ("assistant", "blue"))
TURNS = {"single": ONE, "multi": (*ONE, *TWO), "system": (SYSTEM, *ONE), "system, multi": (SYSTEM, *ONE, *TWO)}


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_answers_are_trained_under_the_prompt_of_the_model(tokenizer, family, turns):
    one = row(*turns)
    encoder = Encoder(tokenizer)
    encoded = encoder.encode_all([one])
    messages = list(one.messages)
    if messages[0].role == "system" and not family.system:
        assert SYSTEM_MERGED in encoded.changed
        messages = [Message("user", f"be brief\n\n{messages[1].content}"), *messages[2:]]
    between = tokenizer(family.between, add_special_tokens=False)["input_ids"]
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    found = [(part, span) for part in encoded.encoded for span in spans(part)]
    assert len(found) == len(answers)
    for i, (part, (start, end)) in zip(answers, found, strict=True):
        assert tokenizer.decode(part.input_ids[start:end]).replace(" ", "").strip() == messages[i].content + family.end
        assert part.labels[start:end] == part.input_ids[start:end]
        assert part.input_ids[:start] == asked(tokenizer, messages[:i]) + between
    assert encoder.prompt_ids(one) == asked(tokenizer, messages[: answers[0]]) + between
    later_system = turns is TURNS["system, multi"] and family.name == "mistral_v03_last"
    splits = len(answers) > 1 and (family.split or later_system)
    assert encoded.changed.get(SPLIT, 0) == splits
    assert len(encoded.encoded) == (2 if splits else 1)


def test_thoughts_are_trained_as_the_template_writes_them(tokenizer, family):
    """auto: an answer that has thoughts is trained with them, one that has none without; off drops them."""
    thought = Message("assistant", "blue", reasoning="why")
    both = row(*ONE, ("user", "and then"), thought)
    inline = row(*ONE, ("user", "and then"), ("assistant", "<think>\nwhy\n</think>\n\nblue"))
    for one in (both, inline) if family.thoughts else (both,):
        encoded = Encoder(tokenizer).encode_all([one])
        found = [tokenizer.decode(p.input_ids[a:b]) for p in encoded.encoded for a, b in spans(p)]
        assert found[0].replace(" ", "").strip() == f"red{family.end}"
        assert found[1].replace(" ", "").strip() == (family.thoughts or "blue") + family.end
        assert encoded.changed.get(REASONING_DROPPED, 0) == (family.thoughts is None)
        last = encoded.encoded[-1]
        prompt = asked(tokenizer, one.messages[:-1], think=family.thoughts is not None)
        assert last.input_ids[: spans(last)[-1][0]] == prompt
    off = Encoder(tokenizer, thinking="off").encode_all([both])
    assert "why" not in "".join(tokenizer.decode(part.input_ids) for part in off.encoded)
    assert off.changed.get(REASONING_OFF, 0) == (family.thoughts is not None)


def test_dates_are_fixed(tokenizer, family, monkeypatch):
    """Tomorrow the same row has the same tokens."""
    from transformers.utils import chat_template_utils

    class Tomorrow(chat_template_utils.datetime):
        @classmethod
        def now(cls):
            return cls(2031, 12, 24)

    before = Encoder(tokenizer).encode(row(*ONE))
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert Encoder(tokenizer).encode(row(*ONE)) == before
    text = tokenizer.decode(before[0].input_ids)
    for name, date in {"llama3_2": "26 Jul 2024", "gptoss": "2024-07-26", "smollm3": "26 July 2024"}.items():
        assert family.name != name or date in text


def test_ordinary_templates_add_nothing_to_the_ids_of_steps(tokenizer, family):
    dated = family.name in {"llama3_2", "gptoss", "smollm3", "granite"}
    thinks = family.thoughts is not None or family.name == "granite"
    expected = [*(["dated 2024-07-26"] if dated else []), *(["thinking"] if thinks else [])]
    assert list(Encoder(tokenizer).template.traits) == expected


def test_a_template_for_pictures_is_refused():
    """It goes through the parts of a turn, and writes nothing of a turn that is text."""
    tokenizer = tokenizer_for((TRL / "smolvlm.jinja").read_text(encoding="utf-8"))
    with pytest.raises(InputError, match="does not write the text of turns"):
        Encoder(tokenizer)
