"""Random damage to a step's files: each reader says one line with a hint, or heals; never a traceback."""

import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .helpers.fuzz import EXAMPLES, many, steering
from .test_fuzz import paths
from .test_old_runs import ARCHIVES, unpacked

READERS = [["show", "small"], ["show", "small", "--json"], ["ls"], ["ls", "--json"], ["gc"], ["show", "taken-in"]] * 5
READERS += [["report", "small", "--to", "out"], ["run", "recipe.yaml", "--dry-run"]]
values = st.none() | st.booleans() | st.integers() | st.floats() | steering | st.just([]) | st.just({})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return unpacked(ARCHIVES[0], tmp_path_factory.mktemp("steps"))


def damaged(data, draw):
    """Bytes flipped, cut, put in, gone; or a value of a JSON file made another one."""
    how = draw(st.sampled_from(["flip", "cut", "insert", "empty", "value", "value", "other"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if how == "value":
        try:
            document = json.loads(data)
        except ValueError:
            how = "flip"
        else:
            found = list(paths(document))
            path = draw(st.sampled_from(found)) if found else ()
            node = document
            for key in path[:-1]:
                node = node[key]
            if path:
                node[path[-1]] = draw(values)
            return json.dumps(document).encode()
    if how == "flip":
        return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :] if data else b"\xff"
    return {
        "cut": data[:at],
        "insert": data[:at] + draw(st.binary(max_size=9)) + data[at:],
        "empty": b"",
        "other": b"[]",
    }[how]


@settings(many, max_examples=EXAMPLES if EXAMPLES > 200 else 60)  # each takes a tenth of a second and more
@given(st.data())
def test_a_steps_files_damaged_anyhow(pristine, qcft, tmp_path, data):
    for name in ("runs", "out"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    shutil.copytree(pristine / "runs", tmp_path / "runs", copy_function=os.link)
    for name in ("recipe.yaml", "data", "model"):
        (tmp_path / name).exists() or (tmp_path / name).symlink_to(pristine / name)
    files = sorted(p for p in (tmp_path / "runs").rglob("*") if p.is_file() and p.suffix != ".safetensors")
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    file.unlink()  # one of two names of the file, whose content stays as it is under the other
    if data.draw(st.integers(0, 9)):
        file.write_bytes(damaged(content, data.draw))
    code, _, err = qcft(*data.draw(st.sampled_from(READERS)))
    where = f"{file.relative_to(tmp_path)}: {err}"
    assert "unexpected" not in err, where
    assert "Traceback" not in err, where
    assert code in {0, 1, 2}, where
    if code:
        assert [line.split(": ")[0] for line in err.splitlines()[-2:]] == ["error", "hint"], where
