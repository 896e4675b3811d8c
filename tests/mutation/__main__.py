"""Which small mistakes the tests notice: the score of each module, and the survivors.

    python -m tests.mutation                        six mistakes in each module
    python -m tests.mutation --only metrics.scores,core.lock --count 20 --seed 1
    python -m tests.mutation --only core.lock --list     all that could be made

A mistake is made in a copy of the repository, and the module's own tests and doctests run on it,
without those that need Ray, an S3 server or a browser. Which mistakes are made is drawn by `--seed`
from their names, so that a change of the code moves few of them. Those that change nothing that
could be noticed stand in equivalent.txt with the reason, and are not drawn.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from tests.mutation.mutants import Mutant, changed, mutants, sample

ROOT = Path(__file__).parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
# The modules that decide a number or a row, and tests that state what they do beside their own.
MODULES: dict[str, tuple[str, ...]] = {
    "metrics.scores": (),
    "metrics.calibration": (),
    "models.classifier": ("metrics/test_calibration",),
    "metrics.thresholds": (),
    "metrics.novelty": (),
    "metrics.intervals": (),
    "evaluation.verdict": (),
    "metrics.drift": (),
    "metrics.nights": (),
    "metrics.rounding": ("metrics/test_thresholds",),
    "metrics.estimate": (),
    "metrics.prevalence": (),
    "metrics.verdicts": (),
    "metrics.background": (),
    "metrics.mistakes": (),
    "metrics.slices": (),
    "evaluation.settings": ("metrics/test_slices",),
    "labelling.selection": (),
    "labelling.audit": (),
    "features.cache": (),
    "data.images": ("features/test_cache",),
    "features.moments": ("features/test_cache",),
    "features.views": ("features/test_cache",),
    "core.errors": ("features/test_cache",),
    "training.head.fit": (),
    "training.loop": ("training/head/test_fit", "training/finetune/test_fit"),
    "distributed.worker": ("training/head/test_fit",),
    "training.finetune.fit": (),
    "training.finetune.tuner": ("training/finetune/test_fit",),
    "training.finetune.state": ("training/finetune/test_fit",),
    "training.finetune.augment": (),
    "training.finetune.pixels": (),
    "training.head.state": (),
    "distributed.checkpoint": ("training/head/test_state",),
    "scoring.ledger": (),
    "scoring.fields": (),
    "scoring.units": (),
    "scoring.shares": (),
    "scoring.audits": ("labelling/test_audit",),
    "scoring.staging": ("scoring/test_ledger",),
    "core.lock": (),
    "scoring.listing": (),
    "data.listing": (),
    "data.headers": ("data/test_images",),
    "data.tables": ("scoring/test_listing",),
    "preparation.labels": ("preparation/test_sources",),
    "scoring.rows": (),
    "scoring.reading": ("scoring/test_rows",),
    "preparation.plan": (),
    "preparation.examples": ("preparation/test_plan",),
    "preparation.duplicates": ("preparation/test_plan",),
    "data.groups": ("preparation/test_plan",),
    "preparation.splits": ("preparation/test_plan",),
    "preparation.sources": (),
    "preparation.samples": ("preparation/test_sources",),
    "preparation.parquet": ("preparation/test_sources",),
    "preparation.folders": ("preparation/test_sources",),
    "preparation.webdataset": ("preparation/test_sources",),
    "data.shards": (),
    "models.bundle": (),
    "models.runtime": ("models/test_bundle",),
    "models.card": ("models/test_bundle",),
    "models.weights": (),
    "models.resnet": ("models/test_weights",),
    "core.hardware": ("models/test_weights",),
    "models.tta": (),
    "models.registry": (),
    "core.settings": (),
    "preparation.settings": ("core/test_settings",),
    "training.settings": ("core/test_settings",),
    "scoring.settings": ("core/test_settings",),
    "models.settings": ("core/test_settings",),
    "labelling.settings": ("core/test_settings",),
    "evaluation.evaluate": (),
    "evaluation.document": ("evaluation/test_evaluate",),
    "evaluation.tables": (),
    "evaluation.promote": (),
    "training.dry_run": (),
    "training.estimate": (),
    "training.stages": (),
    "training.head.worker": (),
    "distributed.group": (),
    "distributed.failures": ("distributed/test_group",),
    "distributed.ray_train": ("distributed/test_group",),
    "training.publish": (),
    "training.finetune.worker": (),
    "labelling.answers": (),
    "labelling.labelstudio": (),
    "models.cam": (),
}
# Imported once, before the processes that run the tests are forked.
_HEAVY = ("tensorflow", "keras", "ray", "ray.data", "pyarrow.parquet", "scipy.optimize", "cv2")
_SERVERS = {"local_ray", "moto", "radosgw", "browser", "served"}


@dataclass
class _Run:
    """The tests of a module, running in a process of their own on one copy of the repository."""

    process: ForkProcess
    copy: Path
    module: str
    mutant: Mutant | None  # None: the code as it is
    began: float = field(default_factory=time.monotonic)


@dataclass
class _Score:
    killed: int = 0
    survivors: list[Mutant] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.killed + len(self.survivors)


def main() -> None:
    options = _options()
    chosen = options.only.split(",") if options.only else list(MODULES)
    equivalent = _equivalent()
    drawn = {}
    for module in chosen:
        source = _file(ROOT, module).read_text()
        names = equivalent.get(module, set())
        found = [each for each in mutants(source) if each.name not in names]
        if unknown := names - {each.name for each in mutants(source)}:
            sys.exit(f"equivalent.txt: {module} has no mistake {sorted(unknown)}")
        found = [mutant for mutant, _ in changed(source, found)]
        drawn[module] = found if options.list else sample(found, options.count, seed=options.seed)
    if options.list:
        for module, found in drawn.items():
            print(*(f"{module}:{each.line} {each.name}" for each in found), sep="\n")
        return
    with tempfile.TemporaryDirectory(prefix="leafnet-mutation-") as folder:
        scores = _run_all(drawn, [_copy(Path(folder) / str(i)) for i in range(options.jobs)])
    _tell(scores)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", help="modules, with commas")
    parser.add_argument("--count", type=int, default=6, help="mistakes in each module")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at the same time")
    parser.add_argument("--list", action="store_true", help="all mistakes, none of them made")
    options = parser.parse_args()
    if unknown := set((options.only or "core.lock").split(",")) - set(MODULES):
        parser.error(f"--only {options.only}: no module {', '.join(sorted(unknown))}")
    return options


def _file(root: Path, module: str) -> Path:
    return root / "leafnet" / f"{module.replace('.', '/')}.py"


def _tests(module: str) -> list[str]:
    """The files with the tests of a module: its own, and those named beside it."""
    *folders, name = module.split(".")
    own = "/".join(["tests", *folders, f"test_{name}.py"])
    files = [own] if (ROOT / own).exists() else []
    return files + [f"tests/{each}.py" for each in MODULES[module]]


def _equivalent() -> dict[str, set[str]]:
    """Names of mistakes that nobody can notice, by module."""
    found: dict[str, set[str]] = {}
    for line in EQUIVALENT.read_text().splitlines():
        if line and not line.startswith(("#", " ")):
            module, name = line.split(" ", 1)
            found.setdefault(module, set()).add(name)
    return found


def _copy(folder: Path) -> Path:
    """A copy of what the tests need, to make mistakes in."""
    kept = shutil.ignore_patterns(".*", "__pycache__", "demo", "build", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=kept)
    return folder


def _run_all(drawn: dict[str, list[Mutant]], copies: list[Path]) -> dict[str, _Score]:
    """Run the tests on every mutant, one in each of the copies at a time."""
    # As many processes as processors: more threads would only wait for each other.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    for name in _HEAVY:
        importlib.import_module(name)
    # Processes are forked with the modules above, and must import leafnet from their copy.
    for name in [each for each in sys.modules if each.split(".")[0] in ("leafnet", "tests")]:
        if not name.startswith("tests.mutation") and name != "tests":
            del sys.modules[name]
    limits: dict[str, float] = {}
    waiting: list[tuple[str, Mutant | None]] = [(module, None) for module in drawn]
    waiting += [(module, mutant) for module, found in drawn.items() for mutant in found]
    scores = {module: _Score() for module in drawn}
    running: list[_Run] = []
    while waiting or running:
        while waiting and len(running) < len(copies):
            module, mutant = waiting[0]
            if mutant is not None and module not in limits:
                break  # its tests have not passed yet without a mistake
            waiting.pop(0)
            (copy, *_) = [each for each in copies if each not in [run.copy for run in running]]
            running.append(_start(copy, module, mutant))
        multiprocessing.connection.wait([run.process.sentinel for run in running], timeout=1.0)
        for run in list(running):
            taken = time.monotonic() - run.began
            late = taken > limits.get(run.module, 900)
            if run.process.is_alive() and not late:
                continue
            _end(run)
            running.remove(run)
            code = None if late else run.process.exitcode
            if run.mutant is None:
                if code != 0:
                    output = (run.copy / "output.txt").read_text()
                    sys.exit(f"{output}\n{run.module}: its tests fail without a mistake")
                limits[run.module] = 60 + 5 * taken
                print(f"{run.module:28} {taken:6.1f} s for its tests", flush=True)
            elif code == 0:
                scores[run.module].survivors.append(run.mutant)
                print(f"{run.module:28} survives:{run.mutant.line} {run.mutant.name}", flush=True)
            else:
                scores[run.module].killed += 1
    return scores


def _start(copy: Path, module: str, mutant: Mutant | None) -> _Run:
    source = _file(ROOT, module).read_text()
    _file(copy, module).write_text(mutant.applied(source) if mutant else source)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_test, args=(copy, module))
    process.start()
    return _Run(process, copy, module, mutant)


def _end(run: _Run) -> None:
    """End the process with all that its tests have started, and put the file back."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.process.pid or 0, signal.SIGKILL)
    run.process.join()
    shutil.copyfile(_file(ROOT, run.module), _file(run.copy, run.module))


