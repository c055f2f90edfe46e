// Crop by dragging a box over the picture. The number fields say the same and work alone; both show in the overlay.
"use strict";

(() => {
  const area = document.getElementById("crop-area");
  const form = document.getElementById("crop-form");
  if (!area || !form) return;
  const path = area.querySelector("path");
  const whole = { width: Number(area.dataset.width), height: Number(area.dataset.height) };
  let begin = null;

  area.classList.add("is-live");

  // The place under the pointer, in pixels of the picture.
  function place(event) {
    const frame = area.getBoundingClientRect();
    const along = (at, start, length, pixels) => Math.round(Math.min(1, Math.max(0, (at - start) / length)) * pixels);
    return {
      x: along(event.clientX, frame.left, frame.width, whole.width),
      y: along(event.clientY, frame.top, frame.height, whole.height),
    };
  }

  function show() {
    const [left, top, width, height] = ["left", "top", "width", "height"].map((name) => Number(form.elements[name].value) || 0);
    const hole = width > 0 && height > 0 ? `M${left} ${top}h${width}v${height}h${-width}z` : "";
    path.setAttribute("d", `M0 0h${whole.width}v${whole.height}H0z ${hole}`);
  }

  function drag(event) {
    if (!begin) return;
    const end = place(event);
    form.elements.left.value = Math.min(begin.x, end.x);
    form.elements.top.value = Math.min(begin.y, end.y);
    form.elements.width.value = Math.abs(begin.x - end.x);
    form.elements.height.value = Math.abs(begin.y - end.y);
    show();
  }

  area.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    begin = place(event);
    area.setPointerCapture(event.pointerId);
  });
  area.addEventListener("pointermove", drag);
  area.addEventListener("pointerup", (event) => {
    const end = place(event);
    if (begin && (begin.x !== end.x || begin.y !== end.y)) drag(event);
    begin = null;
  });
  area.addEventListener("pointercancel", () => { begin = null; });
  form.addEventListener("input", show);
})();
