"""Models of real shapes with random weights, for benchmarks of what depends on shapes alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def model_of(shape: str | None, half_frozen: bool = False) -> Iterator[None]:
    """Have this process's children, which take its arguments, use a model of a shape, made for as long as they run.

    `half_frozen`: with the lower half of its layers frozen. A model is made on the card where there is one.
    """
    if shape is None:
        yield
        return
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.gpu.models import SHAPES, make_models

    if shape not in SHAPES:
        sys.exit(f"--shape {shape!r} is not known: use {', '.join(SHAPES)}")
    with TemporaryDirectory(prefix="qcft-shape-") as place:
        make_models(Path(place), [shape])
        frozen = ["--frozen", str(SHAPES[shape].layers // 2)] if half_frozen and "--frozen" not in sys.argv else []
        sys.argv += ["--model", str(Path(place) / shape), *frozen]
        yield
