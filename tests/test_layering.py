"""Which package may import which. Imports go down only."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

LEAFNET = Path(__file__).parents[1] / "leafnet"

# Each package, or module beside the packages, and the others that it may import, from the bottom to
# the top. A row that has to grow is a decision on the architecture.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "metrics": set(),
    "data": {"core"},
    "reporting": {"core", "metrics"},
    "models": {"core", "data", "metrics"},
    "distributed": {"core", "data"},
    "features": {"core", "data", "distributed", "models"},
    "preparation": {"core", "data", "distributed"},
    "evaluation": {"core", "data", "distributed", "metrics", "models"},
    "scoring": {"core", "data", "distributed", "metrics", "models", "reporting"},
    "labelling": {"core", "data", "models", "preparation", "scoring"},
    "training": {
        *("core", "data", "distributed", "evaluation", "features", "metrics", "models"),
        "reporting",
    },
    "doctor": {"core", "distributed", "models"},
}

# Beside all of `distributed`: what runs on the cluster, and the jobs that start it.
MAY_IMPORT_RAY = {
    "doctor",
    "evaluation.evaluate",
    "evaluation.predict",
    "features.extraction",
    "preparation.prepare",
    "scoring.pipeline",
    "scoring.score",
    "scoring.telemetry",
    "training.dry_run",
    "training.finetune.worker",
    "training.head.trials",
    "training.head.worker",
    "training.quantize",
    "training.run",
    "training.stages",
}
# The one module that a new release of Ray may break.
MAY_IMPORT_PRIVATE_RAY = {"distributed.ray_train"}

# Each module by its dotted name below leafnet, such as `core.errors`.
FILES: dict[str, Path] = {
    ".".join(path.relative_to(LEAFNET).with_suffix("").parts): path
    for path in sorted(LEAFNET.rglob("*.py"))
    if path.stem != "__init__"
}
MODULES = list(FILES)


def imports(path: Path) -> set[str]:
    """Dotted names of all that a source file imports anywhere in it, relative imports refused."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from leafnet.core import errors` imports a module, `from leafnet.core.errors import
            # UserError` a name: with both spelled out, the module is the beginning of either.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif (  # after `import leafnet`
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "leafnet"
        ):
            found.add(f"leafnet.{node.attr}")
    return found


def own(names: set[str], modules: Collection[str]) -> set[str]:
    """Those of `modules` that `names` are of, or are in; a package is no answer."""
    found: set[str] = set()
    for name in names:
        top, *parts = name.split(".")
        if top == "leafnet" and parts and not parts[0].startswith("__"):
            beginnings = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
            assert beginnings & set(modules), f"{name} is no module, and nothing in one"
            found |= beginnings & set(modules)
    return found


def package(module: str) -> str:
    """The row of MAY_IMPORT that a module belongs to."""
    return module.split(".")[0]


def forbidden(module: str, imported: Collection[str]) -> list[str]:
    """What is wrong with the imports of a module, each with the way to go."""
    row = package(module)
    wrong = {other for other in imported if package(other) not in MAY_IMPORT[row] | {row}}
    return [
        f"leafnet.{module} imports leafnet.{other}, but {row} may import only "
        f"{', '.join(sorted(MAY_IMPORT[row])) or 'nothing of leafnet'}: move what both need into "
        f"one of these, or hand it over as an argument from a package above {row}"
        for other in sorted(wrong)
    ]


def private_ray(path: Path) -> set[str]:
    """Names of Ray with a part that begins with `_`, imported or reached through `ray`."""
    found = {name for name in imports(path) if name.split(".")[0] == "ray"}
    for node in ast.walk(ast.parse(path.read_text())):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if name.split(".")[0] == "ray" and name.replace(".", "").replace("_", "").isalnum():
            found.add(name)
    return {
        name
        for name in found
        if any(part.startswith("_") for part in name.split(".")) or ".core.generated" in name
    }


def test_every_module_is_in_a_row_of_the_table() -> None:
    assert len(MODULES) > 90
    assert {package(module) for module in MODULES} == set(MAY_IMPORT)
    assert set(MODULES) > MAY_IMPORT_RAY | MAY_IMPORT_PRIVATE_RAY
    assert len(list(LEAFNET.glob("*.py"))) <= 4


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_the_table_allows(module: str) -> None:
    assert forbidden(module, own(imports(FILES[module]), MODULES)) == []