def _test(copy: Path, module: str) -> None:
    """Run the module's tests on the copy; exits with pytest's code."""
    os.setsid()
    os.chdir(copy)
    sys.path[:] = [str(copy), *(each for each in sys.path if each not in ("", str(ROOT)))]
    os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    sys.modules.pop("tests", None)
    importlib.invalidate_caches()
    with (
        open("output.txt", "w") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        code = pytest.main(
            [
                *("-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(copy)),
                *("-m", "not ray and not slow and not faults", "--durations=0"),
                *(str(_file(copy, module).relative_to(copy)), *_tests(module)),
            ],
            plugins=[_WithoutServers()],
        )
    os._exit(int(code))


class _WithoutServers:
    """Leaves out what needs a server, as pytest does with marks."""

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        left_out = [item for item in items if _SERVERS & set(getattr(item, "fixturenames", ()))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _tell(scores: dict[str, _Score]) -> None:
    print()
    for module, score in scores.items():
        share = f"{score.killed / score.total:4.0%}" if score.total else "  - "
        print(f"{module:28} {share}  {score.killed:3} of {score.total:3}")
    killed = sum(score.killed for score in scores.values())
    total = sum(score.total for score in scores.values())
    print(f"{'all':28} {killed / max(total, 1):4.0%}  {killed:3} of {total:3}\n")
    for module, score in scores.items():
        for mutant in score.survivors:
            print(f"{module}:{mutant.line} {mutant.name}")


if __name__ == "__main__":
    main()
