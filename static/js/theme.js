// Runs before the first paint, so that a chosen theme does not flash. The button itself is in lorapilot.js.
"use strict";
try {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is switched off: the system's preference stands.
}
