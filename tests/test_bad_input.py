"""Whatever is given wrong: exit code 2, a line that says what, a hint that says what to do, and a disk as it was."""

import gzip
import json
import shutil
import subprocess
import sys

import pytest
import yaml

from .helpers.bad_input import check_refused, listing
from .helpers.tiny import write_rows

GOOD = [{"instruction": f"what color is {i}", "output": "red"} for i in range(40)]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)
LINES = "".join(json.dumps(row) + "\n" for row in GOOD).encode()
PACKED = gzip.compress(LINES)

DATA = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n \n",
    "odd.jsonl": b'{"foo": 1}\n',
    "wide.jsonl": json.dumps({f"column{i}": 1 for i in range(3000)}).encode(),
    "prose.jsonl": b"Once upon a time\nthere was a file\n",
    "numbers.json": b"[1, 2, 3]",
    "object.json": b'{"a": {"b": 1}}',
    "open.json": b'[{"instruction": "a", "output": "b"}',
    "deep.json": b"[" * 100_000,
    "unanswered.jsonl": b'{"instruction": "a", "output": ""}\n' * 9,
    "roles.jsonl": b'{"messages": [{"role": "wizard", "content": "abracadabra"}]}\n' * 9,
    "halves.jsonl": b'{"instruction": "a\\ud800", "output": "b"}\n' * 9,
    "utf16.jsonl": LINES.decode().encode("utf-16"),
    "cut.jsonl.gz": PACKED[:-40],
    "flipped.jsonl.gz": PACKED[:30] + bytes([PACKED[30] ^ 255]) + PACKED[31:],
    "bad.parquet": b"PAR1 and no more",
    "bad.csv": b'instruction,output\n"never closed,\n',
    "latin.csv": "instruction,output\nseñor,sí\n".encode("latin-1"),
    "notes.docx": b"PK\x03\x04",
    "one.jsonl": LINES[: LINES.index(b"\n") + 1],
    "long.jsonl": (json.dumps({"instruction": "red " * 900, "output": "blue"}) + "\n").encode() * 40,
}

RECIPES = {
    "empty.yaml": b"",
    "list.yaml": b"- 1\n- 2\n",
    "open.yaml": b"name: [a\n",
    "tabs.yaml": b"name:\n\t- a\n",
    "binary.yaml": b"\x00\xff\xfe\x01",
    "twice.yaml": b"name: a\nname: b\n",
    "deep.yaml": b"[" * 3000,
    "bomb.yaml": BOMB.encode(),
    "python.yaml": b"!!python/object/apply:os.system ['touch pwned']\n",
    "nothing.yaml": b"name: a\n",
    "date.yaml": b"name: 2024-13-45\n",
    "text.yaml": b"just a sentence\n",
}


def command(*arguments):
    return list(arguments)


def setting(*texts):
    return ["run", "recipe.yaml", *(part for text in texts for part in ("--set", text))]


def data(name, **more):
    return setting(f"phase1.data=[{json.dumps({'path': name, 'lang': 'en', **more})}]")


