// Adding files and folders to a dataset: dropped or chosen, small ones together in plain requests, large ones in pieces
// that continue where they stopped, also after a reload. Without this script the form of the page sends the files itself.
// A file goes about as an item { file, path, choices }: `path` with the folders that it lay in.
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
const isHidden = (path) => path.split("/").some((part) => part.startsWith(".") || part === "__MACOSX");
const isCaption = (path) => [".txt", ".caption", ".json"].includes(ending(path));
const isTable = (path) => [".json", ".jsonl", ".csv"].includes(ending(path)); // .json: of one picture, or of many
const base64 = (buffer) => btoa(String.fromCharCode(...new Uint8Array(buffer)));

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
    list.closest("details").open = true;
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

  end(text, refused = [], notes = []) {
    this.bar.remove();
    this.state.textContent = text;
    for (const told of refused) this.tell(told, "error");
    for (const told of notes) this.tell(told, "muted small");
  }

  tell({ name, reason }, kind) {
    const line = document.createElement("p");
    line.className = kind;
    line.textContent = reason.startsWith(`${name}:`) ? reason : `${name}: ${reason}`;
    this.item.append(line);
  }
}

class Uploader {
  constructor(form) {
    this.form = form;
    this.list = document.getElementById("upload-list");
    this.dataset = Number(form.dataset.dataset);
    this.token = form.querySelector("[name=csrfmiddlewaretoken]").value;
    this.pauseButton = form.querySelector("[data-pause]");
    this.pauseButton.addEventListener("click", () => (this.resume ? this.goOn() : this.pause()));
    this.queue = [];
    this.isBusy = false;
    this.resume = null; // while paused: what lets the waiting go on
    this.paused = Promise.resolve();
    this.stop = new AbortController();
  }

  add(items) {
    this.queue.push(...items.filter(({ path }) => !isHidden(path)));
    if (this.queue.length && !this.isBusy) this.work();
  }

  async work() {
    this.isBusy = true;
    this.pauseButton.hidden = false;
    addEventListener("beforeunload", warnOfUploads);
    while (this.queue.length) await this.send(this.queue.splice(0));
    removeEventListener("beforeunload", warnOfUploads);
    this.pauseButton.hidden = true;
    this.isBusy = false;
    refreshPictures();
  }

  // What is under way is broken off; large files go on later from where the server is.
  pause() {
    this.paused = new Promise((resolve) => (this.resume = resolve));
    this.pauseButton.textContent = "Resume";
    this.pauseButton.setAttribute("aria-pressed", "true");
    this.stop.abort();
    this.stop = new AbortController();
  }

  goOn() {
    this.resume();
    this.resume = null;
    this.pauseButton.textContent = "Pause";
    this.pauseButton.setAttribute("aria-pressed", "false");
  }

  // Captions of large pictures, and files with the captions of many, wait until their pictures are there.
  async send(items) {
    const isLarge = ({ file }) => file.size > LARGE_BYTES;
    const stems = new Set(items.filter((item) => !isTable(item.path)).map((item) => stem(item.path)));
    const largeStems = new Set(items.filter(isLarge).map((item) => stem(item.path)));
    const waits = ({ path }) => (isCaption(path) && largeStems.has(stem(path))) || (isTable(path) && !stems.has(stem(path)));
    const small = items.filter((item) => !isLarge(item));
    await this.sendTogether(small.filter((item) => !waits(item)));
    for (const item of items.filter(isLarge)) await this.sendInPieces(item);
    await this.sendTogether(small.filter(waits));
  }

  // --- Small files, some in each request -----------------------------------------------------------------------------
  async sendTogether(items) {
    for (const batch of batches(items)) await this.sendBatch(batch);
  }

  async sendBatch(items) {
    const [{ path, choices }] = items;
    const line = new Line(this.list, items.length === 1 ? path : `${path} and ${items.length - 1} more`);
    line.show(0, 0, "Uploading");
    const body = new FormData();
    for (const [name, value] of Object.entries(choices)) body.append(name, value);
    for (const item of items) {
      body.append("files", item.file, item.file.name);
      body.append("paths", item.path);
    }
    try {
      const answer = await this.retried(() => this.request("POST", this.form.dataset.picturesUrl, { body }), line);
      line.end(answer.detail, answer.refused, answer.notes);
    } catch (error) {
      line.end("Not imported", error.body?.refused?.length ? error.body.refused : [{ name: line.label.textContent, reason: error.message }]);
    }
  }

