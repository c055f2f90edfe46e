"""A server that speaks as the hub does, on this machine: it hands files on to a second address as to a storage, and can
throttle, break off, lie about a length, forget Range, change a file, and send somewhere else."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_BYTES = 1000  # from here on a file is one of LFS, with a sha256


class Hub:
    def __init__(self, server, storage):
        self.server = server
        self.storage = storage
        self.files = {}  # "owner/name" → {path: bytes}
        self.gated = set()
        self.tokens = set()  # that may have what is gated
        self.faults = {}  # path → list of what goes wrong, one for each time it is asked for
        self.asked = []  # (server, path, headers)
        self.reached = threading.Event()  # a fault has sent what it sends
        self.go_on = threading.Event()  # and waits for this

    @property
    def address(self):
        return f"http://{self.host}"

    @property
    def host(self):
        return "{}:{}".format(*self.server.server_address)

    @property
    def storage_host(self):
        return "{}:{}".format(*self.storage.server_address)

    def put(self, repository, **files):
        self.files.setdefault(repository, {}).update({path.replace("__", "/"): body for path, body in files.items()})

    def requests_of(self, path):
        """The headers of each request to the storage for that file."""
        return [headers for server, asked, headers in self.asked if server == "storage" and asked.endswith(f"/{path}")]

    # --- what it answers
    def model(self, repository):
        siblings = []
        for path, body in self.files[repository].items():
            blob = hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()
            large = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest(), "pointerSize": 134}
            siblings.append(
                {"rfilename": path, "size": len(body), "blobId": blob}
                | ({"lfs": large} if len(body) >= LARGE_BYTES else {})
            )
        return {"id": repository, "sha": COMMIT, "gated": "auto" if repository in self.gated else False} | {
            "siblings": siblings
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    role = ""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.close_connection = True
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.role, path, dict(self.headers)))
        if self.role == "storage":
            return self.send_from_storage(path)
        if path.startswith("/api/models/"):
            return self.send_json(path.removeprefix("/api/models/"))
        return self.hand_on(path)

    def send_json(self, repository):
        if repository not in self.hub.files:
            return self.send_text(404, "Repository not found")
        return self.send_text(200, json.dumps(self.hub.model(repository)))

    def send_text(self, status, text, **headers):
        self.send_response(status)
        body = text.encode()
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def hand_on(self, path):
        repository, _, rest = path.lstrip("/").partition("/resolve/")
        if repository in self.hub.gated and self.headers.get("Authorization", "")[7:] not in self.hub.tokens:
            return self.send_text(403, "gated", **{"X-Error-Code": "GatedRepo"})
        commit, _, name = rest.partition("/")
        if commit != COMMIT or name not in self.hub.files.get(repository, {}):
            return self.send_text(404, "no such file")
        fault = self.hub.faults.get(name, [])
        if fault and fault[0].get("location"):
            return self.send_text(302, "", Location=fault.pop(0)["location"])
        return self.send_text(302, "", Location=f"http://{self.hub.storage_host}/{repository}/{name}")

    def send_from_storage(self, path):
        owner, name, file = path.lstrip("/").split("/", 2)
        body = self.hub.files[f"{owner}/{name}"][file]
        faults = self.hub.faults.get(file, [])
        fault = faults.pop(0) if faults else {}
        if "status" in fault:
            return self.send_text(fault["status"], "")
        body = fault.get("body", body)
        etag = fault.get("etag", f'"{hashlib.sha256(body).hexdigest()}"')
        begin = self.begin(etag, len(body), fault)
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", etag)
        if "type" in fault:
            self.send_header("Content-Type", fault["type"])
        if fault.get("closes"):
            self.send_header("Connection", "close")
        if fault.get("length") != "unknown":
            self.send_header("Content-Length", str(fault.get("length", len(body) - begin)))
        self.end_headers()
        return self.send_body(body[begin:], fault)

    def begin(self, etag, size, fault):
        asked = self.headers.get("Range", "")
        is_same = fault.get("goes_on_anyway") or self.headers.get("If-Range") == etag
        if fault.get("ignores_range") or not asked or not is_same:
            return 0
        return min(int(asked.removeprefix("bytes=").removesuffix("-")), size)

    def send_body(self, body, fault):
        try:
            self.wfile.write(body[: fault.get("after", len(body))])
            self.wfile.flush()
            if "after" not in fault:
                return
            self.hub.reached.set()
            if fault.get("waits"):
                self.hub.go_on.wait(20)
            if not fault.get("breaks"):
                self.wfile.write(body[fault["after"] :])
        except OSError:  # the client has gone
            pass


@contextmanager
def running_hub():
    servers = []
    hub = Hub(None, None)
    for role in ("hub", "storage"):
        handler = type(f"{role}Handler", (Handler,), {"role": role, "hub": hub})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    hub.server, hub.storage = servers
    try:
        yield hub
    finally:
        hub.go_on.set()
        for server in servers:
            server.shutdown()
            server.server_close()