CASES = {
    # the command line
    "no such command": (command("trian"), "trian"),
    "no such option": (command("run", "recipe.yaml", "--replya"), "--replya"),
    "no recipe given": (command("run"), "recipe"),
    "no such recipe": (command("run", "quickstrat"), "no recipe 'quickstrat'"),
    "a folder as the recipe": (command("run", "folder"), "is a folder, not a recipe"),
    "a name too long for any disk": (command("run", "r" * 5000), "there is no recipe"),
    "a number that is none": (command("phase2", "x", "--replay", "much"), "--replay"),
    "a ratio over the limit": (
        command("phase2", "x", "--model", "tiny", "--data", "en=good.jsonl", "--replay", "1"),
        "outside [0, 0.9]",
    ),
    "an anchor nobody has": (
        command("phase2", "x", "--model", "tiny", "--data", "en=good.jsonl", "--anchor", "kll"),
        "there is no anchor 'kll'",
    ),
    "an anchor that pushes away": (
        command("phase1", "x", "--model", "tiny", "--data", "good.jsonl", "--anchor", "kl:-1"),
        "-1 is below 0",
    ),
    "a loss of replay nobody has": (
        command("phase2", "x", "--model", "tiny", "--data", "en=good.jsonl", "--replay", "0.1", "--replay-loss", "x"),
        "phase2.replay.loss: 'x'",
    ),
    "a loss of replay without replay": (
        command("phase2", "x", "--model", "tiny", "--data", "en=good.jsonl", "--replay-loss", "distil"),
        "--replay-loss: the phase has no replay",
    ),
    "a phase 1 without a model": (command("phase1", "x", "--data", "good.jsonl"), "phase1 needs a model"),
    "a phase 1 without data": (command("phase1", "x", "--model", "tiny"), "phase1 has no data"),
    "a phase 2 without a run": (command("phase2"), "there is no run with a phase 1"),
    "no run to show": (command("show"), "there is no run"),
    "no such run": (command("show", "nope"), "there is no run 'nope'"),
    "no run to merge": (command("merge", "nope"), "there is no run 'nope'"),
    "no run to remove": (command("rm", "nope"), "there is no run 'nope'"),
    "a run that is a path": (command("rm", "../folder"), "there is no run '../folder'"),
    "nowhere to export to": (command("export", "x"), "--to"),
    "scales that are none": (command("dial", "x", "--scales", "a:b"), "there is no run"),
    "no such layers": (command("layers", "nothing-here"), "is not an embedded model, a file or a folder"),
    "no such built-in recipe": (command("recipes", "--show", "quikstart"), "no built-in recipe 'quikstart'"),
    "a run name with a slash": (command("run", "recipe.yaml", "--as", "a/b"), "cannot name a run"),
    "a run name that is not a name": (command("run", "recipe.yaml", "--as", ".."), "cannot name a run"),
    "a run name that is empty": (command("run", "recipe.yaml", "--as", ""), "--as: the value given is empty"),
    "an option without its value": (command("check", "recipe.yaml", "--vram"), "--vram"),
    "a size without its unit": (command("check", "recipe.yaml", "--vram", "8"), "--vram '8' is not a size"),
    "an encoder that is none": (command("check", "recipe.yaml", "--encoder", ""), "--encoder: the value given"),
    "runs without a name": (command("ls", "--runs", ""), "--runs: the value given is empty"),
    "runs behind a link that leads nowhere": (
        command("run", "recipe.yaml", "--runs", "dangling"),
        "is a link that leads nowhere",
    ),
    "runs below a file": (command("run", "recipe.yaml", "--runs", "good.jsonl/runs"), "is a file"),
    # recipes
    **{f"the recipe {name}": (command("run", name), says) for name, says in {
        "empty.yaml": "a recipe is a mapping of keys, not nothing",
        "list.yaml": "a recipe is a mapping of keys, not a list",
        "text.yaml": "a recipe is a mapping of keys, not text",
        "open.yaml": "not readable as YAML",
        "tabs.yaml": "not readable as YAML",
        "binary.yaml": "not readable as YAML",
        "twice.yaml": "the key 'name' is given twice",
        "deep.yaml": "not readable as YAML",
        "bomb.yaml": "more than 100,000 values",
        "python.yaml": "not readable as YAML",
        "date.yaml": "not readable as YAML",
        "nothing.yaml": "'model' is missing",
    }.items()},
    "an unknown key": (setting("phase1.train.lrr=1"), "unknown key 'phase1.train.lrr'"),
    "an unknown phase": (setting("phase9.freeze=none"), "no phase or recipe key 'phase9'"),
    "no value": (setting("seed"), "not KEY=VALUE"),
    "a value that is not YAML": (setting("seed=[1"), "the value cannot be read"),
    "a rate that is a word": (setting("phase1.train.lr=fast"), "phase1.train.lr: 'fast'"),
    "a rate that is a truth": (setting("phase1.train.lr=true"), "phase1.train.lr"),
    "an infinite rate": (setting("phase1.train.lr=.inf"), "phase1.train.lr: inf"),
    "a negative seed": (setting("seed=-1"), "seed: -1"),
    "a seed too large": (setting(f"seed={2**32}"), f"seed: {2**32}"),
    "more epochs than a life": (setting("phase1.train.epochs=1e308"), "rows to train on"),
    "more steps than a life": (setting(f"phase1.train.steps={10**12}"), "rows to train on"),
    "a rank over all ranks": (setting("lora.r=100000"), "more than the rank"),
    "a rank of nothing": (setting("lora.r=0"), "lora.r: 0"),
    "half a batch": (setting("phase1.train.batch=2.5"), "phase1.train.batch: 2.5"),
    "all rows held out": (setting("heldout.share=1"), "heldout.share: 1"),
    "a schedule nobody has": (setting("phase1.train.scheduler=cosin"), "no scheduler 'cosin'"),
    "an optimizer nobody has": (setting("phase1.train.optimizer=adamm"), "no optimizer 'adamm'"),
    "a field TRL lacks": (setting("phase1.train.sft={max_grad_nrom: 1}"), "no field 'max_grad_nrom'"),
    "a loss TRL lacks": (setting("phase1.train.sft={loss_type: dtf}"), "no loss_type 'dtf'"),
    "a loss that TRL does not smooth": (
        setting("phase1.train.sft={loss_type: dft, label_smoothing_factor: 0.1}"),
        "loss_type dft and label_smoothing_factor",
    ),
    "an anchor beside another loss": (
        setting("phase1.anchor=kl", "phase1.train.sft={loss_type: dft}"),
        "train.sft.loss_type changes the cross-entropy",
    ),
    "an anchor beside smoothed labels": (
        setting("phase1.anchor=kl", "phase1.train.sft={label_smoothing_factor: 0.1}"),
        "train.sft.label_smoothing_factor changes the cross-entropy",
    ),
    "a field qcft sets": (setting("phase1.train.sft={output_dir: x}"), "output_dir is set by qcft itself"),
    "a token in a field": (setting("phase1.train.sft={hub_token: abc}"), "hub_token is set by qcft itself"),
    "a token in a value": (setting(f"model.revision=hf_{'a' * 34}"), "contains an access token"),
    "half a character": (setting('phase1.system="\\ud800"'), "half a character"),
    "a tracker nobody has": (setting("phase1.train.report_to=[mlflaw]"), "'mlflaw' is not known"),
    "a freeze spec nobody has": (setting("phase1.freeze=frist:2"), "'frist:2'"),
    "all layers frozen": (setting("phase1.freeze=first:3"), "freezes all 3 layers"),
    "a layer the model lacks": (setting("phase1.freeze=layers:7"), "names layer 7"),
    "modules the model lacks": (setting("lora.targets=[q_porj]"), "no linear module 'q_porj'"),
    "a field PEFT lacks": (setting("lora.peft={use_doar: true}"), "unknown key 'lora.peft.use_doar'"),
    "a field of PEFT that qcft sets": (setting("lora.peft={target_modules: [q_proj]}"), "is set by qcft itself"),
    "a field of PEFT that cannot be merged": (
        setting("lora.peft={modules_to_save: [lm_head]}"),
        "modules_to_save: qcft trains adapters",
    ),
    "a field of PEFT that is not true or false": (setting("lora.peft={use_dora: much}"), "lora.peft.use_dora: 'much'"),
    "fields of PEFT that are none": (setting("lora.peft=dora"), "lora.peft: 'dora'"),
    "PiSSA on 4 bits": (
        setting("lora.peft={init_lora_weights: pissa_niter_4}"),
        "'pissa_niter_4' changes the weights under the adapter",
    ),
    "an adapter that begins at random": (
        setting("lora.peft={init_lora_weights: false}"),
        "false starts from a random change",
    ),
    "a rank of modules the model lacks": (
        setting("lora.peft={rank_pattern: {q_porj: 2}}"),
        "no adapted module's name ends in 'q_porj'",
    ),
    "a rank of modules over all ranks": (
        setting("lora.peft={rank_pattern: {q_proj: 1000}}"),
        "lora.peft.rank_pattern.q_proj: 1000 is more than the rank",
    ),
    "a pattern that is none": (setting('lora.peft={alpha_pattern: {"q(": 2}}'), "'q(' is not a pattern"),
    "an alpha of nothing": (setting("lora.peft={alpha_pattern: {q_proj: 0}}"), "q_proj: 0"),
    "a bias where there is none": (setting("lora.peft={lora_bias: true}"), "has no bias"),
    "DoRA with a bias": (setting("lora.peft={use_dora: true, lora_bias: true}"), "PEFT has no lora_bias for DoRA"),
    "a phase named twice": (
        setting("phases=[{name: a, data: good.jsonl}, {name: a, data: good.jsonl}]"),
        "two phases are named 'a'",
    ),
    "a phase with qcft's own word": (
        setting("phases=[{name: merged, data: good.jsonl}]"),
        "'merged' would be mistaken for a stage that qcft makes itself",
    ),
    "no phases": (setting("phases=[]"), "phases"),
    "an anchor that is a number": (setting("phase1.anchor=0.5"), "phase1.anchor: 0.5 is not an anchor"),
    "distilling on no rows": (setting("phase1.replay={ratio: 0, loss: distil}"), "has no rows to distil on"),
    "replay of a file without one": (setting("phase1.replay={ratio: 0.1, kind: file}"), "needs path: FILE"),
    "replay of a phase there is not": (
        setting("phase1.replay={ratio: 0.1, kind: phase1, phase: zero}"),
        "not a phase before phase1",
    ),
    "replay in a language that cannot be identified": (
        setting("phase1.replay={ratio: 0.1, filters: {language: xx}}"),
        "not a language that can be identified",
    ),
    "more replay than there is": (
        setting("phase1.replay={ratio: 0.9, kind: english, parallel: false, data: good.jsonl}"),
        "can be made",
    ),
    # data
    **{f"the data {name}": (data(name), says) for name, says in {
        "nowhere.jsonl": "there is no file 'nowhere.jsonl'",
        "empty.jsonl": "is empty",
        "blank.jsonl": "is empty",
        "odd.jsonl": "no known format",
        "wide.jsonl": "column11 and 2988 more: no known format",
        "prose.jsonl": "prose.jsonl' are not JSON objects; the first is line 1",
        "numbers.json": "the first is entry 1",
        "object.json": "holds an object, not a list of records",
        "open.json": "not readable as JSON",
        "deep.json": "not readable as JSON",
        "unanswered.jsonl": "9 empty answer",
        "roles.jsonl": "unknown role 'wizard'",
        "halves.jsonl": "9 broken Unicode",
        "utf16.jsonl": "are not JSON objects",
        "cut.jsonl.gz": "cannot be read",
        "flipped.jsonl.gz": "cannot be read",
        "bad.parquet": "not readable as parquet",
        "bad.csv": "line 2: a quote opens here and is not closed",
        "latin.csv": "not readable as CSV",
        "notes.docx": "has an unsupported file type",
        "one.jsonl": "held-out share",
        "long.jsonl": "none of the",
        "folder": "holds no data files",
        "qcft:instructions/xx": "no data named 'qcft:instructions/xx'",
        "someone/rows": "in the local cache",
        "": "'' should not be empty",
    }.items()},
    "a format nobody has": (data("good.jsonl", format="alpacca"), "alpacca"),
    "a take of nothing": (data("good.jsonl", take=0), "take: 0"),
    "languages without a place for them": (
        setting("phase1.data=[{path: good.jsonl, lang: [es, pt]}]"),
        "no {lang} in path",
    ),
    # models
    **{f"the model {name}": (setting(f"model.name={name}"), says) for name, says in {
        "smollm2-135m-instuct": "is not an embedded model",
        "folder": "holds no model",
        "cut.gguf": "truncated",
        "text.gguf": "is not a GGUF file",
        "good.jsonl": "but not a .gguf file",
        "nowhere.gguf": "there is no file or folder",
        "someone/something": "in the local cache",
        "untemplated": "no chat template",
        "untokenised": "no tokenizer could be read",
        "cut": "truncated or altered",
        "pickled": "only pickled weights",
        "quantised": "quantised already",
        "garbled": "config.json",
        "unheard": "unheard_of",
        "shardless": "lacks model-00002-of-00002.safetensors",
        "adapter": "holds no model",
        "m" * 3000: "is not an embedded model, a file or a folder",
    }.items()},
    "an attention nobody has": (setting("model.attn_implementation=flash_attention_9"), "flash_attention_9"),
    # adapters
    **{f"the adapter {name}": (setting(f"phase1={{adapter: {name}}}"), says) for name, says in {
        "nowhere": "no folder 'nowhere'",
        "folder": "has no adapter_config.json",
        "pickled-adapter": "has no adapter_model.safetensors",
        "cut-adapter": "truncated or altered",
        "prefix-adapter": "not LORA",
        "adapter": "which the model lacks",
    }.items()},
}  # fmt: skip


