"""URLs and paths as settings, lists and stored rows may hold them: without a secret."""

import os
import posixpath
import re

from leafnet.core.errors import UserError

# Names of query parameters that sign a URL or stand for a password.
_SECRETS = re.compile(
    r"[?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|"
    r"(?:[a-z]+[-_])?token|api[-_]?key|access[-_]?key|awsaccesskeyid|password|passwd|secret|"
    r"(?:client|shared)[-_]secret)=",
    re.IGNORECASE,
)


def absolute(url: str) -> str:
    """`url` as every process of the job understands it: local paths are made absolute.

    >>> absolute("s3://bucket/shards/")
    's3://bucket/shards'
    """
    if is_local(url):
        return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
    return without_secret(url).rstrip("/")


def without_secret(url: str) -> str:
    """`url` itself.

    Raises:
        UserError: it holds a password, a token or a signature: URLs are logged and stored.
    """
    # fsspec chains protocols: simplecache::https://host/a.
    for part in url.split("::"):
        scheme, marker, rest = part.partition("://")
        if not marker or scheme == "file":
            continue
        authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
        host, port = authority.rpartition("@")[2].partition(":")[::2]
        who = authority.rpartition("@")[0]
        # A secret key of AWS may have a slash in it, and so ends the authority before its `@`.
        cut = "@" in rest and not who and bool(port) and not port.isdecimal()
        if ":" in who or cut or (who and scheme.startswith("http")) or _SECRETS.search(rest):
            place = f"{scheme}://{'…' if cut else host}"
            raise UserError(
                "secret-in-url",
                f"a URL at {place} holds a password or a signature, which would end up in logs; "
                "give it without, and the keys in the environment",
            )
    return url


def is_local(url: str) -> bool:
    """True for a path or a file:// URL."""
    return "://" not in url or url.startswith("file://")


def join(url: str, *parts: str) -> str:
    """`parts` below `url`.

    >>> join("s3://bucket/runs/", "potato", "model")
    's3://bucket/runs/potato/model'
    """
    return posixpath.join(url, *parts) if is_local(url) else "/".join((url.rstrip("/"), *parts))