  // --- One large file, in pieces -------------------------------------------------------------------------------------
  async sendInPieces(item) {
    const { file } = item;
    document.getElementById(`unfinished-${memoryKey(this.dataset, file)}`)?.remove();
    const line = new Line(this.list, item.path);
    try {
      let upload = (await this.rememberedUpload(file)) || (await this.startUpload(item, line));
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

  async startUpload({ file, path, choices }, line) {
    const body = JSON.stringify({ dataset: this.dataset, filename: path, size: file.size, ...choices });
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
      const piece = await file.slice(known.offset, end).arrayBuffer();
      const headers = { "Content-Type": "application/offset+octet-stream", "Upload-Offset": String(known.offset) };
      // Browsers compute checksums on https and localhost only.
      if (crypto.subtle) headers["Upload-Checksum"] = `sha256 ${base64(await crypto.subtle.digest("SHA-256", piece))}`;
      try {
        const answer = await this.request("PATCH", this.uploadUrl(upload.id), { headers, body: piece });
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
    const { added, captioned, duplicates, refused, notes } = job.result;
    line.end(`${added} added, ${captioned} with a new caption, ${duplicates} already here`, refused, notes);
  }

  uploadUrl(id) {
    return `${this.form.dataset.uploadsUrl}${id}/`;
  }

  // --- Requests ------------------------------------------------------------------------------------------------------
  // Parsed JSON, null for an empty answer. Throws Refused for 4xx, an ordinary error for what may pass.
  async request(method, url, { headers = {}, body } = {}) {
    const { signal } = this.stop;
    const answer = await fetch(url, { method, body, signal, headers: { Accept: "application/json", "X-CSRFToken": this.token, ...headers } });
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
      await this.paused;
      try {
        return await attempt();
      } catch (error) {
        if (error.name === "AbortError") {
          if (line) line.state.textContent = "Paused";
          await this.paused;
          if (line) line.state.textContent = "Going on";
          tried = 0;
          continue;
        }
        if (error instanceof Refused || tried === TRIES) throw error;
        const wait = Math.min(1000 * 2 ** (tried - 1), LONGEST_WAIT_MS);
        if (line) line.state.textContent = `Connection lost. Next try in ${Math.round(wait / 1000)} s`;
        await sleep(wait);
      }
    }
  }
}

// A caption travels with the picture of the same name, so that the two are imported together.
function batches(items) {
  const groups = new Map();
  for (const item of items) groups.set(stem(item.path), [...(groups.get(stem(item.path)) || []), item]);
  const made = [];
  let bytes = 0;
  for (const group of groups.values()) {
    const size = group.reduce((sum, item) => sum + item.file.size, 0);
    const last = made.at(-1);
    if (last && last[0].choices === group[0].choices && bytes + size <= BATCH_BYTES && last.length + group.length <= BATCH_FILES) {
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

// Not under somebody's hands: while a caption is being edited, or cannot be saved, a button stands where the pictures
// would come.
async function refreshPictures() {
  if (await isGridSettled()) {
    showPictures();
    return;
  }
  if (document.getElementById("show-new")) return;
  const button = document.createElement("button");
  button.type = "button";
  button.id = "show-new";
  button.className = "button button-small";
  button.textContent = "Show what was added";
  button.addEventListener("click", async () => (await isGridSettled()) && showPictures());
  document.querySelector("#pictures .page-head").append(button);
}

function showPictures() {
  window.htmx.ajax("GET", location.href, { source: "#upload-list", target: "#pictures", select: "#pictures", swap: "outerHTML" });
}

// --- Which upload belongs to a file: survives a reload, until the same file is chosen again --------------------------------
const memoryKey = (dataset, file) => `upload:${dataset}:${file.name}:${file.size}:${file.lastModified}`;

function remember(dataset, file, id) {
  try {
    localStorage.setItem(memoryKey(dataset, file), JSON.stringify({ id, at: Date.now(), name: file.name }));
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
  forgetKey(memoryKey(dataset, file));
}

function forgetKey(key) {
  try {
    localStorage.removeItem(key);
  } catch {
    // Storage is switched off: there is nothing to forget.
  }
}

// [key, name, id] of the uploads that an earlier visit left unfinished.
function unfinished(dataset) {
  const found = [];
  try {
    for (const key of Object.keys(localStorage)) {
      if (!key.startsWith(`upload:${dataset}:`)) continue;
      const { id, at, name } = JSON.parse(localStorage.getItem(key));
      if (Date.now() - at < REMEMBERED_MS) found.push([key, name || key.split(":")[2], id]);
      else forgetKey(key);
    }
  } catch {
    // Storage is switched off: nothing is remembered.
  }
  return found;
}

// A browser does not let a page open a file by itself, so it asks for it.
async function showUnfinished(uploader) {
  for (const [key, name, id] of unfinished(uploader.dataset)) {
    let upload;
    try {
      upload = await uploader.request("GET", uploader.uploadUrl(id));
    } catch (error) {
      if (error instanceof Refused) forgetKey(key);
      continue;
    }
    const line = new Line(uploader.list, name);
    line.item.id = `unfinished-${key}`;
    if (upload.job) {
      forgetKey(key);
      uploader.followImport(upload, line).then(refreshPictures, (error) => line.end("Not imported", [{ name, reason: error.message }]));
      continue;
    }
    line.show(upload.offset, upload.size, `${Math.floor((100 * upload.offset) / upload.size)} % is here. Choose the same file again to go on.`);
    const row = document.createElement("span");
    row.className = "upload-row-actions";
    const button = document.createElement("button");
    button.type = "button";
    button.className = "button button-small button-quiet";
    button.textContent = "Forget it";
    button.addEventListener("click", async () => {
      button.disabled = true;
      await uploader.request("DELETE", uploader.uploadUrl(id)).catch(() => null);
      forgetKey(key);
      line.item.remove();
    });
    row.append(button);
    line.item.append(row);
  }
}

// --- Folders ----------------------------------------------------------------------------------------------------------------
const entriesOf = (reader) => new Promise((resolve, reject) => reader.readEntries(resolve, reject));
const fileOf = (entry) => new Promise((resolve, reject) => entry.file(resolve, reject));

// [file, path] of everything below a dropped entry. readEntries hands out some at a time.
async function filesBelow(entry, folder = "") {
  const path = `${folder}${entry.name}`;
  if (entry.isFile) return [[await fileOf(entry), path]];
  const reader = entry.createReader();
  const found = [];
  for (let some = await entriesOf(reader); some.length; some = await entriesOf(reader)) {
    for (const one of some) found.push(...(await filesBelow(one, `${path}/`)));
  }
  return found;
}

// Entries have to be taken before the first wait: the drop's data is gone after its event.
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => [file, file.name]);
  return (await Promise.all(entries.map((entry) => filesBelow(entry)))).flat();
}

// --- The form ---------------------------------------------------------------------------------------------------------------
function takeOver(form) {
  const uploader = new Uploader(form);
  const box = form.closest("details");
  const input = form.querySelector("input[type=file][name]");
  const folderInput = form.querySelector("[data-folder-input]");
  for (const element of form.querySelectorAll("[data-without-script]")) element.hidden = true;
  for (const element of form.querySelectorAll("[data-with-script]")) element.hidden = false;
  const take = (files) => {
    const { fills, colour, replace_captions: replaces } = form.elements;
    const choices = { flatten: fills.checked ? colour.value : "", replace_captions: replaces.checked };
    uploader.add(files.map(([file, path]) => ({ file, path, choices })));
  };
  for (const chosen of [input, folderInput]) chosen.addEventListener("change", () => {
    take([...chosen.files].map((file) => [file, file.webkitRelativePath || file.name]));
    chosen.value = "";
  });
  form.querySelector("[data-choose-folder]").addEventListener("click", () => folderInput.click());
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const type of ["dragenter", "dragover"]) box.addEventListener(type, (event) => {
    event.preventDefault();
    box.open = true;
    form.classList.add("is-over");
  });
  for (const type of ["dragleave", "drop"]) box.addEventListener(type, () => form.classList.remove("is-over"));
  box.addEventListener("drop", async (event) => {
    event.preventDefault();
    take(await dropped(event.dataTransfer));
  });
  showUnfinished(uploader);
}

document.addEventListener("DOMContentLoaded", () => {
  const form = document.getElementById("upload-form");
  if (form) takeOver(form);
});
