"""DES against its definition, its interval against scipy's and against the truth; the command on static encoders."""

import json

import numpy as np
import pytest
import yaml

from qcft import InputError
from qcft.data.instructions import instructions
from qcft.measure.des import EmbeddingSums, similarity
from qcft.models import encoders
from qcft.recipe import Source
from tests.helpers.tiny import write_rows

from .helpers.encoders import static_encoder


def sums_of(embeddings, seed, parts=3):
    sums, draws = EmbeddingSums.empty(embeddings.shape[1]), np.random.default_rng(seed)
    for part in np.array_split(embeddings, parts):
        sums.add(part, draws)
    return sums


def cosine(a, b):
    x, y = a.mean(axis=0), b.mean(axis=0)
    return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


def clouds(rng, rows, width=8):
    """Two clouds about means whose cosine is known."""
    means = np.zeros((2, width))
    means[0, 0] = means[1, 0] = 1.0
    means[1, 1] = 0.7
    made = [mean + 0.8 * rng.normal(size=(rows, width)) for mean in means]
    return (*made, 1 / np.sqrt(1 + 0.7**2))


def test_it_is_the_cosine_of_the_means_however_the_rows_are_split():
    a, b, _ = clouds(np.random.default_rng(0), 200)
    found = similarity(sums_of(a, 1), sums_of(b[:150], 2, parts=7))
    assert found.value == pytest.approx(cosine(a, b[:150]), rel=1e-12)
    assert found.rows == (200, 150)
    assert similarity(sums_of(a[:80], 1) + sums_of(a[80:], 3), sums_of(b, 2)).value == pytest.approx(cosine(a, b))


def test_of_a_set_with_itself_it_is_one():
    a, _, _ = clouds(np.random.default_rng(0), 50)
    found = similarity(sums_of(a, 1), sums_of(a, 1))
    assert (found.value, found.low, found.high) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))


def test_the_interval_is_scipys():
    """Poisson resamples and drawing with replacement give the same interval, up to the resamples' noise."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    a, b, _ = clouds(rng, 120)
    found = similarity(sums_of(a, 1), sums_of(b, 2))

    def both(x, y, axis=-1):
        means = [np.take(values, index.astype(int), axis=0).mean(axis=1) for values, index in ((a, x), (b, y))]
        norms = [np.linalg.norm(mean, axis=-1) for mean in means]
        return (means[0] * means[1]).sum(axis=-1) / (norms[0] * norms[1])

    indices = (np.arange(120.0), np.arange(120.0))
    draws = rng.integers(0, 120, size=(2, 5000, 120))
    resampled = both(draws[0], draws[1])
    low, high = 2 * found.value - np.percentile(resampled, [97.5, 2.5])
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    interval = stats.bootstrap(
        indices, lambda x, y, axis=-1: both(np.atleast_2d(x), np.atleast_2d(y)).squeeze(), method="basic",
        vectorized=False, n_resamples=2000, rng=rng,
    ).confidence_interval  # fmt: skip
    assert found.low == pytest.approx(interval.low, abs=0.02)
    assert found.high == pytest.approx(min(1, interval.high), abs=0.02)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(7)
    held = 0
    for trial in range(200):
        a, b, truth = clouds(rng, 60)
        found = similarity(sums_of(a, 2 * trial), sums_of(b, 2 * trial + 1))
        held += found.low <= truth <= found.high
    assert 178 <= held <= 199  # of 200; 190 expected


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer_folder):
    pytest.importorskip("model2vec")
    return static_encoder(tmp_path_factory.mktemp("encoder") / "static", tokenizer_folder)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def by_hand(encoder, texts):
    """Normalised means of token vectors, as the format has it."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    vectors = load_file(encoder / "model.safetensors")["embeddings"]
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    means = np.stack([vectors[tokenizer.encode(t, add_special_tokens=False).ids].mean(axis=0) for t in texts])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def test_the_command_against_numpy_by_language_and_from_the_cache(qcft, encoder, color_data, cache, monkeypatch):
    texts = {lang: list(instructions(Source(path=str(color_data / f"{lang}.jsonl")))) for lang in ("en", "es", "pt")}
    assert len(texts["en"]) == 60
    vectors = {lang: by_hand(encoder, own) for lang, own in texts.items()}
    pair = [f"es={color_data / 'es.jsonl'},pt={color_data / 'pt.jsonl'}", color_data / "en.jsonl"]
    code, out, error = qcft("similarity", *pair, "--encoder", encoder, "--json", "-q")
    assert code == 0, error
    found = json.loads(out)
    both = np.concatenate([vectors["es"], vectors["pt"]])
    assert found["des"]["value"] == pytest.approx(cosine(both, vectors["en"]), abs=1e-6)
    assert found["des"]["rows"] == [120, 60]
    for entry in found["languages"]:
        assert entry["value"] == pytest.approx(cosine(vectors[entry["lang"]], vectors["en"]), abs=1e-6)
    assert [entry["lang"] for entry in found["languages"]] == ["es", "pt"]
    assert found["scale"]["paper"] is None
    assert "scale of its own" in found["says"][1]
    monkeypatch.setattr(encoders, "load_encoder", None)  # nothing is embedded again
    from qcft.measure import similarity

    monkeypatch.setattr(similarity, "load_encoder", None)
    assert json.loads(qcft("similarity", *pair, "--encoder", encoder, "--json", "-q")[1]) == found
    code, out, _ = qcft("similarity", *pair, "--encoder", encoder, "-q")
    assert "DES by static" in out
    assert "es.jsonl, " in out


