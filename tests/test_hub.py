"""A hub that fails midway, on this machine: retried, resumed, then reported; no incomplete download is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers.fake_hub import COMMIT, FakeHub
from .helpers.tiny import write_rows

ROOT = Path(__file__).parents[1]
FETCH = """
from huggingface_hub import constants
from qcft import QcftError, hub
from qcft.events import Watch
from qcft.models.sources import resolve, weights_folder
from qcft.recipe import Model
hub.WAIT = 0.1
constants.DOWNLOAD_CHUNK_SIZE = 4096  # of 10 MB, in which a tiny model is fetched whole or not at all
try:
    folder = weights_folder(resolve(Model(name="someone/tiny")), Watch(lambda event: print("note:", event.text)))
    print("folder:", folder)
except QcftError as error:
    print("error:", error.message, "| hint:", error.hint, "|", error.exit_code)
"""


@pytest.fixture
def fetch(tmp_path, tiny_model):
    """The hub, and fetching the model from it in a process of its own: what it prints."""
    hub = FakeHub(models={"someone/tiny": tiny_model})

    def run(code=FETCH, **environment):
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
        places = {"HF_HOME": str(tmp_path / "hf"), "QCFT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        timeouts = {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2", "TQDM_DISABLE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **places, **timeouts, **environment}, cwd=tmp_path,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    run.hub = hub
    yield run
    hub.close()


def blobs(tmp_path):
    return list((tmp_path / "hf").glob("hub/models--someone--tiny/blobs/*"))


def test_a_model_is_fetched_once_pinned_and_complete(fetch, tiny_model, tmp_path):
    folder = Path(fetch().removeprefix("folder: ").strip())
    assert folder.name == COMMIT
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    fetch.hub.asked.clear()
    assert str(folder) in fetch()
    assert not [one for one in fetch.hub.asked if "resolve" in one]  # looked up, not fetched again
    fetch.hub.close()
    assert str(folder) in fetch()  # and not needed any more


@pytest.mark.parametrize("faults", [[503, 503], ["cut"], ["stall", "cut", 500]])
def test_a_download_that_fails_midway_is_retried_and_resumed(fetch, tiny_model, faults):
    fetch.hub.faults["model.safetensors"] = list(faults)
    said = fetch()
    folder = Path(said.splitlines()[-1].removeprefix("folder: "))
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    if "cut" in faults:
        assert any("resolve" in one and "bytes=" in one for one in fetch.hub.asked)  # not from the beginning
    if 503 in faults:
        assert said.count("note: someone/tiny: the hub fails (") == 2


def test_a_hub_that_keeps_failing_is_reported_and_half_a_model_is_never_used(fetch, tiny_model):
    fetch.hub.faults["model.safetensors"] = [500] * 50
    said = fetch().splitlines()
    assert said[-1].startswith("error: model: 'someone/tiny' could not be loaded from the hub: ")
    assert "500" in said[-1]
    assert len(said) == 4  # three more tries were reported
    # Config and tokenizer are in the cache by now: without a hub, that is not a model.
    offline = fetch(HF_HUB_OFFLINE="1")
    assert "error: model: 'someone/tiny' is not (completely) in the local cache, and " in offline
    fetch.hub.faults.clear()
    assert "folder: " in fetch()
    assert "folder: " in fetch(HF_HUB_OFFLINE="1")


def test_what_others_fetched_is_used_where_the_hub_cannot_be_reached(fetch):
    """By `hf download`, say, before qcft was ever asked for the model."""
    place = fetch("from huggingface_hub import snapshot_download; print(snapshot_download('someone/tiny'))").strip()
    fetch.hub.close()
    assert f"folder: {place}" in fetch()
    assert f"folder: {place}" in fetch(HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_an_altered_file_in_the_hubs_cache_is_named_and_fetched_again(fetch, tiny_model, tmp_path, damage):
    folder = Path(fetch().removeprefix("folder: ").strip())
    blob = (folder / "model.safetensors").resolve()
    data = blob.read_bytes()
    if damage == "gone":
        blob.unlink()
    else:
        blob.write_bytes(data[:-9] if damage == "cut" else data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    said = fetch()
    assert "note: someone/tiny: model.safetensors in the hub's cache is missing or altered; it is fetched again" in said
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_no_such_model_and_pickled_weights(fetch, tiny_model, tmp_path):
    assert "error: model: there is no 'someone/tiny' on the hub" in fetch(HF_ENDPOINT=fetch.hub.url + "/nowhere")
    fetch.hub.repos[("models", "someone/tiny")] = pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"never fetched")
    assert "has no safetensors on the hub" in fetch()
    assert not [one for one in fetch.hub.asked if "pytorch_model" in one]


READ = """
from qcft import QcftError
from qcft.data.load import load_source
from qcft.events import Watch
from qcft.recipe import HeldOut, Source
try:
    found = load_source(Source(path="someone/rows", take={take}), HeldOut(share=0.2, rows=5), Watch())
    print("rows:", len(found.rows), found.digest)
