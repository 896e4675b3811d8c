"""S3 for `storage`: settings from the environment, limits on waiting, errors in one line.

| variable | what it does |
|---|---|
| `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN` | keys |
| `AWS_PROFILE`, `AWS_CONFIG_FILE`, `AWS_SHARED_CREDENTIALS_FILE` | keys and settings of a profile |
| (none of them) | the role of the machine, container or service account |
| `AWS_NO_SIGN_REQUEST` | `true`: anonymous, for public buckets |
| `AWS_REGION`, `AWS_DEFAULT_REGION` | region of the bucket; the first one wins |
| `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL` | a server that is not AWS; the first one wins |
| `AWS_S3_ADDRESSING_STYLE` | `path`, `virtual` or `auto`: path on a server that is not AWS |
| `AWS_CA_BUNDLE` | file of the certificates that are trusted |
| `AWS_MAX_ATTEMPTS`, `AWS_RETRY_MODE` | tries of a request (5), `standard` or `adaptive` |
| `AWS_REQUEST_CHECKSUM_CALCULATION`, `AWS_RESPONSE_CHECKSUM_VALIDATION` | `when_required` on a
server that is not AWS, since older ones refuse what is new; `when_supported` on AWS |

Every machine of a cluster needs them. Keys are read by botocore in each process; leafnet never
holds them, so they are in no message, no pickle and no file.
"""

import asyncio
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import s3fs
import urllib3.exceptions
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper

from leafnet.core.errors import UserError

# A server that hangs ends a job within a minute: so long for all tries of one request, and longer
# by what its body takes at the slowest rate that is waited for.
ANSWER_S = 40.0
_SLOWEST_UPLOAD = 250_000  # bytes/s
_CONNECT_S, _SILENCE_S = 5, 15  # of one try; silence in the middle of an answer too
_ATTEMPTS = 5
_BODY_ATTEMPTS = 4  # reads of a body that was cut short
_CONNECTIONS = 64

_STYLES = ("auto", "path", "virtual")
_WRONG_KEYS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "ExpiredToken",
    "TokenRefreshRequired",
    "InvalidSecurity",
}
_NO_ACCESS = {
    "403",
    "405",
    "AccessDenied",
    "AllAccessDisabled",
    "AccountProblem",
    "InvalidObjectState",
    "MethodNotAllowed",
}
_OTHER_REGION = {
    "301",
    "307",
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
_NO_KEYS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.MetadataRetrievalError,
    boto.TokenRetrievalError,
    boto.NoAuthTokenError,
    boto.ProfileNotFound,
    boto.ConfigNotFound,
    boto.ConfigParseError,
)
_SILENT = (
    boto.ReadTimeoutError,
    boto.ResponseStreamingError,
    boto.IncompleteReadError,
    aiohttp.ClientPayloadError,
    urllib3.exceptions.IncompleteRead,
    TimeoutError,
)


class NoAnswer(ConnectionError):
    """All tries of a request together took too long."""


