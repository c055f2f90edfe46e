"""A server on this machine that speaks as OpenAI, xAI and Gemini do, and can be told to misbehave."""

from __future__ import annotations

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

COLOURS = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue", (255, 255, 0): "yellow"}


class Stand:
    """`faults`: what goes wrong with the next requests, one each; None is none."""

    def __init__(self):
        self.server = None
        self.keys = {"sk-alice"}
        self.models = {"eye-1"}
        self.faults = []
        self.asked = []  # (path, headers, body, size of the picture, what is seen in it)
        self.reached = threading.Event()
        self.go_on = threading.Event()

    @property
    def host(self):
        return "{}:{}".format(*self.server.server_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand: Stand

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.close_connection = True
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_gemini = self.path.endswith(":generateContent")
        model, prompt, jpeg = _gemini_question(self.path, body) if is_gemini else _chat_question(self.path, body)
        picture = Image.open(io.BytesIO(jpeg))
        assert picture.format == "JPEG"
        seen = _colour_of(picture)
        self.stand.asked.append((self.path, dict(self.headers), body, picture.size, seen))
        key = self.headers.get("x-goog-api-key") if is_gemini else self.headers.get("Authorization", "")[7:]
        fault = self.stand.faults.pop(0) if self.stand.faults else None
        if callable(fault):
            fault = fault(seen)
        if key not in self.stand.keys:
            return self.refuse_key(key, is_gemini=is_gemini)
        if fault:
            return self.misbehave(fault)
        if model not in self.stand.models:
            return self.send(404, {"error": {"message": f"There is no {model}", "code": "model_not_found"}})
        said = f"{prompt.split()[0]}: a {seen} square"
        return self.send(200, gemini_answer(said) if is_gemini else chat_answer(said))

    def refuse_key(self, key, *, is_gemini):
        if is_gemini:
            details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]
            error = {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT", "details": details}
            return self.send(400, {"error": error})
        return self.send(401, {"error": {"message": f"Incorrect API key provided: {key}.", "code": "invalid_api_key"}})

    def misbehave(self, fault):
        if fault.get("waits"):
            self.stand.reached.set()
            self.stand.go_on.wait(20)
        return self.send(fault.get("status", 200), fault.get("body", {}), **fault.get("headers", {}))

    def send(self, status, body, **headers):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(raw)
        except OSError:  # the client has gone
            pass


def chat_answer(text, *, finish="stop", refusal=None):
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}


def gemini_answer(text, *, finish="STOP"):
    content = {"role": "model", "parts": [{"text": text}] if text else []}
    usage = {"promptTokenCount": 90, "candidatesTokenCount": 6, "thoughtsTokenCount": 3, "totalTokenCount": 99}
    return {"candidates": [{"content": content, "finishReason": finish, "index": 0}], "usageMetadata": usage}


def _chat_question(path, body):
    assert path.endswith("/chat/completions")
    text, picture = body["messages"][0]["content"]
    url = picture["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    return body["model"], text["text"], base64.b64decode(url.partition(",")[2])


def _gemini_question(path, body):
    text, picture = body["contents"][0]["parts"]
    assert picture["inlineData"]["mimeType"] == "image/jpeg"
    model = path.rpartition("/")[2].removesuffix(":generateContent")
    return model, text["text"], base64.b64decode(picture["inlineData"]["data"])


def _colour_of(picture):
    """The nearest of the colours that tests draw: JPEG is not exact."""
    found = picture.convert("RGB").getpixel((0, 0))
    return min(COLOURS.items(), key=lambda item: sum(abs(a - b) for a, b in zip(item[0], found, strict=True)))[1]


@contextmanager
def running_stand():
    stand = Stand()
    stand.server = ThreadingHTTPServer(("127.0.0.1", 0), type("StandHandler", (Handler,), {"stand": stand}))
    stand.server.daemon_threads = True
    threading.Thread(target=stand.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield stand
    finally:
        stand.go_on.set()
        stand.server.shutdown()
        stand.server.server_close()
