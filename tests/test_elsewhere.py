"""Exports for other programs: a GGUF file with its card, a Modelfile for Ollama, a folder on the hub."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from qcft.models.gguf_tools import find_tools
from qcft.models.ollama import NAME, find_pieces, go_template
from qcft.models.sources import check_gguf

from .helpers.bad_input import check_refused, listing
from .helpers.fake_hub import FakeHub

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A runs folder where the module's run is made once."""
    return tmp_path_factory.mktemp("elsewhere") / "runs"


@pytest.fixture
def runs(made, raw_recipe, qcft, tmp_path):
    """A finished run `tiny` of one phase."""
    raw = {**raw_recipe, "phases": raw_recipe["phases"][:1], "answers": {"prompts": 0}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw))
    code, _, error = qcft("run", tmp_path / "tiny.yaml", "--runs", made, "-q")
    assert code == 0, error
    return made


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Programs on PATH that keep what they were called with, then do what is given."""
    place = tmp_path / "tools"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")

    def add(name, does=""):
        script = place / name
        script.write_text(
            f"#!{sys.executable}\nimport json, os, shutil, sys\n"
            f"json.dump([sys.argv[1:], os.getcwd()], open({str(place / name)!r} + '.called', 'w'))\n{does}\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return lambda: json.loads((place / f"{name}.called").read_text())

    return add


def test_a_gguf_file_is_in_its_folder_with_a_card_that_says_what_it_kept(runs, qcft, tmp_path):
    code, out, error = qcft(
        "export", "tiny", "--runs", runs, "--to", tmp_path / "out", "--gguf", "q8_0", "--ollama", "me/tiny", "--json"
    )
    assert code == 0, error
    found = json.loads(out)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "README.md", "tiny-phase1-Q8_0.gguf"]
    file = Path(found["file"])
    check_gguf(file)
    merged = json.loads((runs / "tiny" / "kept-merged" / "done.json").read_text())["metrics"]
    kept = found["kept"]
    assert (kept["groups"], kept["gain"]) == (merged["groups"], merged["gain"])
    assert kept["share"] is not None
    assert kept["share"] != merged["share"]
    assert abs(kept["loss"]["value"]) < kept["gain"]["value"] / 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"kept {kept['share']:.0%} of a gain of {kept['gain']['value']:.3f} nats" in card
    assert f"llama-cli -m {file.name}" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "gguf"
    assert "gguf" in front["tags"]
    modelfile = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert modelfile[0] == f"FROM ./{file.name}"
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "PARAMETER num_ctx 512" in modelfile
    assert found["ollama"] is None
    assert error.splitlines()[-1] == f"next: ollama create me/tiny -f {tmp_path / 'out' / 'Modelfile'}"
    assert f"kept {kept['share']:.0%}" in error


def test_what_a_file_kept_of_several_languages(raw_recipe, qcft, tmp_path):
    """Translations of one row are one observation, in the file's scores as in the run's."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**raw_recipe, "answers": {"prompts": 0}}))
    assert qcft("run", tmp_path / "tiny.yaml", "-q")[0] == 0
    code, out, error = qcft("export", "tiny", "--to", tmp_path / "out", "--gguf", "f16", "--json")
    assert code == 0, error
    kept = json.loads(out)["kept"]
    assert kept["groups"] == ["phase2 es", "phase2 pt"]
    assert (kept["gain"]["rows"], kept["gain"]["clusters"]) == (12, 6)
    merged = json.loads((tmp_path / "runs" / "tiny" / "kept-merged-phase2" / "done.json").read_text())["metrics"]
    assert kept["gain"] == merged["gain"]


