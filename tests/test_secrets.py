"""Secrets of every kind that qcft or its libraries read, planted: in nothing that is printed, in no file."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qcft.safe import json_shown, without_tokens

from .helpers.fake_hub import FakeHub
from .helpers.tiny import write_rows

ROOT = Path(__file__).parents[1]
MARK = "Qz7xK9vW"  # every secret holds its number beside it


def secret(number):
    return f"{MARK}{number:02}" * 4


HEX = "0123456789abcdef" * 2 + "beefcafe"
ENVIRONMENT = {
    "HF_TOKEN": "hf_" + secret(1),
    "HUGGING_FACE_HUB_TOKEN": "hf_" + secret(2),
    "HUGGINGFACEHUB_API_TOKEN": "hf_oauth_" + secret(3),
    "WANDB_API_KEY": HEX,
    "AWS_SECRET_ACCESS_KEY": secret(4),
    "AWS_SESSION_TOKEN": secret(5),
    "COMET_API_KEY": secret(6),
    "MLFLOW_TRACKING_PASSWORD": secret(7),
    "NEPTUNE_API_TOKEN": secret(8),
    "PIP_INDEX_URL": f"http://me:{secret(9)}@127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": f"http://{secret(10)}@127.0.0.1:9/simple",
    "PIP_RETRIES": "0",
    "HTTP_PROXY": f"http://me:{secret(11)}@127.0.0.1:9",
    "HTTPS_PROXY": f"http://me:pa@{secret(12)}@127.0.0.1:9",
    "GITHUB_TOKEN": "ghp_" + secret(13),
}
FILES = {
    "token": "hf_" + secret(14),
    "stored_tokens": f"[one]\nhf_token = hf_{secret(15)}\n\n[two]\nhf_token = {secret(16)}\n",
    "netrc": f"machine api.wandb.ai\n  login user\n  password {secret(17)}\n",
}
ENDPOINT = f"me:pa@{secret(18)}"
URLS = [
    f"https://me:{secret(19)}@data.example/rows.jsonl",
    f"https://data.example/rows.jsonl?token={secret(20)}",
    f"https://b.s3.amazonaws.com/rows.jsonl?X-Amz-Credential={secret(21)}&X-Amz-Signature={secret(22)}",
    f"https://x.blob.core.windows.net/rows.jsonl?sv=1&sig={secret(23)}",
    f"https://data.example/rows.jsonl?Policy=p&Signature={secret(24)}&Key-Pair-Id=K",
    "api_org_" + secret(25),
    "hf_oauth_" + secret(26),
]
KINDS = 27

WORK = """
import sys
from qcft import hub
from qcft.cli import main
hub.WAIT = 0.01
for arguments in {commands}:
    sys.argv = ["qcft", *arguments]
    sys.stderr.write(f"--- {{len(arguments)}} words\\n")
    try:
        main()
    except SystemExit as end:
        sys.stderr.write(f"code {{end.code}}\\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
"""


@pytest.fixture
def place(tmp_path, raw_recipe):
    raw_recipe["phases"] = raw_recipe["phases"][:1]
    raw_recipe["model"] = {"name": "someone/tiny"}
    raw_recipe["phases"][0]["train"]["epochs"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw_recipe))
    write_rows(tmp_path / "good.jsonl", [{"instruction": f"what {i}", "output": "red"} for i in range(40)])
    (tmp_path / "home").mkdir()
    for name, text in FILES.items():
        (tmp_path / "home" / name).write_text(text)
    return tmp_path


def work(place, endpoint, commands, **more):
    """What a process prints that is given the commands one after the other, all secrets in its environment."""
    home = place / "home"
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": endpoint.replace("://", f"://{ENDPOINT}@"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "NETRC": str(home / "netrc"),
        "QCFT_CACHE": str(place / "cache"),
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", WORK.format(commands=repr(commands))], cwd=place, env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    return done.stdout + done.stderr


def check_clean(place, printed):
    for text in (MARK, HEX):
        assert text not in printed, printed[max(0, printed.index(text) - 300) : printed.index(text) + 100]
        for file in place.rglob("*"):
            if file.is_file() and (file.parent != place / "home" or file.name not in FILES):
                assert text.encode() not in file.read_bytes(), file


def test_a_run_its_retries_its_report_and_its_errors_hold_no_secret(place, tiny_model):
    hub = FakeHub(models={"someone/tiny": tiny_model})
    hub.faults["model.safetensors"] = [503, 500]
    commands = [
        ["run", "recipe.yaml"],
        ["show", "--json"],
        ["report"],
        ["ls"],
        ["doctor"],
        ["doctor", "--json"],
        ["check", "recipe.yaml", "--debug", "--set", "model.name=someone/else"],
        ["phase1", "x", "--model", "smollm2-135m-instruct", "--data", "good.jsonl"],
        *(
            ["phase1", "x", "--model", "someone/tiny", "--data", url, *more]
            for url in URLS
            for more in ([], ["--debug"])
        ),
        ["run", URLS[0]],
        ["run", "recipe.yaml", "--set", f"model.name={URLS[-1]}"],
        [URLS[-2], URLS[0]],
        ["run", "recipe.yaml", f"--{secret(4)}"],
    ]
    printed = work(place, hub.url, commands, NO_PROXY="127.0.0.1")
    hub.close()
    assert printed.count("the hub fails (") == 2, printed
    assert "Traceback" in printed
    assert "***@127.0.0.1" in printed
    assert (place / "runs" / "tiny" / "report" / "report.html").is_file(), printed
    check_clean(place, printed)


def test_a_hub_and_a_proxy_that_cannot_be_reached_are_reported_without_their_passwords(place):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    commands = [["run", "recipe.yaml"], ["check", "recipe.yaml", "--debug"], ["doctor"]]
    printed = work(place, endpoint, commands) + work(place, endpoint, commands[:1], NO_PROXY="127.0.0.1")
    assert printed.count("error: ") >= 2, printed
    assert "***@127.0.0.1" in printed
    check_clean(place, printed)


@pytest.mark.parametrize("number", range(1, KINDS))
def test_each_kind_is_redacted(place, monkeypatch, number):
    """In the form in which it was planted, and where it can be known alone."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_ENDPOINT", f"http://{ENDPOINT}@127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(place / "home"))
    monkeypatch.setenv("NETRC", str(place / "home" / "netrc"))
    planted = [text for text in (*ENVIRONMENT.values(), *FILES.values(), ENDPOINT, *URLS) if secret(number) in text]
    assert len(planted) == 1
    for text in (planted[0], f"fails: {planted[0]}, again", f'{{"url": "{planted[0]}"}}'):
        assert MARK not in without_tokens(text)
        assert MARK not in json_shown(text)
    if number in {4, 5, 6, 7, 8, 9, 10, 11, 16, 17}:  # known by itself, too, as the environment or a file holds it so
        assert without_tokens(f"a {secret(number)} b") == "a *** b"


def test_what_is_not_a_secret_stays(monkeypatch):
    monkeypatch.setenv("EMAIL", "someone.long@example.org")
    monkeypatch.setenv("SHORT_TOKEN", "word")
    for text in (
        "hf_models/SmolLM2-135M-Instruct",
        "https://hub.example/x@main and https://h:8080/y@v2",
        "someone.long wrote to me@example.org",
        "a word, and a bearer of news; task-oriented-instructions-in-english",
        "rows.jsonl?version=3&split=train",
        '{"a": "https://x.example", "b": "me@example.org"}',
    ):
        assert without_tokens(text) == text
