"""The pipeline: walk the plan, skip what is done, go on with what is partial, run the rest."""

from qcft.pipeline.run import Run, Stage, run_recipe

__all__ = ["Run", "Stage", "run_recipe"]