class Filesystem(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """s3fs with a limit on waiting, and errors that name the URL."""

    retries = _BODY_ATTEMPTS

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        body = kwargs.get("Body")
        seconds = ANSWER_S + (len(body) / _SLOWEST_UPLOAD if isinstance(body, bytes) else 0.0)
        try:
            try:
                async with asyncio.timeout(seconds):
                    return await super()._call_s3(method, *akwarglist, **kwargs)
            except TimeoutError:
                raise NoAnswer(f"no answer within {seconds:.0f} s") from None
        except Exception as error:
            told = await self._more(error, method, kwargs)
            user_error = explain(told, _url(kwargs), self.endpoint)
            if user_error is None:
                raise
            raise user_error from None

    call_s3 = sync_wrapper(_call_s3)  # what files that are open for writing use

    async def _more(self, error: Exception, method: str, kwargs: dict[str, Any]) -> Exception:
        """What the server says to a listing, where the answer to a HEAD has no body to say it."""
        found = client_error(error)
        if found is None or not method.startswith("head_") or "Bucket" not in kwargs:
            return error
        code = found.response["Error"].get("Code")
        if code == "404" and method == "head_object":
            return error
        try:
            async with asyncio.timeout(ANSWER_S):
                await super()._call_s3(
                    "list_objects_v2",
                    Bucket=kwargs["Bucket"],
                    Prefix=kwargs.get("Key", ""),
                    MaxKeys=1,
                )
        except Exception as more:
            return more
        return error

    async def _exists(self, path: str) -> bool:
        # s3fs takes every error at the root of a bucket for "is not there".
        try:
            await self._info(path)
        except FileNotFoundError:
            return False
        return True

    exists = sync_wrapper(_exists)

    def pages(self, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
        """Every object whose key begins with `prefix`, by key; s3fs's own passes over `a//b`."""
        more: dict[str, str] | None = {}
        while more is not None:
            page = self.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            for found in page.get("Contents", ()):
                yield {**found, "size": found["Size"]}
            token = page.get("NextContinuationToken")
            more = {"ContinuationToken": token} if page.get("IsTruncated") and token else None

    @property
    def endpoint(self) -> str:
        """Scheme and host of the server, without anything else that its URL may hold."""
        url = self._s3.meta.endpoint_url if self._s3 is not None else _endpoint() or "S3"
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}" if parts.netloc else url


def options() -> dict[str, Any]:
    """Arguments of `Filesystem` from the environment; no key is among them.

    Raises:
        UserError: a variable that cannot be.
    """
    style = os.environ.get("AWS_S3_ADDRESSING_STYLE", "auto")
    if style not in _STYLES:
        raise UserError(
            "bad-environment",
            f"AWS_S3_ADDRESSING_STYLE is {style!r}; set it to one of {', '.join(_STYLES)}",
        )
    attempts = os.environ.get("AWS_MAX_ATTEMPTS", str(_ATTEMPTS))
    if not attempts.isdecimal() or attempts == "0":
        raise UserError(
            "bad-environment", f"AWS_MAX_ATTEMPTS is {attempts!r}; set it to a number from 1"
        )
    config: dict[str, Any] = {
        "retries": {
            "mode": os.environ.get("AWS_RETRY_MODE", "standard"),
            "total_max_attempts": int(attempts),
        },
        "connect_timeout": _CONNECT_S,
        "read_timeout": _SILENCE_S,
        "max_pool_connections": _CONNECTIONS,
        "s3": {"addressing_style": style},
    }
    if _endpoint():
        for setting in ("request_checksum_calculation", "response_checksum_validation"):
            config[setting] = os.environ.get(f"AWS_{setting.upper()}", "when_required")
    client = {"region_name": os.environ["AWS_REGION"]} if os.environ.get("AWS_REGION") else {}
    return {
        "anon": os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes"),
        "endpoint_url": _endpoint(),
        "config_kwargs": config,
        "client_kwargs": client,
        # One request for a read, without a question for the size before it, and a download that
        # goes on where it was cut.
        "max_concurrency": 1,
    }


def _endpoint() -> str | None:
    # botocore knows both too; here they decide on checksums, and are named in errors.
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _url(kwargs: dict[str, Any]) -> str:
    deleted = kwargs.get("Delete", {}).get("Objects") or [{}]
    key = kwargs.get("Key") or kwargs.get("Prefix") or deleted[0].get("Key", "")
    return f"s3://{kwargs.get('Bucket', '')}/{key}".rstrip("/")


def client_error(error: BaseException | None) -> boto.ClientError | None:
    """The server's own answer that `error` was made from."""
    while error is not None and not isinstance(error, boto.ClientError):
        error = error.__cause__
    return error


def explain(error: BaseException, url: str, endpoint: str) -> UserError | None:
    """What to tell the person who gave `url`; None where `error` is about the file alone."""
    if isinstance(error, UserError):
        return error
    answer = client_error(error)
    if answer is not None:
        return _explain_answer(answer, url, endpoint)
    if isinstance(error, _NO_KEYS):
        return UserError(
            "no-keys",
            f"{url}: there are no S3 keys to use ({_one_line(error)}); set AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_NO_SIGN_REQUEST=true for a "
            "public bucket",
        )
    if isinstance(error, boto.SSLError):
        return UserError(
            "bad-certificate",
            f"{url}: {endpoint} has no certificate that is trusted, or speaks no TLS; name the "
            "file of the authority that signed it in AWS_CA_BUNDLE, or correct AWS_ENDPOINT_URL",
        )
    if isinstance(error, (NoAnswer, *_SILENT)):
        return UserError(
            "no-answer",
            f"{url}: {endpoint} does not answer, or breaks off, at every try; check "
            "AWS_ENDPOINT_URL and the network, then run the same command again",
        )
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError | ConnectionError):
        return UserError(
            "no-network",
            f"{url}: cannot reach {endpoint}; check AWS_ENDPOINT_URL and the network, then run "
            "the same command again",
        )
    if isinstance(error, ResponseParserError):
        return _no_s3(url, endpoint)
    if isinstance(error, boto.BotoCoreError):
        return UserError("bad-url", f"{url}: {_one_line(error)}")
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        return UserError(
            "bad-environment",
            f"{url}: AWS_ENDPOINT_URL is no URL such as https://s3.example.org: {endpoint}",
        )
    return None


