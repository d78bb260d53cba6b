"""What each kind of step came to, in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcft.steps.step import Step


def summarise(step: Step, metrics: Mapping[str, Any]) -> str:
    """What a step came to, in a few words."""
    if step.kind == "probe":
        return ", ".join(f"{name} {g['nll']:.3f}" for name, g in metrics["groups"].items()) + " (NLL)"
    if step.kind == "train":
        trained = f"{metrics['steps']} steps, {metrics['tokens']:,} tokens, loss {metrics['loss']:.3f}"
        return trained + _replayed(metrics) + _probed(metrics)
    if step.kind == "replay":
        left_out = ", ".join(f"{n} {reason}" for reason, n in metrics["left_out"].items())
        share = f"{metrics['share_of_rows']:.1%} of rows, {metrics['share_of_answer_tokens']:.1%} of answer tokens"
        return f"{metrics['rows']} rows: {share}" + (f"; left out {left_out}" if left_out else "")
    if step.kind == "merge":
        return f"{metrics['merged_weights']} weights changed"
    if step.kind == "dial":
        return f"{len(metrics['points'])} scales"
    if step.kind == "suite":
        return _evaluated(metrics)
    if step.kind == "layers":
        return f"{metrics['modules']} modules"
    if step.kind == "kept":
        share = metrics["share"]
        rows = metrics["gain"]["rows"]
        far = f"KL {metrics['kl']:.3f} nats, greedy agreement {metrics['agreement']:.0%}"
        if share is None:
            return f"not measurable: a gain of {metrics['gain']['value']:.3f} nats on {rows} rows is too small; {far}"
        return f"{share:.0%} of a gain of {metrics['gain']['value']:.3f} nats, on {rows} rows; {far}"
    return ""


def _evaluated(metrics: Mapping[str, Any]) -> str:
    if "score" in metrics:
        return f"{metrics['metric']} {metrics['score']:.4f}, {metrics['items']:,} items"
    if "languages" in metrics:
        shares = {lang: entry["right"] for lang, entry in metrics["languages"].items()}
        told = ", ".join(f"{lang} {share:.0%}" for lang, share in shares.items() if share is not None)
        return f"answers in the prompt's language: {told or 'none can be told'}"
    return f"{metrics['rows']} answers of {metrics['mean_tokens']:.0f} tokens"


def _replayed(metrics: Mapping[str, Any]) -> str:
    """Replay's share of what a training was fed."""
    fed = metrics["exposure"]
    replay = [entry for entry in fed if entry["source"].startswith("replay (")]
    if not replay:
        return ""
    rows, tokens = (sum(e[k] for e in replay) / sum(e[k] for e in fed) for k in ("rows", "answer_tokens"))
    return f"; of it replay {rows:.1%} of rows, {tokens:.1%} of answer tokens"


def _probed(metrics: Mapping[str, Any]) -> str:
    """What the live probe found, and what it cost."""
    found = metrics.get("forgetting")
    if not found:
        return ""
    last = next(probe for probe in reversed(found["probes"]) if probe["step"] <= metrics["steps"])
    return (
        f"; English NLL {last['change']:+.1%} ({len(found['probes'])} probes of {found['rows']} rows, "
        f"{found['share_of_time']:.1%} of the time)"
    )
