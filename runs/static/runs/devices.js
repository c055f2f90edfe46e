// The services page. How busy each device was: one chart a device, utilisation and memory in percent. Read again every
// half minute, which is how often hosts measure; a host that was silent leaves a gap.
"use strict";

const EVERY = 30_000; // milliseconds
const STEPS = { 1: 600, 6: 3600, 24: 4 * 3600 }; // seconds between two times on the axis, by hours shown
const COLUMNS = { at: 0, utilisation: 1, memory: 2, temperature: 3, power: 4 };

class DeviceChart {
  constructor(parent, title) {
    this.root = document.createElement("article");
    this.root.className = "device";
    const heading = document.createElement("h3");
    heading.textContent = title;
    this.figures = document.createElement("p");
    this.figures.className = "small muted number";
    const box = document.createElement("div");
    box.className = "device-box";
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    box.append(canvas);
    this.root.append(heading, this.figures, box);
    parent.append(this.root);
    this.title = title;
    this.chart = new Chart(canvas, settings());
  }

  show(points, memoryBytes, hours) {
    const share = (bytes) => (bytes === null || !memoryBytes ? null : (100 * bytes) / memoryBytes);
    const gap = Math.max(90, (hours * 3600 * 3) / 500);
    const [utilisation, memory] = [[], []];
    let before = null;
    for (const point of points) {
      const x = point[COLUMNS.at];
      if (before !== null && x - before > gap) for (const line of [utilisation, memory]) line.push({ x: before + 1, y: null });
      utilisation.push({ x, y: point[COLUMNS.utilisation] });
      memory.push({ x, y: share(point[COLUMNS.memory]) });
      before = x;
    }
    this.chart.data.datasets[0].data = utilisation;
    this.chart.data.datasets[1].data = memory;
    const now = Date.now() / 1000;
    this.chart.options.scales.x.min = now - hours * 3600;
    this.chart.options.scales.x.max = now;
    this.chart.options.scales.x.ticks.stepSize = STEPS[hours];
    this.describe(points.at(-1), share);
    this.colour();
    this.chart.update("none");
  }

  describe(last, share) {
    const figures = [];
    if (last) {
      const told = (column, write) => last[column] !== null && figures.push(write(last[column]));
      told(COLUMNS.utilisation, (value) => `${Math.round(value)} % busy`);
      told(COLUMNS.memory, (value) => `${(value / 2 ** 30).toFixed(1)} GiB (${Math.round(share(value))} %) in use`);
      told(COLUMNS.temperature, (value) => `${Math.round(value)} °C`);
      told(COLUMNS.power, (value) => `${Math.round(value)} W`);
    }
    this.figures.textContent = last ? `${clock(last[COLUMNS.at])}: ${figures.join(", ")}` : "No measurement in this time.";
    this.chart.canvas.setAttribute("aria-label", `${this.title}. ${this.figures.textContent}`);
  }

  colour() {
    const style = getComputedStyle(document.querySelector("[data-chart-colours]"));
    const [utilisation, memory] = this.chart.data.datasets;
    utilisation.borderColor = utilisation.backgroundColor = style.color;
    memory.borderColor = memory.backgroundColor = style.borderBottomColor;
    colourAxes(this.chart, style.borderTopColor, style.backgroundColor);
  }

  recolour() {
    this.colour();
    this.chart.update("none");
  }
}

function settings() {
  const line = { ...curveLine(), borderWidth: 1.5 };
  const axis = curveAxis();
  const options = curveOptions(clock, (value) => `${Math.round(value)} %`);
  options.scales = {
    x: { ...axis, type: "linear", ticks: { ...axis.ticks, includeBounds: false, callback: clock } },
    y: { ...axis, min: 0, max: 100, ticks: { ...axis.ticks, stepSize: 25, callback: (value) => `${value} %` } },
  };
  return { type: "line", data: { datasets: [{ ...line, label: "Utilisation" }, { ...line, label: "Memory" }] }, options };
}

function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
}

class HostHistory {
  constructor(root) {
    this.root = root;
    this.charts = new Map(); // by the device's uuid
  }

  async read(hours) {
    const answer = await fetch(`${this.root.dataset.history}?hours=${hours}`, { headers: { Accept: "application/json" } }).catch(() => null);
    if (!answer?.ok) return; // the next time
    const histories = await answer.json();
    if (!histories.some(({ points }) => points.length) && !this.charts.size) return;
    this.root.querySelector("[data-history-empty]")?.remove();
    for (const { device, points } of histories) {
      if (!this.charts.has(device.uuid)) this.charts.set(device.uuid, new DeviceChart(this.root, titleOf(this.root.dataset.host, device)));
      this.charts.get(device.uuid).show(points, device.memory_bytes, hours);
    }
  }
}

function titleOf(host, device) {
  return device.kind === "cpu" ? `${host}: CPU and memory` : `${host}: GPU ${device.index}, ${device.name}`;
}

document.addEventListener("DOMContentLoaded", () => {
  const hosts = [...document.querySelectorAll("[data-history]")].map((root) => new HostHistory(root));
  const hours = document.querySelector("[data-hours]");
  if (!hosts.length) return;
  const read = () => {
    for (const host of hosts) host.read(Number(hours.value));
  };
  hours.addEventListener("change", read);
  document.addEventListener("themechange", () => {
    for (const host of hosts) for (const chart of host.charts.values()) chart.recolour();
  });
  document.addEventListener("visibilitychange", () => document.hidden || read());
  setInterval(() => document.hidden || read(), EVERY);
  read();
});

// Whoever marks a command to copy it keeps it: the list is not replaced meanwhile.
document.addEventListener("htmx:beforeRequest", (event) => {
  const selection = getSelection();
  if (event.target.id === "services" && !selection.isCollapsed && event.target.contains(selection.anchorNode)) event.preventDefault();
});
