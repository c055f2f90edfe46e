// The run form: a name is proposed from the dataset, and "My own values" opens the part where they are.
"use strict";

function safeName(text) {
  return text.normalize("NFKD").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+|[^A-Za-z0-9]+$/g, "").slice(0, 80);
}

document.addEventListener("DOMContentLoaded", () => {
  const form = document.getElementById("run-form");
  const { dataset, output_name: name } = form.elements;
  let proposed = "";
  const propose = () => {
    if (!dataset.value || (name.value && name.value !== proposed)) return;
    name.value = proposed = safeName(dataset.selectedOptions[0].text);
  };
  dataset.addEventListener("change", propose);
  propose();
  form.addEventListener("change", (event) => {
    if (event.target.name === "profile" && !event.target.value) document.getElementById("own-values").open = true;
  });
});

// Options that have what is looked for in their name or description. The box comes anew with each list.
document.addEventListener("input", (event) => {
  if (event.target.id !== "option-search") return;
  const wanted = event.target.value.trim().toLowerCase();
  let shown = 0;
  for (const group of document.querySelectorAll("#option-list fieldset")) {
    let found = 0;
    for (const option of group.querySelectorAll("[data-option]")) {
      option.hidden = wanted !== "" && !option.dataset.option.toLowerCase().includes(wanted);
      found += option.hidden ? 0 : 1;
    }
    group.hidden = found === 0;
    shown += found;
  }
  document.getElementById("option-none").hidden = shown > 0;
});
