"""Models of real shapes with random weights, for benchmarks whose results depend only on shapes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def model_of(shape: str | None, half_frozen: bool = False) -> Iterator[None]:
    """Make this process's children, which inherit its arguments, use a temporary model of a shape.

    `half_frozen`: with the lower half of its layers frozen. The model is made on the card if there is one.
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
