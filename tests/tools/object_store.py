"""An S3 server on loopback: moto's, with a log of its requests, and faults."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
from botocore.config import Config
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"


@dataclass(frozen=True)
class Call:
    """A request: `GET`, `bucket/name`, its query, and the range of bytes that it asks for, if any."""

    method: str
    path: str
    query: str
    bytes: tuple[int, int] | None


@dataclass
class ObjectStore:
    """The server, and the log of its requests. `fault` may answer a request in its place."""

    url: str
    client: Any
    log: list[Call] = field(default_factory=list)
    fault: Callable[[Call], Any] | None = None

    def environment(self, folder: Path) -> dict[str, str]:
        """Return an environment in which a process uses this server as S3, and caches in `folder`."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "2",
            "AWS_CONFIG_FILE": str(folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def put(self, prefix: str, files: dict[str, bytes]) -> str:
        """Put objects below a prefix, and return its URL."""
        for name, data in files.items():
            self.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=data)
        return f"s3://{BUCKET}/{prefix}"

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Return the objects below a prefix, by their names after it."""
        listed = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix + "/").get("Contents", ())
        keys = [item["Key"] for item in listed]
        return {key[len(prefix) + 1 :]: self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}

    def empty(self) -> None:
        """Remove every object."""
        for item in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
            self.client.delete_object(Bucket=BUCKET, Key=item["Key"])

    def unfinished(self) -> int:
        """Count the multipart uploads under way."""
        return len(self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ()))

    def calls(self, method: str, name: str) -> list[Call]:
        """Return the requests for objects whose path ends with `name`."""
        return [call for call in self.log if call.method == method and call.path.endswith(name)]


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *_: Any) -> None:
        pass


def error(status: str, code: str) -> Callable[[Any], list[bytes]]:
    """Return a fault that answers as S3 does: `403 Forbidden`, `AccessDenied`."""

    def answer(start_response: Any) -> list[bytes]:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, they say</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    return answer


@contextlib.contextmanager
def serve() -> Iterator[ObjectStore]:
    """Run the server on a port of its own, with an empty bucket."""
    backend = DomainDispatcherApplication(create_backend_app)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        span = environ.get("HTTP_RANGE", "")
        first, _, last = span.removeprefix("bytes=").partition("-")
        bounds = (int(first), int(last) + 1) if first and last else None
        call = Call(environ["REQUEST_METHOD"], environ["PATH_INFO"].strip("/"), environ["QUERY_STRING"], bounds)
        if environ.get("HTTP_USER_AGENT", "").startswith("the-test"):
            return backend(environ, start_response)
        store.log.append(call)
        answer = store.fault(call) if store.fault else None
        if answer is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return answer(start_response)
        return backend(environ, start_response)

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        config=Config(user_agent="the-test"),
    )
    store = ObjectStore(url, client)
    try:
        client.create_bucket(Bucket=BUCKET)
        yield store
    finally:
        urlopen(
            Request(f"{url}/moto-api/reset", method="POST"), timeout=10
        ).close()  # it is this process's, not the server's
        server.shutdown()
        thread.join()
        server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kept(tmp_path: Path) -> list[Path]:
    """Return the files that unfinished work has left."""
    return [path for path in (tmp_path / "cache/reshard/unfinished").glob("*") if path.suffix != ".lock"]
