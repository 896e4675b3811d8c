"""Which module may import which. Imports go one way: a module imports only what stands above it."""

import ast
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

LEAFNET = Path(__file__).parents[1] / "leafnet"

# Each module, the modules of leafnet that it may import, from the bottom to the top. A new module
# gets a line here; a line that has to grow is a decision on the architecture.
MAY_IMPORT: dict[str, set[str]] = {
    # Values, files, pictures and numbers, which know nothing of data sets and models.
    "errors": set(),
    "images": set(),
    "metrics": set(),
    "s3": {"errors"},
    "storage": {"errors", "s3"},
    "config": {"errors", "storage"},
    "terminal": {"errors", "storage"},
    "machine": set(),
    "demo": {"errors"},
    "plots": {"metrics"},
    "thumbnails": set(),
    "pages": {"terminal"},
    "mistakes": set(),
    "slices": {"errors", "metrics"},
    "background": {"metrics"},
    # The data set.
    "local_cache": {"storage"},
    "shards": {"errors", "storage", "local_cache"},
    "sources": {"errors", "storage"},
    "prepare": {"errors", "config"},
    "tensorboard": {"config", "images", "shards", "storage"},
    "tracking": {"errors", "config", "storage", "terminal"},
    # The network, its training and its publication.
    "backbone": {"errors", "storage"},
    "classifier": {"backbone"},
    "openvino_graph": {"backbone", "classifier"},
    "onnx_graph": {"backbone", "classifier"},
    "novelty": set(),
    "review": {"metrics"},
    "drift": {"review"},
    "charts": {"metrics", "drift"},
    "calibration": {"metrics", "classifier"},
    "resampling": {"metrics", "calibration"},
    "evaluation_tables": {"terminal", "background", "resampling"},
    "tta": {"classifier"},
    "cam": {"backbone", "classifier"},
    "explanations": {"images", "thumbnails", "backbone", "classifier", "cam"},
    "gallery": {"storage", "images", "metrics", "mistakes", "shards", "cam"},
    "features": {"storage", "images", "shards", "backbone"},
    "augment": {"features"},
    "photographs": {"images", "local_cache", "shards"},
    "checkpoint": {"errors", "storage", "classifier"},
    "training": {"errors", "config", "classifier", "checkpoint", "features"},
    "finetune": {
        *("errors", "storage", "config", "backbone", "classifier", "checkpoint", "training"),
        *("augment", "photographs"),
    },
    "registry": {"errors", "storage"},
    "plan": {"backbone", "features", "training"},
    "bundle": {
        *("errors", "storage", "images", "metrics", "registry"),
        *("backbone", "openvino_graph", "novelty", "review", "classifier"),
    },
    # What a published model does, as far as that needs no cluster.
    "engine": {"errors", "backbone", "openvino_graph", "review", "bundle"},
    "apart": {"errors", "images"},
    "scoring": {"errors", "storage", "images", "metrics", "apart", "shards", "review"},
    "listing": {"errors", "storage", "shards", "sources"},
    "ledger": {"errors", "storage", "scoring"},
    "lock": {"errors", "storage"},
    "comparison": {"metrics", "resampling"},
    "export": {
        *("errors", "config", "storage", "terminal", "images", "metrics", "demo", "shards"),
        *("classifier", "openvino_graph", "onnx_graph", "bundle"),
    },
    "selection": set(),
    "labelstudio": {"errors", "storage"},
    # Pages about what was made, from what is stored.
    "report": {
        *("errors", "config", "images", "storage", "plots", "gallery", "thumbnails", "pages"),
        *("shards", "review", "charts"),
    },
    "night_report": {
        *("errors", "storage", "thumbnails", "pages", "drift", "charts", "ledger"),
    },
    # Ray, from here on. Settings objects end in these modules and in `training`.
    "cluster": {"errors", "config", "backbone"},
    "watch": set(),
    "workers": {
        *("errors", "storage", "terminal", "backbone", "features", "checkpoint", "training"),
        "watch",
    },
    "fitting": {
        *("config", "images", "metrics", "storage", "local_cache", "shards", "backbone"),
        *("novelty", "review", "classifier", "calibration", "features", "checkpoint", "training"),
        "workers",
    },
    "tuning": {
        *("config", "metrics", "storage", "shards", "backbone", "novelty", "review"),
        *("classifier", "features", "photographs", "training", "finetune", "workers", "fitting"),
    },
    "ingest": {
        *("errors", "config", "images", "storage", "terminal"),
        *("shards", "sources", "prepare", "apart", "lock", "cluster"),
    },
    "telemetry": {"errors", "config", "terminal", "cluster"},
    "inference": {
        *("errors", "images", "storage", "background", "shards", "backbone", "openvino_graph"),
        *("novelty", "review", "classifier", "tta", "cam", "gallery", "features", "bundle"),
        *("engine", "apart", "cluster", "terminal"),
    },
    "answers": {
        *("errors", "config", "storage", "terminal", "shards", "sources", "labelstudio"),
        "ingest",
    },
    "labelling": {
        *("errors", "config", "images", "storage", "terminal", "bundle", "engine", "ledger"),
        *("selection", "labelstudio", "answers"),
    },
    "side_by_side": {"shards", "backbone", "classifier", "bundle", "cluster", "inference"},
    # Whole jobs.
    "search": {
        *("errors", "config", "metrics", "storage", "terminal", "prepare", "shards", "backbone"),
        *("classifier", "features", "checkpoint", "training", "cluster", "fitting"),
    },
    "rehearsal": {
        *("errors", "config", "storage", "terminal", "machine", "shards", "backbone", "features"),
        *("classifier", "training", "finetune", "plan", "cluster"),
    },
    "doctor": {
        *("errors", "config", "storage", "terminal", "machine", "backbone", "openvino_graph"),
        "cluster",
    },
    "evaluation": {
        *("errors", "images", "metrics", "storage", "config", "terminal", "mistakes", "slices"),
        *("background", "local_cache", "shards", "openvino_graph", "classifier", "calibration"),
        *("resampling", "evaluation_tables", "gallery", "bundle", "engine", "cluster"),
        "inference",
    },
    "results": {
        *("config", "metrics", "storage", "terminal", "plots", "tensorboard", "shards", "backbone"),
        *("openvino_graph", "review", "drift", "classifier", "calibration", "checkpoint"),
        *("bundle", "cluster", "fitting", "inference", "evaluation"),
    },
    "runs": {
        *("errors", "config", "storage", "terminal", "shards", "tensorboard", "tracking"),
        *("backbone", "openvino_graph", "drift", "classifier", "calibration", "features"),
        *("checkpoint", "training", "finetune", "bundle", "lock", "pages", "report", "cluster"),
        *("workers", "fitting", "tuning", "inference", "search", "rehearsal", "evaluation"),
        "results",
    },
    "promotion": {
        *("errors", "config", "storage", "terminal", "shards", "registry", "bundle", "lock"),
        *("comparison", "cluster", "side_by_side"),
    },
    "nightly": {
        *("errors", "config", "storage", "terminal", "openvino_graph", "bundle", "tta"),
        *("engine", "apart", "scoring", "listing", "ledger", "lock", "cluster", "telemetry"),
        *("thumbnails", "pages", "night_report", "explanations"),
    },
}

