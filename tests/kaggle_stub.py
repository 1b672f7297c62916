"""A stand-in for the competition site: as much of it as the real client needs to create and version datasets, run a notebook and submit it.

It keeps what it is sent, writes down every request, and misbehaves on demand (see `Fault`). It answers requests addressed to it and requests
that come to it as to an HTTP proxy, so that the client can be pointed at it by public environment variables alone.
"""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

TOKEN = "KGAT_0123456789abcdef"
USER, KEY = "tester", "fedcba9876543210fedcba9876543210"
SUBMISSION = b"id,prediction\n0,A B C\n"

Json = dict[str, Any]


class Request(NamedTuple):
    """op: the method's name, or PUT (an upload), PROBE (how much of it is there) or GET. auth: "Bearer", "Basic" or "". body: JSON."""

    op: str
    auth: str
    body: Json


class Answer(NamedTuple):
    """What goes back."""

    status: int
    data: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    kind: str = "application/json"


@dataclass
class Fault:
    """What to do at `times` requests of a kind ("*": any), after `skip` have passed.

    carry_out: do first what was asked. keep: bytes of an upload to keep where it is not. call: a function to call then. status: what to answer,
    with message and headers; 0: close the connection without an answer.
    """

    op: str
    skip: int = 0
    times: int = 1
    carry_out: bool = False
    keep: int = 0
    call: Callable[[], None] | None = None
    status: int = 0
    message: str = "try later"
    headers: tuple[tuple[str, str], ...] = ()

    def is_due(self, op: str) -> bool:
        """Count a request; whether it is one to misbehave at."""
        if self.op not in (op, "*"):
            return False
        self.skip -= 1
        return -self.times <= self.skip < 0


@dataclass
class Blob:
    """An upload. data: what is kept of it. received: how many bytes came, those that came twice included."""

    name: str
    size: int
    data: bytes = b""
    received: int = 0


@dataclass
class Dataset:
    """versions: file name → content, of each. looks: how often its status will be asked before the newest version is ready."""

    title: str
    versions: list[dict[str, bytes]] = field(default_factory=list)
    looks: int = 0

    @property
    def current(self) -> int:
        """The newest version that is ready."""
        return len(self.versions) - (self.looks > 0)