except QcftError as error:
    print("error:", error.message, "|", error.hint)
"""


def test_a_data_set_is_read_from_the_hub_completely_or_not_at_all(fetch, tmp_path):
    rows = [{"instruction": f"q {i}", "output": f"a {i}"} for i in range(200)]
    write_rows(tmp_path / "rows" / "train.jsonl", rows)
    fetch.hub.repos[("datasets", "someone/rows")] = tmp_path / "rows"
    fetch.hub.faults["train.jsonl"] = [500] * 50
    said = fetch(READ.format(take=None))
    assert said.startswith("error: data: 'someone/rows' could not be loaded from the hub"), said
    fetch.hub.faults["train.jsonl"] = ["cut"]
    whole = fetch(READ.format(take=None))
    assert whole.startswith("rows: 1"), whole
    assert fetch(READ.format(take=20)).startswith("rows: 20 ")  # streamed
    fetch.hub.close()
    assert fetch(READ.format(take=None), HF_HUB_OFFLINE="1") == whole


def test_a_download_beyond_the_limit_is_refused_before_a_byte_of_it_is_fetched(fetch, tmp_path):
    """The limit is said, with the variable that sets it; of a model, a description alone, a data set."""
    write_rows(tmp_path / "rows" / "train.jsonl", [{"instruction": f"q {i}", "output": "a"} for i in range(200)])
    fetch.hub.repos[("datasets", "someone/rows")] = tmp_path / "rows"
    limit = {"QCFT_MAX_DOWNLOAD": "0.000001"}
    said = fetch(**limit)
    assert said.startswith("error: model: 'someone/tiny' is a download of 0.0 GB, more than the limit of 1e-06 GB"), (
        said
    )
    assert "| hint: use a smaller one, or set QCFT_MAX_DOWNLOAD" in said
    assert "more than the limit" in fetch(FETCH.replace("weights_folder", "described_folder"), **limit)
    assert "error: data: 'someone/rows' is a download of" in fetch(READ.format(take=None), **limit)
    assert not [one for one in fetch.hub.asked if one.startswith("GET") and "resolve" in one and "README" not in one]
    assert "QCFT_MAX_DOWNLOAD='much' is not a size" in fetch(QCFT_MAX_DOWNLOAD="much")
    assert "folder: " in fetch(QCFT_MAX_DOWNLOAD="1 GB")
    assert "folder: " in fetch(**limit)  # nothing is fetched any more
    assert fetch(READ.format(take=None)).startswith("rows: ")


PART = """
from qcft import QcftError
from qcft.data.sources import read_records
from qcft.recipe import Source
for keys in {keys}:
    try:
        rows = read_records(Source(path="someone/rows", **keys))
        print("rows:", sorted({{row["instruction"].split()[0] for row in rows}}))
    except QcftError as error:
        print("error:", error.message, "|", error.hint)
"""


def test_a_split_and_a_subset_of_the_hub_are_obeyed_or_refused_with_what_there_is(fetch, tmp_path):
    for file in ("es/train.jsonl", "es/test.jsonl", "pt/train.jsonl"):
        lang, split = Path(file).parts[0], Path(file).stem
        write_rows(tmp_path / "rows" / file, [{"instruction": f"{lang}-{split} {i}", "output": "a"} for i in range(9)])
    fetch.hub.repos[("datasets", "someone/rows")] = tmp_path / "rows"
    subsets = "".join(f"- config_name: {lang}\n  data_dir: {lang}\n" for lang in ("es", "pt"))
    (tmp_path / "rows" / "README.md").write_text(f"---\nconfigs:\n{subsets}---\n")
    asked = [
        {"subset": "es"},
        {"subset": "es", "split": "test"},
        {"subset": "pt", "split": "test"},
        {"subset": "fr"},
        {},
    ]
    expected = [
        "rows: ['es-train']",
        "rows: ['es-test']",
        "error: data: 'someone/rows' has no split 'test' | it has train: name one with split:",
        "error: data: 'someone/rows' has no subset 'fr' | it has es, pt: name one with subset:",
        "error: data: 'someone/rows' has several subsets | it has es, pt: name one with subset:",
    ]
    assert fetch(PART.format(keys=asked)).splitlines() == expected
    streamed = [{**keys, "take": 3} for keys in asked]
    assert fetch(PART.format(keys=streamed)).splitlines() == expected
