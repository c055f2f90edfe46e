// The grid of pictures: selecting many, keys from picture to picture, captions as tags, and conflicts of two writers.
// Without this script captions are saved by their buttons, and boxes are ticked one by one.
"use strict";

const MODE_KEY = "captions-mode";
const SUGGEST_AFTER_MS = 150;
const SUGGESTIONS = 12;
const LEFT = "caption-left:"; // before the picture's id: what was typed when the page was left

const grid = () => document.getElementById("picture-grid");
const cards = () => [...(grid()?.querySelectorAll("[data-picture]") || [])];
const cardOf = (element) => element.closest?.("[data-picture]");
const fieldOf = (card) => card.querySelector("textarea");
const isSaved = new WeakMap(); // caption field → the text that the server has

// --- Selecting -----------------------------------------------------------------------------------------------------------
const selected = new Set();
let lastBox = null;

function showSelection() {
  const ids = document.getElementById("bulk-ids");
  ids.disabled = false;
  ids.value = [...selected].join(",");
  document.getElementById("selected-count").textContent = selected.size ? `${selected.size} ticked` : "";
  document.querySelector("[data-select-none]").hidden = !selected.size;
}

function select(box, isOn) {
  box.checked = isOn;
  cardOf(box).classList.toggle("is-selected", isOn);
  if (isOn) selected.add(box.value);
  else selected.delete(box.value);
}

// With shift: everything between the box that was changed last and this one.
function selectUpTo(box, isOn, withShift) {
  const boxes = [...grid().querySelectorAll("[data-select]")];
  const ends = [boxes.indexOf(lastBox), boxes.indexOf(box)].sort((a, b) => a - b);
  const between = withShift && ends[0] >= 0 ? boxes.slice(ends[0], ends[1] + 1) : [box];
  for (const one of between) select(one, isOn);
  lastBox = box;
  showSelection();
}

function selectNone() {
  for (const box of grid().querySelectorAll("[data-select]:checked")) select(box, false);
  selected.clear();
  showSelection();
}

// --- Keys ----------------------------------------------------------------------------------------------------------------
function neighbour(card, step) {
  const all = cards();
  return all[all.indexOf(card) + step];
}

function goTo(card, wantsField) {
  if (!card) return;
  const field = wantsField && (card.querySelector("[data-tag-input]:not([hidden])") || fieldOf(card));
  (field || card).focus();
  card.scrollIntoView({ block: "nearest" });
}

function keyInField(event, card) {
  const isNext = (event.altKey && event.key === "ArrowDown") || (event.ctrlKey && event.key === "Enter" && !event.shiftKey);
  const isBefore = (event.altKey && event.key === "ArrowUp") || (event.ctrlKey && event.key === "Enter" && event.shiftKey);
  if (isNext || isBefore) goTo(neighbour(card, isNext ? 1 : -1), true);
  else if (event.altKey && event.code === "KeyZ") card.querySelector("[data-undo]").click();
  else if (event.key === "Escape") goTo(card, false);
  else return;
  event.preventDefault();
}

function keyOnCard(event, card) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const box = card.querySelector("[data-select]");
  if (["ArrowDown", "ArrowRight"].includes(event.key)) goTo(neighbour(card, 1), false);
  else if (["ArrowUp", "ArrowLeft"].includes(event.key)) goTo(neighbour(card, -1), false);
  else if (event.key === "Enter") goTo(card, true);
  else if (event.key.toLowerCase() === "x") selectUpTo(box, !box.checked, event.shiftKey);
  else return;
  event.preventDefault();
}

function onKey(event) {
  const card = cardOf(event.target);
  if (!card || event.defaultPrevented) return;
  if (event.target.matches("textarea, [data-tag-input]")) keyInField(event, card);
  else if (event.target === card || event.target.matches("[data-select]")) keyOnCard(event, card);
}