MAY_IMPORT_RAY = {
    "cluster",
    "watch",
    "workers",
    "fitting",
    "tuning",
    "ingest",
    "inference",
    "evaluation",
    "runs",
    "side_by_side",
    "promotion",
    "nightly",
    "search",
    "rehearsal",
    "doctor",
    "telemetry",
}

# Where each module stands, by its dotted name below leafnet: "errors", "core.errors".
FILES = {
    ".".join(path.relative_to(LEAFNET).with_suffix("").parts): path
    for path in sorted(LEAFNET.rglob("*.py"))
    if path.name != "__init__.py"
}
MODULES = sorted(FILES)


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


def test_every_module_has_its_place_in_the_table() -> None:
    assert len(MODULES) > 70
    assert set(MODULES) == set(MAY_IMPORT)
    assert set(MODULES) > MAY_IMPORT_RAY


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_the_table_allows(module: str) -> None:
    assert own(imports(FILES[module]), MODULES) <= MAY_IMPORT[module]


def test_the_table_goes_one_way() -> None:
    above: set[str] = set()
    for module, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{module} may import {allowed - above}, which stand below it"
        above.add(module)


def test_a_package_imports_nothing() -> None:
    """Else importing one module would import others, which the table does not show."""
    packages = list(LEAFNET.rglob("__init__.py"))
    assert LEAFNET / "__init__.py" in packages
    assert {path: imports(path) for path in packages} == {path: set() for path in packages}


@pytest.mark.parametrize("module", sorted(set(MODULES) - MAY_IMPORT_RAY))
def test_only_the_top_knows_ray(module: str) -> None:
    assert "ray" not in {name.split(".")[0] for name in imports(FILES[module])}


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
        "        return leafnet.__file__, leafnet.machine.describe(), leafnet\n"
    )
    modules = ["core.errors", "core.s3", "core.storage", "data.shards", "lock", "machine"]
    modules.append("models.onnx.graph")
    assert own(imports(source), [*modules, "core.lock", "errors", "shards", "s3"]) == set(modules)
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
        ("leafnet.sources", ["tensorflow", "keras", "ray"]),
        ("leafnet.prepare", ["tensorflow", "keras", "ray"]),
        ("leafnet.runs", ["tensorflow", "keras"]),
        ("leafnet.ingest", ["tensorflow", "keras"]),
    ],
)
def test_importing_is_light(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
