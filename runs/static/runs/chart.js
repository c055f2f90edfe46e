// The loss over the steps: the measured values faint, their moving average on top. Points come from the socket while
// the run trains; an attempt that goes on from an earlier step makes the points after it void.
"use strict";

const MOST_POINTS = 4000;
const REDRAW = 250;

class LossChart {
  constructor(root) {
    this.root = root;
    this.points = []; // {step, loss, rate}, steps rising
    this.validations = []; // [step, loss], steps rising
    this.smoothing = root.querySelector("[data-smoothing]");
    this.showRate = root.querySelector("[data-show-rate]");
    this.validationKey = root.querySelector("[data-validation-key]");
    this.empty = root.querySelector("[data-chart-empty]");
    this.summary = root.querySelector("[data-chart-summary]");
    this.chart = new Chart(root.querySelector("canvas"), this.settings());
    this.smoothing.addEventListener("input", () => this.draw());
    this.showRate.addEventListener("change", () => this.draw());
    document.addEventListener("themechange", () => this.draw());
  }

  settings() {
    const line = curveLine();
    const axis = curveAxis();
    const options = curveOptions((x) => `Step ${x}`);
    options.scales.rate = { ...axis, position: "right", display: false, grid: { drawOnChartArea: false }, ticks: { ...axis.ticks, callback: (value) => value.toExponential(1) } };
    return {
      type: "line",
      data: {
        datasets: [
          { ...line, label: "Loss", borderWidth: 1, order: 2 },
          { ...line, label: "Moving average", borderWidth: 2, order: 1 },
          { ...line, label: "Validation", borderWidth: 2, pointRadius: 2.5, order: 0 },
          { ...line, label: "Learning rate", borderWidth: 1.25, borderDash: [4, 3], yAxisID: "rate", order: 3, hidden: true },
        ],
      },
      options,
    };
  }

  add(points) {
    if (!points.length) return;
    const first = points[0][0];
    while (this.points.length && this.points.at(-1).step >= first) this.points.pop();
    for (const [step, loss, rate] of points) this.points.push({ step, loss, rate });
    if (this.points.length > MOST_POINTS) this.points = thinned(this.points, MOST_POINTS / 2);
    this.schedule();
  }

  // An attempt that steps again from an earlier step: what was measured after it is not part of the run any more.
  rewind({ is_active: isActive, stage, step }) {
    if (!isActive || stage || !(this.points.at(-1)?.step > step)) return;
    this.points = this.points.filter((point) => point.step <= step);
    this.schedule();
  }

  validate(validations) {
    if (validations.length === this.validations.length && !validations.some(([step, loss], place) => step !== this.validations[place][0] || loss !== this.validations[place][1])) return;
    this.validations = validations;
    this.schedule();
  }

  clear() {
    this.points = [];
    this.schedule();
  }

  schedule() {
    if (this.timer) return;
    this.timer = setTimeout(() => {
      this.timer = null;
      this.draw();
    }, REDRAW);
  }

  draw() {
    const [loss, average, validation, rate] = this.chart.data.datasets;
    validation.data = this.validations.filter((point) => point[1] !== null).map(([x, y]) => ({ x, y }));
    const measured = this.points.filter((point) => point.loss !== null);
    loss.data = measured.map((point) => ({ x: point.step, y: point.loss }));
    average.data = movingAverage(measured, Number(this.smoothing.value));
    rate.data = this.points.filter((point) => point.rate !== null && point.rate !== undefined).map((point) => ({ x: point.step, y: point.rate }));
    this.validationKey.hidden = validation.data.length === 0;
    rate.hidden = !this.showRate.checked;
    this.chart.options.scales.rate.display = this.showRate.checked;
    this.empty.hidden = measured.length > 0;
    this.chart.canvas.hidden = measured.length === 0;
    this.describe(measured, average.data);
    this.colour();
    this.chart.update("none");
  }

  describe(measured, average) {
    if (!measured.length) return;
    const last = measured.at(-1);
    const validated = this.validations.length ? ` Validation loss ${readable(this.validations.at(-1)[1])} at step ${this.validations.at(-1)[0]}.` : "";
    this.summary.textContent = `Loss ${readable(last.loss)} at step ${last.step}; moving average ${readable(average.at(-1).y)}, at first ${readable(average[0].y)}.${validated}`;
  }

  colour() {
    const style = getComputedStyle(this.root.querySelector("[data-chart-colours]"));
    const [accent, muted, grid] = [style.color, style.borderTopColor, style.backgroundColor];
    const [loss, average, validation, rate] = this.chart.data.datasets;
    validation.borderColor = validation.backgroundColor = style.borderBottomColor;
    validation.pointBackgroundColor = validation.pointBorderColor = style.borderBottomColor;
    loss.borderColor = accent.replace(/^rgb\((.*)\)$/, "rgba($1, 0.3)");
    average.borderColor = average.backgroundColor = accent;
    rate.borderColor = muted;
    colourAxes(this.chart, muted, grid);
  }
}

// Keeps the lowest and the highest loss of each stretch, so that no spike disappears.
function thinned(points, most) {
  const width = Math.ceil(points.length / (most / 2));
  const kept = [];
  for (let start = 0; start < points.length; start += width) {
    const stretch = points.slice(start, start + width);
    const low = stretch.reduce((a, b) => (b.loss < a.loss ? b : a));
    const high = stretch.reduce((a, b) => (b.loss > a.loss ? b : a));
    kept.push(...new Set([low, high].sort((a, b) => a.step - b.step)));
  }
  return kept;
}

document.addEventListener("DOMContentLoaded", () => {
  for (const root of document.querySelectorAll("[data-loss-chart]")) {
    const chart = new LossChart(root);
    root.lossChart = chart;
    document.addEventListener("run:metrics", (event) => chart.add(event.detail));
    document.addEventListener("run:status", (event) => {
      chart.rewind(event.detail);
      chart.validate(event.detail.validations);
    });
  }
});
