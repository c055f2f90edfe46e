// One run's live channel: the log from a byte offset, the status and the metrics. It survives restarts of the server,
// sleeping laptops and lost networks: after each it goes on at the first byte that it has not seen.
//
// Events: "state" (detail: connecting | live | waiting | ended | refused | deleted), "hello" (log_size, offset), "log" (Uint8Array,
// always the next bytes, never twice and never with a gap), "status" (the run), "metrics" (points), "restart" (the log
// starts again at detail.offset: forget what was shown).
"use strict";

const RESTARTING = 4012;
const FINAL_CODES = new Map([[1000, "ended"], [4401, "refused"], [4404, "refused"]]);
const FIRST_DELAY = 500;
const LONGEST_DELAY = 8000;
const ASLEEP = 30000; // after so long in the background a socket may be dead without saying so

class RunSocket extends EventTarget {
  constructor(path) {
    super();
    this.path = path;
    this.next = null; // offset of the first byte not yet seen; null: the server chooses, near the end
    this.delay = FIRST_DELAY;
    this.hiddenAt = null;
    this.wake = this.wake.bind(this);
    document.addEventListener("visibilitychange", this.wake);
    addEventListener("pageshow", this.wake);
    addEventListener("online", this.wake);
  }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  open() {
    clearTimeout(this.timer);
    this.detach();
    this.tell("state", "connecting");
    const url = new URL(this.path, location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    if (this.next !== null) url.searchParams.set("offset", this.next);
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    socket.onmessage = (event) => this.receive(event.data);
    socket.onclose = (event) => this.closed(event.code);
    this.socket = socket;
  }

  detach() {
    if (!this.socket) return;
    this.socket.onmessage = this.socket.onclose = null;
    this.socket.close();
    this.socket = null;
  }

  // Reads the log again from `offset`.
  restartAt(offset) {
    this.next = offset;
    this.tell("restart", { offset });
    this.open();
  }

  receive(data) {
    if (typeof data !== "string") {
      this.receiveLog(data);
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "hello") this.receiveHello(message);
    else if (message.type === "status") this.tell("status", message.run);
    else if (message.type === "metrics") this.tell("metrics", message.points);
    else if (message.type === "deleted") this.end("deleted");
  }

  receiveHello(message) {
    this.delay = FIRST_DELAY;
    this.tell("state", "live");
    if (this.next !== message.offset) {
      this.next = message.offset;
      this.tell("restart", { offset: message.offset });
    }
    this.tell("hello", message);
  }

  receiveLog(buffer) {
    const offset = Number(new DataView(buffer).getBigUint64(0));
    const bytes = new Uint8Array(buffer, 8);
    if (this.next === null || offset > this.next) {
      this.open();
      return;
    }
    const seen = this.next - offset;
    if (seen >= bytes.length) return;
    this.next += bytes.length - seen;
    this.tell("log", seen ? bytes.subarray(seen) : bytes);
  }

  closed(code) {
    this.socket = null;
    if (FINAL_CODES.has(code)) {
      this.end(FINAL_CODES.get(code));
      return;
    }
    this.tell("state", "waiting");
    const delay = code === RESTARTING ? 50 : this.delay * (0.75 + Math.random() / 2);
    if (code !== RESTARTING) this.delay = Math.min(2 * this.delay, LONGEST_DELAY);
    this.timer = setTimeout(() => this.open(), delay);
  }

  // No more tries: the state says why.
  end(state) {
    this.final = true;
    this.detach();
    this.tell("state", state);
  }

  wake(event) {
    if (document.hidden) {
      this.hiddenAt = Date.now();
      return;
    }
    const slept = (this.hiddenAt !== null && Date.now() - this.hiddenAt > ASLEEP) || event.persisted;
    this.hiddenAt = null;
    if (this.final || (this.socket && this.socket.readyState <= WebSocket.OPEN && !slept)) return;
    this.delay = FIRST_DELAY;
    this.open();
  }
}
