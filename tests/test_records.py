"""The check that what steps wrote is as it is typed can fail. Real steps are held against it in test_old_runs.py."""

from qcft.store import metrics

from .helpers.typed import misfit


def test_a_misfit_is_found():
    point = {"rows": 1, "mean_tokens": 2.0, "finished": 1}
    assert misfit(point, metrics.AnswerLengths) is None
    assert misfit({**point, "rows": 1.5}, metrics.AnswerLengths)
    assert misfit({**point, "more": 1}, metrics.AnswerLengths)
    assert misfit({"rows": 1}, metrics.AnswerLengths)
    assert misfit({"groups": {"a": {}}, "answers": None}, metrics.ProbeMetrics)
