"""A hub in this process: enough of the real one's protocol for the real client to look, download and upload."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"


class SmallHub:
    """Repositories as `{repo: {path: content}}`; `asked` holds the files that were downloaded."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.asked: list[str] = []
        self.private: set[str] = set()
        self.address = ""

    @contextmanager
    def running(self) -> Iterator["SmallHub"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def environment(self, home: object) -> dict[str, str]:
        """What points the client here, with a cache of its own."""
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def _handler(hub: "SmallHub") -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                return

            def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def say(self, value: Any, status: int = 200, **headers: str) -> None:
                self.answer(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                words = unquote(urlsplit(self.path).path).strip("/").split("/")
                if words[:2] == ["api", "models"]:
                    return self.repository("/".join(words[2:4]), words[4:])
                if words[:2] == ["api", "whoami-v2"]:
                    return self.say({"name": "owner", "type": "user"})
                repo, path = "/".join(words[:2]), "/".join(words[4:])
                content = hub.repositories.get(repo, {}).get(path)
                if content is None:
                    return self.say({}, 404, X_Error_Code="EntryNotFound")
                if self.command == "GET":
                    hub.asked.append(path)
                tag = hashlib.sha1(content).hexdigest()
                return self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

            def repository(self, repo: str, rest: list[str]) -> None:
                files = hub.repositories.get(repo)
                if files is None:
                    return self.say({}, 401, X_Error_Code="RepoNotFound")
                if rest[:1] == ["revision"] and rest[1:] not in ([COMMIT], ["main"]):
                    return self.say({}, 404, X_Error_Code="RevisionNotFound")
                if rest[:1] == ["tree"]:
                    return self.say(
                        [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files]
                    )
                siblings = [{"rfilename": name} for name in files]
                return self.say({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False})

            def do_POST(self) -> None:
                words = urlsplit(self.path).path.strip("/").split("/")
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                if words[-2:] == ["repos", "create"]:
                    given = json.loads(body)
                    repo = f"{given.get('organization') or 'owner'}/{given['name']}"
                    if given.get("private") or given.get("visibility") == "private":
                        hub.private.add(repo)
                    known = repo in hub.repositories
                    hub.repositories.setdefault(repo, {})
                    return self.say({"url": f"{hub.address}/{repo}"}, 409 if known else 200)
                if words[-1] == "validate-yaml":
                    return self.say({"errors": [], "warnings": []})
                repo = "/".join(words[2:4])
                if "preupload" in words:
                    files = [
                        {"path": item["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for item in json.loads(body)["files"]
                    ]
                    return self.say({"files": files})
                for line in body.decode().splitlines():
                    item = json.loads(line)
                    if item["key"] == "file":
                        hub.repositories[repo][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                return self.say(
                    {"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.address}/{repo}/commit/{COMMIT}"}
                )

        return Handler
