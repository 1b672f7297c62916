"""The signed-in `kaggle` client, as far as publishing needs it: questions, calls that may fail in passing, and things sent exactly once.

Owns every word spoken to the site, and the one policy of retries; the only file that imports kaggle (inside functions, because importing it
signs in). Does not know what is published, nor what was sent before (publish.py). The client calls many failures a success, so only what the
site confirms is believed: a *delivery* looks whether it has arrived, sends, and looks again. So it can be repeated after a lost answer.
"""

from __future__ import annotations

import contextlib
import email.utils
import io
import itertools
import json
import logging
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from kit import manifest
from kit.errors import BundleError, ConfigError, DependencyError, KitError, PublishError
from kit.vendor import staged

if TYPE_CHECKING:
    from requests import Response

_READY_S = 3600.0  # the longest that a dataset may be in processing
_PAUSES_S = (1, 2, 4, 8, 16, 32, 60, 60, 60)  # between attempts
_POLLS_S = (2, 5, 10, 20, 30, 60)  # between looks at something in progress; the last repeats
_PASSING = (408, 429, 500, 502, 503, 504)
_UNSEEN = (403, 404)  # the site's answers for what is not there, or not yet
_SECRETS = re.compile(r"(?i)(\b(?:basic|bearer)\s+|\"(?:\w*token|key)\":\s*\"|\?)[^\s\"')]+")
_SIGN_IN = (
    "the kaggle client finds no valid credentials: run `kaggle auth login`, or set KAGGLE_API_TOKEN, or write the token to "
    "~/.kaggle/access_token, or set KAGGLE_USERNAME and KAGGLE_KEY, or keep ~/.kaggle/kaggle.json (made on the site: Settings, API)"
)