// --- Saving ----------------------------------------------------------------------------------------------------------------
const forms = () => [...document.querySelectorAll("#picture-grid [data-caption-form]")];
const isUnsaved = (form) => isSaved.get(form.elements.caption) !== form.elements.caption.value;

const postCaption = (form, options) => fetch(form.action, { method: "POST", body: new FormData(form), headers: { "HX-Request": "true" }, ...options });

// Leaving the page must not lose what was typed a moment ago. Nobody is there to see whether that was taken, so the page
// keeps it, too, and asks once more when the picture is shown again: see `bringBack`.
function saveBeforeLeaving() {
  for (const form of forms().filter(isUnsaved)) {
    const { caption, revision } = form.elements;
    try {
      const left = { caption: caption.value, revision: revision.value };
      sessionStorage.setItem(`${LEFT}${cardOf(form).dataset.picture}`, JSON.stringify(left));
    } catch {
      // Storage is switched off: the request is all there is.
    }
    isSaved.set(caption, caption.value);
    postCaption(form, { keepalive: true });
  }
}

// What was typed when the page was left, with the revision that it was typed over: the server knows it already, takes it,
// or says that somebody changed the caption meanwhile.
function bringBack(card) {
  let left = null;
  try {
    left = JSON.parse(sessionStorage.getItem(`${LEFT}${card.dataset.picture}`));
    sessionStorage.removeItem(`${LEFT}${card.dataset.picture}`);
  } catch {
    // As above.
  }
  if (!left) return;
  const { caption, revision } = card.querySelector("[data-caption-form]").elements;
  caption.value = left.caption;
  revision.value = left.revision;
  caption.dispatchEvent(new Event("change", { bubbles: true }));
}

// For whoever replaces the grid: resolves to true when every caption is saved and nobody is about to type another.
async function isGridSettled() {
  if (grid()?.contains(document.activeElement)) return false;
  const answers = await Promise.all(forms().filter(isUnsaved).map(async (form) => {
    const caption = form.elements.caption.value;
    const answer = await postCaption(form).catch(() => null);
    if (answer?.ok) isSaved.set(form.elements.caption, caption);
    return answer?.ok;
  }));
  return answers.every(Boolean);
}

// A conflict is an answer to be shown, not an error.
function showConflict(event) {
  const form = event.detail.elt.closest("[data-caption-form]");
  if (!form || event.detail.xhr.status !== 409) return;
  event.detail.shouldSwap = true;
  event.detail.isError = false;
  event.detail.target = form.querySelector(".caption-state");
  event.detail.swapOverride = "innerHTML";
}

function afterRequest(event) {
  const form = event.detail.elt.closest?.("[data-caption-form]");
  if (form && event.detail.successful && event.detail.elt === form) isSaved.set(form.elements.caption, event.detail.requestConfig.parameters.caption);
}

function settleConflict(event) {
  const button = event.target.closest("[data-keep-mine], [data-take-theirs]");
  if (!button) return;
  const form = button.closest("form");
  form.elements.revision.value = button.dataset.keepMine || button.dataset.takeTheirs;
  if ("takeTheirs" in button.dataset) {
    form.elements.caption.value = button.dataset.caption;
    isSaved.set(form.elements.caption, button.dataset.caption);
    form.querySelector(".caption-state").replaceChildren();
    drawTags(cardOf(form));
  } else {
    form.requestSubmit();
  }
  goTo(cardOf(form), true);
}

// --- Captions as tags ------------------------------------------------------------------------------------------------------
const tagsOf = (text) => text.split(",").map((tag) => tag.trim()).filter(Boolean);

function mode() {
  try {
    return localStorage.getItem(MODE_KEY) === "tags" ? "tags" : "sentence";
  } catch {
    return "sentence"; // storage is switched off
  }
}

function setMode(chosen) {
  try {
    localStorage.setItem(MODE_KEY, chosen);
  } catch {
    // As above: the choice holds for this page.
  }
  showMode(chosen);
}

