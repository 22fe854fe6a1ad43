"""A promoted version on the hub: what is uploaded, how, and who sees the token. The hub is a server of our own."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tuner.errors import TunerError
from tuner.promotion.promote import _push
from tuner.promotion.registry import Version
from tuner.spec.layout import Root

TOKEN = "hf_thisIsASecret"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as creating a repository and committing small files to it takes."""

    def do_POST(self) -> None:
        hub: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        hub.requests.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/validate-yaml":  # the model card's head; anybody may ask
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._answer(200, {"url": f"{hub.url}/me/pydoc"})
        elif self.path.endswith("/preupload/main"):
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._answer(200, {"files": files})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            hub.summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            files = [line["value"] for line in lines if line["key"] == "file"]
            hub.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            self._answer(200, {"success": True, "commitOid": "0", "commitUrl": f"{hub.url}/me/pydoc/commit/0"})

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Authorization")))  # type: ignore[attr-defined]
        self._answer(404, {"error": "not found"})

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub that knows one token, and huggingface_hub pointed at it."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.requests, server.created, server.files = [], [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def version(tmp_path: Path) -> Version:
    promoted = Version(Root(tmp_path / "runs"), "production", 3)
    promoted.path.mkdir(parents=True)
    for name, content in (("README.md", "A card."), ("manifest.json", "{}"), ("model.safetensors", "weights")):
        (promoted.path / name).write_text(content)
    return promoted


def test_a_version_is_uploaded_whole_to_a_private_repository_and_the_token_goes_nowhere_else(
    hub, version, tmp_path, caplog, capfd
):
    caplog.set_level(logging.DEBUG)
    steps: list[str] = []
    address = _push(version, "me/pydoc", steps.append)
    assert address.startswith(hub.url)
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "pydoc")
    assert created.get("private") or created.get("visibility") == "private"
    assert hub.files == {file.name: file.read_bytes() for file in version.path.iterdir()}
    assert hub.summary == "production v3"
    assert {by for path, by in hub.requests if "/models/" in path or "/repos/" in path} == {f"Bearer {TOKEN}"}
    assert steps == ["uploading to me/pydoc"]
    said = "".join(capfd.readouterr()) + caplog.text + address
    written = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert TOKEN not in said + written + "".join(path for path, _ in hub.requests)


@pytest.mark.parametrize("repository", ["me/pydoc", "not a name"])
def test_a_hub_that_refuses_costs_the_upload_alone_and_is_quoted_without_the_token(
    repository, hub, version, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_anotherSecret")
    with pytest.raises(TunerError, match="production v3 is promoted, but it was not uploaded to") as caught:
        _push(version, repository, lambda step: None)
    assert "Secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert version.path.is_dir()
