"""The model card of an exported model: what it is, its data, its recipe, EA and MA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from qcft.files import write_text
from qcft.models.embedded import public_name
from qcft.recipe import Recipe
from qcft.recipe.shared import shared_yaml, without_folders
from qcft.report.cells import stage_name, stage_rows
from qcft.report.markdown import code, fenced, line, markdown_table
from qcft.report.standing import mean_of
from qcft.safe import plain
from qcft.store.table import RunTable

MODEL = """from transformers import pipeline

chat = pipeline("text-generation", model=".")  # this folder
answer = chat([{{"role": "user", "content": "What is a verb?"}}], max_new_tokens=128)
print(answer[0]["generated_text"][-1]["content"])
"""
ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, ".")  # this folder
chat = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained("."))
answer = chat([{{"role": "user", "content": "What is a verb?"}}], max_new_tokens=128)
print(answer[0]["generated_text"][-1]["content"])
"""
GGUF = """llama-cli -m {file} -cnv          # or: llama-server -m {file}
"""
OLLAMA = "ollama create {name} -f Modelfile && ollama run {name}\n"


@dataclass(frozen=True)
class Use:
    """How to use what a folder contains: the library's name on the hub, a code snippet, its language."""

    library: str
    snippet: str
    language: str = "python"
    tags: tuple[str, ...] = ()


A_MODEL, AN_ADAPTER = Use("transformers", MODEL), Use("peft", ADAPTER)


def gguf_use(file: str, ollama: str | None) -> Use:
    """How to use a GGUF file; `ollama`: its name in Ollama."""
    snippet = GGUF.format(file=file) + (OLLAMA.format(name=ollama) if ollama else "")
    return Use("gguf", snippet, "sh", ("gguf",))


def write_card(folder: Path, recipe: Recipe, table: RunTable, stage: str, what: str, use: Use) -> None:
    """Write `folder/README.md`. `stage`: the model's stage in the table; `what`: how the model was made."""
    base = public_name(recipe.model.name)
    languages = sorted({g["lang"] for g in table["groups"] if g["lang"] != "?"})
    front: dict[str, object] = {
        "base_model": base,
        **({"language": languages} if languages else {}),
        "library_name": use.library,
        "pipeline_tag": "text-generation",
        "tags": ["qcft", "lora", "continual-fine-tuning", *use.tags],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {line(recipe.name)}\n",
        f"{line(what)} Base model: {code(base)}. Made with qcft: continual fine-tuning in phases, "
        "measured on rows that were held out of training.\n",
        "## Use\n",
        fenced(use.snippet.format(base=base), use.language) + "\n",
        "## Data\n",
        *_data(recipe),
        "\n## English and multilingual ability (EA, MA)\n",
        _abilities(table, stage),
        "\nMean NLL in nats per answer token over held-out rows, lower is better; compare stages of one precision "
        "only.\n\n## All stages and languages\n",
        markdown_table(stage_rows(table)),
        "\nNLL and the share of answer tokens predicted right.\n\n## Recipe\n",
        fenced(shared_yaml(recipe), "yaml") + "\n",
    ]
    write_text(folder / "README.md", plain("\n".join(parts)))


def _abilities(table: RunTable, last: str) -> str:
    rows = []
    for stage in table["stages"]:
        if stage["stage"] not in {"eval/base-16bit", "eval/base", last}:
            continue
        row = {"stage": stage_name(stage)}
        for title, english in (("EA (English)", True), ("MA (other languages)", False)):
            scores = [stage["groups"][g["name"]] for g in table["groups"] if g["english"] is english]
            mean = mean_of(scores)
            row[title] = "-" if mean is None else f"{mean:.3f} ({sum(s['rows'] for s in scores)} rows)"
        rows.append(row)
    return markdown_table(rows)


def _data(recipe: Recipe) -> list[str]:
    lines = []
    for phase in recipe.phases:
        if phase.adapter:
            lines.append(f"- {phase.name}: an adapter made elsewhere, {code(without_folders(phase.adapter))}")
        for source in phase.sources():
            take = f", first {source.take:,} rows" if source.take else ""
            lang = line(str(source.lang or "language not given"))
            lines.append(f"- {phase.name}: {code(without_folders(source.path))} ({lang}{take})")
    return lines