@pytest.fixture
def place(raw_recipe, tiny_model, tmp_path, monkeypatch):
    """A folder with everything that can be wrong."""
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    raw = {**raw_recipe, "phases": raw_recipe["phases"][:1]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    write_rows(tmp_path / "good.jsonl", GOOD)
    for name, content in {**DATA, **RECIPES}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(8))
    (tmp_path / "text.gguf").write_bytes(b"I am a model")
    models(tiny_model, tmp_path)
    return tmp_path


def models(tiny_model, folder):
    def copy(name, *without):
        made = shutil.copytree(tiny_model, folder / name)
        for file in without:
            (made / file).unlink()
        return made

    copy("tiny")
    copy("untemplated", "chat_template.jinja")
    copy("untokenised", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    cut = copy("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    (copy("pickled", "model.safetensors") / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (copy("garbled") / "config.json").write_text("{oops")
    for name, change in {
        "quantised": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "unheard": {"model_type": "unheard_of"},
    }.items():
        config = copy(name) / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shardless = copy("shardless")
    (shardless / "model.safetensors").rename(shardless / "model-00001-of-00002.safetensors")
    (shardless / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter(folder / "adapter", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    adapter(folder / "prefix-adapter", {"peft_type": "PREFIX_TUNING"})
    adapter(folder / "cut-adapter", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    cut = folder / "cut-adapter" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])
    adapter(folder / "pickled-adapter", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    (folder / "pickled-adapter" / "adapter_model.safetensors").rename(folder / "pickled-adapter" / "adapter_model.bin")


def adapter(folder, config):
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.9.self_attn.q_proj"
    save_file(
        {f"{module}.lora_A.weight": torch.ones(4, 64), f"{module}.lora_B.weight": torch.ones(64, 4)},
        folder / "adapter_model.safetensors",
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-")[:60])
def test_bad_input_gives_two_lines_and_nothing_is_written(qcft, place, case):
    check_refused(qcft, place, *CASES[case])


def test_there_are_sixty_of_them():
    assert len(CASES) >= 60


@pytest.mark.parametrize(
    "case", ["no such command", "the recipe bomb.yaml", "the data halves.jsonl", "a token in a value"]
)
def test_the_same_from_a_separate_process(place, case):
    arguments, says = CASES[case]
    before = listing(place)
    done = subprocess.run(
        [sys.executable, "-m", "qcft", *arguments], cwd=place, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert listing(place) == before
