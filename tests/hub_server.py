"""A Hugging Face Hub of one model on a loopback port, for tests of the code that fetches from it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(name: str, folder: Path, *, announced: dict[str, str] | None = None, gated: bool = False) -> Iterator[str]:
    """Serve the files of `folder` as the model `name`; gives the address.

    announced: SHA-256 that the Hub claims for a file, in place of the true one.
    gated: refuse as the Hub does for a model whose terms were not accepted.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            files = {path.name: path for path in folder.iterdir()}
            if not path.startswith((f"/api/models/{name}/", f"/{name}/resolve/")):
                self.reply(401, b"", {"X-Error-Code": "RepoNotFound"}, body)
            elif path.startswith("/api/models/") and "/tree/" in path:
                tree = [self.entry(file) for file in files.values()]
                self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
            elif path.startswith("/api/models/"):
                siblings = [{"rfilename": file} for file in files]
                info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
            elif gated:
                self.reply(403, b"", {"X-Error-Code": "GatedRepo"}, body)
            else:
                file = files[path.rsplit("/", 1)[1]]
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"'}
                if file.suffix == ".safetensors":
                    digest = hashlib.sha256(file.read_bytes()).hexdigest()
                    headers["X-Linked-ETag"] = f'"{(announced or {}).get(file.name, digest)}"'
                    headers["X-Linked-Size"] = str(file.stat().st_size)
                self.reply(200, file.read_bytes(), headers, body)

        def entry(self, file: Path) -> dict[str, object]:
            return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}

        def reply(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
