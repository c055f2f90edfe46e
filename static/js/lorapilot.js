// What every page does: theme button, account menu, questions before a form is sent, notices after an htmx error.
"use strict";

const darkQuery = matchMedia("(prefers-color-scheme: dark)");
const SUN = "M12 4V2M12 22v-2M4 12H2M22 12h-2M6.3 6.3 4.9 4.9M19.1 19.1l-1.4-1.4M6.3 17.7l-1.4 1.4M19.1 4.9l-1.4 1.4M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8Z";
const MOON = "M20 14.5A8 8 0 0 1 9.5 4 8 8 0 1 0 20 14.5Z";

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : darkQuery.matches;
}

function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const shape = document.createElementNS("http://www.w3.org/2000/svg", "path");
  for (const [name, value] of Object.entries({ viewBox: "0 0 24 24", fill: "none", stroke: "currentColor", "stroke-width": "1.8", "stroke-linecap": "round", "stroke-linejoin": "round", "aria-hidden": "true" })) svg.setAttribute(name, value);
  shape.setAttribute("d", path);
  svg.append(shape);
  return svg;
}

function showThemeButton() {
  const button = document.getElementById("theme-button");
  const draw = () => {
    button.replaceChildren(icon(isDark() ? SUN : MOON));
    button.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
  };
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem("theme", theme);
    } catch {
      // Storage is switched off: the choice holds for this page.
    }
    draw();
    document.dispatchEvent(new CustomEvent("themechange"));
  });
  darkQuery.addEventListener("change", () => {
    draw();
    document.dispatchEvent(new CustomEvent("themechange"));
  });
  draw();
  button.hidden = false;
}

function closeMenusOutside(event) {
  for (const menu of document.querySelectorAll("details.menu[open]")) {
    if (event.type === "keydown" && event.key !== "Escape") continue;
    if (event.type === "click" && menu.contains(event.target)) continue;
    menu.open = false;
    if (event.type === "keydown") menu.querySelector("summary").focus();
  }
}

// Resolves to true when the person confirms. Escape and Cancel resolve to false.
function ask(question, label, detail) {
  const dialog = document.getElementById("confirm-dialog");
  document.getElementById("confirm-question").textContent = question;
  document.getElementById("confirm-detail").textContent = detail || "";
  document.getElementById("confirm-ok").textContent = label || "Confirm";
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok"), { once: true });
  });
}

async function askBeforeSubmit(event) {
  const form = event.target;
  if (!form.dataset.confirm || form.dataset.confirmed) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  const submitter = event.submitter;
  const { confirm, confirmLabel, confirmDetail } = form.dataset;
  if (!(await ask(confirm, confirmLabel || submitter?.textContent.trim(), confirmDetail))) return;
  form.dataset.confirmed = "yes";
  form.requestSubmit(submitter);
  delete form.dataset.confirmed;
}

async function askBeforeRequest(event) {
  if (!event.detail.question) return;
  event.preventDefault();
  if (await ask(event.detail.question, event.target.textContent.trim())) event.detail.issueRequest(true);
}

function notify(text, level) {
  const list = document.getElementById("messages");
  const line = document.createElement("p");
  line.className = `notice notice-${level}`;
  line.textContent = text;
  list.replaceChildren(line);
  list.hidden = false;
}

// A background refresh that fails once is no news; a form or button that fails is.
function reportFailedRequest(event) {
  if (event.detail.elt.matches("[data-quiet]")) return;
  const status = event.detail.xhr.status;
  notify(status ? `The server refused this (${status}). Reload the page and try again.` : "The server cannot be reached. Check the connection and try again.", "error");
}

// Nobody looks: what refreshes itself waits.
function skipUnseenRefresh(event) {
  if (document.hidden && event.detail.elt.matches("[data-quiet]")) event.preventDefault();
}

document.addEventListener("DOMContentLoaded", showThemeButton);
document.addEventListener("click", closeMenusOutside);
document.addEventListener("keydown", closeMenusOutside);
document.addEventListener("submit", askBeforeSubmit, true);
document.addEventListener("htmx:confirm", askBeforeRequest);
document.addEventListener("htmx:beforeRequest", skipUnseenRefresh);
document.addEventListener("htmx:responseError", reportFailedRequest);
document.addEventListener("htmx:sendError", reportFailedRequest);
