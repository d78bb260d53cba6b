"""Models that people download most, with configs of their real shape made smaller, through the whole chain."""

from pathlib import Path

import pytest

from .helpers.families import FAMILIES
from .helpers.whole_chain import one_family

RIGHT = {"loads": "yes", "scores": "yes", "generates": "yes", "pads": "yes", "two phases": "yes", "merge": "yes"}
PACKED = [
    "llama3", "qwen2", "qwen3", "gemma3_wrapper", "gemma4_wrapper", "mistral", "ministral3_wrapper", "phi4", "smollm3",
]  # fmt: skip
PADDED = ["qwen3_5_wrapper", "granite4", "gpt_oss"]


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_a_family_is_trained_merged_and_exported_as_it_should_be(name, tmp_path, monkeypatch):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    found = one_family(name, tmp_path)
    assert found | RIGHT == found, found
    assert found["export"] == "yes"
    assert found["packs"] == ("yes" if name in PACKED else "no")
    assert ("note" in found) == (name in PADDED)
    assert "UNSAID" not in found.get("note", "")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("deepseek_v3", "linear modules of deepseek_v3, such as model.layers.0.mlp.down_proj, onto its experts"),
        ("llama4_wrapper", "llama4_text has no inner model separate from its head"),
        ("gpt2", "hold no linear modules"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_runs(name, says, tmp_path, monkeypatch):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    found = one_family(name, tmp_path)
    assert says in found["refused"]
    assert not (tmp_path / "runs").exists()


def test_the_list_of_families_names_all_that_were_tried():
    text = (Path(__file__).parents[1] / "recipes" / "README.md").read_text()
    assert [kind for kind, _ in FAMILIES.values() if f"`{kind}`" not in text] == []
