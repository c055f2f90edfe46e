// Adding files to a dataset: dropped or chosen, small ones together in plain requests, large ones in pieces that
// continue where they stopped. Without this script the form of the page sends the files itself.
"use strict";

const LARGE_BYTES = 8 * 1024 * 1024;
const BATCH_BYTES = 24 * 1024 * 1024;
const BATCH_FILES = 40;
const LONGEST_WAIT_MS = 30_000;
const TRIES = 12;
const REMEMBERED_MS = 6 * 24 * 3600 * 1000; // the server forgets unfinished uploads after 7 days

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const stem = (name) => name.replace(/\.[^.]*$/, "");
const ending = (name) => name.slice(stem(name).length).toLowerCase();

// The server's answer that repeating does not change.
class Refused extends Error {
  constructor(answer, body) {
    super(body?.detail || `The server refused this (${answer.status}).`);
    this.status = answer.status;
    this.body = body;
  }
}

// One line of the list below the form: name, progress, and what became of the file.
class Line {
  constructor(list, name) {
    this.item = document.createElement("li");
    this.item.className = "progress-row";
    this.label = document.createElement("span");
    this.label.className = "truncate";
    this.label.textContent = name;
    this.state = document.createElement("span");
    this.state.className = "muted";
    this.bar = document.createElement("progress");
    this.bar.setAttribute("aria-label", name);
    this.item.append(this.label, this.state, this.bar);
    list.append(this.item);
  }

  show(done, total, text) {
    if (total) {
      this.bar.max = total;
      this.bar.value = done;
    } else {
      this.bar.removeAttribute("value");
    }
    this.state.textContent = text;
  }

  end(text, refused = []) {
    this.bar.remove();
    this.state.textContent = text;
    for (const { name, reason } of refused) {
      const line = document.createElement("p");
      line.className = "error";
      line.textContent = reason.startsWith(`${name}:`) ? reason : `${name}: ${reason}`;
      this.item.append(line);
    }
  }
}

class Uploader {
  constructor(form) {
    this.form = form;
    this.list = document.getElementById("upload-list");
    this.dataset = Number(form.dataset.dataset);
    this.token = form.querySelector("[name=csrfmiddlewaretoken]").value;
    this.queue = [];
    this.isBusy = false;
  }

  add(files) {
    this.queue.push(...files);
    if (!this.isBusy) this.work();
  }

  async work() {
    this.isBusy = true;
    addEventListener("beforeunload", warnOfUploads);
    while (this.queue.length) await this.send(this.queue.splice(0));
    removeEventListener("beforeunload", warnOfUploads);
    this.isBusy = false;
    refreshPictures();
  }

  // Captions of large pictures wait until their picture is there.
  async send(files) {
    const isLarge = (file) => file.size > LARGE_BYTES;
    const largeStems = new Set(files.filter(isLarge).map((file) => stem(file.name)));
    const waits = (file) => ending(file.name) === ".txt" && largeStems.has(stem(file.name));
    const small = files.filter((file) => !isLarge(file));
    await this.sendTogether(small.filter((file) => !waits(file)));
    for (const file of files.filter(isLarge)) await this.sendInPieces(file);
    await this.sendTogether(small.filter(waits));
  }

  // --- Small files, some in each request -----------------------------------------------------------------------------
  async sendTogether(files) {
    for (const batch of batches(files)) await this.sendBatch(batch);
  }

  async sendBatch(files) {
    const line = new Line(this.list, files.length === 1 ? files[0].name : `${files[0].name} and ${files.length - 1} more`);
    line.show(0, 0, "Uploading");
    const body = new FormData();
    for (const file of files) body.append("files", file, file.name);
    try {
      const answer = await this.retried(() => this.request("POST", this.form.dataset.picturesUrl, { body }), line);
      line.end(answer.detail, answer.refused);
    } catch (error) {
      line.end("Not imported", error.body?.refused?.length ? error.body.refused : [{ name: line.label.textContent, reason: error.message }]);
    }
  }

  // --- One large file, in pieces -------------------------------------------------------------------------------------
  async sendInPieces(file) {
    const line = new Line(this.list, file.name);
    try {
      let upload = (await this.rememberedUpload(file)) || (await this.startUpload(file, line));
      while (!upload.job) upload = await this.sendPiece(file, upload, line);
      forget(this.dataset, file);
      await this.followImport(upload, line);
    } catch (error) {
      if (error.status === 400 || error.status === 404) forget(this.dataset, file);
      line.end("Not imported", [{ name: file.name, reason: error.message }]);
    }
  }

  // The upload of the same file that an earlier visit began, if the server still has it.
  async rememberedUpload(file) {
    const id = recall(this.dataset, file);
    if (!id) return null;
    try {
      return await this.retried(() => this.request("GET", this.uploadUrl(id)));
    } catch {
      forget(this.dataset, file);
      return null;
    }
  }

  async startUpload(file, line) {
    const body = JSON.stringify({ dataset: this.dataset, filename: file.name, size: file.size });
    const headers = { "Content-Type": "application/json" };
    const upload = await this.retried(() => this.request("POST", this.form.dataset.uploadsUrl, { body, headers }), line);
    remember(this.dataset, file, upload.id);
    return upload;
  }

