"""A working folder that holds modules of the libraries' names, which must not be loaded."""

from pathlib import Path


def plant(folder: Path) -> Path:
    """Write them; `check_unused` fails if one was loaded."""
    for name in ("datasets", "torch", "yaml", "typer", "filelock", "wandb"):
        (folder / f"{name}.py").write_text(
            "from pathlib import Path\nPath(__file__).with_suffix('.loaded').touch()\nraise SystemExit('planted')\n"
        )
    return folder


def check_unused(folder: Path) -> None:
    """Fails where a planted module was loaded."""
    assert (folder / "torch.py").is_file()
    assert not list(folder.glob("*.loaded"))