def test_phases_of_a_recipe_and_a_run_by_name(qcft, encoder, raw_recipe, cache, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw_recipe))
    code, out, error = qcft(
        "similarity", f"{tmp_path / 'r.yaml'}:phase1", f"{tmp_path / 'r.yaml'}:phase2", "--encoder", encoder, "--json"
    )
    assert code == 0, error
    found = json.loads(out)
    assert found["des"]["rows"] == [24, 24]
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(raw_recipe))
    (run / "run.json").write_text(json.dumps({"stages": {}}))
    again = json.loads(qcft("similarity", "tiny", "--encoder", encoder, "--json")[1])
    assert again["des"] == found["des"]
    assert json.loads((run / "report" / "similarity.json").read_text())["des"] == found["des"]


@pytest.mark.parametrize("own", [False, True])
def test_an_unmodified_instruct_model_is_compared_by_default_data(
    qcft, encoder, raw_recipe, color_data, cache, tmp_path, own
):
    """What ships with qcft, or the English that its phase replays; and it is said so, with the number of rows."""
    phase = raw_recipe["phases"][1]
    phase["replay"] = {"ratio": 0.2, **({"data": str(color_data / "en.jsonl")} if own else {})}
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump({**raw_recipe, "phases": [phase]}))
    (run / "run.json").write_text(json.dumps({"stages": {}}))
    code, out, error = qcft("similarity", "tiny", "--encoder", encoder, "--json")
    assert code == 0, error
    found = json.loads(out)
    taken = str(color_data / "en.jsonl") if own else "qcft:instructions/en"
    assert (found["a"]["name"], found["b"]["name"]) == (taken, "tiny:phase2")
    rows = 60 if own else 164
    assert found["des"]["rows"] == [rows, 24]
    assert f"is not known: {rows} instructions of {taken} are used instead" in found["says"][-1]
    assert json.loads((run / "report" / "similarity.json").read_text())["says"] == found["says"]


def test_instructions_need_no_answers_and_may_be_any_column(tmp_path, qcft, encoder, cache):
    plain = write_rows(tmp_path / "p.jsonl", [{"prompt": " one "}, {"prompt": ""}, {"prompt": "two"}])
    assert list(instructions(Source(path=str(plain)))) == ["one", "two"]
    asked = write_rows(tmp_path / "q.jsonl", [{"frage": f"what {i}"} for i in range(9)])
    assert list(instructions(Source(path=str(asked), take=2), "frage")) == ["what 0", "what 1"]
    assert list(instructions(Source(path=str(plain)), "frage")) == ["one", "two"]
    with pytest.raises(InputError, match="no known format"):
        list(instructions(Source(path=str(asked))))
    with pytest.raises(InputError, match="no column 'fragen'"):
        list(instructions(Source(path=str(asked)), "fragen"))
    code, out, error = qcft("similarity", asked, asked, "--column", "frage", "--encoder", encoder, "--json", "-q")
    assert code == 0, error
    assert json.loads(out)["des"]["value"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (
            ["qcft:instructions/en", "qcft:instructions/es"],
            "'sentence-transformers/LaBSE' is not (completely) in",
            "--encoder",
        ),
        (["nowhere.jsonl", "qcft:instructions/es", "--encoder", "ENCODER"], "no file 'nowhere.jsonl'", ""),
        (
            ["qcft:instructions/en", "qcft:instructions/es", "--encoder", "./none"],
            "neither a folder nor a hub id",
            "LaBSE",
        ),
        (["qcft:instructions/en", "qcft:instructions/es", "--encoder", "."], "holds neither", "another folder"),
        (["quickstart:phase3", "qcft:instructions/es", "--encoder", "ENCODER"], "no phase 'phase3'", "phase1, phase2"),
        (["nobody:phase1", "qcft:instructions/es", "--encoder", "ENCODER"], "neither a run in", "RUN:PHASE"),
        (["nobody"], "no run 'nobody'", ""),
    ],
)
def test_what_cannot_be_compared_is_reported(qcft, encoder, cache, arguments, says, hint, monkeypatch):
    if "--encoder" not in arguments and says.startswith("'sentence"):
        pytest.importorskip("sentence_transformers")
    given = [str(encoder) if argument == "ENCODER" else argument for argument in arguments]
    code, out, error = qcft("similarity", *given)
    assert code == 2
    assert out == ""
    assert says in error
    assert hint in error


@pytest.mark.parametrize(
    ("package", "name"), [("sentence_transformers", "sentence-transformers/LaBSE"), ("model2vec", "")]
)
def test_an_encoder_that_is_not_installed(encoder, monkeypatch, package, name):
    monkeypatch.setattr(encoders, "find_spec", lambda module: None if module == package else object())
    with pytest.raises(InputError, match="is not installed") as error:
        encoders.find_encoder(name or str(encoder))
    assert "qcft[similarity]" in error.value.hint


def test_a_sentence_transformers_folder(tmp_path, tokenizer_folder, qcft, cache, color_data):
    """A folder that its own library wrote; and what another encoder gives is another value."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    module = StaticEmbedding(tokenizer, embedding_dim=12)
    st.SentenceTransformer(modules=[module, Normalize()]).save(str(tmp_path / "st"))
    pair = (color_data / "en.jsonl", color_data / "es.jsonl", "--encoder", tmp_path / "st", "--json", "-q")
    code, out, error = qcft("similarity", *pair)
    assert code == 0, error
    model = st.SentenceTransformer(str(tmp_path / "st"))
    sides = [model.encode(list(instructions(Source(path=str(color_data / f"{lang}.jsonl"))))) for lang in ("en", "es")]
    assert json.loads(out)["des"]["value"] == pytest.approx(cosine(*sides), abs=1e-5)
