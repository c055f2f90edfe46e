// The live log panel (runs/_log.html), on the run's page and in the admin. The other scripts hear of the run through
// events on the panel: run:status, run:metrics, run:state.
"use strict";

const STATES = {
  connecting: "connecting…",
  live: "live",
  waiting: "reconnecting…",
  ended: "ended",
  deleted: "this run was deleted",
  refused: "not available: reload the page or sign in again",
};
const ERROR_LINE = /\b(error|exception|traceback|fatal)\b/i;
const WARNING_LINE = /\bwarn(ing)?\b/i;

class LogPanel {
  constructor(root) {
    this.root = root;
    this.view = root.querySelector("[data-log-view]");
    this.list = root.querySelector("[data-log-lines]");
    this.jump = root.querySelector("[data-log-jump]");
    this.whole = root.querySelector("[data-log-whole]");
    this.text = new LogText();
    this.shown = 0; // number after the last ended line in the list
    this.tail = this.newLine("");
    this.following = true;
    this.socket = new RunSocket(root.dataset.socketPath);
    this.listen();
    this.socket.open();
  }

  listen() {
    const { socket } = this;
    socket.addEventListener("log", (event) => this.receive(event.detail));
    socket.addEventListener("restart", (event) => this.restart(event.detail.offset));
    socket.addEventListener("state", (event) => this.showState(event.detail));
    socket.addEventListener("status", (event) => {
      this.isOver = event.detail.is_terminal;
      this.root.classList.toggle("is-over", this.isOver);
      this.showState(this.root.dataset.state);
    });
    for (const type of ["status", "metrics", "state"]) {
      socket.addEventListener(type, (event) => {
        this.root.dispatchEvent(new CustomEvent(`run:${type}`, { detail: event.detail, bubbles: true }));
      });
    }
    this.view.addEventListener("scroll", () => this.noticeScroll(), { passive: true });
    this.jump.addEventListener("click", () => this.follow());
    this.whole.addEventListener("click", () => socket.restartAt(0));
    this.root.querySelector("[data-log-wrap]").addEventListener("click", (event) => {
      const wrapped = this.view.classList.toggle("is-wrapped");
      event.currentTarget.setAttribute("aria-pressed", wrapped);
      if (this.following) this.follow();
    });
  }

  receive(bytes) {
    this.text.write(bytes);
    this.schedule();
  }

  restart(offset) {
    this.text.clear();
    this.list.replaceChildren();
    this.shown = 0;
    this.whole.hidden = offset === 0;
    this.schedule();
  }

  showState(state) {
    this.root.dataset.state = state;
    this.root.querySelector("[data-log-state]").textContent = state === "live" && this.isOver ? "complete" : STATES[state];
  }

  // Many frames of the log become one change of the page.
  schedule() {
    if (this.scheduled) return;
    this.scheduled = true;
    requestAnimationFrame(() => {
      this.scheduled = false;
      this.draw();
    });
  }

  draw() {
    const [first, lines] = this.text.endedFrom(this.shown);
    this.tail.remove();
    if (first > this.shown) this.list.replaceChildren();
    const added = document.createDocumentFragment();
    for (const line of lines) added.append(this.newLine(line));
    this.tail = this.newLine(this.text.current);
    if (this.text.current) added.append(this.tail);
    this.list.append(added);
    this.shown = this.text.ended;
    for (let surplus = this.list.childElementCount - this.text.mostLines; surplus > 0; surplus -= 1) {
      this.list.firstElementChild.remove();
    }
    this.root.dataset.offset = this.socket.next ?? "";
    this.root.classList.toggle("is-empty", this.list.childElementCount === 0);
    if (this.following) this.view.scrollTop = this.view.scrollHeight;
  }

  newLine(text) {
    const line = document.createElement("div");
    line.textContent = text || "\u200b";
    if (ERROR_LINE.test(text)) line.className = "log-error";
    else if (WARNING_LINE.test(text)) line.className = "log-warning";
    return line;
  }

  noticeScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.view;
    this.following = scrollHeight - scrollTop - clientHeight < 24;
    this.jump.hidden = this.following;
  }

  follow() {
    this.following = true;
    this.jump.hidden = true;
    this.view.scrollTop = this.view.scrollHeight;
  }
}

document.addEventListener("DOMContentLoaded", () => {
  for (const root of document.querySelectorAll("[data-log]")) root.logPanel = new LogPanel(root);
});
