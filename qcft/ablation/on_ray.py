"""An ablation's steps as tasks of a Ray cluster: the plan's graph over a runs folder that all nodes share.

Ray schedules; the store decides what is done, as it does for one process. The step of a lost worker is run again,
and resumes from what is in the step's folder.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qcft.ablation.arms import begin_ablation, changes_of, fault_of, first_undone
from qcft.errors import ChangedInput, InputError, QcftError, short
from qcft.events import Watch
from qcft.models.gpus import asked_device
from qcft.recipe import ArmRun, Recipe, recipe_from
from qcft.runner.libraries import quiet, set_environment
from qcft.runner.planned import PlannedRecipe
from qcft.runner.recipe import do_step, run_prepared
from qcft.store import Store
from qcft.store.ablations import AblationIndex
from qcft.store.holding import working
from qcft.store.results import Run
from qcft.training.settings import with_optimizers

RETRIES = 3  # of a step whose worker was lost


def run_on_ray(
    plain: Recipe, arms: Sequence[ArmRun], runs: Path, watch: Watch, finished: Callable[[Run], Run], address: str | None
) -> AblationIndex:
    """`run_arms` with the steps on a Ray cluster: the one at `address`, or one started on this machine.

    Raises InputError where Ray is not installed or the cluster cannot be reached.
    """
    section = plain.ablation
    assert section is not None
    if asked_device() == "cpu":
        if section.gpus:
            raise InputError(
                f"--cpu with ablation.gpus={section.gpus:g}: the steps cannot both run on the CPU and have GPUs",
                "omit --cpu (or unset QCFT_DEVICE), or --set ablation.gpus=0",
            )
        section = section.model_copy(update={"gpus": 0})
    runs = runs.absolute()
    with _cluster(address) as ray, ExitStack() as held:
        gpus = section.gpus if section.gpus is not None else min(1, ray.cluster_resources().get("GPU", 0))
        where = "cuda" if gpus else "cpu"  # so that every worker plans the same steps, with or without a GPU
        arms = [replace(arm, recipe=with_optimizers(arm.recipe, where)) for arm in arms]
        ablation, named = begin_ablation(plain, arms, runs, watch)
        held.enter_context(working(runs, *(name for name, _ in named)))
        store, tasks = Store(runs), _Tasks(ray, section.cpus, gpus, runs)
        parts = {name: tasks.submit(one.prepared, store) for name, one in named}
        prepared = {name: one.prepared for name, one in named}
        changes = dict(zip(prepared, changes_of(named), strict=True))
        for name in prepared:
            ablation.begin(name)
            watch.emit(changes[name]("running"))
        open_arms = dict(parts)
        while open_arms:
            watch.check_stop()
            waiting = list({ref for refs in open_arms.values() for ref in refs})
            ready = set(ray.wait(waiting, timeout=1)[0]) if waiting else set()
            for name, refs in list(open_arms.items()):
                left = [ref for ref in refs if ref not in ready]
                open_arms[name] = left
                if len(left) < len(refs):
                    watch.emit(changes[name]("running", f"{len(left)} of {len(parts[name])} steps left"))
                if left:
                    continue
                del open_arms[name]
                error = _failure(ray, parts[name])
                if error is None:
                    try:
                        finished(run_prepared(prepared[name], store, watch))
                    except QcftError as refused:  # a merge that kept too little
                        error = refused
                fault = fault_of(error, first_undone(prepared[name], store)) if error else None
                ablation.end(name, fault)
                watch.emit(changes[name]("failed" if fault else "done", fault["message"] if fault else ""))
    return ablation


class _Tasks:
    """Every step that is not done, submitted once, after the steps it depends on."""

    def __init__(self, ray: Any, cpus: float, gpus: float, runs: Path) -> None:
        self.refs: dict[str, Any] = {}
        self.runs = runs
        self.work = ray.remote(_work)
        self.options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES, "retry_exceptions": False}

    def submit(self, prepared: PlannedRecipe, store: Store) -> list[Any]:
        """The tasks of an arm's steps that are not done."""
        document = prepared.pinned_recipe().model_dump(mode="json")
        own = []
        for step in prepared.plan.steps:
            if step.id not in self.refs:
                if store.done(step.id) is not None:
                    continue
                parents = [self.refs[parent] for parent in step.depends_on if parent in self.refs]
                options = self.options | ({"num_gpus": 0} if step.work.streams else {})
                task = self.work.options(**options, name=step.title)
                self.refs[step.id] = task.remote(document, str(self.runs), os.getcwd(), step.id, *parents)
            own.append(self.refs[step.id])
        return own


_memo: dict[Any, Any] = {}  # what a worker has read, for all steps it does


def _work(recipe: dict[str, Any], runs: str, working: str, step: str, *_: None) -> None:
    """A step, in a worker. The steps it depends on are passed so that Ray runs them first."""
    with suppress(OSError):  # another machine may lack it; only relative paths need it
        os.chdir(working)
    set_environment()
    quiet()
    watch, store = Watch(), Store(Path(runs))
    prepared = PlannedRecipe(recipe_from(recipe), watch, memo=_memo)
    steps = prepared.plan.steps
    position, wanted = next(((i, one) for i, one in enumerate(steps, start=1) if one.id == step), (0, None))
    if wanted is None:
        raise ChangedInput(f"{step}: its inputs changed meanwhile", "run the same command again")
    do_step(wanted, position, len(steps), prepared.bench(store, watch))


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise InputError("--on ray: Ray is not installed", "pip install 'qcft[ray]'") from None
    try:
        host, colon, port = (address or "").rpartition(":")
        if colon and port.isdigit():  # Ray itself waits for minutes, then ends the process
            socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
        with TemporaryDirectory() as empty, chdir(empty):  # Ray has workers load modules from the working folder first
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
    except (OSError, ValueError, RuntimeError) as error:
        what = f"there is no cluster at {address!r}" if address else "a cluster could not be started on this machine"
        hint = "start one with `ray start --head`" + ("" if address else ", then give --on ray:ADDRESS")
        raise InputError(f"--on ray: {what}: {short(error)}", hint) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _failure(ray: Any, refs: Sequence[Any]) -> Exception | None:
    """Why a task failed: the error of the step itself if there is one, else what Ray reports about its worker."""
    for ref in refs:
        try:
            ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            return cause if isinstance(cause, Exception) else error
        except ray.exceptions.RayError as error:
            return QcftError(f"its worker was lost {RETRIES + 1} times: {short(error, 200)}", "")
    return None
