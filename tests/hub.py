"""A stand-in of the Hugging Face hub on this machine: what `whoami`, `create_repo` and `upload_folder` ask of it."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_standin"


class Hub:
    """Repositories by name, each with its visibility and its files as they were committed.

    broken: a path whose requests are refused. role: what the token may do.
    """

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.broken, self.role = "none", "write"
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        content += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                path = self.path.split("?")[0]
                hub.asked.append(f"{self.command} {path}")
                code, answer = hub.answer(path, self.headers, content)
                body = json.dumps(answer).encode()
                self.send_response(code)
                if code == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path, headers, content):
        """(status, JSON) of one request."""
        if path.startswith("/blobs/"):  # a signed address: no token
            self.blobs[path.removeprefix("/blobs/")] = content
            return 200, {}
        if headers.get("Authorization") not in (f"Bearer {TOKEN}",):
            return 401, {"error": "Invalid credentials"}
        if self.broken in path:
            return 403, {"error": "forbidden"}
        if path == "/api/whoami-v2":
            return 200, {"name": "user", "orgs": [], "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/validate-yaml":  # of the card's front matter
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked['organization'] or 'user'}/{asked['name']}"
            url = {"url": f"{self.address}/{repo}", "name": repo}
            if repo in self.files:
                return 409, {"error": "You already created this model repo", **url}
            self.files[repo], self.private[repo] = {}, asked.get("visibility") == "private"
            return 200, url
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            links = [{**one, "actions": {"upload": {"href": f"{self.address}/blobs/{one['oid']}"}}} for one in objects]
            return 200, {"transfer": "basic", "objects": links}
        repo, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            large = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                      "shouldIgnore": False, "oid": None} for file in json.loads(content)["files"]]  # fmt: skip
            return 200, {"files": large}
        repo, _, rest = path.removeprefix("/api/models/").partition("/commit/")
        if rest:
            for line in content.decode().splitlines():
                self.commit(self.files[repo], **json.loads(line))
            oid = hashlib.sha1(content).hexdigest()
            url = f"{self.address}/{repo}/commit/{oid}"
            return 200, {"commitUrl": url, "commitOid": oid, "hookOutput": "", "success": True}
        repo = path.removeprefix("/api/models/").removesuffix("/revision/main")
        if repo in self.files:
            return 200, {"id": repo, "private": self.private[repo], "sha": "0" * 40, "siblings": []}
        return 404, {"error": "Repository not found"}

    def commit(self, files, key, value):
        """One line of a commit."""
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            content = self.blobs[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
            files[value["path"]] = content
