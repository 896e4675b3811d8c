import errno
import functools
import ipaddress
import json
import os
import pickle
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from leafnet.core import s3, storage
from leafnet.core.errors import UserError
from leafnet.core.urls import without_secret
from tests.conftest import make_bucket, use_server
from tests.support.s3_server import Proxy, Server, free_port, has_radosgw


@pytest.fixture(params=["local", "memory", "moto", "radosgw"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    name = tmp_path.name.lower().replace("_", "-")
    if request.param in ("local", "memory"):
        yield str(tmp_path) if request.param == "local" else f"memory://{name}"
        return
    server: Server = request.getfixturevalue(request.param)
    use_server(monkeypatch, server.environment())
    yield make_bucket(name[:40].strip("-")) + "/some/where"
    storage._filesystem.cache_clear()


@pytest.fixture
def bucket(
    request: pytest.FixtureRequest, radosgw: Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A bucket on the real server, with one object."""
    use_server(monkeypatch, radosgw.environment())
    url = make_bucket(f"b{abs(hash(request.node.name)):x}")
    storage.write_bytes(f"{url}/a/one", b"1")
    yield url
    storage._filesystem.cache_clear()


def allow(bucket: str, principal: str, *actions: str) -> None:
    """Let somebody else do `actions` in the bucket."""
    fs, name = storage.filesystem(bucket)
    statement = {
        "Effect": "Allow",
        "Principal": {"AWS": [principal]},
        "Action": [f"s3:{action}" for action in actions],
        "Resource": [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"],
    }
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    fs.call_s3("put_bucket_policy", Bucket=name, Policy=json.dumps(policy))


def test_write_read_list_delete(root: str) -> None:
    storage.write_bytes(storage.join(root, "a", "one.bin"), b"1")
    storage.write_bytes(storage.join(root, "a", "two.bin"), b"22")
    storage.write_bytes(storage.join(root, "a", "two.bin"), b"222")
    storage.write_bytes(storage.join(root, "a", ".hidden"), b"x")
    storage.write_bytes(storage.join(root, "a", "half.tmp"), b"x")
    files = storage.list_files(storage.join(root, "a"))
    assert [(file.url.rsplit("/", 1)[-1], file.size) for file in files] == [
        ("one.bin", 1),
        ("two.bin", 3),
    ]
    assert [storage.read_bytes(file.url) for file in files] == [b"1", b"222"]
    assert storage.exists(storage.join(root, "a"))
    assert storage.is_folder(storage.join(root, "a"))
    mark = storage.join(root, "a", "one.bin")
    storage.delete_folder(storage.join(root, "a"), mark=mark)
    assert storage.list_files(storage.join(root, "a")) == []
    assert not storage.exists(storage.join(root, "a"))
    storage.delete_folder(storage.join(root, "a"), mark=mark)


def test_missing_file(root: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))
    assert storage.list_names(storage.join(root, "nothing")) == []


def test_json(root: str) -> None:
    url = storage.join(root, "a.json")
    storage.write_json(url, {"a": [1, "ä"]})
    assert storage.read_json(url) == {"a": [1, "ä"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(url, float("nan"))
    storage.write_bytes(url, b"{")
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        storage.read_json(url)


def test_local_copy(root: str) -> None:
    url = storage.join(root, "w.h5")
    storage.write_bytes(url, b"weights")
    with storage.local_copy(url) as path:
        assert Path(path).read_bytes() == b"weights"
        assert Path(path).name == "w.h5"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    url = str(tmp_path / "a.json")
    storage.write_json(url, 1)
    with pytest.raises(TypeError):
        storage.write_bytes(url, "text")  # type: ignore[arg-type]
    assert json.loads((tmp_path / "a.json").read_text()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_unknown_protocol() -> None:
    with pytest.raises(UserError, match="cannot open ftpx://host/a"):
        storage.exists("ftpx://host/a")


def test_relative_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/") == str(tmp_path / "runs")
    assert storage.absolute(f"file://{tmp_path}/runs") == str(tmp_path / "runs")


def test_create_only_what_is_not_there(root: str) -> None:
    url = storage.join(root, "new", "a.json")
    assert storage.create_bytes(url, b"first")
    assert not storage.create_bytes(url, b"second")
    assert storage.read_bytes(url) == b"first"
    assert storage.list_names(storage.join(root, "new")) == ["a.json"]


def test_one_of_many_creates_it(root: str) -> None:
    url = storage.join(root, "lock.json")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: storage.create_bytes(url, b"%d" % i), range(8)))
    assert made.count(True) == 1
    assert storage.read_bytes(url) == b"%d" % made.index(True)


def test_move_in(root: str, tmp_path: Path) -> None:
    """A file is there whole, and never takes the place of another's."""
    url = storage.join(root, "date=1", "a.bin")
    ours = tmp_path / "ours"
    ours.write_bytes(b"one")
    assert storage.move_in(ours, url)
    assert not ours.exists()
    ours.write_bytes(b"two")
    assert not storage.move_in(ours, url)
    assert storage.read_bytes(url) == b"one"
    assert ours.read_bytes() == b"two"


def test_markers_of_folders_are_no_files(root: str) -> None:
    """Consoles of object stores make an empty object `name/` for a new folder."""
    storage.write_bytes(storage.join(root, "a", "one"), b"1")
    fs, path = storage.filesystem(root)
    if root.startswith("s3://"):
        fs.pipe_file(f"{path}/a/", b"")
        fs.pipe_file(f"{path}/", b"")
    assert [file.url for file in storage.list_files(root)] == [storage.join(root, "a", "one")]
    assert storage.list_names(root) == ["a"]
    assert storage.list_names(storage.join(root, "a")) == ["one"]
    assert not storage.is_folder(storage.join(root, "a", "one"))
    assert not storage.exists(storage.join(root, "b"))


def test_read_in_pieces_and_by_many_threads(root: str) -> None:
    data = [np.random.default_rng(i).bytes(i * 20_000) for i in range(16)]
    urls = [storage.join(root, f"{i}.bin") for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(storage.write_bytes, urls, data))
        assert list(pool.map(storage.read_bytes, urls)) == data
    with storage.open_file(urls[-1]) as file:
        file.seek(-10, 2)
        assert file.read() == data[-1][-10:]
    with pytest.raises(FileNotFoundError), storage.open_file(storage.join(root, "no")):
        pass


def test_the_same_files_through_pyarrow_also_in_another_process(root: str) -> None:
    storage.write_bytes(storage.join(root, "a", "one"), b"1")
    filesystem, path = storage.arrow_filesystem(root)
    if not root.startswith("memory://"):
        carried = pickle.dumps(filesystem)
        assert b"ecret" not in carried
        filesystem = pickle.loads(carried)
    filesystem.create_dir(f"{path}/b")
    with filesystem.open_output_stream(f"{path}/b/two") as file:
        file.write(b"22")
    assert storage.read_bytes(storage.join(root, "b", "two")) == b"22"
    with filesystem.open_input_file(f"{path}/a/one") as file:
        assert file.read() == b"1"
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    assert {info.path.rsplit("/", 1)[1] for info in found if info.is_file} == {"one", "two"}
    filesystem.delete_dir(f"{path}/b")
    assert storage.list_names(root) == ["a"]


def everything(url: str) -> dict[str, Callable[[], Any]]:
    """Each function of `storage` that asks the store."""
    filesystem, path = storage.arrow_filesystem(url)
    return {
        "exists": lambda: storage.exists(url),
        "is_folder": lambda: storage.is_folder(url),
        "read": lambda: storage.read_bytes(url),
        "open": lambda: storage.open_file(url).__enter__(),
        "write": lambda: storage.write_bytes(url, b"1"),
        "list": lambda: storage.list_files(url),
        "names": lambda: storage.list_names(url),
        "copy": lambda: storage.local_copy(url).__enter__(),
        "delete": lambda: storage.delete(url),
        "upload": lambda: storage.upload_folder(Path(__file__).parents[2] / "jobs", url),
        "pyarrow": lambda: filesystem.get_file_info(path),
    }


MISTAKES: dict[str, tuple[dict[str, str], str]] = {
    "wrong-keys": ({"AWS_ACCESS_KEY_ID": "nobody"}, "does not accept the keys (InvalidAccessKeyId"),
    "wrong-keys ": ({"AWS_SECRET_ACCESS_KEY": "hushhush"}, "the keys (SignatureDoesNotMatch)"),
    "no-keys": ({"AWS_PROFILE": "nobody"}, "the config profile (nobody) could not be found"),
    "no-access": ({"AWS_NO_SIGN_REQUEST": "true"}, "AccessDenied"),
    "bad-environment": ({"AWS_ENDPOINT_URL": "localhost:80"}, "AWS_ENDPOINT_URL is no URL such as"),
    "bad-environment ": (
        {"AWS_S3_ADDRESSING_STYLE": "dns"},
        "set it to one of auto, path, virtual",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_function_tells_each_mistake_in_one_line(
    mistake: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = MISTAKES[mistake]
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    storage._filesystem.cache_clear()
    check_told(f"{bucket}/a/one", mistake.strip(), message)


def check_told(url: str, reason: str, message: str, *, not_in: tuple[str, ...] = ()) -> None:
    try:
        calls = everything(url)
    except UserError:
        calls = {"filesystem": lambda: storage.filesystem(url)}
    for name, call in calls.items():
        if name in not_in:
            continue
        with pytest.raises(UserError) as told:
            call()
        assert told.value.reason == reason, (name, str(told.value))
        assert message.lower() in str(told.value).lower(), name
        assert "\n" not in str(told.value)
        assert "hushhush" not in str(told.value)
        if reason != "bad-environment":
            assert url in str(told.value), name


def test_no_bucket(bucket: str) -> None:
    check_told("s3://not-there/a", "no-such-bucket", "there is no bucket not-there at http://127")
    with pytest.raises(UserError, match="no bucket not-there"):
        storage.exists("s3://not-there")


def test_no_server(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    check_told(f"{bucket}/a/one", "no-network", "cannot reach http://127.0.0.1:")


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch, moto: Server) -> None:
    """Connections are taken and nothing comes: all tries together end with the one limit."""
    monkeypatch.setattr(s3, "ANSWER_S", 1.5)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        use_server(monkeypatch, moto.environment())
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name in ("read", "write", "list"):
            began = time.monotonic()
            with pytest.raises(UserError, match=r"s3://some/a: .* does not answer") as told:
                everything("s3://some/a")[name]()
            assert told.value.reason == "no-answer"
            assert time.monotonic() - began < 4


def test_a_clock_that_is_wrong(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "botocore.auth.get_current_datetime",
        lambda: datetime.now(UTC).replace(tzinfo=None) - timedelta(hours=2),
    )
    check_told(f"{bucket}/a/one", "clock-skew", "clock is too far from that of http://127.0.0.1")


def test_rights_to_read_only(bucket: str, radosgw: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(bucket, "arn:aws:iam:::user/reader", "GetObject", "ListBucket")
    use_server(monkeypatch, radosgw.environment() | radosgw.reader.environment())
    assert storage.read_bytes(f"{bucket}/a/one") == b"1"
    assert storage.list_names(f"{bucket}/a") == ["one"]
    calls: list[Callable[[], None]] = [
        lambda: storage.write_bytes(f"{bucket}/a/two", b"2"),
        lambda: storage.delete(f"{bucket}/a/one"),
        lambda: storage.delete_folder(f"{bucket}/a", mark=f"{bucket}/a/one"),
    ]
    for call in calls:
        with pytest.raises(UserError, match=f"{bucket}/a") as told:
            call()
        assert told.value.reason == "no-access"
    assert storage.list_names(f"{bucket}/a") == ["one"]


def test_anonymous_from_a_public_bucket(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(bucket, "*", "GetObject")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage._filesystem.cache_clear()
    with pytest.raises(UserError, match="there are no S3 keys to use"):
        storage.read_bytes(f"{bucket}/a/one")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    assert storage.read_bytes(f"{bucket}/a/one") == b"1"


def test_keys_and_endpoint_of_a_profile(
    bucket: str, radosgw: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text(
        f"[leaf]\naws_access_key_id={radosgw.keys.id}\naws_secret_access_key={radosgw.keys.secret}\n"
    )
    (tmp_path / "config").write_text(f"[profile leaf]\nendpoint_url={radosgw.endpoint}\n")
    use_server(
        monkeypatch,
        {
            "AWS_PROFILE": "leaf",
            "AWS_CONFIG_FILE": str(tmp_path / "config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        },
    )
    assert storage.read_bytes(f"{bucket}/a/one") == b"1"


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, "http://127.0.0.1:1/bucket/a?"),
        (
            {"AWS_ENDPOINT_URL": "http://s3.test", "AWS_S3_ADDRESSING_STYLE": "virtual"},
            "//bucket.s3",
        ),
        (
            {"AWS_ENDPOINT_URL": "http://s3.test", "AWS_S3_ADDRESSING_STYLE": "path"},
            "s3.test/bucket",
        ),
        ({"AWS_ENDPOINT_URL": "http://s3.test"}, "http://s3.test/bucket/a?"),
        ({"AWS_ENDPOINT_URL_S3": "http://first.test"}, "http://first.test/bucket/a?"),
        ({"AWS_ENDPOINT_URL": "", "AWS_REGION": "eu-west-1"}, "https://s3.eu-west-1.amazon"),
        (
            {"AWS_ENDPOINT_URL": "", "AWS_DEFAULT_REGION": "eu-west-3"},
            "https://s3.eu-west-3",
        ),
    ],
)
def test_where_requests_go(
    environment: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    use_server(monkeypatch, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"} | keys | environment)
    fs: Any
    fs, path = storage.filesystem("s3://bucket/a")
    # Signed URLs for AWS name no region.
    endpoint = fs.s3.meta.endpoint_url
    assert url in (fs.sign(path) if environment.get("AWS_ENDPOINT_URL") != "" else endpoint)


def client(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Any:
    """What talks to S3 with these variables and no server behind it."""
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    use_server(monkeypatch, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"} | keys | environment)
    fs: Any
    fs, _ = storage.filesystem("s3://bucket/a")
    return fs


def test_a_session_token_goes_with_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As temporary keys need it: signed into every request."""
    signed = client(monkeypatch, {"AWS_SESSION_TOKEN": "of-an-hour"}).sign("bucket/a")
    assert "x-amz-security-token=of-an-hour" in signed.lower()
    assert "token" not in client(monkeypatch, {}).sign("bucket/a").lower()


@pytest.mark.parametrize(
    ("environment", "mode", "tries"),
    [
        ({}, "standard", 5),
        ({"AWS_RETRY_MODE": "adaptive"}, "adaptive", 5),
        ({"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "9"}, "standard", 9),
    ],
)
def test_how_and_how_often_a_request_is_tried(
    environment: dict[str, str], mode: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    retries = client(monkeypatch, environment).s3.meta.config.retries
    assert (retries["mode"], retries["total_max_attempts"]) == (mode, tries)


@pytest.mark.parametrize("tries", ["0", "-1", "many", "1.5"])
def test_a_number_of_tries_that_cannot_be_is_refused(
    tries: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"AWS_MAX_ATTEMPTS is '{tries}'") as caught:
        client(monkeypatch, {"AWS_MAX_ATTEMPTS": tries})
    assert caught.value.reason == "bad-environment"


def test_a_certificate_of_ones_own(
    moto: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate = tmp_path / "server.pem"
    certificate.write_bytes(self_signed("127.0.0.1"))
    use_server(monkeypatch, moto.environment())
    with Proxy(moto.endpoint).running(certificate) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(UserError, match="has no certificate that is trusted"):
            storage.exists("s3://some/a")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        storage._filesystem.cache_clear()
        url = make_bucket("with-tls")
        storage.write_bytes(f"{url}/a", b"1")
        assert storage.read_bytes(f"{url}/a") == b"1"


def self_signed(address: str) -> bytes:
    """A key and a certificate for it, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, address)])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(pem)


def test_through_a_proxy_that_does_harm(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503, resets before and after the server did it, bodies cut short, silence: all is right."""
    real: Server = request.getfixturevalue("radosgw" if has_radosgw() else "moto")
    monkeypatch.setattr(s3, "_SILENCE_S", 1)
    use_server(monkeypatch, real.environment())
    root = make_bucket("harm") + "/data"
    proxy = Proxy(real.endpoint, seed=1, share=0.3, stall_s=3)
    sizes = [0, 1, 100, 70_000, 1_000_000, *range(1000, 16_000, 500)]
    data = {f"{i % 4}/{i}.bin": np.random.default_rng(i).bytes(n) for i, n in enumerate(sizes)}
    with proxy.running() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        urls = [storage.join(root, name) for name in data]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(storage.write_bytes, urls, data.values()))
            assert list(pool.map(storage.read_bytes, urls)) == list(data.values())
            copies = list(pool.map(copied, urls[:12]))
        assert copies == list(data.values())[:12]
        found = storage.list_files(root)
        assert {file.url: file.size for file in found} == {
            url: len(content) for url, content in zip(urls, data.values(), strict=True)
        }
        with storage.open_file(urls[4]) as file:
            file.seek(500_000)
            assert file.read(1000) == data["0/4.bin"][500_000:501_000]
        folder = storage.join(root, "3")
        storage.delete_folder(folder, mark=storage.list_files(folder)[0].url)
        assert storage.list_names(root) == ["0", "1", "2"]
        # A try whose answer was lost has created it.
        locks = [f"{root}-locks/{i}" for i in range(16)]
        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(storage.create_bytes, locks, (name.encode() for name in data)))
            assert not any(pool.map(storage.create_bytes, locks, [b"another"] * 16))
    assert all(proxy.done[fault] for fault in Proxy.FAULTS), proxy.done
    monkeypatch.setenv("AWS_ENDPOINT_URL", real.endpoint)
    left = [storage.join(root, name) for name in data if not name.startswith("3/")]
    assert [file.url for file in storage.list_files(root)] == sorted(left)
    assert all(storage.read_bytes(url) == data[url.removeprefix(f"{root}/")] for url in left)


def copied(url: str) -> bytes:
    with storage.local_copy(url) as path:
        return Path(path).read_bytes()


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hushhush@bucket/a",
        "ftp://me:hushhush@host/a",
        "https://bucket.s3.amazonaws.com/a?X-Amz-Expires=60&X-Amz-Signature=hushhush",
        "s3://AKIAKEY:hush/hushhush+a@bucket/a",
        "simplecache::https://me:hushhush@host/a",
        "zip://a.jpg::https://host/a.zip?token=hushhush",
        "https://hushhush@host/a",
        "https://host/a?a=1&access_token=hushhush",
        "https://host/a?a=1&api_key=hushhush&b",
        "https://host/a?X-Amz-Security-Token=hushhush",
        "https://host/a;sig=hushhush",
    ],
)
def test_a_url_with_a_secret_is_refused_without_showing_it(url: str) -> None:
    for call in (storage.absolute, storage.filesystem):
        with pytest.raises(UserError, match="holds a password or a signature") as told:
            call(url)
        assert "hushhush" not in str(told.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a:b@c.jpg",
        "https://host:8080/me@example.org/a:b.jpg",
        "sftp://me@host:22/a@b",
        "https://host/a?tokens=3&mysig=1&page=2",
        "/data/a?token=1@b:c",
        "in/a@b:c.jpg",
    ],
)
def test_a_url_without_a_secret_is_left_alone(url: str) -> None:
    assert without_secret(url) == url


def test_a_local_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/sys/leafnet/a: "):
        storage.write_bytes("/sys/leafnet/a", b"1")


def test_rights_are_tried_and_nothing_stays(root: str) -> None:
    storage.write_bytes(storage.join(root, "a", "mine"), b"1")
    storage.try_rights(storage.join(root, "a"))
    storage.try_rights(storage.join(root, "new", "runs"))
    assert storage.list_names(root) == ["a"]
    assert storage.list_names(storage.join(root, "a")) == ["mine"]


def test_rights_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}/file/runs: ") as caught:
        storage.try_rights(str(tmp_path / "file" / "runs"))
    assert caught.value.reason == "cannot-write"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Who writes an object on radosgw may read it.
@pytest.mark.parametrize(
    ("actions", "refused"),
    [(("ListBucket",), "writing"), (("ListBucket", "PutObject"), "deleting")],
)
def test_rights_that_are_not_there(
    actions: tuple[str, ...],
    refused: str,
    bucket: str,
    radosgw: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allow(bucket, "arn:aws:iam:::user/reader", *actions)
    for name, value in radosgw.reader.environment().items():
        monkeypatch.setenv(name, value)
    storage._filesystem.cache_clear()
    with pytest.raises(UserError, match="refuses") as caught:
        storage.try_rights(f"{bucket}/runs")
    assert caught.value.reason == "no-access"
    assert f"refuses {refused}" in str(caught.value)


def test_paths_and_urls_are_joined() -> None:
    assert storage.join("/a/", "b", "c") == "/a/b/c"
    assert storage.join("a", "b") == "a/b"
    assert storage.join("/a", "/b") == "/b"
    assert storage.join("s3://a//", "b", "c") == "s3://a/b/c"
    assert storage.join("s3://a", "b/c") == "s3://a/b/c"


def test_what_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for url in ("/a", "a", "file:///a", "~/a"):
        assert storage.is_local(url)
    for url in ("s3://a", "memory://a", "https://a/b", "files://a"):
        assert not storage.is_local(url)
    assert storage.absolute("~/a/") == "/home/me/a"
    assert storage.absolute("file:///a/../b") == "/b"
    assert storage.absolute("memory://a/b//") == "memory://a/b"


@pytest.mark.parametrize("name", ["sig", "Signature", "X-Amz-Signature", "X-Goog-Signature"])
def test_a_signature_is_a_secret_wherever_it_stands(name: str) -> None:
    for query in (f"{name}=hushhush", f"a=1&{name}=hushhush&b=2"):
        with pytest.raises(UserError, match="a URL at https://host holds") as told:
            storage.absolute(f"https://host/a?{query}")
        assert told.value.reason == "secret-in-url"
        assert "hushhush" not in str(told.value)
    assert storage.absolute(f"https://host/a?my{name}=1") == f"https://host/a?my{name}=1"
    assert storage.absolute("ftp://me@host/a") == "ftp://me@host/a"


class OfAClient(Exception):
    """An error of a package that speaks to a store."""

    __module__ = "aiohttp.client_exceptions"


@pytest.mark.parametrize(
    ("error", "url", "reason", "message"),
    [
        (OSError(errno.ENOSPC, "x"), "/a/b", "disk-full", "cannot write /a/b: No space left"),
        (OSError(errno.EDQUOT, "x"), "/a/b", "disk-full", "cannot write /a/b: Disk quota exceeded"),
        (OSError(errno.EACCES, "x"), "/a/b", "no-access", "/a/b: Permission denied; give another"),
        (OSError(errno.EPERM, "x"), "/a/b", "no-access", "/a/b: Operation not permitted; give"),
        (OSError(errno.EROFS, "x"), "/a/b", "no-access", "/a/b: Read-only file system; give"),
        (OSError(errno.EIO, "x"), "/a/b", None, ""),
        (OSError("x"), "/a/b", None, ""),
        (ValueError("x"), "/a/b", None, ""),
        (FileNotFoundError(errno.ENOENT, "x"), "/a/b", None, ""),
        (ConnectionError("a\n b"), "memory://a", "no-network", "cannot reach memory://a: a b"),
        (TimeoutError(), "memory://a", "no-network", "cannot reach memory://a: TimeoutError"),
        (OSError(errno.EIO, "x"), "memory://a", "no-network", "cannot reach memory://a: [Errno 5]"),
        (OfAClient("x"), "memory://a", "no-network", "cannot reach memory://a: x"),
        # What only reads a file has errors without a number, too.
        (OSError("not a Parquet file"), "memory://a", None, ""),
        (ValueError("x"), "memory://a", None, ""),
        (FileNotFoundError(errno.ENOENT, "x"), "memory://a", None, ""),
        (FileExistsError(errno.EEXIST, "x"), "memory://a", None, ""),
        (IsADirectoryError(errno.EISDIR, "x"), "memory://a", None, ""),
        (NotADirectoryError(errno.ENOTDIR, "x"), "memory://a", None, ""),
        (UserError("no-keys", "told already"), "memory://a", None, ""),
    ],
)
def test_what_is_wrong_with_a_store_and_not_with_a_file(
    error: Exception, url: str, reason: str | None, message: str
) -> None:
    with pytest.raises(Exception) as raised, storage.told(url):  # noqa: PT011
        raise error
    if reason is None:
        assert raised.value is error
    else:
        assert isinstance(raised.value, UserError)
        assert raised.value.reason == reason
        assert str(raised.value).startswith(message)


def test_errors_after_which_waiting_is_of_no_use() -> None:
    unreachable = {"no-answer", "no-network", "store-failed"}
    others = {"wrong-keys", "no-keys", "no-access", "disk-full", "no-such-bucket"}
    assert unreachable == storage.UNREACHABLE
    assert unreachable | others == storage.OF_STORES


@pytest.fixture(params=["local", "memory"])
def here(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that needs no server."""
    return str(tmp_path / "here") if request.param == "local" else f"memory://{tmp_path.name}/here"


def test_files_and_folders_are_told_apart(here: str) -> None:
    url = storage.join(here, "a", "b")
    assert not storage.exists(here)
    storage.write_bytes(url, b"")
    found = [(storage.exists(u), storage.is_folder(u), storage.is_file(u)) for u in (here, url)]
    assert found == [(True, True, False), (True, False, True)]
    for nothing in (storage.join(here, "c"), storage.join(url, "below")):
        assert not storage.is_file(nothing)
        assert not storage.is_folder(nothing)
    assert storage.list_names(url) == []


def test_a_part_of_a_file(here: str) -> None:
    url = storage.join(here, "a")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.read_bytes(url, start=7) == b"789"
    assert storage.read_bytes(url, stop=3) == b"012"
    assert storage.read_bytes(url, start=2, stop=5) == b"234"
    for stream in (False, True):
        with storage.open_file(url, stream=stream) as file:
            file.seek(4)
            assert (file.read(2), file.read()) == (b"45", b"6789")


def test_files_are_listed_by_url_with_their_sizes(here: str) -> None:
    for name, size in (("b/c", 3), ("a", 1), ("b/a/d", 4), ("c.tmp", 9), ("b/.h/e", 9), (".f", 9)):
        storage.write_bytes(storage.join(here, name), b"x" * size)
    found = [(file.url.removeprefix(here), file.size) for file in storage.list_files(here + "/")]
    assert found == [("/a", 1), ("/b/a/d", 4), ("/b/c", 3)]
    assert storage.list_files(storage.join(here, "a")) == [(storage.join(here, "a"), 1)]
    assert storage.list_names(here) == [".f", "a", "b", "c.tmp"]


def test_one_file_is_deleted_and_the_others_stay(here: str) -> None:
    for name in ("a/b", "a/c", "d"):
        storage.write_bytes(storage.join(here, name), b"1")
    storage.delete(storage.join(here, "a/b"))
    storage.delete(storage.join(here, "d"))
    storage.delete(storage.join(here, "nothing"))
    assert [file.url for file in storage.list_files(here)] == [storage.join(here, "a/c")]


def test_files_of_a_folder_are_uploaded_and_no_folders(here: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a").write_bytes(b"1")
    (source / "b").write_bytes(b"22")
    (source / "c").write_bytes(b"333")
    storage.upload_folder(source, here)
    found = [(file.url.removeprefix(here), file.size) for file in storage.list_files(here)]
    assert found == [("/b", 2), ("/c", 3)]


def test_a_copy_of_a_remote_file_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage.write_bytes(f"memory://{tmp_path.name}/a.h5", b"1")
    with storage.local_copy(f"memory://{tmp_path.name}/a.h5") as path:
        assert Path(path).parent.parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").write_bytes(b"2")
    with storage.local_copy(str(tmp_path / "mine")) as path:
        assert path == str(tmp_path / "mine")
    assert (tmp_path / "mine").exists()


def test_what_is_not_there_is_not_moved_in(here: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.move_in(tmp_path / "gone", storage.join(here, "new", "a"))
    assert storage.list_files(here) == []


@pytest.mark.parametrize("at_once", [1, 3, 20])
def test_answers_come_in_order_and_few_are_asked_for_at_once(at_once: int) -> None:
    lock, asking, most = threading.Lock(), 0, 0
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(9):
            # One that is asked for is held until it is taken.
            assert i - len(taken) <= at_once
            yield i

    def ask(item: int) -> int:
        nonlocal asking, most
        with lock:
            asking += 1
            most = max(most, asking)
        time.sleep(0.005 * (9 - item) if item % 2 else 0)
        with lock:
            asking -= 1
        return item * item

    for answer in storage.each(ask, items(), at_once=at_once):
        taken.append(answer)
    assert taken == [0, 1, 4, 9, 16, 25, 36, 49, 64]
    assert most <= at_once


def test_after_an_error_no_more_is_asked_for() -> None:
    asked: list[int] = []

    def ask(item: int) -> int:
        asked.append(item)
        time.sleep(0.02)
        if item == 1:
            raise KeyError(item)
        return item

    with pytest.raises(KeyError):
        list(storage.each(ask, range(100), at_once=2))
    assert len(asked) < 6
    assert list(storage.each(ask, [], at_once=2)) == []


def test_a_digest() -> None:
    # FIPS 180-2, appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.sha256(b"abc") == expected


def test_json_is_for_people_too(here: str) -> None:
    storage.write_json(storage.join(here, "a"), {"ä": [1]})
    assert storage.read_bytes(storage.join(here, "a")).decode() == '{\n  "ä": [\n    1\n  ]\n}\n'
    storage.write_bytes(storage.join(here, "b"), b"{")
    with pytest.raises(UserError) as told:
        storage.read_json(storage.join(here, "b"))
    assert told.value.reason == "not-json"


def test_a_store_that_gives_back_something_else(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "read_bytes", lambda url: b"else")
    with pytest.raises(UserError, match="does not give back what was written to it") as told:
        storage.try_rights(here)
    assert told.value.reason == "store-failed"
    monkeypatch.undo()
    monkeypatch.setattr(storage, "list_names", lambda url: [])
    with pytest.raises(UserError, match="does not give back what was written to it"):
        storage.try_rights(here)


# What is deleted, and what never


def test_a_folder_without_the_mark_of_leafnet_stays(root: str) -> None:
    """Also where the mark was asked for, and its like is deeper in the folder."""
    folder = storage.join(root, "of", "somebody")
    storage.write_bytes(storage.join(folder, "thesis.txt"), b"years")
    storage.write_bytes(storage.join(folder, "deep", "run.json"), b"{}")
    with pytest.raises(UserError, match="may not be leafnet's; move it away") as told:
        storage.delete_folder(folder, mark=storage.join(folder, "run.json"))
    assert told.value.reason == "not-ours"
    storage.delete(folder)  # of a file
    assert len(storage.list_files(folder)) == 2


def test_a_folder_goes_and_what_is_beside_it_stays(root: str) -> None:
    """Names are names, and no patterns; the mark may lie beside the folder."""
    folder = storage.join(root, "night[1]*")
    for name in ("run.json", "part", "deep/part", ".hidden", "half.tmp"):
        storage.write_bytes(storage.join(folder, name), b"1")
    others = [storage.join(root, name) for name in ("night1", "night[1]", "night[1]*2/part")]
    for other in others:
        storage.write_bytes(other, b"another's")
    storage.delete_folder(folder, mark=others[0])
    assert [file.url for file in storage.list_files(root)] == sorted(others)
    assert not storage.exists(folder)


@pytest.mark.parametrize("name", ["s3://a-bucket", "s3://a-bucket/", "/", "file:///", "memory://"])
def test_a_whole_disk_or_bucket_is_never_deleted(
    name: str, moto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_server(monkeypatch, moto.environment())
    if name == "s3://a-bucket":
        make_bucket("a-bucket")
        storage.write_bytes("s3://a-bucket/run.json", b"{}")
    with pytest.raises(UserError, match="is a whole disk or bucket") as told:
        storage.delete_folder(name, mark=storage.join(name, "run.json"))
    assert told.value.reason == "not-ours"
    storage._filesystem.cache_clear()


def test_links_are_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "run.json").write_text("{}")
    (tmp_path / "link").symlink_to(mine)
    with pytest.raises(UserError, match="link is a symbolic link") as told:
        storage.delete_folder(str(tmp_path / "link"), mark=str(tmp_path / "link" / "run.json"))
    assert told.value.reason == "not-ours"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "link").symlink_to(mine)
    storage.delete_folder(str(folder), mark=str(folder / "run.json"))
    storage.delete(str(tmp_path / "link"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (mine / "run.json").exists()


@pytest.mark.parametrize("there", ["local", "memory"])
def test_the_mark_goes_last(there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left of a deletion that was interrupted can be deleted again."""
    root = str(tmp_path / "here") if there == "local" else f"memory://{tmp_path.name}"
    for name in ("a", "run.json", "z"):
        storage.write_bytes(storage.join(root, name), b"1")
    gone: list[str] = []

    def unlink(path: str, real: Callable[[str], None]) -> None:
        if len(gone) == 2:
            raise KeyboardInterrupt
        real(path)
        gone.append(path.rpartition("/")[2])

    fs = storage.filesystem(root)[0]
    with monkeypatch.context() as patch:
        if there == "local":
            patch.setattr(os, "unlink", functools.partial(unlink, real=os.unlink))
            patch.setattr(Path, "unlink", lambda path, **_: unlink(str(path), os.remove))
        else:
            patch.setattr(fs, "rm_file", functools.partial(unlink, real=fs.rm_file))
        with pytest.raises(KeyboardInterrupt):
            storage.delete_folder(root, mark=storage.join(root, "run.json"))
    assert sorted(gone) == ["a", "z"]
    assert storage.list_names(root) == ["run.json"]
    storage.delete_folder(root, mark=storage.join(root, "run.json"))
    assert not storage.exists(root)


def test_a_protocol_that_nobody_knows() -> None:
    with pytest.raises(UserError, match="cannot open ftpx://host/a: ") as told:
        storage.filesystem("ftpx://host/a")
    assert told.value.reason == "unknown-protocol"


def test_hosts_of_urls_are_told_to_their_filesystem() -> None:
    found = storage._options("ftp", "ftp://me@host:2121/a/b")
    assert (found["host"], found["port"], found["username"]) == ("host", 2121, "me")
    assert storage._options("memory", "memory://a/b") == {}


def test_a_filesystem_is_made_once_for_a_process_and_remembers_no_listing() -> None:
    fs = storage.filesystem("memory://a")[0]
    assert storage.filesystem("memory://b/c")[0] is fs
    other: Any = storage._filesystem("memory", "{}", os.getpid() + 1)
    assert other is not fs
    assert fs.storage_options["use_listings_cache"] is False


def test_a_store_without_exclusive_create_is_told_where_rights_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An S3 server that does not know If-None-Match takes it for an ordinary write."""
    here = f"memory://{tmp_path.name}"

    def create(url: str, data: bytes) -> bool:
        storage.write_bytes(url, data)
        return True

    storage.try_rights(here)
    monkeypatch.setattr(storage, "create_bytes", create)
    with pytest.raises(UserError, match=r"If-None-Match on S3.*use another store") as told:
        storage.try_rights(here)
    assert told.value.reason == "no-exclusive-create"
