// The review below an order of captions comes by itself when there is something to review, and when the order ends:
// but not over somebody who edits in it. "Show what has come" is there for them.
"use strict";

const isTyped = (field) => (field.type === "checkbox" ? field.checked !== field.defaultChecked : field.value !== field.defaultValue);

function isEdited(review) {
  const fields = [...review.querySelectorAll("textarea, input[type=checkbox]")];
  return fields.some((field) => field === document.activeElement || isTyped(field));
}

document.addEventListener("htmx:beforeRequest", (event) => {
  if (event.target.id === "review" && isEdited(event.target)) event.preventDefault();
});