log = logging.getLogger(__name__)
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class RefusalError(PublishError):
    """The site's refusal. status: of HTTP."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class PassingError(PublishError):
    """A failure that may be over at the next attempt. after_s: when the site asks to come back."""

    def __init__(self, text: str, after_s: float | None = None) -> None:
        super().__init__(text)
        self.after_s = after_s


class Delivery(Protocol[T_co]):
    """Something to be sent once. `arrived` asks the site for it, and gives None as long as it is not there; only then `send` may be repeated."""

    name: str

    def arrived(self) -> T_co | None:
        """What is there."""

    def send(self) -> None:
        """One attempt."""


class State(NamedTuple):
    """Of a dataset: "absent", "ready", "failed", "deleted" or a stage of processing; and its version. Of a run: how it stands, and why it failed."""

    status: str
    version: int = 0
    reason: str = ""


class Session:
    """The signed-in client, with one policy of retries; what it prints goes to the log, without credentials. All methods raise PublishError."""

    def __init__(self, timeout_s: float, sleep: Callable[[float], None], clock: Callable[[], float]) -> None:
        self._timeout_s, self._sleep, self._clock = timeout_s, sleep, clock
        self.client = _new_client()
        self.ask("signing in", self.client.authenticate)
        self.user = str(self.client.config_values["username"])

    def call(self, what: str, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """One call of the client. Raises PassingError, RefusalError, PublishError, and ConfigError without credentials."""
        import requests

        try:
            with _captured():
                return function(*args, **named)
        except KitError:
            raise
        except SystemExit:  # how the client says that nobody is signed in
            raise ConfigError(_SIGN_IN) from None
        except requests.HTTPError as error:
            raise _refusal(what, error.response) from None
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise PassingError(f"{what}: the connection failed ({_clean(str(error))})") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # the client's, on an answer it does not expect
            raise PublishError(f"{what}: {type(error).__name__}: {_clean(str(error))}") from None

    def ask(self, what: str, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """A call that changes nothing, repeated as long as it fails in passing."""
        for pause in _PAUSES_S:
            try:
                return self.call(what, function, *args, **named)
            except PassingError as error:
                self._rest(error, pause)
        return self.call(what, function, *args, **named)

    def deliver(self, delivery: Delivery[T]) -> T:
        """Send once: look before every attempt, and again afterwards. Raises PublishError where success was claimed but nothing is there."""
        for pause in (*_PAUSES_S, None):
            if (there := delivery.arrived()) is not None:
                return there
            try:
                delivery.send()
                break
            except PassingError as error:
                if pause is None:
                    raise
                self._rest(error, pause)
        for pause in _PAUSES_S[:5]:
            if (there := delivery.arrived()) is not None:
                return there
            self._sleep(pause)
        raise PublishError(f"{delivery.name}: the site answered success, but does not have it: look there, then run the same command again")

    def poll(self, what: str, look: Callable[[], State], is_over: Callable[[State], bool], timeout_s: float) -> State:
        """Look until it is over. Raises PublishError after `timeout_s`."""
        began = self._clock()
        with tqdm(desc=what, bar_format="{desc}: {postfix} {elapsed}", disable=None) as bar:
            for pause in itertools.chain(_POLLS_S, itertools.repeat(_POLLS_S[-1])):
                state = look()
                bar.set_postfix_str(state.status)
                log.info("%s: %s", what, state.status)
                if is_over(state):
                    return state
                if self._clock() - began + pause > timeout_s:
                    raise PublishError(f"{what}: still {state.status} after {timeout_s:.0f} s: run the same command again to go on waiting")
                self._sleep(pause)
        raise AssertionError("the pauses never end")

    def _rest(self, error: PassingError, pause: float) -> None:
        pause = pause if error.after_s is None else error.after_s
        log.warning("%s; trying again in %.0f s", error, pause)
        self._sleep(pause)

    def dataset(self, ref: str) -> State:
        """A dataset now."""
        try:
            found = json.loads(self.ask(f"dataset {ref}", self.client.dataset_status, ref, format="json"))
        except RefusalError as error:
            if error.status in _UNSEEN:
                return State("absent")
            raise
        return State(found["status"], found["current_version_number"] or 0)

    def settled_dataset(self, ref: str, expected: int = 0) -> State:
        """A dataset when it is out of processing. expected: the version that was just sent, if one was; without, it may be absent."""

        def is_over(state: State) -> bool:
            arrived = state.status in ("ready", "deleted") and state.version >= expected
            return arrived or state.status == "failed" or (state.status == "absent" and not expected)

        return self.poll(f"dataset {ref}", lambda: self.dataset(ref), is_over, min(_READY_S, self._timeout_s))

    def digest(self, ref: str, version: int) -> str:
        """The digest of the manifest that a dataset's version holds; empty where it holds none."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "download")
            try:
                self.ask(f"dataset {ref}", self.client.dataset_download_file, f"{ref}/{version}", manifest.FILE, path=str(path), force=True)
                (file,) = path.iterdir()  # named by the address that the site redirects to
                if zipfile.is_zipfile(file):  # the site gives some single files as archives
                    with zipfile.ZipFile(file) as archive:
                        archive.extract(manifest.FILE, path)
                else:
                    file.replace(path / manifest.FILE)
                return staged.digest(manifest.read(path))
            except (RefusalError, BundleError, KeyError, ValueError) as error:
                log.info("dataset %s version %s: no manifest to compare with (%s)", ref, version, error)
                return ""

    def notebook(self, ref: str) -> tuple[int, str] | None:
        """A notebook's current version (0: not told) and source; None where there is none."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

        try:
            found = self._ask_about_kernel(ref, "get_kernel", ApiGetKernelRequest())
        except RefusalError as error:
            if error.status in _UNSEEN:
                return None
            raise
        return int(found.metadata.current_version_number or 0), str(found.blob.source or "")

    def finished_run(self, ref: str) -> State:
        """The end of a notebook's run."""

        def look() -> State:
            answer = self.ask(f"notebook {ref}", self.client.kernels_status, ref)
            return State(answer.status.name.lower(), reason=str(answer.failure_message or ""))

        return self.poll(f"notebook {ref}", look, lambda state: state.status not in ("queued", "running", "new_script"), self._timeout_s)

    def outputs(self, ref: str) -> tuple[dict[str, str], str]:
        """The files of a notebook's last run, name → address, and its log."""
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

        request = ApiListKernelSessionOutputRequest()
        files: dict[str, str] = {}
        text = ""
        while True:
            page = self._ask_about_kernel(ref, "list_kernel_session_output", request)
            files |= {item.file_name: item.url for item in page.files or ()}
            text = text or page.log or ""
            if not page.next_page_token:
                return files, text
            request.page_token = page.next_page_token

    def download(self, what: str, address: str) -> bytes:
        """A file of a run. The client's own download would keep an error page as the file."""
        import requests

        def get() -> bytes:
            with requests.get(address, timeout=60) as response:
                response.raise_for_status()
                return response.content

        return self.ask(what, get)

    def _ask_about_kernel(self, ref: str, method: str, request: Any) -> Any:
        """A question that the client's own methods do not pass on."""
        request.user_name, request.kernel_slug = ref.split("/")

        def get() -> Any:
            with self.client.build_kaggle_client() as connection:
                return getattr(connection.kernels.kernels_api_client, method)(request)

        return self.ask(f"notebook {ref}", get)