  // Sends from where the server is; after any trouble it asks where that is.
  async sendPiece(file, upload, line) {
    line.show(upload.offset, file.size, `${Math.floor((100 * upload.offset) / file.size)} %`);
    let known = upload;
    let hasFailed = false;
    return this.retried(async () => {
      if (hasFailed) known = await this.request("GET", this.uploadUrl(upload.id));
      if (known.job) return known;
      hasFailed = true;
      const end = Math.min(known.offset + known.chunk_bytes, file.size);
      const headers = { "Content-Type": "application/offset+octet-stream", "Upload-Offset": String(known.offset) };
      try {
        const answer = await this.request("PATCH", this.uploadUrl(upload.id), { headers, body: file.slice(known.offset, end) });
        return answer || { ...known, offset: end };
      } catch (error) {
        if (error.status !== 409) throw error;
        await sleep(1000); // an earlier try of ours may still be writing
        return { ...known, offset: error.body.offset };
      }
    }, line);
  }

  async followImport(upload, line) {
    let { job } = upload;
    while (job.status === "queued" || job.status === "running") {
      line.show(job.done, job.total, job.message || "Importing");
      await sleep(1000);
      job = (await this.retried(() => this.request("GET", this.uploadUrl(upload.id)), line)).job;
    }
    if (job.status !== "succeeded") throw new Error(job.message);
    const { added, captioned, duplicates, refused } = job.result;
    line.end(`${added} added, ${captioned} with a new caption, ${duplicates} already here`, refused);
  }

  uploadUrl(id) {
    return `${this.form.dataset.uploadsUrl}${id}/`;
  }

  // --- Requests ------------------------------------------------------------------------------------------------------
  // Parsed JSON, null for an empty answer. Throws Refused for 4xx, an ordinary error for what may pass.
  async request(method, url, { headers = {}, body } = {}) {
    const answer = await fetch(url, { method, body, headers: { Accept: "application/json", "X-CSRFToken": this.token, ...headers } });
    const text = await answer.text();
    let parsed = null;
    try {
      parsed = text ? JSON.parse(text) : null;
    } catch {
      // A page of some proxy: the status says enough.
    }
    if (answer.status === 429 || answer.status >= 500) throw new Error(`The server answered ${answer.status}.`);
    if (!answer.ok) throw new Refused(answer, parsed);
    return parsed;
  }

  // Again after 1, 2, 4, … seconds while the connection or the server fails; a refusal is final.
  async retried(attempt, line) {
    for (let tried = 1; ; tried += 1) {
      try {
        return await attempt();
      } catch (error) {
        if (error instanceof Refused || tried === TRIES) throw error;
        const wait = Math.min(1000 * 2 ** (tried - 1), LONGEST_WAIT_MS);
        if (line) line.state.textContent = `Connection lost. Next try in ${Math.round(wait / 1000)} s`;
        await sleep(wait);
      }
    }
  }
}

// A caption travels with the picture of the same name, so that the two are imported together.
function batches(files) {
  const groups = new Map();
  for (const file of files) groups.set(stem(file.name), [...(groups.get(stem(file.name)) || []), file]);
  const made = [];
  let bytes = 0;
  for (const group of groups.values()) {
    const size = group.reduce((sum, file) => sum + file.size, 0);
    const last = made.at(-1);
    if (last && bytes + size <= BATCH_BYTES && last.length + group.length <= BATCH_FILES) {
      last.push(...group);
      bytes += size;
    } else {
      made.push(group);
      bytes = size;
    }
  }
  return made;
}

function warnOfUploads(event) {
  event.preventDefault();
}

function refreshPictures() {
  window.htmx.ajax("GET", location.href, { source: "#pictures", target: "#pictures", select: "#pictures", swap: "outerHTML" });
}

// --- Which upload belongs to a file: survives a reload, until the same file is chosen again --------------------------------
const memoryKey = (dataset, file) => `upload:${dataset}:${file.name}:${file.size}:${file.lastModified}`;

function remember(dataset, file, id) {
  try {
    localStorage.setItem(memoryKey(dataset, file), JSON.stringify({ id, at: Date.now() }));
  } catch {
    // Storage is switched off or full: a reload starts this file again.
  }
}

function recall(dataset, file) {
  try {
    const found = JSON.parse(localStorage.getItem(memoryKey(dataset, file)));
    return found && Date.now() - found.at < REMEMBERED_MS ? found.id : null;
  } catch {
    return null;
  }
}

function forget(dataset, file) {
  try {
    localStorage.removeItem(memoryKey(dataset, file));
  } catch {
    // Storage is switched off: there is nothing to forget.
  }
}

// --- The form ---------------------------------------------------------------------------------------------------------------
function takeOver(form) {
  const uploader = new Uploader(form);
  const input = form.querySelector("input[type=file]");
  for (const element of form.querySelectorAll("[data-without-script]")) element.hidden = true;
  for (const element of form.querySelectorAll("[data-with-script]")) element.hidden = false;
  const take = (files) => {
    uploader.add([...files]);
    form.reset();
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
  const form = document.getElementById("upload-form");
  if (form) takeOver(form);
});
