"""A server for W&B's clients on this machine: what they ask when they upload runs, and what they send.

It is as strict as W&B's in one point only: rows of the history are placed by the offset that the client gives.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Run:
    """What was uploaded of a run; `settings` are its variables, such as groupName."""

    settings: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    num_system_rows: int = 0
    exit_code: int | None = None

    def history(self) -> list[dict[str, Any]]:
        """The rows in their order, without what W&B adds to each (`_timestamp`, `_runtime`)."""
        assert sorted(self.rows) == list(range(len(self.rows)))
        own = ("_timestamp", "_runtime")
        return [{k: v for k, v in self.rows[i].items() if k not in own} for i in range(len(self.rows))]


@dataclass
class Server:
    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # of GraphQL
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def login(self) -> dict[str, str]:
        """Environment variables of a client."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def asked(self, name: str) -> list[dict[str, Any]]:
        """The variables of each request of this name."""
        return [variables for asked, variables in self.requests if asked == name]

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.requests.append((name, variables))
        project = {"id": "p", "name": "cifar_dist", "entity": {"id": "e", "name": "somebody"}}
        run = self.runs.get(str(variables.get("name")), Run())
        if name == "RunResumeStatus":
            known = variables["name"] in self.runs
            return {"model": {**project, "bucket": self._state(variables["name"], run) if known else None}}
        if name == "UpsertBucket":
            inserted = variables["name"] not in self.runs
            self.runs[variables["name"]] = run
            run.settings |= {key: value for key, value in variables.items() if value is not None}
            bucket = {**self._state(variables["name"], run), "project": project, "sweepName": None, "description": ""}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if name == "CreateRunFiles":
            uploads = [{"name": file, "uploadUrl": f"{self.url}/put/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": uploads}}
        if name == "Viewer":
            return {"viewer": {"id": "u", "entity": "somebody", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        if name == "NotifyScriptableRunAlert":
            return {"notifyScriptableRunAlert": {"success": True}}
        raise LookupError(name)

    def _state(self, name: str, run: Run) -> dict[str, Any]:
        tail = json.dumps([json.dumps(run.rows[max(run.rows)])]) if run.rows else "[]"
        return {
            "id": "x", "name": name, "displayName": "", "config": "{}", "tags": [], "notes": None,
            "wandbConfig": '{"t": {}}',
            "summaryMetrics": json.dumps(run.summary), "historyLineCount": len(run.rows), "historyTail": tail,
            "logLineCount": 0, "eventsLineCount": run.num_system_rows, "eventsTail": "[]",
        }  # fmt: skip

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        run, files = self.runs[name], sent.get("files", {})
        for file, part in files.items():
            lines = [json.loads(line) for line in part["content"]]
            if file == "wandb-history.jsonl":
                run.rows |= dict(enumerate(lines, part["offset"]))
            elif file == "wandb-summary.json":
                run.summary = lines[-1]
            elif file == "wandb-events.jsonl":
                run.num_system_rows += len(lines)
        run.exit_code = sent.get("exitcode", run.exit_code)


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def body(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

        def send(self, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.send({})

        def do_PUT(self) -> None:
            server.files[self.path.removeprefix("/put/")] = self.body()
            self.send({})

        def do_POST(self) -> None:
            sent = json.loads(self.body())
            if self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], sent)
                return self.send({"exitcode": None, "limits": {}})
            found = re.search(r"(?:query|mutation) (\w+)", sent["query"])
            assert found
            try:
                return self.send({"data": server.answer(found[1], sent.get("variables") or {})})
            except LookupError as error:
                return self.send({"errors": [{"message": f"no answer to {error}"}], "data": None})

    class Http(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Clients are killed."""

    http = Http(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
