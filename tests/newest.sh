#!/usr/bin/env bash
# The suite on the newest releases of all dependencies, torch below 2.14: run it before a bound in pyproject.toml is raised.
#   bash tests/newest.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
# shellcheck disable=SC1091
. "$place/venv/bin/activate"
python - >"$place/newest.txt" <<'PYTHON'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
more = project["optional-dependencies"]
for one in [*project["dependencies"], *more["test"], *more["eval"], *more["ray"]]:
    name = re.match(r"[\w.\[\]-]+", one)[0]
    if not name.startswith("qcft"):
        print("torch<2.14" if name == "torch" else name)
PYTHON
pip install -q -r "$place/newest.txt"
pip install -q --no-deps .
pip freeze | grep -iE "^(torch|transformers|trl|peft|bitsandbytes|accelerate|datasets|lm.eval)=="
pytest "$@"