def _explain_answer(answer: boto.ClientError, url: str, endpoint: str) -> UserError | None:
    code = str(answer.response["Error"].get("Code", ""))
    metadata = answer.response.get("ResponseMetadata", {})
    status = int(metadata.get("HTTPStatusCode") or 0)
    operation = answer.operation_name
    bucket = url.removeprefix("s3://").split("/", 1)[0]
    if code == "NoSuchBucket" or (code == "404" and operation == "HeadBucket"):
        return UserError(
            "no-such-bucket",
            f"{url}: there is no bucket {bucket} at {endpoint}; create it, or correct the URL or "
            "AWS_ENDPOINT_URL",
        )
    if code == "404" and operation != "HeadObject":
        return _no_s3(url, endpoint)
    if code in ("RequestTimeTooSkewed", "RequestExpired"):
        date = metadata.get("HTTPHeaders", {}).get("date", "")
        there = f", which says {date}" if date else ""
        return UserError(
            "clock-skew",
            f"{url}: this machine's clock is too far from that of {endpoint}{there}; set it right",
        )
    if code in _WRONG_KEYS:
        return UserError(
            "wrong-keys",
            f"{url}: {endpoint} does not accept the keys ({code}); check AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN",
        )
    if code in _NO_ACCESS:
        return UserError(
            "no-access",
            f"{url}: {endpoint} refuses {_action(operation)} ({code}); give the keys or the role "
            "the right to, or use others",
        )
    if code in _OTHER_REGION:
        return UserError(
            "other-region",
            f"{url}: the bucket is in another region than AWS_REGION says ({code}); correct it",
        )
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling", "429"):
        return UserError(
            "store-failed",
            f"{url}: {endpoint} answered {code} to every try; run the same command again later",
        )
    if code == "InvalidBucketName":
        return UserError("bad-url", f"{url}: {bucket!r} cannot be the name of a bucket")
    # What says something of the object alone: it is gone, it is there, it was changed.
    if status in (404, 409, 412, 416) or code in ("NoSuchKey", "404", "409", "412", "416"):
        return None
    return UserError("store-refused", f"{url}: {endpoint} answered {_one_line(answer)}")


def _no_s3(url: str, endpoint: str) -> UserError:
    return UserError(
        "no-s3", f"{url}: what answers at {endpoint} is no S3 server; correct AWS_ENDPOINT_URL"
    )


def _action(operation: str) -> str:
    """What was refused, for people.

    >>> _action("PutObject"), _action("ListObjectsV2")
    ('writing', 'listing')
    """
    if operation.startswith(("Get", "Head")):
        return "reading"
    if operation.startswith("List"):
        return "listing"
    return "deleting" if operation.startswith("Delete") else "writing"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
