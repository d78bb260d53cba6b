"""The words and numbers of the table, shared by the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping

from qcft.store.metrics import AnswerLengths
from qcft.store.table import Between, GroupOf, Named, StageChange, StagesTable, Transfer


def stage_rows(table: StagesTable) -> list[dict[str, str]]:
    """A row per stage: NLL and token accuracy of each group (English marked); length and finished share of answers."""
    lines, answers = [], _answers(table)
    for stage in table["stages"]:
        line = {"stage": stage_name(stage)}
        for group in table["groups"]:
            score = stage["groups"][group["name"]]
            line[_title(table, group)] = f"{score['nll']:.3f}  {score['accuracy']:.0%}"
        if stage["answers"]:
            line[_answers_title(answers)] = in_short(stage["answers"])
        lines.append(line)
    return lines


def change_rows(table: StagesTable) -> list[dict[str, str]]:
    """A row per comparison: NLL change with its 95% interval and in percent."""
    lines, answers = [], _answers(table)
    for change in table["changes"]:
        line = {"change": change_name(change)}
        for group in table["groups"]:
            entry = change["groups"][group["name"]]
            mark = " !" if group["english"] and entry["low"] > 0 else ""
            line[_title(table, group)] = (
                f"{entry['value']:+.3f} ({entry['relative']:+.0%}){mark}\n[{entry['low']:+.2f}, {entry['high']:+.2f}]"
            )
        if answers:
            start, end = answers[change["from"]]["mean_tokens"], answers[change["to"]]["mean_tokens"]
            line[_answers_title(answers)] = f"{end - start:+.0f} tokens"
        lines.append(line)
    return lines


def stage_name(stage: Named) -> str:
    """A stage with the precision it was measured in."""
    return f"{stage['name']}, {stage['precision']}"


def change_name(change: Between) -> str:
    """Which stages a change is between."""
    return f"{change['to_name']} since {change['from_name']}"


def in_short(answers: AnswerLengths) -> str:
    """How long greedy answers are, and how many of them came to an end."""
    return f"{answers['mean_tokens']:.0f} tokens, {answers['finished']:.0%} done"


def _title(table: StagesTable, group: GroupOf) -> str:
    rows = table["stages"][0]["groups"][group["name"]]["rows"]
    return f"{group['name']}{' *' if group['english'] else ''}\n{rows} rows"


def _answers(table: StagesTable) -> dict[str, AnswerLengths]:
    """Each stage's English answers; none where no prompts were asked."""
    return {stage["stage"]: stage["answers"] for stage in table["stages"] if stage["answers"]}


def _answers_title(answers: Mapping[str, AnswerLengths]) -> str:
    return f"English answers\n{next(iter(answers.values()))['rows']} prompts"


def left_out(reasons: Mapping[str, int], nothing: str) -> str:
    """How many rows were left out, reason by reason."""
    return ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or nothing


def conclusion(table: StagesTable) -> list[str]:
    """What the table says, in sentences: what was gained, what English lost."""
    if not table["changes"]:
        return []
    english = [g["name"] for g in table["groups"] if g["english"]]
    others = [g["name"] for g in table["groups"] if not g["english"]]
    base = next((c for c in table["changes"] if c["from"] == "eval/base"), table["changes"][0])
    since = table["changes"][0]
    sentences = []
    if others:
        gains = ", ".join(f"{name} {base['groups'][name]['relative']:+.0%}" for name in others)
        sentences.append(f"NLL since the {_start(table, base)}: {gains}.")
    for name in english:
        entry = since["groups"][name]
        clear = "" if entry["low"] > 0 or entry["high"] < 0 else "; the interval includes zero"
        word = "lost" if entry["value"] > 0 else "gained"
        sentences.append(
            f"English ({name}) {word} {abs(entry['value']):.3f} nats since {since['from_name']}, "
            f"95% interval {entry['low']:+.3f} to {entry['high']:+.3f}, {entry['rows']} rows{clear}."
        )
    answers = _answers(table)
    if answers:
        start, end = answers[since["from"]], answers[since["to"]]
        sentences.append(
            f"Greedy English answers went from {start['mean_tokens']:.0f} to {end['mean_tokens']:.0f} tokens, "
            f"finished {start['finished']:.0%} to {end['finished']:.0%}, {end['rows']} prompts."
        )
    for stage, kept in table["kept"].items():
        share = kept["share"]
        if share is None:
            sentences.append(f"What {stage} kept is not measurable: the gain was {kept['gain']['value']:+.3f} nats.")
        else:
            sentences.append(
                f"Merging kept {share:.0%} of the {kept['gain']['value']:.3f} nats gained "
                f"({stage}, {kept['gain']['rows']} rows); KL to the live adapter {kept['kl']:.3f} nats per answer "
                f"token, greedy agreement {kept['agreement']:.0%} of {kept['compared_tokens']} tokens."
            )
    return sentences


def _start(table: StagesTable, change: StageChange) -> str:
    stage = next(s for s in table["stages"] if s["stage"] == change["from"])
    return f"{stage['name']} in {stage['precision']}"


def continual_in_words(continual: Transfer | None, unit: str, scale: float = 1.0) -> list[str]:
    """Backward transfer and forgetting as a sentence."""
    if continual is None:
        return []
    transfer, lost = continual["backward_transfer"] * scale, continual["forgetting"] * scale
    return [f"Backward transfer {transfer:+.3f}, forgetting {lost:+.3f} {unit}."]
