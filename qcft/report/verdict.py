"""The answer at the top of a report of several arms, in sentences: what was compared, and which arms differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qcft.measure.stats import Difference
from qcft.report.cells import basis, listed, moved
from qcft.report.standing import NEAR, Standing, Verdict, unequal_training

ONE_RUN = "One run each: differences between runs of one arm were not measured"


def verdict_in_words(said: Verdict, arms: int) -> str:
    """The verdict over `arms` arms."""
    best, enough = said.best, f"at least {NEAR:.0%} of the largest gain"
    near = f"{len(said.near)} of {arms} arms with {enough}"
    if not said.tested:
        text = [
            f"No winner is named. {ONE_RUN}. `{more_seeds([one.arm.runs[0].recipe.seed for one in said.near])}` adds "
            f"seeds. How English NLL changed in the {near} (nats per answer token, {basis(best.lost)}) since "
            f"{_changes(said.near)}."
        ]
    elif not said.behind:
        text = [f"Only {best.arm.name}, of {arms} arms, has {enough}: {became(best)}."]
    else:
        text = [*_compared(best, said.behind, near)]
    if said.beyond and said.tested:
        other, share, less = said.beyond
        if less.is_clear:
            text.append(f"{other.arm.name} gained less ({share:.0%} of the most) and has more English: {_by(less)}.")
    if best.lost_trained:
        text.append(
            "The English rows are of a kind that no arm trains on; the table also has English like that of the first "
            "phase."
        )
    return " ".join([*text, *trained_unlike(best, said.near)])


def became(one: Standing) -> str:
    """How an arm's English and other languages changed, with intervals."""
    return (
        f"English loss {moved(one.lost)} since {one.since}, that of the other languages {moved(one.gained)} "
        "since the base"
    )


def trained_unlike(best: Standing, near: Sequence[Standing]) -> list[str]:
    """A sentence if an arm was trained on more or fewer answer tokens than those that it is compared with."""
    shares = unequal_training(best.arm, [one.arm for one in near if one is not best])
    found = []
    for word, own in (
        ("more", {name: share for name, share in shares.items() if share > 0}),
        ("fewer", {name: -share for name, share in shares.items() if share < 0}),
    ):
        if own:
            low, high = (f"{pick(own.values()):.0%}" for pick in (min, max))
            much = high if low == high else f"{low} to {high}"
            found.append(f"{best.arm.name} was trained on {much} {word} answer tokens than {listed([*own])}.")
    return found


def more_seeds(seeds: Sequence[int]) -> str:
    """The command that runs arms with three seeds instead of one."""
    first = min(seeds)
    return f"qcft ablate RECIPE --seeds {','.join(str(seed) for seed in (first, first + 1, first + 2))}"


def _changes(arms: Sequence[Standing]) -> str:
    """How much English NLL changed in each arm, by the stage since which it did."""
    stages = dict.fromkeys(one.since for one in arms)
    return "; since ".join(
        f"{stage}: {', '.join(f'{one.arm.name} {one.lost.value:+.3f}' for one in arms if one.since == stage)}"
        for stage in stages
    )


def _compared(best: Standing, behind: Mapping[str, Difference], near: str) -> list[str]:
    beaten = {name: d for name, d in behind.items() if d.low is not None and d.low > 0}
    equal = {name: d for name, d in behind.items() if name not in beaten}
    name, first = best.arm.name, next(iter(behind.values()))
    over = f"95% intervals of all {first.compared} pairs of arms together, {basis(first)}"
    more = f"less English loss than {listed([f'{other} ({_by(d)})' for other, d in beaten.items()])}"
    apart = listed([*equal])
    if not equal:
        text = [f"{name} kept the most English of the {near}: {became(best)}.", f"It has {more}; {over}."]
    elif beaten:
        text = [
            f"No single winner among the {near}: {name} cannot be distinguished from {apart} in English.",
            f"It has {more}; {over}.",
        ]
    else:
        text = [
            f"No winner: of the {near}, {name} has the least English loss, but cannot be distinguished from {apart}",
        ]
        text[0] += f"; {over}."
    widths = [width for d in equal.values() if (width := d.half_width) is not None]
    if widths:
        text.append(
            f"A difference below {max(widths):.3f} nats could not have been detected (half the width of the interval)."
        )
    return text


def _by(less: Difference) -> str:
    """A difference without its sign, with its interval."""
    if less.low is None or less.high is None:
        return f"{abs(less.value):.3f} nats, {less.method}"
    low, high = sorted((abs(less.low), abs(less.high)))
    return f"{abs(less.value):.3f} nats, {low:.3f} to {high:.3f}"
