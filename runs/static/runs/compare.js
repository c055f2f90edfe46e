// The loss of several runs over each other: their moving averages, over the steps or over the time spent in them.
"use strict";

class ComparedChart {
  constructor(root) {
    this.root = root;
    this.runs = JSON.parse(root.dataset.curves);
    this.smoothing = root.querySelector("[data-smoothing]");
    this.axis = root.querySelector("[data-axis]");
    this.keys = [...root.querySelectorAll("[data-run-key]")];
    this.shown = [...root.querySelectorAll("[data-show-run]")];
    this.summary = root.querySelector("[data-chart-summary]");
    this.chart = new Chart(root.querySelector("canvas"), this.settings());
    for (const control of [this.smoothing, this.axis, ...this.shown]) control.addEventListener("input", () => this.draw());
    document.addEventListener("themechange", () => this.draw());
    this.draw();
  }

  get isByTime() {
    return this.axis.value === "time";
  }

  settings() {
    const options = curveOptions((x) => (this.isByTime ? duration(x) : `Step ${x}`));
    options.interaction = { mode: "nearest", intersect: false, axis: "x" };
    return { type: "line", data: { datasets: this.runs.map(({ name }) => ({ ...curveLine(), label: name, borderWidth: 2 })) }, options };
  }

  draw() {
    const smoothing = Number(this.smoothing.value);
    for (const [place, { points }] of this.runs.entries()) {
      const measured = points.filter((point) => point[1] !== null);
      const dataset = this.chart.data.datasets[place];
      dataset.data = movingAverage(measured.map(([step, loss, seconds]) => ({ step, loss, x: this.isByTime ? seconds : step })), smoothing);
      dataset.hidden = !this.shown[place].checked;
    }
    const { x } = this.chart.options.scales;
    x.title.text = this.isByTime ? "Time in steps" : "Step";
    x.ticks.callback = this.isByTime ? duration : (value) => value.toLocaleString("en");
    this.describe();
    this.colour();
    this.chart.update("none");
  }

  describe() {
    const ends = this.chart.data.datasets.filter((dataset) => dataset.data.length && !dataset.hidden);
    this.summary.textContent = ends.map((dataset) => `${dataset.label} ends at ${readable(dataset.data.at(-1).y)}.`).join(" ");
  }

  // Each line looks as its key does: the style sheet says how, in light and in dark.
  colour() {
    for (const [place, key] of this.keys.entries()) {
      const { stroke, strokeDasharray } = getComputedStyle(key);
      const dataset = this.chart.data.datasets[place];
      dataset.borderColor = dataset.backgroundColor = stroke;
      dataset.borderDash = strokeDasharray === "none" ? [] : strokeDasharray.split(",").map(parseFloat);
    }
    const style = getComputedStyle(this.root.querySelector("[data-chart-colours]"));
    colourAxes(this.chart, style.borderTopColor, style.backgroundColor);
  }
}

document.addEventListener("DOMContentLoaded", () => {
  for (const root of document.querySelectorAll("[data-compared-chart]")) root.comparedChart = new ComparedChart(root);
});
