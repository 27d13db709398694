"""What the hub does not give is refused within seconds; a server on this machine plays the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from saepipe import hub
from saepipe.errors import UserError


def test_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert hub.local("model") == tmp_path / "model"
    assert hub.local("owner/name") is None


@pytest.mark.parametrize("name", ["./model", "/data/model", "a/b/c", "~/nowhere-at-all"])
def test_paths_are_not_asked_for(name: str) -> None:
    with pytest.raises(UserError, match=rf"model.name={name} does not exist; give an existing path or a hub id"):
        hub.check(name, "model", None, key="model.name")


def test_offline_asks_nothing() -> None:
    assert hub.offline()  # conftest sees to that
    assert hub.check("owner/absent", "model", None, key="model.name") is None


def test_fault_is_one_short_line() -> None:
    assert hub.fault(ValueError("one\n  two")) == "one two"
    assert hub.fault(ValueError()) == "ValueError"
    assert hub.fault(ValueError("a" * 300)) == "a" * 250 + " ..."


@contextmanager
def small_hub(status: int, code: str) -> Iterator[str]:
    """Serve a hub on this machine that answers everything with one error, as the real one words it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", r"is gated; accept its licence on its hub page, then run `hf auth login` or set HF_TOKEN"),
        (404, "RepoNotFound", r"neither a file or folder here nor a model on the hub that you may read"),
        (404, "RevisionNotFound", r"model.revision=v9 is no branch, tag or commit of owner/absent"),
        (500, "", r"the hub cannot be reached .*`hf download owner/absent`"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with small_hub(status, code) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        with pytest.raises(UserError, match=message):
            hub.check("owner/absent", "model", "v9", key="model.name")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"data.path=owner/absent.*hf download owner/absent --repo-type dataset"):
        hub.check("owner/absent", "dataset", None, key="data.path")