# --- the client -----------------------------------------------------------------------------------------------------------------------


def _new_client() -> Any:
    """The real client, not signed in yet, with Session's retries instead of its own. Raises DependencyError."""
    try:
        with _captured():
            from kaggle.api.kaggle_api_extended import KaggleApi
            from kaggle.models.kaggle_models_extended import ResumableUploadResult
    except ImportError as error:
        package = (error.name or "kaggle").partition(".")[0]
        raise DependencyError(f"publishing needs package {package!r}: pip install kaggle six (kaggle imports six without declaring it)") from None

    class Client(KaggleApi):
        """Leaves repeating to Session, which looks before it repeats, and loses no file of a dataset silently."""

        may_resume = False  # whether begun uploads are of the same contents: the client goes by path, size and mtime, which staging fixes

        def with_retry(self, func: Callable[..., T], *_: Any, **__: Any) -> Callable[..., T]:
            return func

        def upload_files(self, request: Any, resources: Any, folder: str, blob_type: Any, upload_context: Any, *args: Any, **named: Any) -> None:
            self.begun = {str(path): Path(upload_context.get_upload_info_file_path(str(path))) for path in Path(folder).iterdir()}
            if not self.may_resume:
                for info in self.begun.values():
                    info.unlink(missing_ok=True)
            super().upload_files(request, resources, folder, blob_type, upload_context, *args, **named)

        def upload_complete(self, path: str, url: str, quiet: bool, resume: bool = False) -> Any:
            result = super().upload_complete(path, url, quiet, resume)
            if result == ResumableUploadResult.COMPLETE:
                return result
            if result != ResumableUploadResult.INCOMPLETE:  # expired or refused: to be begun anew. The client may leave the file out
                self.begun[path].unlink(missing_ok=True)
            raise PassingError(f"upload of {Path(path).name} broke off")

    return Client()


@contextlib.contextmanager
def _captured() -> Iterator[None]:
    """What the client prints goes to the log: its warnings as warnings (a key that others may read, an old client), the rest for debugging."""
    said, transport = io.StringIO(), logging.getLogger("urllib3.connectionpool")  # which logs the addresses of uploads that it repeats
    transport.addFilter(_clean_record)
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        transport.removeFilter(_clean_record)
        for line in _clean(said.getvalue()).splitlines():
            log.log(logging.WARNING if line.startswith("Warning") else logging.DEBUG, "kaggle: %s", line)


def _clean(text: str) -> str:
    """Without what signs a request: authorization headers, tokens and keys in JSON, queries of addresses."""
    return _SECRETS.sub(r"\1***", text)


def _clean_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = _clean(record.getMessage()), ()
    return True


def _refusal(what: str, response: Response | None) -> PublishError:
    """An answer of 4xx or 5xx as an exception, in the site's own words where it gives any."""
    if response is None:
        return PublishError(f"{what}: an error without an answer")
    try:
        words = str(response.json()["message"])
    except (ValueError, LookupError, TypeError):
        words = str(response.reason)
    text = f"{what}: the site answered {response.status_code} ({_clean(words)})"
    if response.status_code in _PASSING:
        return PassingError(text, _retry_after(response.headers))
    return RefusalError(f"{text}; {_SIGN_IN}" if response.status_code == 401 else text, response.status_code)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from either form of the header; None without a usable one."""
    value = headers.get("Retry-After", "")
    try:
        return float(value) if value.isdigit() else max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