def test_ollama_takes_the_modelfile_where_it_is_installed(runs, qcft, tools, tmp_path):
    called = tools("ollama")
    code, _, error = qcft("export", "tiny", "--runs", runs, "--to", tmp_path / "out", "--ollama", "tiny")
    assert code == 0, error
    assert called() == [["create", "tiny", "-f", str(tmp_path / "out" / "Modelfile")], str(tmp_path / "out")]
    assert error.splitlines()[-1] == "next: ollama run tiny"
    tools("ollama", "sys.exit('Error: could not connect to ollama app')")
    code, _, error = qcft("export", "tiny", "--runs", runs, "--to", tmp_path / "two", "--ollama", "tiny", "-q")
    assert code == 1
    assert "error: ollama create failed: Error: could not connect to ollama app" in error
    assert (tmp_path / "two" / "Modelfile").is_file()


def test_llama_cpps_tools_are_used_where_they_are_named(runs, qcft, tools, tmp_path):
    """The quantizer on what qcft wrote in bf16; the converter on a whole model folder, in an empty folder."""
    called = tools("llama-quantize", "shutil.copyfile(sys.argv[1], sys.argv[2])")
    code, out, error = qcft("export", "tiny", "--runs", runs, "--to", tmp_path / "out", "--gguf", "q4_k_m", "--json")
    assert code == 0, error
    (source, target, kind), place = called()
    assert (Path(source).name, kind, Path(target).name) == ("16bit.gguf", "Q4_K_M", "tiny-phase1-Q4_K_M.gguf")
    assert Path(place) not in (tmp_path, Path.cwd())
    given = tmp_path / "llama.cpp"
    given.mkdir()
    ready = shutil.copyfile(json.loads(out)["file"], tmp_path / "ready.gguf")
    (given / "beside.py").write_text("")
    (given / "convert_hf_to_gguf.py").write_text(
        "import beside, json, os, shutil, sys\n"
        f"open({str(given / 'called')!r}, 'w').write(json.dumps([sys.argv[1:], os.listdir(sys.argv[1])]))\n"
        f"shutil.copyfile({str(ready)!r}, sys.argv[3])\n"
    )
    flags = ("--gguf", "f16", "--llama-cpp", given)
    code, _, error = qcft("export", "tiny", "--runs", runs, "--to", tmp_path / "two", *flags, "-q")
    assert code == 0, error
    arguments, listed = json.loads((given / "called").read_text())
    assert arguments[1::2] == ["--outfile", "--outtype"]
    assert arguments[4] == "f16"
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(listed)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["README.md", "tiny-phase1-F16.gguf"]


def test_a_tool_that_fails_leaves_nothing(runs, qcft, tools, tmp_path):
    tools("llama-quantize", "sys.exit('quantize: unknown tensor')")
    code, _, error = qcft("export", "tiny", "--runs", runs, "--to", tmp_path / "out", "--gguf", "q4_k_m", "-q")
    assert code == 1
    assert "llama-quantize failed: quantize: unknown tensor" in error
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]
    given = tmp_path / "llama.cpp"
    given.mkdir()
    (given / "convert_hf_to_gguf.py").write_text("import no_such_module.part\n")
    flags = ("--to", tmp_path / "out", "--gguf", "f16", "--llama-cpp", given)
    code, _, error = qcft("export", "tiny", "--runs", runs, *flags, "-q")
    assert code == 1
    assert "hint: pip install no_such_module, which it needs, or export without --gguf" in error


def test_tools_on_a_relative_path_are_not_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    monkeypatch.setenv("PATH", ".")
    assert find_tools(None).converter is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_tools(None).converter == tmp_path / "convert_hf_to_gguf.py"


def test_a_family_that_is_not_known_is_refused_with_the_converters_command(qcft, raw_recipe, tiny_model, tmp_path):
    from qcft.recipe import recipe_from
    from qcft.store import open_run

    shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "olmo2"}))
    open_run(tmp_path / "runs", recipe_from({**raw_recipe, "model": {"name": str(tmp_path / "other")}}), {})
    arguments = ["export", "tiny", "--to", "out", "--gguf", "f16"]
    check_refused(qcft, tmp_path, arguments, "--gguf: qcft writes llama, mistral, qwen2, qwen3, gemma3_text")
    assert "convert_hf_to_gguf.py DIR" in qcft(*arguments)[2]


