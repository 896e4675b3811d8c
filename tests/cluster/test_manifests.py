"""The manifests of cluster/: schemas, and every command, flag, path and setting in them exists.

Kubernetes' own objects and all pod templates are checked against the schemas that the package
kubernetes-validate ships, `ray up`'s file against the schema in Ray. No package ships KubeRay's:
KUBERAY below has, from its API reference (v1, KubeRay 1.7.0), the fields that the manifests use.
"""

import fnmatch
import http.server
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import cli as ray_cli

from leafnet.core.settings import leaves, parse
from leafnet.distributed import session
from tests import docs
from tests.left_out import leave_out
from tests.test_packaging import sources

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
KUBERNETES = "1.33"  # the oldest that is still supported when this was written
TEXTS = sorted(path for path in CLUSTER.rglob("*") if path.is_file())

# Placeholders that an operator replaces, and what a value of that kind looks like.
PLACEHOLDERS = {
    "ACCOUNT": "123456789012",
    "REGION": "us-east-1",
    "SUBNET": "subnet-0123456789abcdef0",
    "SECURITY_GROUP": "sg-0123456789abcdef0",
    "AMI": "ami-0123456789abcdef0",
    "KUBECTL_IMAGE": "kubectl:1.33",
    "IMAGE": "leafnet",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def filled(text: str) -> str:
    for placeholder, value in PLACEHOLDERS.items():
        text = re.sub(rf"\b{placeholder}\b", value, text)
    return text


def documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(filled(path.read_text())) if document]


def scalars(document: Any) -> Iterator[str]:
    """Every string in a parsed YAML document."""
    if isinstance(document, dict):
        for value in document.values():
            yield from scalars(value)
    elif isinstance(document, list):
        for value in document:
            yield from scalars(value)
    elif isinstance(document, str):
        yield document


# Schemas


def closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


TEXT, BOOL, NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
POSITIVE = {"type": "integer", "minimum": 1}
TEXTS_BY_NAME = {"type": "object", "additionalProperties": TEXT}
ANY = {"type": "object"}  # a pod template, which Kubernetes' own schema checks

RAY_CLUSTER = closed(
    required=("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=closed(mode=one_of("token", "disabled")),
    enableInTreeAutoscaling=BOOL,
    autoscalerOptions=closed(version=one_of("v1", "v2"), idleTimeoutSeconds=NUMBER),
    headGroupSpec=closed(
        required=("rayStartParams", "template"), rayStartParams=TEXTS_BY_NAME, template=ANY
    ),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
            required=("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName=TEXT,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            rayStartParams=TEXTS_BY_NAME,
            template=ANY,
        ),
    },
)
DELETION_RULE = closed(
    required=("policy", "condition"),
    policy=one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"),
    condition=closed(
        jobStatus=one_of("SUCCEEDED", "FAILED"),
        jobDeploymentStatus=one_of("Failed"),
        ttlSeconds=NUMBER,
    ),
)
RAY_JOB = closed(
    required=("entrypoint", "rayClusterSpec"),
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    activeDeadlineSeconds=POSITIVE,
    preRunningDeadlineSeconds=POSITIVE,
    backoffLimit=NUMBER,
    shutdownAfterJobFinishes=BOOL,
    ttlSecondsAfterFinished=NUMBER,
    deletionStrategy=closed(
        required=("deletionRules",),
        deletionRules={"type": "array", "minItems": 1, "items": DELETION_RULE},
    ),
    submitterConfig=closed(backoffLimit=NUMBER),
    submitterPodTemplate=ANY,
    rayClusterSpec=RAY_CLUSTER,
)
# A schedule of RayCronJob has five fields.
SCHEDULE = {"type": "string", "pattern": r"^(\S+ ){4}\S+$"}
KUBERAY = {
    "RayCluster": RAY_CLUSTER,
    "RayJob": RAY_JOB,
    "RayCronJob": closed(
        required=("schedule", "jobTemplate"),
        schedule=SCHEDULE,
        timeZone=TEXT,
        suspend=BOOL,
        jobTemplate=RAY_JOB,
    ),
}


def pod_templates(document: Any) -> Iterator[Any]:
    if isinstance(document, dict):
        for key, value in document.items():
            if key == "template" or key == "submitterPodTemplate":
                yield value
            else:
                yield from pod_templates(value)
    elif isinstance(document, list):
        for value in document:
            yield from pod_templates(value)


MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_kubernetes_objects(path: Path) -> None:
    assert documents(path)
    for document in documents(path):
        if not document["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            continue
        assert document["apiVersion"] == "ray.io/v1"
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
        jsonschema.validate(document["spec"], KUBERAY[document["kind"]])
        templates = list(pod_templates(document["spec"]))
        assert len(templates) >= 2
        for template in templates:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {}} | template
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    (job,) = documents(CLUSTER / "kuberay" / "score.yaml")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(job["spec"], KUBERAY["RayJob"])
    pod = next(pod_templates(job["spec"]))
    pod["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {}} | pod, KUBERNETES, strict=True
        )


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_containers_have_no_rights_and_a_limit(path: Path) -> None:
    for document in documents(path):
        for template in pod_templates(document):
            if "containers" not in template["spec"]:
                continue  # the Job around the pod
            assert template["spec"]["securityContext"]["runAsNonRoot"] is True
            for container in template["spec"]["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert "memory" in container["resources"]["limits"]


def test_ray_version_is_the_one_that_is_pinned() -> None:
    found = {
        version
        for path in MANIFESTS
        for version in re.findall('rayVersion: "(.*)"', path.read_text())
    }
    assert found == {pins()["ray"]}


def test_ray_up_file() -> None:
    (document,) = documents(CLUSTER / "aws.yaml")
    validate_config(prepare_config(document))
    types = document["available_node_types"]
    assert types[document["head_node_type"]]["resources"] == {"CPU": 0}
    for name, node_type in types.items():
        spot = "InstanceMarketOptions" in node_type["node_config"]
        assert spot == name.endswith("_spot"), name
        if spot:  # first, with the same machine on demand behind it
            behind = types[name.replace("_spot", "_on_demand")]
            assert node_type["priority"] > behind["priority"]
            assert node_type["resources"] == behind["resources"]
    document["available_node_types"]["head"]["resources"] = {"CPU": -1}
    with pytest.raises(jsonschema.ValidationError, match="-1 is less than the minimum"):
        validate_config(prepare_config(document))


def test_the_two_nights_on_kubernetes_are_the_same() -> None:
    (job,) = documents(CLUSTER / "kuberay" / "score.yaml")
    (nightly,) = documents(CLUSTER / "kuberay" / "nightly-raycronjob.yaml")
    *_, cronjob = documents(CLUSTER / "kuberay" / "nightly-cronjob.yaml")
    how_it_ends = {"deletionStrategy", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
    once, every_night = job["spec"], nightly["spec"]["jobTemplate"]
    assert {key: once[key] for key in set(once) - how_it_ends} == {
        key: every_night[key] for key in set(every_night) - how_it_ends
    }
    # KubeRay refuses rules beside the older way.
    assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & set(every_night)
    schedule = cronjob["spec"]
    assert schedule["schedule"] == nightly["spec"]["schedule"]
    assert schedule["concurrencyPolicy"] == "Forbid"
    outer = schedule["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert outer > once["activeDeadlineSeconds"] + once["preRunningDeadlineSeconds"]


# Commands, flags, paths and settings


def lines(path: Path) -> list[str]:
    """What a file says, a command a line: comments without their marks, continued lines joined."""
    text = path.read_text()
    if path.suffix == ".yaml":
        parsed = "\n".join(text for document in documents(path) for text in scalars(document))
        comments = re.findall(r"^\s*#(.*)$", text, re.MULTILINE)
        text = "\n".join(comments) + "\n" + parsed
    text = re.sub(r"^\s*#\s?", "", text, flags=re.MULTILINE)
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def job_commands(path: Path) -> list[tuple[str, list[str]]]:
    """(job, its arguments) of every `python jobs/JOB.py …` or installed `leafnet.jobs.JOB`."""
    found = []
    for line in lines(path):
        pattern = r"python (?:(?:/opt/leafnet/)?jobs/(\w+)\.py|-P -m leafnet\.jobs\.(\w+))([^`|;]*)"
        for match in re.finditer(pattern, line):
            arguments = re.split(r"\s(?:2>&1|&&)", match[3])[0]
            found.append((match[1] or match[2], shlex.split(arguments)))
    return found


WITH_COMMANDS = [path for path in TEXTS if job_commands(path)]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_commands_of_jobs_are_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for job, arguments in job_commands(path):
        settings_class = docs.jobs()[job]
        if "…" in arguments or "--help" in arguments:
            names = {name for name, _ in leaves(settings_class)} | {"config", "help"}
            given = {word[2:] for word in arguments if word.startswith("--")}
            assert given <= names, f"jobs/{job}.py has no {given - names}"
            continue
        arguments = [filled(word) for word in arguments]
        parse(settings_class, arguments, prog=job, description="")


def test_commands_were_found() -> None:
    jobs = {job for path in WITH_COMMANDS for job, _ in job_commands(path)}
    assert jobs >= {"prepare", "train", "score"}
    assert {"train.yaml", "score.yaml", "README.md", "crontab"} <= {p.name for p in WITH_COMMANDS}


PATH = re.compile(
    r"(?:(?<=[\s`'\"(=])|^)((?:cluster|jobs|leafnet|tests)/[\w./*-]*[\w*/])", re.MULTILINE
)


# Those that name settings.
PAGES = ("README", "SUBMITTING", "NIGHTLY", "COSTS", "SCALING", "FAULTS", "STORAGE")


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_paths_exist(path: Path) -> None:
    # Links in Markdown are relative to the page.
    text = path.read_text()
    for found in PATH.findall(text.replace("/opt/leafnet/", " ").replace("/srv/leafnet/", " ")):
        assert list(REPOSITORY.glob(found.rstrip("/"))), f"{name_of(path)} names {found}"
    if path.suffix == ".md":
        for found in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / found).exists(), f"{name_of(path)} links to {found}"
        for found in re.findall(r"python -m (tests[\w.]+)", text):
            assert importlib.util.find_spec(found), f"{name_of(path)} runs {found}"


@pytest.mark.parametrize("page", [f"{name}.md" for name in PAGES])
def test_settings_in_the_pages_exist(page: str) -> None:
    jobs = ["prepare", "train", "evaluate", "score"]
    known = {name for job in jobs for name, _ in leaves(docs.jobs()[job])}
    text = re.sub(r"^```.*?^```", "", (CLUSTER / page).read_text(), flags=re.S | re.M)
    spans = re.findall(r"`([^`\n]+)`", text)
    flags = {span.split()[0][2:] for span in spans if span.startswith("--")}
    dotted = {
        span for span in spans if re.fullmatch(r"(head|data|cache|checkpoint|ray)\.[a-z_]+", span)
    }
    assert flags
    assert flags | dotted <= known, f"no such settings: {(flags | dotted) - known}"


def ray_commands(path: Path) -> Iterator[list[str]]:
    for line in lines(path):
        for match in re.finditer(
            r"(?:^|[\s`;])ray ((?:up|down|dashboard|start|job|get-auth)[^`;]*)", line
        ):
            yield match[1].replace("'", "").replace('"', "").split()


@pytest.mark.parametrize("path", [p for p in TEXTS if list(ray_commands(p))], ids=name_of)
def test_commands_of_ray_exist(path: Path) -> None:
    for words in ray_commands(path):
        command: Any = ray_cli
        while isinstance(command, click.Group):
            assert words[0] in command.commands, f"ray has no {words[0]}"
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        ours = words[: words.index("--")] if "--" in words else words
        given = {word.split("=")[0] for word in ours if word.startswith("--")}
        assert given <= options, f"{command.name} has no {given - options}"


# What jobs are given


def test_runtime_env() -> None:
    (ours,) = documents(CLUSTER / "runtime_env.yaml")
    environments = [ours]
    for name in ("train", "score"):
        (job,) = documents(CLUSTER / "kuberay" / f"{name}.yaml")
        environments.append(yaml.safe_load(job["spec"]["runtimeEnvYAML"]))
    of_leafnet = set(session._WORKER_ENVIRONMENT)
    for environment in environments:
        RuntimeEnv(**environment)
        # Ray refuses a job that sets a variable that its driver sets again.
        assert not set(environment["env_vars"]) & of_leafnet
        assert not re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY", " ".join(environment["env_vars"]))


def allows(policy: str, action: str, resource: str) -> bool:
    document = json.loads((CLUSTER / "iam" / f"{policy}.json").read_text())
    return any(
        action in statement["Action"]
        and any(fnmatch.fnmatchcase(resource, pattern) for pattern in statement["Resource"])
        for statement in document["Statement"]
    )


@pytest.mark.parametrize("policy", ["prepare", "train", "score", "head"])
def test_policies_are_closed(policy: str) -> None:
    document = json.loads((CLUSTER / "iam" / f"{policy}.json").read_text())
    assert document["Version"] == "2012-10-17"
    for statement in document["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        assert not any("*" in action for action in statement["Action"])
        if statement["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in statement["Action"])


@pytest.mark.parametrize(
    ("policy", "action", "key", "allowed"),
    [
        ("prepare", "s3:GetObject", "PHOTOGRAPHS/rust/1.jpg", True),
        ("prepare", "s3:PutObject", "PHOTOGRAPHS/rust/1.jpg", False),
        ("prepare", "s3:DeleteObject", "SHARDS/potato/index.json", True),
        ("train", "s3:GetObject", "SHARDS/potato/index.json", True),
        ("train", "s3:PutObject", "SHARDS/potato/index.json", False),
        ("train", "s3:DeleteObject", "RUNS/potato/head/checkpoint", True),
        ("train", "s3:GetObject", "PHOTOGRAPHS/rust/1.jpg", False),
        ("score", "s3:GetObject", "PHOTOGRAPHS/2026/11/1.jpg", True),
        ("score", "s3:DeleteObject", "PHOTOGRAPHS/2026/11/1.jpg", False),
        ("score", "s3:GetObject", "RUNS/potato/model/model.json", True),
        ("score", "s3:GetObject", "RUNS/potato/metrics.json", False),
        ("score", "s3:PutObject", "RUNS/potato/model/model.json", False),
        ("score", "s3:PutObject", "PREDICTIONS/potato/date=2026-11-24/run.parquet", True),
        ("score", "s3:DeleteObject", "PREDICTIONS/potato/date=2026-11-24/run.parquet", False),
        ("score", "s3:DeleteObject", "PREDICTIONS/potato/_staging/0123/part-000000", True),
        ("score", "s3:DeleteObject", "PREDICTIONS/potato/_lock/00000001.json", True),
        ("score", "s3:DeleteObject", "PREDICTIONS/potato/_runs/run.json", False),
    ],
)
def test_policies_give_what_is_needed_and_no_more(
    policy: str, action: str, key: str, allowed: bool
) -> None:
    assert allows(policy, action, f"arn:aws:s3:::{key}") is allowed


# The image


def pins() -> dict[str, str]:
    text = (REPOSITORY / "constraints.txt").read_text()
    return {canonical(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def is_sent_to_docker(name: str) -> bool:
    """Whether a file or folder is: the last pattern that fits it, or a folder it is in, decides."""
    path, sent = PurePosixPath("/", name), True
    for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        # With a slash in front it has to fit the whole path, and not its end alone.
        pattern = pattern[3:] if pattern.startswith("**/") else f"/{pattern}"
        if any(each.match(pattern) for each in (path, *path.parents)):
            sent = line.startswith("!")
    return sent


def test_docker_gets_every_source_and_nothing_else() -> None:
    assert [str(path) for path in sources().values() if not is_sent_to_docker(str(path))] == []
    for name in ("data/leaf.jpg", ".git/config", "runs/a/model/head.json", "tests/conftest.py"):
        assert not is_sent_to_docker(name), name
    assert not is_sent_to_docker("leafnet/__pycache__/errors.cpython-311.pyc")


def test_dockerfile_has_what_it_copies_and_ends_without_root() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    assert copied
    for source in copied:
        assert (REPOSITORY / source).exists(), source
        assert is_sent_to_docker(source), source
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", text, re.M | re.S))
    for target in ("cpu", "gpu"):
        assert re.findall(r"^USER (.*)$", stages[target], re.M)[-1] == "1000:1000"


def test_everything_in_the_image_is_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"'\.\[(.*?)\]'", (CLUSTER / "Dockerfile").read_text())
    wanted = list(project["dependencies"])
    for extra in {name for names in extras for name in names.split(",")}:
        wanted += project["optional-dependencies"][extra]
    wanted += [
        text for text in metadata.requires("tensorflow") or [] if 'extra == "and-cuda"' in text
    ]
    assert any("nvidia" in text for text in wanted)
    versions = pins()
    for requirement in map(Requirement, wanted):
        version = versions.get(canonical(requirement.name))
        assert version, f"{requirement.name} is not pinned"
        assert version in requirement.specifier, f"{requirement} excludes {version}"


def test_hadolint() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    subprocess.run([hadolint, CLUSTER / "Dockerfile"], check=True)


# The night without Kubernetes


def test_systemd_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        leave_out("no systemd-analyze on this machine: apt-get install -y systemd")
    for name in ("leafnet-score.service", "leafnet-score.timer"):
        text = (CLUSTER / "nightly" / name).read_text()
        text = text.replace("/srv/leafnet", str(REPOSITORY)).replace("User=leafnet", "User=root")
        (tmp_path / name).write_text(text)
    units = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_crontab_line() -> None:
    text = (CLUSTER / "nightly" / "crontab").read_text()
    (line,) = [line for line in text.splitlines() if re.match(r"[\d*]", line)]
    assert re.fullmatch(r"\d+ \d+ \* \* \*  leafnet  .*", line)
    assert "%" not in line, "cron makes a new line of it"
    command = line.split("leafnet  ", 1)[1]
    subprocess.run(["sh", "-n", "-c", command], check=True)
    assert "flock -n" in command


@pytest.mark.parametrize(
    ("ray", "deadline", "code", "stopped"),
    [
        ("exit 0", "10s", 0, False),
        ("exit 1", "10s", 1, False),
        ("exec sleep 30", "0.3s", 124, True),
    ],
)
def test_submit_script(tmp_path: Path, ray: str, deadline: str, code: int, stopped: bool) -> None:
    """The script with a `ray` that writes down how it is called; submitting is Ray's own."""
    stand_in = tmp_path / "ray"
    calls = tmp_path / "calls"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n[ "$2" = stop ] && exit 0\n{ray}\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        [CLUSTER / "nightly" / "submit.sh", "leafnet-score", "python", "jobs/train.py", "--help"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEADLINE": deadline},
        cwd=tmp_path,
        capture_output=True,
        timeout=20,
    )
    assert done.returncode == code
    submit, *rest = calls.read_text().splitlines()
    match = re.fullmatch(
        r"job submit --submission-id (leafnet-score-\d{8}T\d{6}Z) --runtime-env "
        r"cluster/runtime_env.yaml --working-dir \. -- python jobs/train.py --help",
        submit,
    )
    assert match, submit
    assert rest == ([f"job stop {match[1]}"] if stopped else [])


class OneJob(http.server.BaseHTTPRequestHandler):
    """As much of Ray's API as tells what became of a job."""

    exit_code: int | None = None

    def do_GET(self) -> None:
        told: dict[str, Any] = {"version": "4", "ray_version": ray.__version__, "ray_commit": ""}
        if self.path.startswith("/api/jobs/"):
            told = {
                "type": "SUBMISSION", "entrypoint": "e", "status": "FAILED",
                "submission_id": self.path.rsplit("/", 1)[1], "driver_exit_code": self.exit_code,
            }  # fmt: skip
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.mark.parametrize(("own", "code"), [(4, 4), (2, 2), (1, 1), (-9, 1), (None, 1)])
def test_submit_script_keeps_the_code_of_the_job(
    tmp_path: Path, own: int | None, code: int
) -> None:
    """Ray's client asks an API on loopback; `ray job submit` ends with 1."""
    (tmp_path / "ray").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ray").chmod(0o755)
    handler = type("Handler", (OneJob,), {"exit_code": own})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        address = f"http://127.0.0.1:{server.server_address[1]}"
        done = subprocess.run(
            [CLUSTER / "nightly" / "submit.sh", "leafnet-score", "true"],
            env=os.environ | {"PATH": path, "RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=60,
        )
        server.shutdown()
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("fails", range(6))
def test_a_request_of_the_cronjob_may_fail(tmp_path: Path, fails: int) -> None:
    """Whichever of its requests fails once, the night is followed to its end."""
    *_, cronjob = documents(CLUSTER / "kuberay" / "nightly-cronjob.yaml")
    (script,) = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]
    calls = tmp_path / "calls"
    kubectl = f"""#!/bin/sh
echo "$1" >> {calls}
count=$(wc -l < {calls})
[ "$count" -eq {fails} ] && exit 1
case $1 in
  create) echo rayjob.ray.io/night ;;
  get) [ "$count" -lt 5 ] && echo "Running RUNNING" || echo "Complete SUCCEEDED" ;;
esac
"""
    for name, text in (("kubectl", kubectl), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["sh", "-eu", "-c", script],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_NAME": "a", "JOB_UID": "b"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "created rayjob.ray.io/night"
    assert "no owner" not in done.stdout
    asked = calls.read_text().split()
    assert [asked.count(verb) for verb in ("create", "patch")] == [
        1 + (fails == 1),
        1 + (fails == 2),
    ]


def test_script_of_the_cronjob() -> None:
    *_, cronjob = documents(CLUSTER / "kuberay" / "nightly-cronjob.yaml")
    pod = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (script,) = pod["containers"][0]["args"]
    subprocess.run(["sh", "-n", "-c", script], check=True)
    patch = re.search(r'--patch "(.*?)" \|\|', script, re.S)
    assert patch
    told = subprocess.run(
        ["sh", "-c", f'printf %s "{patch[1]}"'],
        env={"JOB_NAME": "leafnet-score-1", "JOB_UID": "0-1"},
        capture_output=True,
        check=True,
    )
    (owner,) = json.loads(told.stdout)["metadata"]["ownerReferences"]
    assert owner == {
        "apiVersion": "batch/v1", "kind": "Job", "name": "leafnet-score-1", "uid": "0-1"
    }  # fmt: skip
