"""The check that every table of bad input shares."""


def listing(folder):
    """The content of a folder: names, sizes and times. Of locks, which are empty, no times: most releases of filelock
    touch the file when they look whether it is locked."""
    found = ((p, p.lstat()) for p in folder.rglob("*"))
    return sorted(
        (str(p.relative_to(folder)), stat.st_size, 0 if p.name.startswith((".lock", ".working")) else stat.st_mtime_ns)
        for p, stat in found
    )


def check_refused(qcft, place, arguments, says):
    """A command ends with code 2, a line that holds `says` and a hint; nothing is printed or written beside that."""
    before = listing(place)
    code, out, err = qcft(*arguments)
    lines = [line for line in err.strip().splitlines() if not line.startswith("tiny: ")]  # what is about to be done
    assert code == 2, err
    assert len(lines) == 2, err
    error, hint = lines
    assert error.startswith("error: ")
    assert says.lower() in error.lower()
    assert len(error) < 500
    assert hint.startswith("hint: ")
    assert len(hint) > len("hint: ") + 8
    assert "Traceback" not in err
    assert out == ""
    assert listing(place) == before