@pytest.mark.parametrize(
    ("name", "good"),
    [("tiny", True), ("me/tiny:q8_0", True), ("bad name!", False), ("-x", False), ("a/b/c/d", False), ("a:", False)],
)
def test_names_of_models_in_ollama(name, good):
    assert bool(NAME.fullmatch(name)) is good


CHATS = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", ["chatml", *CHATS])
def test_a_chat_template_becomes_gos(name, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, bos_token="<|endoftext|>")
    tokenizer.chat_template = CHATS.get(name, tokenizer.chat_template)
    pieces = find_pieces(tokenizer)
    turns = [("user", "Hi"), ("assistant", "Ho"), ("user", "Hu")]
    expected = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], tokenize=False, add_generation_prompt=True
    )
    assert pieces.render(["Hi", "Hu"], ["Ho"], None) == expected
    assert json.dumps(pieces.turn, ensure_ascii=False) in go_template(pieces)
    assert '"""' not in go_template(pieces)


def test_a_template_that_does_more_is_dropped(tokenizer, monkeypatch):
    counting = "{% for m in messages %}{{ loop.index ~ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}assistant:"
    monkeypatch.setattr(tokenizer, "chat_template", counting)
    assert find_pieces(tokenizer) is None


@pytest.fixture
def hub(tmp_path):
    hub = FakeHub()

    def run(*arguments, **more):
        places = {"HF_HOME": str(tmp_path / "hf"), "QCFT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        secret = {"HF_TOKEN": "hf_" + "s3cr3tT0ken" * 3, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        return subprocess.run(
            [sys.executable, "-P", *arguments], env={**os.environ, **places, **secret, **more}, cwd=tmp_path,
            capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    hub.run = run
    yield hub
    hub.close()


def test_a_folder_is_uploaded_private_once_it_is_complete(hub, runs, tmp_path):
    flags = ("--adapter-only", "--push", "me/tiny", "--yes")
    done = hub.run("-m", "qcft", "export", "tiny", "--runs", str(runs), "--to", "out", *flags)
    assert done.returncode == 0, done.stderr
    uploaded = hub.repos["models", "me/tiny"]
    ours = {name for name, *_ in listing(tmp_path / "out")}
    assert {name for name, *_ in listing(uploaded)} == ours
    assert (uploaded / "README.md").read_bytes() == (tmp_path / "out" / "README.md").read_bytes()
    assert "create me/tiny private" in hub.asked
    assert hub.private == {"me/tiny"}
    assert f"uploaded: {hub.url}/me/tiny" in done.stderr
    assert any("s3cr3t" in token for token in hub.tokens)
    assert "s3cr3t" not in done.stdout + done.stderr


UPLOAD = """
import os
import time
from pathlib import Path
from qcft import QcftError, hub
from qcft.events import Watch
from qcft.runner.upload import check_upload, upload
hub.WAIT = 0.01
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the hub's client waits up to 8 s before it tries again
for repo, public in (("me/new", True), ("me/new", False), ("me/more", False), ("me/more", True), ("me/none", False)):
    if repo == "me/none":
        os.environ.pop("HF_TOKEN")
    try:
        check_upload(repo, public)
        print(upload(Path("folder"), repo, public, Watch()))
    except QcftError as error:
        print(error.exit_code, error.message, error.hint)
"""


def test_nothing_is_uploaded_to_a_public_repository_without_a_flag(hub, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("hello")
    hub.faults["commit"] = [None] + [500] * 40
    new, unasked, failed, private, without = hub.run("-c", UPLOAD).stdout.splitlines()
    assert new == f"{hub.url}/me/new"
    assert hub.private == {"me/more"}
    assert unasked.startswith("2 --push: 'me/new' already exists on the hub and is public")
    assert failed.startswith("1 --push: the upload to 'me/more' failed: ")
    assert "500" in failed
    assert "hf upload me/more folder" in failed
    assert private.startswith("2 --push: 'me/more' already exists on the hub and is private")
    assert without.startswith("2 --push: no access token for the hub was found")
