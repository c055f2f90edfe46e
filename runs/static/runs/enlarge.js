// A click on a sample shows it large, in the page's sample dialog.
"use strict";

function enlarge(event) {
  const link = event.target.closest("a[data-sample]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const dialog = document.getElementById("sample-dialog");
  dialog.querySelector("img").src = link.href;
  dialog.querySelector("img").alt = link.dataset.prompt;
  dialog.querySelector("[data-sample-title]").textContent = link.dataset.sample;
  dialog.querySelector("[data-sample-prompt]").textContent = link.dataset.prompt;
  dialog.querySelector("[data-sample-open]").href = link.href;
  dialog.showModal();
}

document.addEventListener("click", enlarge);
