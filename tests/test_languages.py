"""Languages of data: codes in flags are explained; where a source has none, it is guessed, reported and kept."""

import json

import pytest

from qcft import InputError
from qcft.cli.data_flags import source_keys, sources_of
from qcft.events import Note, Watch
from qcft.prepare.prepared import Prepared
from qcft.recipe import recipe_from

from .helpers.tiny import write_rows

SPANISH = [f"¿Cuál es la capital del país número {i}, y por qué es conocida en todo el mundo?" for i in range(40)]
GERMAN = [f"Wie heißt die Hauptstadt des Landes Nummer {i}, und wofür ist sie bekannt?" for i in range(40)]


def data(path, texts):
    return str(write_rows(path, [{"instruction": text, "output": "12"} for text in texts]))


def prepared(raw, events):
    return Prepared(recipe_from(raw), Watch(events.append))


def phases(raw_recipe, first, second):
    one, two = raw_recipe["phases"]
    return {**raw_recipe, "phases": [{**one, "data": [first]}, {**two, "data": [second], "replay": None}]}


def warnings(events):
    return [event.text for event in events if isinstance(event, Note) and event.level == "warning"]


def test_the_language_of_a_second_phase_is_guessed_and_reported(raw_recipe, tmp_path):
    events = []
    german, spanish = data(tmp_path / "de.jsonl", GERMAN), data(tmp_path / "es.jsonl", SPANISH)
    found = prepared(phases(raw_recipe, german, spanish), events)
    assert [group.name for group in found.groups][:2] == ["phase1 ?", "phase2 es"]  # a first phase is as it was
    (text,) = warnings(events)
    assert text.startswith(f"data: {spanish} has no lang: taken as es (100% of ")
    assert text.endswith("set it with lang: es, or --data es=PATH")
    assert [source.lang for source in found.recipe.phases[1].data] == ["es"]
    again = []
    assert [group.name for group in prepared(json.loads(found.recipe.model_dump_json()), again).groups] == [
        group.name for group in found.groups
    ]
    assert warnings(again) == []


@pytest.mark.parametrize("texts", [[x for pair in zip(SPANISH, GERMAN, strict=True) for x in pair], ["12"] * 40])
def test_what_is_not_clear_stays_unknown(raw_recipe, tmp_path, texts):
    events = []
    texts = [f"{text} {i}" for i, text in enumerate(texts)]
    german = {"path": data(tmp_path / "de.jsonl", GERMAN), "lang": "de"}
    found = prepared(phases(raw_recipe, german, data(tmp_path / "mixed.jsonl", texts)), events)
    assert [group.name for group in found.groups][:2] == ["phase1 de", "phase2 ?"]
    assert "its language is not clear, so tables show it as ?" in warnings(events)[0]


def test_one_phase_on_an_unmodified_model_and_a_test_set(raw_recipe, tmp_path):
    events = []
    raw = {**raw_recipe, "phases": [{"name": "phase2", "data": data(tmp_path / "es.jsonl", SPANISH)}]}
    raw["heldout"] = {"share": 0.3, "rows": 5, "data": data(tmp_path / "test.jsonl", GERMAN)}
    found = prepared(raw, events)
    assert [group.name for group in found.groups] == ["phase2 es", "test de", "probe en"]
    assert len(warnings(events)) == 2


def test_languages_that_are_named_are_used(raw_recipe, tmp_path):
    events = []
    german = {"path": data(tmp_path / "de.jsonl", GERMAN), "lang": "de"}
    prepared(phases(raw_recipe, german, {**german, "path": data(tmp_path / "x.jsonl", SPANISH)}), events)
    assert warnings(events) == []


@pytest.mark.parametrize(
    ("given", "says", "hint"),
    [
        ("VI=vi.jsonl", "'VI' is not a language code", "did you mean vi=vi.jsonl? a language code is two or three"),
        ("Spanish=es.jsonl", "'Spanish' is not a language code", "a language code is two or three lower-case letters"),
        ("pt_BR=pt.jsonl", "'pt_BR' is not a language code", "a language code is"),
        ("es=", "the path is missing", "a language code is"),
    ],
)
def test_language_codes_are_explained(given, says, hint):
    with pytest.raises(InputError) as error:
        sources_of([given])
    assert error.value.message == f"data: {given!r}: {says}"
    assert error.value.hint.startswith(hint)


def test_languages_and_splits_in_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set" / "lang=es").mkdir(parents=True)
    (tmp_path / "set" / "a=b.jsonl").write_text("")

    def place(text):
        (found,) = sources_of([text])
        return {key: value for key, value in found.items() if value is not None}

    here = str(tmp_path / "set")
    assert place("es=set") == {"path": here, "lang": "es"}
    assert place("es=set/test") == {"path": here, "split": "test", "lang": "es"}
    assert place("set/a=b.jsonl") == {"path": f"{here}/a=b.jsonl"}
    assert place("set/lang=es") == {"path": f"{here}/lang=es"}
    assert place("set/es/train") == {"path": "set/es/train"}  # no such folder: not a hub id
    assert place("set/x.jsonl") == {"path": "set/x.jsonl"}
    assert place("es=google/xquad") == {"path": "google/xquad", "lang": "es"}
    assert place("es=google/xquad/validation") == {"path": "google/xquad", "split": "validation", "lang": "es"}
    assert place("google/xquad@v1.0") == {"path": "google/xquad", "revision": "v1.0"}
    assert place("google/xquad/test@abc") == {"path": "google/xquad", "split": "test", "revision": "abc"}
    assert place("qcft:passages/es") == {"path": "qcft:passages/es"}


def test_keys_of_every_source():
    keys = source_keys(5, "instruction=question, output=answer")
    assert keys == {"take": 5, "columns": {"instruction": "question", "output": "answer"}}
    assert sources_of(["a", "es=b"], keys, lang="en") == [
        {"path": "a", "lang": "en", **keys},
        {"path": "b", "lang": "es", **keys},
    ]
    assert source_keys(None, None) == {}
    with pytest.raises(InputError, match=r"'question' is not NAME=COLUMN"):
        source_keys(None, "question")
