"""A stand-in for the part of the W&B server that wandb-core talks to, so that the real client is tested online.

with StandIn() as server:
    environment = server.environment()   # for a subprocess that runs wandb
    server.runs["the-id"].history        # the rows that arrived
"""

import gzip
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

KEY = "local" + "0" * 40  # wandb refuses shorter ones without asking the server


@dataclass
class Run:
    """What the server knows of one run."""

    name: str
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)  # project, entity, groupName, displayName, notes ...
    state: str = "running"
    preempting: bool = False


class StandIn:
    """Serves on a free port of 127.0.0.1. `fail(method, path, operation)` returns a status to answer with, or None."""

    def __init__(self, fail: Callable[[str, str, str], int | None] = lambda method, path, operation: None) -> None:
        self.runs: dict[str, Run] = {}
        self.fail = fail
        self.requests: list[bytes] = []  # every body as it came, for what must not be in them

        class Handler(_Handler):
            standin = self

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def run(self, name: str) -> Run:
        return self.runs.setdefault(name, Run(name))

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p1", "name": variables.get("project"), "entity": {"id": "e1", "name": "local"}}
        viewer = {"id": "u1", "entity": "local", "username": "local", "flags": "{}", "teams": {"edges": []}}
        if "upsertBucket" in query:
            return {"upsertBucket": self._upsert(variables, project)}
        if "createRunFiles" in query:
            name = variables.get("run") or variables.get("runName") or variables["runID"]
            files = [{"name": file, "uploadUrl": f"{self.url}/storage/{name}/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": f"id_{name}", "uploadHeaders": [], "files": files}}
        if "historyTail" in query:  # what a resuming client asks for
            run = self.runs.get(variables["name"])
            return {"model": {**project, "bucket": run and self._bucket(run)}}
        if "RunFragment" in query:  # wandb.Api().run(...)
            run = self.runs.get(variables["name"])
            return {"project": project | {"run": run and self._public(run)}}
        if "RunHistoryKeys" in query:
            return {"project": {"run": {"historyKeys": self._public(self.runs[variables["name"]])["historyKeys"]}}}
        if "RunParquetHistory" in query:
            rows = self.runs[variables["runName"]].history
            return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": rows}}}}
        if "HistoryPage" in query:
            rows = self.runs[variables["run"]].history
            page = [row for row in rows if variables["minStep"] <= row["_step"] < variables["maxStep"]]
            return {"project": {"run": {"history": [json.dumps(row) for row in page]}}}
        if "serverInfo" in query:
            versions = {"latestLocalVersionInfo": None, "cliVersionInfo": {"max_cli_version": "999.0.0"}}
            return {"serverInfo": {"features": [], **versions}, "viewer": viewer}
        return {"viewer": viewer} if "viewer" in query else {}

    def _upsert(self, variables: dict[str, Any], project: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or variables["id"]
        inserted = name not in self.runs
        run = self.run(name)
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        run.tags = variables.get("tags") or run.tags
        run.about |= {key: value for key, value in variables.items() if value is not None and key != "config"}
        return {
            "bucket": {**self._bucket(run), "description": None, "sweepName": None, "project": project},
            "inserted": inserted,
        }

    def _bucket(self, run: Run) -> dict[str, Any]:
        return {
            "id": f"id_{run.name}",
            "name": run.name,
            "displayName": run.about.get("displayName", run.name),
            "summaryMetrics": json.dumps(run.summary),
            "config": json.dumps(run.config),
            "tags": run.tags,
            "wandbConfig": json.dumps({"t": 1}),
            "logLineCount": len(run.output),
            "historyLineCount": len(run.history),
            "eventsLineCount": len(run.events),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": json.dumps([json.dumps(row) for row in run.events[-1:]]),
        }

    def _public(self, run: Run) -> dict[str, Any]:
        """A run as wandb.Api shows it."""
        bucket = self._bucket(run)
        return {
            **{
                key: bucket[key]
                for key in ("id", "name", "displayName", "tags", "config", "summaryMetrics", "historyLineCount")
            },
            "projectId": "1",
            "state": run.state,
            "user": {"name": "local", "username": "local"},
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "systemMetrics": "{}",
            "historyKeys": {"lastStep": len(run.history) - 1, "keys": {}},
            **dict.fromkeys(("sweepName", "group", "jobType", "commit", "description", "notes")),
        }

    def file_stream(self, name: str, sent: dict[str, Any]) -> None:
        run = self.run(name)
        for file, part in (sent.get("files") or {}).items():
            offset, lines = part.get("offset", 0), part.get("content", [])
            if file == "wandb-history.jsonl":
                run.history[offset:] = map(json.loads, lines)  # a client that doesn't resume starts at 0 and overwrites
            elif file == "wandb-events.jsonl":
                run.events[offset:] = map(json.loads, lines)
            elif file == "wandb-summary.json" and lines:
                run.summary = json.loads(lines[-1])
            elif file == "output.log":
                run.output[offset:] = lines
        run.preempting |= bool(sent.get("preempting"))
        if sent.get("exitcode") is not None:
            run.state = "finished" if sent["exitcode"] == 0 else "failed"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # wandb-core resets idle connections


class _Handler(BaseHTTPRequestHandler):
    standin: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _serve(self) -> None:
        body = self._body()
        self.standin.requests.append(body)
        asked = json.loads(body) if self.path == "/graphql" else {}
        status = self.standin.fail(self.command, self.path, asked.get("operationName") or "")
        if status is not None:
            self._answer(status, {"error": "the test wanted this"})
        elif asked:
            self._answer(200, {"data": self.standin.graphql(asked["query"], asked.get("variables") or {})})
        elif stream := re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.standin.file_stream(stream[1], json.loads(body))
            self._answer(200, {"exitcode": None, "limits": {}})
        elif (storage := re.match(r"/storage/([^/]+)/(.+)", self.path)) and self.command == "PUT":
            self.standin.run(storage[1]).files[storage[2]] = body
            self._answer(200, {})
        else:
            self._answer(404, {})

    do_GET = do_POST = do_PUT = _serve
