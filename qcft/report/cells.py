"""The texts and numbers of the table, shared by the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qcft.measure.stats import Difference
from qcft.report.languages import language_name
from qcft.store.metrics import AnswerLengths, Paired, ReplayedPart
from qcft.store.table import Between, GroupOf, Named, StageChange, StagesTable, Transfer
from qcft.words import counted


def stage_rows(table: StagesTable) -> list[dict[str, str]]:
    """A row per stage: NLL and token accuracy of each group (English is marked), bits per byte of raw text; mean length
    of the answers and the share that is finished."""
    lines, answers = [], _answers(table)
    for stage in table["stages"]:
        line = {"stage": stage_name(stage)}
        for group in table["groups"]:
            score = stage["groups"][group["name"]]
            bits = f"  {score['bits_per_byte']:.3f} b/B" if "bits_per_byte" in score else ""
            line[_title(table, group)] = f"{score['nll']:.3f}  {score['accuracy']:.0%}{bits}"
        if stage["answers"]:
            line[_answers_title(answers)] = in_short(stage["answers"])
        lines.append(line)
    return lines


def change_rows(table: StagesTable) -> list[dict[str, str]]:
    """A row per comparison: NLL change with its 95% interval over rows and in percent."""
    lines, answers = [], _answers(table)
    for change in table["changes"]:
        line = {"change": f"{change_name(change)}\n[95% interval over rows]"}
        for group in table["groups"]:
            entry = change["groups"][group["name"]]
            mark = " !" if group["english"] and entry["low"] is not None and entry["low"] > 0 else ""
            line[_title(table, group)] = (
                f"{entry['value']:+.3f} ({entry['relative']:+.0%}){mark}\n{bracket(entry['low'], entry['high'])}"
            )
        if answers:
            start, end = answers[change["from"]]["mean_tokens"], answers[change["to"]]["mean_tokens"]
            line[_answers_title(answers)] = f"{round(end - start):+} tokens"
        lines.append(line)
    return lines


def stage_name(stage: Named) -> str:
    """A stage with the precision it was measured in."""
    return f"{stage['name']}, {stage['precision']}"


def change_name(change: Between) -> str:
    """The two stages of a change."""
    return f"{change['to_name']} since {change['from_name']}"


def in_short(answers: AnswerLengths) -> str:
    """How long greedy answers are, and how many of them are finished."""
    return f"{answers['mean_tokens']:.0f} tokens, {answers['finished']:.0%} done"


def _title(table: StagesTable, group: GroupOf) -> str:
    rows = table["stages"][0]["groups"][group["name"]]["rows"]
    return f"{group['name']}{' *' if group['english'] else ''}\n{rows} rows"


def text_groups(table: StagesTable) -> list[str]:
    """The names of the groups of raw text."""
    first = table["stages"][0]["groups"] if table["stages"] else {}
    return [name for name, score in first.items() if "bits_per_byte" in score]


def text_note(table: StagesTable) -> str:
    """A note on groups of raw text; empty where there are none."""
    if not text_groups(table):
        return ""
    return "Raw text: every token that stands for text, and b/B, the bits for each of its UTF-8 bytes."


def _answers(table: StagesTable) -> dict[str, AnswerLengths]:
    """Each stage's English answers; empty where none were generated."""
    return {stage["stage"]: stage["answers"] for stage in table["stages"] if stage["answers"]}


def _answers_title(answers: Mapping[str, AnswerLengths]) -> str:
    return f"English answers\n{next(iter(answers.values()))['rows']} prompts"


def reasons_in_words(reasons: Mapping[str, int], nothing: str) -> str:
    """How many rows were dropped, reason by reason."""
    return ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or nothing


def bracket(low: float | None, high: float | None, digits: int = 2) -> str:
    """An interval for a table's cell."""
    return "[no interval]" if low is None or high is None else f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def listed(things: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(things[:-1]), *things[-1:])))


def basis(change: Paired | Difference) -> str:
    """What an interval is over: `48 rows (16 without translations), 3 seeds`."""
    change = change.as_dict() if isinstance(change, Difference) else change
    text = f"{change['rows']:,} row{'s' * (change['rows'] != 1)}"
    if change["clusters"] < change["rows"]:
        text += f" ({change['clusters']:,} without translations)"
    return text + (f", {change['seeds']} seeds" if change["seeds"] > 1 else "")


def moved(change: Paired | Difference) -> str:
    """A change of a loss in words: `rose by 0.158 nats per token (95% interval 0.107 to 0.208, 16 rows)`.

    The interval's bounds have no sign, as the verb gives the direction; only where it includes zero they have one, and
    the text says how small a change could have been detected.
    """
    change = change.as_dict() if isinstance(change, Difference) else change
    value, low, high = change["value"], change["low"], change["high"]
    text = f"{'rose' if value > 0 else 'fell'} by {abs(value):.3f} nats per token"
    if low is None or high is None:
        return f"{text} ({change['method']}, {basis(change)})"
    if low > 0 or high < 0:
        low, high = sorted((abs(low), abs(high)))
        return f"{text} (95% interval {low:.3f} to {high:.3f}, {basis(change)})"
    return (
        f"{text} (95% interval of the change {low:+.3f} to {high:+.3f}, {basis(change)}; a change below "
        f"{(high - low) / 2:.3f}, half the interval's width, could not have been detected)"
    )


