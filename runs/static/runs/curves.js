// What the charts share: of one run's loss (chart.js), of several beside each other (compare.js), of devices (devices.js).
"use strict";

function curveLine() {
  return { pointRadius: 0, pointHoverRadius: 3, borderJoinStyle: "round", data: [] };
}

function curveAxis() {
  return { ticks: { maxRotation: 0, autoSkipPadding: 24, font: { size: 11 } }, border: { display: false } };
}

// `where` says what x is, for the tooltip's title, and `write` what y is.
function curveOptions(where, write = readable) {
  const axis = curveAxis();
  return {
    animation: false,
    parsing: false,
    normalized: true,
    maintainAspectRatio: false,
    interaction: { mode: "index", intersect: false, axis: "x" },
    scales: {
      x: { ...axis, type: "linear", bounds: "data", min: 0, ticks: { ...axis.ticks, precision: 0 }, title: { display: true, text: "Step", font: { size: 11 } } },
      y: { ...axis },
    },
    plugins: {
      legend: { display: false },
      tooltip: { callbacks: { title: (items) => where(items[0].parsed.x), label: (item) => `${item.dataset.label}: ${write(item.parsed.y)}` } },
    },
  };
}

function colourAxes(chart, muted, grid) {
  for (const axis of Object.values(chart.options.scales)) {
    axis.ticks.color = muted;
    axis.grid = { ...axis.grid, color: grid };
    if (axis.title) axis.title.color = muted;
  }
}

// Exponential, not drawn to the first value, and aware of gaps: a point `n` steps later counts as `n` steps.
function movingAverage(points, smoothing) {
  let sum = 0;
  let weight = 0;
  let before = 0;
  return points.map(({ step, loss, x = step }) => {
    const kept = smoothing ** Math.max(1, step - before);
    sum = sum * kept + loss * (1 - kept);
    weight = weight * kept + (1 - kept);
    before = step;
    return { x, y: sum / weight };
  });
}

function readable(value) {
  return Math.abs(value) < 0.001 && value !== 0 ? value.toExponential(2) : value.toPrecision(4);
}

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}
