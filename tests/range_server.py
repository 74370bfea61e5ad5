"""A web server of one folder, for the tests: it lists folders, gives ranges, notes what was asked, and fails on demand.
And one that answers as the Hugging Face Hub does, as far as its file system asks."""

import base64
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit


class Asked(NamedTuple):
    method: str
    path: str
    num_bytes: int  # of a file, that were sent


class RangeServer:
    """`with RangeServer(folder) as server`: its files are at `server.url`."""

    def __init__(self, folder: Path, login: str | None = None, handler: "type[Handler] | None" = None):
        self.folder, self.login, self.handler = folder, login, handler or Handler
        self.asked: list[Asked] = []
        self.fails: list[str] = []  # how the next requests fail: "503", "drop" within an answer of a file, or "no"
        self.down = False  # 503 to all

    def __enter__(self) -> "RangeServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: self.handler(*args, server_of=self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sent(self) -> list[Asked]:
        """The requests that were answered with bytes of files."""
        return [each for each in self.asked if each.num_bytes]


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, server_of: RangeServer):
        self.of = server_of
        super().__init__(*args, directory=str(server_of.folder))

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        if not self.fails():
            self.note()
            super().do_HEAD()

    def do_GET(self) -> None:
        if self.fails():
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.note()
            super().do_GET()  # a folder's list
            return
        data = path.read_bytes()
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if int(first or 0) >= len(data):
            self.note()
            self.answer(416, b"")
            return
        part = data[int(first or 0) : int(last or len(data) - 1) + 1]
        self.note(len(part))
        content_range = f"bytes {first}-{int(first or 0) + len(part) - 1}/{len(data)}"
        dropped = self.of.fails[:1] == ["drop"] and self.of.fails.pop(0)
        self.answer(206 if first else 200, part, {"Content-Range": content_range} if first else {}, bool(dropped))

    def note(self, num_bytes: int = 0) -> None:
        self.of.asked.append(Asked(self.command, self.path, num_bytes))

    def fails(self) -> bool:
        given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        if self.of.fails[:1] == ["no"]:
            self.of.fails.pop(0)
            return False
        failed = self.of.down or (self.of.fails[:1] == ["503"] and self.of.fails.pop(0))
        status = 401 if self.of.login not in (None, given) else 503 if failed else None
        if status:
            self.note()
            self.answer(status, b"")
        return status is not None

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, dropped: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if dropped else body)
        self.close_connection = dropped


class Hub(Handler):
    """Of the data set NAME at the revision REVISION, what stands in the folder; the requests are those that
    huggingface_hub 2.4 sends."""

    NAME, REVISION = "some/set", "refs/convert/parquet"

    def do_GET(self) -> None:
        path, api = unquote(urlsplit(self.path).path), f"/api/datasets/{self.NAME}"
        files = f"/datasets/{self.NAME}/resolve/{self.REVISION}/"
        if path == f"{api}/revision/{self.REVISION}":
            self.json({"id": self.NAME, "sha": "0" * 40, "siblings": []})
        elif path.startswith(f"{api}/tree/{self.REVISION}/"):
            folder = self.of.folder / path.removeprefix(f"{api}/tree/{self.REVISION}/")
            self.json([self.entry(each) for each in sorted(folder.iterdir())])
        elif path.startswith(files):
            self.path = "/" + path.removeprefix(files)
            super().do_GET()
        else:
            self.answer(404, b"")

    def entry(self, path: Path) -> dict[str, Any]:
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        return {"type": kind, "oid": "0" * 40, "size": size, "path": str(path.relative_to(self.of.folder))}

    def json(self, value: Any) -> None:
        self.note()
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})