def cut_in_words(part: ReplayedPart) -> str:
    """For one kind of a phase's replay: how many answers were cut off, and how that changed the mean length."""
    cut = part.get("cut") or {"rows": 0, "answer_tokens": 0}  # none in steps of earlier versions
    if not cut["rows"]:
        return ""
    finished, tokens = part["rows"] - cut["rows"], part["answer_tokens"] - cut["answer_tokens"]
    without = f"; {tokens / finished:.0f} without those" if finished > 0 else ""
    return (
        f"{part['kind']} replay: {finished} answers finished, {cut['rows']} cut off at the maximum length (no loss on "
        f"an end of turn); mean {part['answer_tokens'] / part['rows']:.0f} answer tokens{without}"
    )


def conclusion(table: StagesTable) -> list[str]:
    """The table's results in sentences: gains, and losses of English."""
    if not table["changes"]:
        return []
    english = [g["name"] for g in table["groups"] if g["english"]]
    others = [g for g in table["groups"] if not g["english"]]
    untrained = {g["name"] for g in table["groups"] if not g["trained"]}
    base = next((c for c in table["changes"] if c["from"] == "eval/base"), table["changes"][0])
    since = table["changes"][0]
    several = len(english) > 1
    sentences = [
        _english(since, name, f" ({name}{', unlike anything trained on' * (name in untrained)})" if several else "")
        for name in english
    ]
    if others:
        sentences.append(_others(table, base, others))
    answers = _answers(table)
    if answers:
        sentences.append(_length(answers[since["from"]], answers[since["to"]]))
    for stage, kept in table["kept"].items():
        share, gain = kept["share"], kept["gain"]
        if share is None:
            sentences.append(
                f"How much of the improvement is left in {stage} cannot be measured: an improvement of "
                f"{gain['value']:.3f} nats per token {bracket(gain['low'], gain['high'], 3)} is below 0.05 or its "
                "interval includes zero."
            )
        else:
            sentences.append(
                f"In {stage}, {share:.0%} of the improvement ({gain['value']:.3f} nats per token, "
                f"{gain['rows']} rows) is left after merging; it picks the same token as the adapter in "
                f"{kept['agreement']:.0%} of {kept['compared_tokens']} cases (KL {kept['kl']:.3f} nats per token)."
            )
    return sentences


def _english(since: StageChange, name: str, which: str) -> str:
    entry = since["groups"][name]
    low, high = entry["low"], entry["high"]
    clear = low is not None and high is not None and (low > 0 or high < 0)
    if not clear:
        word = "It is not clear whether English got worse"
    else:
        word = "English got worse" if entry["value"] > 0 else "English did not get worse"
    where = "since the base model" if since["from"] == "eval/base" else f"after {since['from_name']}"
    loss = moved(entry).replace(" nats per token", f" nats per token {where}", 1)
    return f"{word}{which}: its loss {loss}."


def _others(table: StagesTable, base: StageChange, groups: Sequence[GroupOf]) -> str:
    """How much the loss of the other languages fell or rose, relative to the loss before, and where that is unclear."""
    langs = [group["lang"] for group in groups]
    ways: dict[str, list[str]] = {}
    unclear = list[str]()
    for group in groups:
        name = (
            language_name(group["lang"]) if langs.count(group["lang"]) == 1 and group["lang"] != "?" else group["name"]
        )
        entry = base["groups"][group["name"]]
        if entry["low"] is None or entry["high"] is None or entry["low"] <= 0 <= entry["high"]:
            unclear.append(f"{name} ({entry['relative']:+.0%})")
        else:
            way = "fell" if entry["value"] < 0 else "rose"
            ways.setdefault(way, []).append(f"{abs(entry['relative']):.0%} in {name}")
    stage = next(s for s in table["stages"] if s["stage"] == base["from"])
    bits = {"NF4": "4-bit", "16 bit": "16-bit"}.get(stage["precision"], stage["precision"])
    whom = f"the {bits} base model" if base["from"] == "eval/base" else f"{stage['name']} in {stage['precision']}"
    if not ways:
        return f"Compared with {whom}, it is not clear whether held-out loss (NLL) changed in {listed(unclear)}."
    text = f"Compared with {whom}, held-out loss (NLL) {' and '.join(f'{w} by {listed(s)}' for w, s in ways.items())}"
    return f"{text}{f'; whether it changed in {listed(unclear)} is not clear' if unclear else ''}."


def _length(start: AnswerLengths, end: AnswerLengths) -> str:
    before, after = (round(one["mean_tokens"]) for one in (start, end))
    if before == after:
        text = f"English answers kept their length: {counted(after, 'token')} on average"
    else:
        word = "shorter" if after < before else "longer"
        text = f"English answers became {word}: {counted(after, 'token')} on average instead of {before}"
    done = f"{end['finished']:.0%} of them end by themselves (before: {start['finished']:.0%})"
    return f"{text}; {done}. {end['rows']} prompts."


def continual_in_words(continual: Transfer | None, unit: str, scale: float = 1.0) -> list[str]:
    """Backward transfer and forgetting in a sentence."""
    if continual is None:
        return []
    transfer, lost = continual["backward_transfer"] * scale, continual["forgetting"] * scale
    return [
        f"Backward transfer {transfer:+.3f} (below 0: later phases hurt earlier ones), forgetting {lost:+.3f} "
        f"(above 0: something was lost), in {unit}."
    ]


def noise_ratio(ratio: float | None) -> str:
    """A signal-to-noise ratio, or a mean of several, for a table; that of matrices without noise is huge."""
    if ratio is None:
        return "-"
    return f"{ratio:.3g}" if ratio < 1e250 else "no noise"