class RefusedError(Exception):
    """An answer of 4xx."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Stub(ThreadingHTTPServer):
    """The site: `with Stub() as site:` listens at `site.url`. Its state is public, to be set up and looked at by tests."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.blobs: list[Blob] = []
        self.datasets: dict[str, Dataset] = {}
        self.kernels: dict[str, list[Json]] = {}
        self.submissions: list[Json] = []
        self.looks = 0  # how often the status of a new version is asked before it is ready
        self.hides = False  # whether a dataset in processing is answered with 403
        self.outcome = "READY"  # of processing
        self.zips = False  # whether a single file is given as an archive
        self.runs = ["QUEUED", "RUNNING", "COMPLETE"]  # the answers to questions for the status of a run, the last for good
        self.failure = ""
        self.log = json.dumps([{"stream_name": "stdout", "time": 1.0, "data": "installed\n"}])
        self.outputs = {"figure.png": b"png", "submission.csv": SUBMISSION}
        self.page = 20  # outputs in a page of their list
        self.changed: dict[str, Json] = {}  # method → what to put over its answer, which is then all that it does
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def ops(self) -> list[str]:
        """The requests, by what they ask for."""
        return [request.op for request in self.requests]

    def count(self, *ops: str) -> int:
        """How many requests of these kinds have come."""
        return sum(op in ops for op in self.ops)

    def asked(self, op: str) -> list[Json]:
        """The bodies of the requests of a kind."""
        return [request.body for request in self.requests if request.op == op]

    def note(self, request: Request) -> Fault | None:
        """Write a request down; the fault that is due, if any."""
        with self._lock:
            self.requests.append(request)
            return next((fault for fault in self.faults if fault.is_due(request.op)), None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are part of the job."""

    def __enter__(self) -> Stub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    # -- the methods of the site

    def answer(self, op: str, body: Json) -> Any:
        """Carry out a method. Raises RefusedError."""
        if op in self.changed:
            return self.changed[op]
        method = getattr(self, "on_" + re.sub(r"(?<!^)(?=[A-Z])", "_", op).lower(), None)
        if method is None:
            raise RefusedError(404, f"the stub has no {op}")
        return method(body)

    def on_introspect_token(self, body: Json) -> Json:
        return {"active": True, "username": USER} if body["token"] == TOKEN else {"active": False}

    def on_get_dataset_status(self, body: Json) -> Json:
        dataset = self._dataset(body)
        if not dataset.looks:
            return {"status": self.outcome}
        dataset.looks -= 1
        if self.hides:
            raise RefusedError(403, "Permission 'datasets.get' was denied")
        return {"status": "BLOBS_RECEIVED"}

    def on_get_dataset(self, body: Json) -> Json:
        return {"currentVersionNumber": self._dataset(body).current}

    def on_download_dataset(self, body: Json) -> Answer:
        files = self._dataset(body).versions[body["datasetVersionNumber"] - 1]
        if body["fileName"] not in files:
            raise RefusedError(404, "no such file")
        place = "/".join((body["ownerSlug"], body["datasetSlug"], str(body["datasetVersionNumber"]), body["fileName"]))
        return Answer(302, headers=(("Location", f"{self.url}/files/{place}?signature=secret"),))

    def on_start_blob_upload(self, body: Json) -> Json:
        self.blobs.append(Blob(body["name"], int(body["contentLength"])))
        token = f"blob{len(self.blobs)}"
        return {"token": token, "createUrl": f"{self.url}/upload/{token}?signature=secret"}

    def on_create_dataset(self, body: Json) -> Json:
        ref = f"{body['ownerSlug']}/{body['slug']}"
        if ref in self.datasets or any(body["title"] == other.title for other in self.datasets.values()):
            return {"status": "error", "error": f"The requested title \"{body['title']}\" is already in use by a dataset."}
        self.datasets[ref] = Dataset(body["title"], [self._files(body)], self.looks)
        return {"ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}", "status": "ok", "error": ""}

    def on_create_dataset_version(self, body: Json) -> Json:
        dataset = self._dataset(body)
        if dataset.looks:
            raise RefusedError(403, "the dataset is still in processing")
        dataset.versions.append(self._files(body["body"]))
        dataset.looks = self.looks
        return {"url": f"https://www.kaggle.com/datasets/{body['ownerSlug']}/{body['datasetSlug']}", "status": "ok", "error": ""}

    def on_get_kernel(self, body: Json) -> Json:
        versions = self.kernels.get(f"{body['userName']}/{body['kernelSlug']}")
        if not versions:
            raise RefusedError(403, "Permission 'kernels.get' was denied")
        return {"metadata": {"currentVersionNumber": len(versions)}, "blob": {"source": versions[-1]["text"]}}

    def on_save_kernel(self, body: Json) -> Json:
        versions = self.kernels.setdefault(body["slug"], [])
        versions.append(body)
        url = f"https://www.kaggle.com/code/{body['slug']}"
        invalid = [source for source in body.get("datasetDataSources", ()) if not self._is_dataset(source)]
        return {"ref": f"/code/{body['slug']}", "url": url, "versionNumber": len(versions), "error": "", "invalidDatasetSources": invalid}

    def on_get_kernel_session_status(self, _: Json) -> Json:
        status = self.runs.pop(0) if len(self.runs) > 1 else self.runs[0]
        return {"status": status, "failureMessage": self.failure}

    def on_list_kernel_session_output(self, body: Json) -> Json:
        start = int(body.get("pageToken") or 0)
        page = list(self.outputs)[start : start + self.page]
        more = str(start + self.page) if start + self.page < len(self.outputs) else ""
        return {"files": [{"fileName": name, "url": f"{self.url}/output/{name}?signature=secret"} for name in page], "log": self.log, "nextPageToken": more}

    def on_create_code_submission(self, body: Json) -> Json:
        self.submissions.insert(0, body)
        return {"message": "Successfully submitted to the competition", "ref": len(self.submissions)}

    def on_list_submissions(self, _: Json) -> Json:
        return {"submissions": [{"ref": 1, "description": each["submissionDescription"], "status": "PENDING"} for each in self.submissions]}

    def file(self, path: str) -> bytes:
        """A file of a dataset or of a run."""
        kind, *names = path.strip("/").split("/")
        if kind == "output":
            return self.outputs[names[-1]]
        owner, slug, version, name = names
        data = self.datasets[f"{owner}/{slug}"].versions[int(version) - 1][name]
        if not self.zips:
            return data
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(name, data)
        return buffer.getvalue()

    def _dataset(self, body: Json) -> Dataset:
        ref = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if ref not in self.datasets:
            raise RefusedError(404, "Not found")
        return self.datasets[ref]

    def _files(self, body: Json) -> dict[str, bytes]:
        """The uploads that a dataset is made of, which must be whole."""
        blobs = [self.blobs[int(file["token"].removeprefix("blob")) - 1] for file in body["files"]]
        for blob in blobs:
            if len(blob.data) != blob.size:
                raise RefusedError(400, f"{blob.name} has {len(blob.data)} bytes instead of {blob.size}")
        return {blob.name: blob.data for blob in blobs}

    def _is_dataset(self, source: str) -> bool:
        owner, slug, version = f"{source}/1".split("/")[:3]
        dataset = self.datasets.get(f"{owner}/{slug}")
        return dataset is not None and 1 <= int(version) <= dataset.current


class Handler(BaseHTTPRequestHandler):
    """One connection to the site."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    disable_nagle_algorithm = True
    server: Stub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """A method: /api/v1/<service>/<method>, JSON in, JSON out."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        op = self._path.rpartition("/")[2]

        def carry_out() -> Answer:
            if not self._auth and op != "IntrospectToken":
                raise RefusedError(401, "Unauthenticated")
            answer = self.server.answer(op, body)
            return answer if isinstance(answer, Answer) else Answer(200, json.dumps(answer).encode())

        self._serve(op, body, carry_out)

    def do_PUT(self) -> None:
        """An upload, or the question how much of it is there, by the rules of resumable uploads."""
        blob = self.server.blobs[int(self._path.rpartition("blob")[2]) - 1]
        span = self.headers.get("Content-Range", "")
        size = int(self.headers["Content-Length"])

        def carry_out(keep: int = size) -> Answer:
            start = int(span.removeprefix("bytes ").split("-")[0]) if span else 0
            data = self.rfile.read(min(keep, size))
            blob.data = blob.data[:start] + data
            blob.received += len(data)
            return Answer(200)

        def probe(_: int = 0) -> Answer:
            have = len(blob.data)
            return Answer(200) if have == blob.size else Answer(308, headers=(("Range", f"bytes=0-{have - 1}"),) if have else ())

        is_probe = span.startswith("bytes */")
        self._serve("PROBE" if is_probe else "PUT", {"name": blob.name, "range": span}, probe if is_probe else carry_out, carry_out)

    def do_GET(self) -> None:
        """A file."""
        self._serve("GET", {"path": self._path}, lambda: Answer(200, self.server.file(self._path), kind="application/octet-stream"))

    def _serve(self, op: str, body: Json, carry_out: Callable[[], Answer], keep: Callable[[int], Answer] | None = None) -> None:
        """Write the request down and answer it, unless a fault is due."""
        fault = self.server.note(Request(op, self._auth, body))
        if fault is None or fault.carry_out:
            try:
                answer = carry_out()
            except RefusedError as error:
                answer = refusal(error.status, str(error))
        elif fault.keep and keep:
            keep(fault.keep)
        if fault:
            if fault.call:
                fault.call()
            self.close_connection = True
            if not fault.status:
                return
            self._drain(op, fault)
            answer = refusal(fault.status, fault.message, fault.headers)
        self._send(answer)

    def _drain(self, op: str, fault: Fault) -> None:
        """Read what is left of an upload, so that the client sees the answer."""
        if op == "PUT" and not fault.carry_out:
            self.rfile.read(max(0, int(self.headers["Content-Length"]) - fault.keep))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in (("Content-Type", answer.kind), ("Content-Length", str(len(answer.data))), *answer.headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.data)
        self.wfile.flush()

    @property
    def _path(self) -> str:
        return urllib.parse.urlsplit(self.path).path

    @property
    def _auth(self) -> str:
        """How the request is signed in, if rightly."""
        header = self.headers.get("Authorization", "")
        basic = base64.b64encode(f"{USER}:{KEY}".encode()).decode()
        return {f"Bearer {TOKEN}": "Bearer", f"Basic {basic}": "Basic"}.get(header, "")


def refusal(status: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    """An error as the site words it."""
    return Answer(status, json.dumps({"code": status, "message": message}).encode(), headers)


def interrupt() -> None:
    """Ctrl-C for the main thread of this process, and time for it to come through."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(0.05)
