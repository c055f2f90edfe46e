// The run's page while the run lives: the figures change in place, and parts of the page are fetched again when the
// status or a count says that there is news.
"use strict";

const SLOW = 1; // below one step a second, seconds per step read better
const QUEUE_LOOK = 10000; // what happens to others in the queue is no news of this run

function speed(stepsPerSecond) {
  if (!stepsPerSecond) return "–";
  return stepsPerSecond < SLOW ? `${(1 / stepsPerSecond).toFixed(1)} s/step` : `${stepsPerSecond.toFixed(1)} steps/s`;
}

const FIGURES = {
  step: (run) => (run.total_steps ? `${run.step.toLocaleString("en")} / ${run.total_steps.toLocaleString("en")}` : "–"),
  percent: (run) => (run.total_steps ? `${Math.floor((100 * run.step) / run.total_steps)} %` : ""),
  loss: (run) => (run.loss === null ? "–" : run.loss.toPrecision(4)),
  speed: (run) => (run.is_active ? speed(run.steps_per_second) : "–"),
  eta: (run) => (run.is_active && run.eta_seconds !== null ? duration(run.eta_seconds) : "–"),
  attempt: (run) => String(run.attempt),
  stage: (run) => (run.is_active ? run.stage : ""),
};

// What each part of the page depends on.
function dependencies(run) {
  return {
    status: [run.status, run.attempt, run.reason, run.is_held, run.stop_intent, run.kill_requested, run.host_condition, run.state_step].join(" "),
    attempts: [run.status, run.attempt].join(" "),
    adapted: String(run.attempt),
    checkpoints: String(run.checkpoints),
    samples: String(run.samples),
    events: String(run.events),
  };
}

class RunPage {
  constructor(root) {
    this.root = root;
    this.run = JSON.parse(root.dataset.run);
    this.known = dependencies(this.run);
    this.waiting = new Set();
    document.addEventListener("run:status", (event) => this.show(event.detail));
    document.addEventListener("close", () => this.refreshWaiting(), true);
    setInterval(() => this.countDown(), 1000);
    setInterval(() => this.lookAtQueue(), QUEUE_LOOK);
  }

  show(run) {
    for (const [name, text] of Object.entries(FIGURES)) {
      for (const element of this.root.querySelectorAll(`[data-figure="${name}"]`)) {
        const wanted = text(run);
        if (element.textContent !== wanted) element.textContent = wanted;
      }
    }
    for (const bar of this.root.querySelectorAll("[data-run-progress]")) {
      bar.max = run.total_steps || 1;
      bar.value = run.step;
      bar.className = `progress-${run.status}`;
    }
    this.title(run);
    this.refreshChanged(run);
  }

  title(run) {
    const percent = run.status === "running" && run.total_steps ? FIGURES.percent(run) : run.status_label;
    document.title = `${percent} · ${run.output_name} · LoRA Pilot`;
  }

  refreshChanged(run) {
    const now = dependencies(run);
    for (const [part, value] of Object.entries(now)) if (this.known[part] !== value) this.refresh(part);
    this.known = now;
    if (this.sentence(this.run) !== this.sentence(run)) this.announce(run);
    this.run = run;
  }

  sentence(run) {
    const host = run.host_condition === "lost" ? " Nothing is heard of its host." : "";
    return `${run.output_name}: ${run.status_label}.${host} ${run.reason.split("\n")[0]}`;
  }

  announce(run) {
    document.getElementById("messages").hidden = true; // it spoke of the status before
    document.getElementById("run-announcer").textContent = this.sentence(run);
  }

  // How long a run that was asked to stop still has.
  countDown() {
    const deadline = this.root.querySelector("[data-deadline]");
    if (!deadline) return;
    const left = Math.ceil((new Date(deadline.dateTime) - Date.now()) / 1000);
    this.root.querySelector("[data-countdown]").textContent = left > 0 ? ` (${duration(left)} left)` : " (that is over)";
  }

  lookAtQueue() {
    if (this.run.status === "queued" && !this.run.is_held) this.refresh("status");
  }

  // Not under an open dialog: its form or picture must not be taken away.
  refresh(part) {
    if (document.querySelector("dialog[open]")) this.waiting.add(part);
    else htmx.trigger(`[data-part="${part}"]`, "refresh");
  }

  refreshWaiting() {
    const parts = [...this.waiting];
    this.waiting.clear();
    for (const part of parts) setTimeout(() => this.refresh(part));
  }
}

document.addEventListener("DOMContentLoaded", () => {
  const root = document.getElementById("run");
  if (root) root.runPage = new RunPage(root);
});