def test_the_table_goes_one_way() -> None:
    above: set[str] = set()
    for row, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{row} may import {allowed - above}, which stand below it"
        above.add(row)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: own(imports(path), MODULES) for module, path in FILES.items()}
    assert sum(map(len, graph.values())) > 300
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_a_forbidden_import_is_told_with_the_way_to_go() -> None:
    (message,) = forbidden("data.shards", {"core.errors", "data.images", "models.bundle"})
    assert message.startswith("leafnet.data.shards imports leafnet.models.bundle, but data may")
    assert "only core: move what both need into one of these" in message
    (message,) = forbidden("metrics.scores", {"core.errors"})
    assert "metrics may import only nothing of leafnet" in message


def test_a_package_imports_nothing() -> None:
    """Else importing one module would import others, which the table does not show.

    `leafnet.load_model` is for programs of others, and imports when it is called.
    """
    packages = list(LEAFNET.rglob("__init__.py"))
    assert len(packages) == len(MAY_IMPORT) - 1 + 3  # leafnet, training.head, training.finetune
    found = {path: own(imports(path), MODULES) for path in packages}
    assert found.pop(LEAFNET / "__init__.py") == {"models.bundle"}
    assert found == {path: set() for path in found}


@pytest.mark.parametrize(
    "module",
    [each for each in MODULES if package(each) != "distributed" and each not in MAY_IMPORT_RAY],
)
def test_only_rooms_of_the_cluster_know_ray(module: str) -> None:
    assert "ray" not in {name.split(".")[0] for name in imports(FILES[module])}


@pytest.mark.parametrize("module", sorted(set(MODULES) - MAY_IMPORT_PRIVATE_RAY))
def test_private_parts_of_ray_stand_in_one_module(module: str) -> None:
    assert private_ray(FILES[module]) == set()


def test_private_parts_are_seen(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import ray\n"
        "from ray.train.v2._internal.constants import A\n"
        "from ray.core.generated import gcs_pb2\n"
        "ray._private.state.state.get()\n"
        "ray.get(x)._hidden\n"
    )
    assert private_ray(source) >= {
        "ray.train.v2._internal.constants.A",
        "ray.core.generated.gcs_pb2",
        "ray._private.state.state.get",
    }
    source.write_text("import ray\nray.get(x)._hidden\n")
    assert private_ray(source) == set()


def test_the_test_sees_imports_of_every_kind(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import ray.data, leafnet.core.s3 as s3\n"
        "from leafnet import __version__, lock\n"
        "from leafnet.core import errors, storage as files\n"
        "from leafnet.data.shards import Shard\n"
        "if False:\n"
        "    def late():\n"
        "        from leafnet.models.onnx.graph import build\n"
        "        return leafnet.__file__, leafnet.core.hardware.describe(), leafnet\n"
    )
    modules = ["core.errors", "core.s3", "core.storage", "data.shards", "lock", "core.hardware"]
    modules.append("models.onnx.graph")
    found = imports(source) - {"leafnet.core"}
    assert own(found | {"leafnet.core.hardware"}, [*modules, "errors", "s3"]) == set(modules)
    assert "ray.data" in imports(source)


@pytest.mark.parametrize("name", ["leafnet.core", "leafnet.gone", "leafnet.core.gone"])
def test_an_import_that_shows_no_module_is_refused(name: str) -> None:
    with pytest.raises(AssertionError, match="is no module"):
        own({name, "leafnet.core.errors"}, ["core.errors"])


def test_a_relative_import_is_refused(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("from . import errors\n")
    with pytest.raises(AssertionError, match="relative import"):
        imports(tmp_path / "module.py")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("leafnet", ["tensorflow", "keras", "ray"]),
        ("leafnet.preparation.sources", ["tensorflow", "keras", "ray"]),
        ("leafnet.preparation.plan", ["tensorflow", "keras", "ray"]),
        ("leafnet.training.train", ["tensorflow", "keras"]),
        ("leafnet.preparation.prepare", ["tensorflow", "keras"]),
    ],
)
def test_importing_is_light(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
