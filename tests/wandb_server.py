"""A W&B server small enough for a test: it answers the real client's calls over HTTP and keeps what it was sent."""

from __future__ import annotations

import gzip
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"


@dataclass
class StoredRun:
    """`settings` as sent when the run was made (group, job type, tags, config, ...), history rows by line, files by name."""

    settings: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict]:
        return [json.loads(self.lines[i]) for i in sorted(self.lines)]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, StoredRun] = {}
        self.received: list[bytes] = []  # every request: path and body
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client drops its connections when it ends

    def graphql(self, query: str, v: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            new = v["name"] not in self.runs
            run = self.runs.setdefault(v["name"], StoredRun())
            run.settings |= {key: value for key, value in v.items() if value is not None}
            project = {"id": "project", "name": v["project"], "entity": {"id": "entity", "name": ENTITY}}
            bucket = {"id": v["name"], "name": v["name"], "displayName": v.get("displayName"), "project": project,
                      "historyLineCount": len(run.lines)}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "RunResumeStatus" in query:
            run = self.runs.get(v["name"])
            tail = json.dumps([run.lines[max(run.lines)]] if run and run.lines else [])
            bucket = run and {
                "id": v["name"], "name": v["name"], "summaryMetrics": "{}", "displayName": v["name"], "logLineCount": 0,
                "historyLineCount": len(run.lines), "eventsLineCount": 0, "historyTail": tail, "eventsTail": "[]",
                "config": run.settings.get("config") or "{}", "tags": run.settings.get("tags") or [],
                "wandbConfig": '{"t": 1}',
            }
            return {"model": {"id": "project", "name": v["project"], "entity": {"id": "entity", "name": ENTITY}, "bucket": bucket}}
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.url}/upload/{v['run']}/{n}"} for n in v["files"]]
            return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}
        if "createArtifact(" in query:  # "I have it already": the content of a table comes as a file, too
            artifact = {"id": "artifact", "state": "COMMITTED", "artifactSequence": {"id": "sequence", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if "viewer" in query:
            return {"viewer": {"id": "user", "entity": ENTITY, "username": "user", "flags": "{}", "teams": {"edges": []}}}
        return {"project": None}


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.received.append(self.path.encode() + b"\n" + body)
        return body

    def _answer(self, data: Any) -> None:
        text = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = json.loads(self._body() or b"{}")
        if self.path.startswith("/graphql"):
            self._answer({"data": self.server.graphql(body["query"], body.get("variables") or {})})
            return
        run = self.server.runs[self.path.split("/")[-2]]  # /files/<entity>/<project>/<run>/file_stream
        history = (body.get("files") or {}).get("wandb-history.jsonl")
        for number, line in enumerate((history or {}).get("content", [])):
            run.lines[history["offset"] + number] = line
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
        self._answer({})

    def do_PUT(self) -> None:
        _, _, run, name = self.path.split("/", 3)
        self.server.runs[run].files[name] = self._body()
        self._answer({})


@contextmanager
def serving():
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
