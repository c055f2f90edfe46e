// Adding LoRA files to the library: dropped or chosen, in pieces that continue where they stopped, also after a reload.
// Without this script the form of the page sends one file itself.
"use strict";

const LONGEST_WAIT_MS = 30_000;
const TRIES = 12;
const LOOK_MS = 700;
const REMEMBERED_MS = 6 * 24 * 3600 * 1000; // the server forgets unfinished uploads after 7 days

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const memoryKey = (file) => `lora-upload:${file.name}:${file.size}:${file.lastModified}`;

// The server's answer that repeating does not change.
class Refused extends Error {
  constructor(answer, body) {
    super(body?.detail || `The server refused this (${answer.status}).`);
    this.status = answer.status;
    this.body = body;
  }
}

// One line of the list below the form: name, progress, and what became of the file.
function makeLine(list, name) {
  const item = document.createElement("li");
  item.className = "progress-row";
  const [label, state, bar] = ["span", "span", "progress"].map((tag) => document.createElement(tag));
  label.className = "truncate";
  label.textContent = name;
  state.className = "muted";
  bar.setAttribute("aria-label", name);
  item.append(label, state, bar);
  list.append(item);
  return {
    show(done, total, text) {
      bar.max = total || 1;
      bar.value = done;
      state.textContent = text;
    },
    fail(message) {
      bar.remove();
      state.textContent = "Not added";
      const line = document.createElement("p");
      line.className = "error";
      line.textContent = message;
      item.append(line);
    },
    end(address, name) {
      bar.remove();
      const link = document.createElement("a");
      link.href = address;
      link.textContent = name;
      state.replaceChildren("In the library: ", link);
    },
  };
}

function uploader(form) {
  const url = form.dataset.uploadsUrl;
  const token = form.querySelector("[name=csrfmiddlewaretoken]").value;

  // Parsed JSON, null for an empty answer. Throws Refused for 4xx, an ordinary error for what may pass.
  async function request(method, address, { headers = {}, body } = {}) {
    const answer = await fetch(address, { method, body, headers: { Accept: "application/json", "X-CSRFToken": token, ...headers } });
    const parsed = await answer.json().catch(() => null);
    if (answer.status === 429 || answer.status >= 500) throw new Error(`The server answered ${answer.status}.`);
    if (!answer.ok) throw new Refused(answer, parsed);
    return parsed;
  }

  // Again after 1, 2, 4, … seconds while the connection or the server fails; a refusal is final.
  async function retried(attempt) {
    for (let tried = 1; ; tried += 1) {
      try {
        return await attempt();
      } catch (error) {
        if (error instanceof Refused || tried === TRIES) throw error;
        await sleep(Math.min(1000 * 2 ** (tried - 1), LONGEST_WAIT_MS));
      }
    }
  }

  async function begin(file) {
    const id = recall(file);
    if (id) {
      try {
        return await retried(() => request("GET", `${url}${id}/`));
      } catch {
        forget(file);
      }
    }
    const body = JSON.stringify({ filename: file.name, size: file.size });
    const upload = await retried(() => request("POST", url, { body, headers: { "Content-Type": "application/json" } }));
    remember(file, upload.id);
    return upload;
  }

  // One piece from where the server is; after any trouble it asks where that is.
  async function sendPiece(file, upload) {
    const end = Math.min(upload.offset + upload.chunk_bytes, file.size);
    const headers = { "Content-Type": "application/offset+octet-stream", "Upload-Offset": String(upload.offset) };
    try {
      const answer = await request("PATCH", `${url}${upload.id}/`, { headers, body: file.slice(upload.offset, end) });
      return answer || { ...upload, offset: end };
    } catch (error) {
      if (error instanceof Refused && error.status !== 409) throw error;
      await sleep(1000);
      return retried(() => request("GET", `${url}${upload.id}/`));
    }
  }

  return async function send(file, line) {
    try {
      let upload = await begin(file);
      for (let stalled = 0; !upload.job; ) {
        line.show(upload.offset, file.size, `${Math.floor((100 * upload.offset) / file.size)} %`);
        const after = await sendPiece(file, upload);
        stalled = after.offset > upload.offset ? 0 : stalled + 1;
        if (stalled === TRIES) throw new Error("The server does not take this file now. Choose it again later to go on.");
        upload = after;
      }
      forget(file);
      while (["queued", "running"].includes(upload.job.status)) {
        line.show(upload.job.done, upload.job.total, upload.job.message || "Being checked");
        await sleep(LOOK_MS);
        upload = await retried(() => request("GET", `${url}${upload.id}/`));
      }
      if (upload.job.status !== "succeeded") throw new Error(upload.job.message);
      line.end(`${form.dataset.lorasUrl}${upload.job.result.adapter}/`, upload.job.result.name);
    } catch (error) {
      if (error instanceof Refused) forget(file);
      line.fail(error.message);
    }
  };
}

// --- Which upload belongs to a file: survives a reload, until the same file is chosen again ---------------------------
function remember(file, id) {
  try {
    localStorage.setItem(memoryKey(file), JSON.stringify({ id, at: Date.now() }));
  } catch {
    // Storage is switched off or full: a reload starts this file again.
  }
}

function recall(file) {
  try {
    const found = JSON.parse(localStorage.getItem(memoryKey(file)));
    return found && Date.now() - found.at < REMEMBERED_MS ? found.id : null;
  } catch {
    return null;
  }
}

function forget(file) {
  try {
    localStorage.removeItem(memoryKey(file));
  } catch {
    // Storage is switched off: there is nothing to forget.
  }
}

// --- The form ---------------------------------------------------------------------------------------------------------
function takeOver(form) {
  const send = uploader(form);
  const list = document.getElementById("lora-upload-list");
  const input = form.querySelector("input[type=file]");
  input.multiple = true;
  for (const element of form.querySelectorAll("[data-without-script]")) element.hidden = true;
  for (const element of form.querySelectorAll("[data-with-script]")) element.hidden = false;
  const take = async (files) => {
    const waiting = [...files].map((file) => [file, makeLine(list, file.name)]);
    form.reset();
    for (const [file, line] of waiting) await send(file, line);
  };
  input.addEventListener("change", () => take(input.files));
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const type of ["dragenter", "dragover"]) form.addEventListener(type, (event) => {
    event.preventDefault();
    form.classList.add("is-over");
  });
  for (const type of ["dragleave", "drop"]) form.addEventListener(type, () => form.classList.remove("is-over"));
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    take(event.dataTransfer.files);
  });
}

document.addEventListener("DOMContentLoaded", () => {
  const form = document.getElementById("lora-upload-form");
  if (form) takeOver(form);
});
