"""Which tasks of lm-eval (and qcft's own) a recipe asks for, in which languages, and whether they are available."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcft.data.filters import identified
from qcft.errors import InputError, QcftError, nearest, short
from qcft.events import Watch
from qcft.hub import unreachable
from qcft.measure.local import check_local, local_dataset, local_digest
from qcft.measure.squad import stand_in
from qcft.private import private
from qcft.recipe import ALPACA_EVAL, FIDELITY, SUITES, Evaluate

OWN_TASKS = Path(__file__).parent / "tasks"
OWN_WORK = (FIDELITY, ALPACA_EVAL)
ENGLISH = "en"
SCRIPTS = {"csebuetnlp/xlsum", "facebook/mlqa"}  # datasets that are scripts, which `datasets` no longer runs
NEEDS = {"ifeval": ("langdetect", "immutabledict", "nltk"), "xlsum_ja": ("fugashi",), "xlsum_th": ("pythainlp",)}
INSTALL = "pip install 'qcft[eval]'"


@dataclass(frozen=True)
class Chosen:
    """The tasks that a recipe asks for, each with a digest of its local definition and data; and for each language,
    the tasks of the suites that do not have it."""

    tasks: Mapping[str, str]
    lacking: Mapping[str, tuple[str, ...]]


class Catalog:
    """lm-eval's tasks by name; reads their YAML files, and data only when a task is loaded."""

    def __init__(self, evaluate: Evaluate, watch: Watch) -> None:
        for module, package in (("lm_eval", "lm-eval"), ("rouge_score", "rouge-score")):
            if find_spec(module) is None:
                raise InputError(f"evaluate: {package} is not installed", INSTALL)
        self.evaluate = evaluate
        self.watch = watch
        self._all: Any = None
        self._loaded: dict[str, Any] = {}

    @property
    def lm_eval(self) -> str:
        """lm-eval's version, which fixes the prompts and scores of its tasks."""
        return version("lm_eval")

    def choose(self, trained: Iterable[str]) -> Chosen:
        """The tasks of the suites in the requested languages (default: those trained), then the tasks given by name.

        Raises InputError for an unknown task or language, and for a local copy of a task that is not evaluated.
        """
        evaluate, names = self.evaluate, list[str]()
        wanted = evaluate.languages if evaluate.languages is not None else trained
        languages = list(dict.fromkeys(lang.split("-")[0] for lang in wanted))  # tasks in pt serve pt-BR
        patterns = [task for suite in evaluate.suites for task in SUITES[suite]]
        self._check_languages(patterns, languages if evaluate.languages else [])
        lacking: dict[str, tuple[str, ...]] = {}
        for pattern in patterns:
            for lang in languages if "{lang}" in pattern else [ENGLISH]:
                name = pattern.replace("{lang}", lang)
                if name in OWN_WORK or self._knows(name):
                    names.append(name)
                else:
                    lacking[lang] = (*lacking.get(lang, ()), name)
        for name in evaluate.tasks:
            names += self._named(name)
        names = list(dict.fromkeys(names))
        for name in evaluate.local:
            if name not in names:
                raise InputError(
                    f"evaluate.local: {name!r} is not one of the tasks to evaluate",
                    nearest(name, names) + f"they are {', '.join(names)}",
                )
        return Chosen({name: self._digest(name) for name in names}, lacking)

    def check(self, name: str) -> None:
        """Load a task's data, and check that the packages it needs are installed. Raises InputError."""
        for package in NEEDS.get(name.split("_")[0] if name.startswith("ifeval") else name, ()):
            if find_spec(package) is None:
                raise InputError(f"evaluate: {name} needs {package}, which is not installed", INSTALL)
        if name.startswith(("ifeval", "leaderboard")):
            _check_punkt(name)
        if name not in OWN_WORK:
            self.load(name)

    def load(self, name: str) -> Any:
        """A task (or group) loaded by lm-eval, with its data: `tasks`, `groups` and `group_map`."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> Any:
        manager = self._manager_of(name)
        local = self.evaluate.local.get(name)
        changes: dict[str, Any] = {}
        if local is not None:
            changes["custom_dataset"] = local_dataset(name, check_local(name, local), self.evaluate.shots)
        elif (settings := _settings(manager, name)).get("dataset_path") in SCRIPTS:
            changes = _as_converted(settings)
        self.watch.note(f"reading the data of {name}")
        stand_in()
        try:
            # `TaskManager.load` applies no overrides to groups, so the function that it calls is called directly.
            built = private("lm_eval.tasks._factory:TaskFactory")().build(
                manager.task_index[name], overrides=changes, registry=manager.task_index
            )
            loaded = manager.load([built])
            if local is not None:
                _try_scoring(loaded["tasks"].values())
        except QcftError:
            raise
        except Exception as error:  # tasks are code and data by many authors, and may raise anything
            if local is not None:
                raise _unfit(name, local, error) from None
            hint = f"give a local copy with the hub's columns, evaluate.local: {{{name}: PATH}}"
            raise unreachable(f"evaluate: the data of {name}", _dataset(manager, name), error, hint) from None
        return loaded

    def _manager_of(self, name: str) -> Any:
        return self._near if name in self._near.all_tasks else self._every()

    @cached_property
    def _near(self) -> Any:
        """The tasks in those folders of lm-eval that have the name of a requested task: this takes 0.1 s, reading all
        YAML files of lm-eval takes 10 s."""
        import lm_eval.tasks
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        asked = [*self.evaluate.tasks, *(task for suite in self.evaluate.suites for task in SUITES[suite])]
        place = Path(lm_eval.tasks.__file__).parent
        folders = [f for f in sorted(place.iterdir()) if any(_begins_with(name, f.name) for name in asked)]
        return TaskManager(include_defaults=False, include_path=[*folders, OWN_TASKS])

    def _every(self) -> Any:
        from lm_eval.tasks import TaskManager

        if self._all is None:
            self.watch.note("searching all of lm-eval's tasks")
            self._all = TaskManager(include_path=OWN_TASKS)
        return self._all

    def _knows(self, name: str) -> bool:
        return name in self._near.all_tasks

    def _named(self, name: str) -> list[str]:
        """The tasks that a name stands for: the task itself, or the tasks of a tag."""
        if name in OWN_WORK:
            return [name]
        manager = self._manager_of(name)
        if name not in manager.all_tasks:
            known = [*manager.all_tasks, *OWN_WORK]
            raise InputError(
                f"evaluate.tasks: there is no task {name!r}",
                nearest(name, known) + "lm-eval lists its tasks with `lm_eval ls tasks`",
            )
        return sorted(manager.task_index[name].tags) if name in manager.all_tags else [name]

    def _check_languages(self, patterns: Sequence[str], languages: Iterable[str]) -> None:
        families = [pattern for pattern in patterns if "{lang}" in pattern]
        for lang in languages:
            if families and not any(self._knows(pattern.replace("{lang}", lang)) for pattern in families):
                ends = {name.rsplit("_", 1)[-1] for name in self._near.all_tasks}
                known = sorted(e for e in ends if any(self._knows(p.replace("{lang}", e)) for p in families))
                raise InputError(
                    f"evaluate.languages: no task of the suites is in {lang!r}",
                    nearest(lang, known) + f"they are in {', '.join(known)}",
                )

    def _digest(self, name: str) -> str:
        """A digest of what lm-eval's version does not fix: qcft's own tasks, a local copy."""
        parts = []
        if name in self.evaluate.local:
            parts.append(local_digest(check_local(name, self.evaluate.local[name])))
        own = OWN_TASKS / name.split("_")[0]
        if own.is_dir():
            parts += [file.read_text(encoding="utf-8") for file in sorted(own.iterdir()) if file.is_file()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else "hub"


def language_of(task: str, texts: Iterable[str]) -> str:
    """The language of a task: for tasks of a suite the one in the name (`xquad_es`, `mlqa_de_de`).

    The names of other tasks are not reliable (`belebele_spa_Latn`, `kobest_copa`, the English `commonsense_qa`), so it
    is the language that is identified in most of `texts`, the texts of the task's items. The name's language is used
    where no language is identified, or another one that is not English (a confusion of similar languages).
    """
    end = task.rsplit("_", 1)[-1]
    named = end if "_" in task and re.fullmatch(r"[a-z]{2}", end) else None
    if any(task == pattern.replace("{lang}", end) for suite in SUITES.values() for pattern in suite):
        return named or ENGLISH
    counts = Counter(lang for text in texts if (lang := identified(text))).most_common(1)
    if not counts:
        return named or ENGLISH
    most = counts[0][0]
    return most if most == ENGLISH or most in task.split("_") else named or most


def family_of(task: str) -> str:
    """A task's name without its language: `xquad`, `mlqa`, `belebele`."""
    return re.sub(r"(_[a-z]{2}|_[a-z]{3}_[A-Z][a-z]{3})+$", "", task)