function showMode(chosen) {
  grid().dataset.mode = chosen;
  for (const button of document.querySelectorAll("[data-caption-mode] button")) button.setAttribute("aria-pressed", String(button.value === chosen));
  for (const card of cards()) drawTags(card);
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

// In tag mode the field itself is hidden, and stays what is saved.
function drawTags(card) {
  const field = fieldOf(card);
  if (!field) return;
  const isTags = grid().dataset.mode === "tags";
  field.hidden = isTags;
  let editor = card.querySelector(".tag-editor");
  if (!isTags) {
    editor?.remove();
    return;
  }
  if (!editor) {
    editor = element("div", "tag-editor stack-small");
    editor.append(element("ul", "chips"), tagEntry(card, field));
    field.after(editor);
  }
  editor.firstChild.replaceChildren(...tagsOf(field.value).map((tag, index) => chip(card, field, tag, index)));
}

function chip(card, field, tag, index) {
  const item = element("li", "chip", tag);
  const remove = element("button", "", "×");
  remove.type = "button";
  remove.setAttribute("aria-label", `Remove ${tag}`);
  remove.addEventListener("click", () => {
    setTags(card, field, tagsOf(field.value).filter((_, position) => position !== index));
    card.querySelector("[data-tag-input]").focus();
  });
  item.append(remove);
  return item;
}

function setTags(card, field, tags) {
  const seen = new Set();
  field.value = tags.filter((tag) => !seen.has(tag.toLowerCase()) && seen.add(tag.toLowerCase())).join(", ");
  field.dispatchEvent(new Event("change", { bubbles: true }));
  drawTags(card);
}

// A field that adds tags, with proposals from the dataset and the person's own list.
function tagEntry(card, field) {
  const entry = element("div", "tag-entry");
  const input = element("input");
  const list = element("ul", "tag-choices");
  list.id = `choices-${card.dataset.picture}`;
  list.hidden = true;
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", "Tags");
  const attributes = { type: "text", "data-tag-input": "", placeholder: "Add a tag", "aria-label": `Add a tag to ${field.ariaLabel}`, role: "combobox", "aria-expanded": "false", "aria-controls": list.id, autocomplete: "off", autocapitalize: "none", enterkeyhint: "enter" };
  for (const [name, value] of Object.entries(attributes)) input.setAttribute(name, value);
  const add = (text) => {
    setTags(card, field, [...tagsOf(field.value), ...tagsOf(text)]);
    input.value = "";
    show([]);
  };
  const show = (tags) => {
    list.replaceChildren(...tags.map((found, index) => {
      const item = element("li", "", found.tag);
      item.id = `${list.id}-${index}`;
      item.dataset.tag = found.tag;
      item.setAttribute("role", "option");
      item.setAttribute("aria-selected", "false");
      item.append(element("span", "muted number", found.count.toLocaleString("en")));
      return item;
    }));
    list.hidden = !tags.length;
    input.setAttribute("aria-expanded", String(!list.hidden));
    input.removeAttribute("aria-activedescendant");
  };
  const choose = (step) => {
    const items = [...list.children];
    const chosen = items[(items.findIndex((item) => item.ariaSelected === "true") + step + items.length + (step < 0 && !list.querySelector("[aria-selected=true]") ? 1 : 0)) % items.length];
    for (const item of items) item.setAttribute("aria-selected", String(item === chosen));
    input.setAttribute("aria-activedescendant", chosen.id);
    chosen.scrollIntoView({ block: "nearest" });
  };
  let waiting = 0;
  let asked = 0;
  const suggest = async () => {
    const number = ++asked;
    const text = input.value.trim();
    if (!text) return show([]);
    const answer = await fetch(`${grid().dataset.tagsUrl}?q=${encodeURIComponent(text)}&limit=${SUGGESTIONS}`).catch(() => null);
    if (!answer?.ok) return;
    const found = await answer.json();
    if (number === asked && input.value.trim() === text) show(found.results);
  };
  input.addEventListener("input", (event) => {
    event.stopPropagation(); // not a caption that is to be saved
    clearTimeout(waiting);
    if (input.value.includes(",")) add(input.value);
    else waiting = setTimeout(suggest, SUGGEST_AFTER_MS);
  });
  input.addEventListener("change", (event) => event.stopPropagation());
  input.addEventListener("keydown", (event) => {
    const chosen = list.querySelector("[aria-selected=true]");
    if (event.altKey || event.ctrlKey) return;
    if (!list.hidden && (event.key === "ArrowDown" || event.key === "ArrowUp")) choose(event.key === "ArrowDown" ? 1 : -1);
    else if (event.key === "Enter") {
      if (chosen || input.value.trim()) add(chosen ? chosen.dataset.tag : input.value);
    } else if (event.key === "Escape" && !list.hidden) show([]);
    else if (event.key === "Backspace" && !input.value && field.value) setTags(card, field, tagsOf(field.value).slice(0, -1));
    else return;
    event.preventDefault();
  });
  input.addEventListener("blur", () => {
    clearTimeout(waiting);
    asked++;
    if (input.value.trim()) add(input.value);
    else show([]);
  });
  list.addEventListener("pointerdown", (event) => {
    const item = event.target.closest("li");
    event.preventDefault(); // the focus stays in the field
    if (item) add(item.dataset.tag);
  });
  entry.append(input, list);
  return entry;
}

// --- Wiring ----------------------------------------------------------------------------------------------------------------
// Once for every card, also those that come later.
function prepare(card) {
  const field = fieldOf(card);
  if (!field || isSaved.has(field)) return;
  isSaved.set(field, field.value);
  for (const button of card.querySelectorAll("[data-without-script]")) button.hidden = true;
  const box = card.querySelector("[data-select]");
  if (selected.has(box.value)) select(box, true);
  bringBack(card);
  drawTags(card);
}

// The part of the page around the grid, when it comes with the page and when an upload brings it anew.
function prepareAll() {
  const modes = document.querySelector("[data-caption-mode]");
  if (!grid() || !modes) return;
  modes.hidden = false;
  for (const card of cards()) prepare(card);
  showMode(mode());
  showSelection();
  showOperation();
}

function showOperation() {
  const kind = document.getElementById("id_kind").value;
  const shown = { text: kind !== "trigger", replacement: ["rename", "replace", "regex"].includes(kind), at_start: kind === "add" };
  for (const [name, isShown] of Object.entries(shown)) document.getElementById(`id_${name}`).closest(".field").hidden = !isShown;
}

function onClick(event) {
  if (event.target.matches("[data-caption-mode] button")) setMode(event.target.value);
  else if (event.target.closest("[data-select-none]")) selectNone();
  else if (event.target.matches("#picture-grid [data-select]")) selectUpTo(event.target, event.target.checked, event.shiftKey);
  else settleConflict(event);
}

// On the document, since the grid may be replaced.
document.addEventListener("DOMContentLoaded", () => {
  prepareAll();
  document.addEventListener("click", onClick);
  document.addEventListener("keydown", onKey);
  document.addEventListener("change", (event) => event.target.id === "id_kind" && showOperation());
  document.addEventListener("htmx:load", (event) => {
    const come = event.detail.elt;
    if (come.id === "pictures") prepareAll();
    else if (come.matches?.("[data-picture]")) prepare(come);
    else if (come.matches?.(".picture-grid")) for (const card of come.querySelectorAll("[data-picture]")) prepare(card);
  });
  document.addEventListener("htmx:beforeSwap", showConflict);
  document.addEventListener("htmx:afterRequest", afterRequest);
  window.addEventListener("pagehide", saveBeforeLeaving);
  window.addEventListener("pageshow", (event) => event.persisted && cards().forEach(bringBack));
});