def _begins_with(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}_")


def _check_punkt(name: str) -> None:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:  # it comes from neither the hub nor the package index, so qcft does not download it
        raise InputError(
            f"evaluate: {name} needs NLTK's punkt_tab, which is not installed",
            "on a machine with a network, run `python -m nltk.downloader punkt_tab`; copy its ~/nltk_data to this "
            "machine, or set NLTK_DATA to the folder",
        ) from None


def _try_scoring(tasks: Iterable[Any]) -> None:
    """Score an empty answer to the first item, which reads every column that the score needs.

    Without this check, the name of a missing target column would be used as the answer, and every item be wrong.
    """
    for task in tasks:
        target = task.config.doc_to_target
        if isinstance(target, str) and target.isidentifier() and target not in task.eval_docs[0]:
            raise KeyError(target)
        if task.OUTPUT_TYPE == "generate_until":
            try:
                task.process_results(task.eval_docs[0], [""])
            except (ValueError, TypeError, ZeroDivisionError, IndexError):
                continue  # because the answer is empty


def _unfit(name: str, path: str, error: Exception) -> InputError:
    column = re.search(r"'(\w+)' is undefined", str(error))
    missing = column[1] if column else str(error.args[0]) if isinstance(error, KeyError) and error.args else None
    what = f"has no column {missing!r}" if missing else f"cannot be read: {short(error)}"
    return InputError(f"evaluate.local: {name}: {path!r} {what}", f"give a file with the columns of {name} on the hub")


def _dataset(manager: Any, name: str) -> str:
    """The dataset of a task on the hub; for a group, whose tasks have datasets of their own, its name."""
    return str(_settings(manager, name).get("dataset_path") or name)


def _settings(manager: Any, name: str) -> Mapping[str, Any]:
    """What the YAML file of a task or group says, with what it includes."""
    file = manager.task_index[name].yaml_path
    found: Mapping[str, Any] = private("lm_eval.tasks._yaml_loader:load_yaml")(file, resolve_func=False) if file else {}
    return found


def _as_converted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by which a task reads what the hub made of a dataset that is a script: a branch with Parquet files,
    CONFIGURATION/SPLIT/NUMBER.parquet. Nothing on it names the configurations, so the files are named here."""
    splits = {settings[key] for key in ("training_split", "validation_split", "test_split") if settings.get(key)}
    files = {split: f"{settings['dataset_name']}/{split}/*.parquet" for split in sorted(splits)}
    return {"dataset_name": None, "dataset_kwargs": {"revision": "refs/convert/parquet", "data_files": files}}
