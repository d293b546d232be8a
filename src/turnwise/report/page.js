"use strict";
(() => {
  const all = (selector, from) => [...(from || document).querySelectorAll(selector)];
  const charts = JSON.parse(document.getElementById("data").textContent);
  const plots = all("svg.plot");
  const heads = all(".readout .at");
  const lastTexts = all(".readout").map((table) => all("td", table).map((td) => td.textContent));
  document.documentElement.classList.add("js");

  const format = (value, rate) =>
    rate ? `${Math.round(100 * value)}%` : String(Number(value.toPrecision(3))).replace("-", "−");

  const nearest = (xs, x) => {
    let best = -1;
    xs.forEach((v, i) => {
      if (best < 0 || Math.abs(v - x) < Math.abs(xs[best] - x)) best = i;
    });
    return best;
  };

  const steps = [...new Set(charts.flatMap((c) => c.series.flatMap((s) => [...s.x, ...s.vx])))];
  steps.sort((a, b) => a - b);
  let at = steps.length - 1;

  const show = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at];
    plots.forEach((plot, c) => {
      const box = plot.viewBox.baseVal;
      const x = 38 + ((box.width - 42) * step) / Number(plot.dataset.end);
      const cursor = plot.querySelector(".cursor");
      cursor.setAttribute("transform", `translate(${x} 0)`);
      cursor.setAttribute("visibility", "visible");
      const rows = all("tbody tr", plot.parentNode);
      charts[c].series.forEach((s, i) => {
        const cells = all("td", rows[i]);
        const rate = charts[c].rate;
        const k = nearest(s.x, step);
        const near = k >= 0 && Math.abs(s.x[k] - step) <= Math.max(1, (s.x[s.x.length - 1] - s.x[0]) / s.x.length);
        cells[0].textContent = near ? format(s.mean[k], rate) : "–";
        cells[1].textContent =
          near && s.runs > 1 ? `${format(s.low[k], rate)} to ${format(s.high[k], rate)}` : "";
        const v = s.vx.indexOf(step);
        cells[2].textContent = v < 0 ? "" : format(s.vy[v], rate);
      });
    });
    heads.forEach((head) => (head.textContent = `at step ${Math.round(step)}`));
  };

  const rest = () => {
    plots.forEach((plot) => plot.querySelector(".cursor").setAttribute("visibility", "hidden"));
    all(".readout").forEach((table, c) => {
      all("td", table).forEach((td, i) => (td.textContent = lastTexts[c][i]));
    });
    heads.forEach((head) => (head.textContent = "at the end"));
  };

  plots.forEach((plot) => {
    const point = (event) => {
      const box = plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * plot.viewBox.baseVal.width;
      show(nearest(steps, ((x - 38) / (plot.viewBox.baseVal.width - 42)) * Number(plot.dataset.end)));
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", rest);
    plot.addEventListener("blur", rest);
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      show(at + move);
    });
  });

  const arms = document.querySelector(".arms");
  if (arms) {
    arms.hidden = false;
    arms.addEventListener("change", () => {
      all("input", arms).forEach((box) => {
        all(`.chart [data-arm="${box.value}"]`).forEach((part) => part.classList.toggle("off", !box.checked));
      });
    });
  }

  const groups = all("details.group");
  const form = document.querySelector(".pickers");
  if (!form) return;
  form.hidden = false;
  const [run, task] = all("select", form);
  const step = document.getElementById("pick-step");
  const filters = document.querySelector(".filters");
  filters.hidden = false;
  const fill = (select, values, keep) => {
    select.replaceChildren(
      ...values.map((value) => {
        const option = document.createElement("option");
        option.value = value;
        option.textContent = value;
        return option;
      })
    );
    if (values.includes(keep)) select.value = keep;
  };
  const distinct = (list, key) => [...new Set(list.map((g) => g.dataset[key]))];
  const pick = () => {
    const ofRun = groups.filter((g) => g.dataset.run === run.value);
    const steps = distinct(ofRun, "step");
    step.max = steps.length - 1;
    const now = steps[Number(step.value)];
    document.getElementById("step-now").textContent = now;
    step.setAttribute("aria-valuetext", `step ${now}`);
    const ofStep = ofRun.filter((g) => g.dataset.step === now);
    fill(task, distinct(ofStep, "task"), task.value);
    groups.forEach((g) => {
      const on = ofStep.includes(g) && g.dataset.task === task.value;
      g.open = on;
      g.hidden = !on;
    });
    choose();
  };

  // Cards of the group in view: which are shown, and in which order.
  const value = (id) => document.getElementById(id).value;
  const orders = {
    return: (card) => Number(card.dataset.return),
    credit: (card) => Math.max(Number(card.dataset.up), -Number(card.dataset.down)),
    up: (card) => Number(card.dataset.up),
    down: (card) => -Number(card.dataset.down),
  };
  const wanted = (card) => {
    const errors = JSON.parse(card.dataset.errors);
    const error = value("by-error");
    return (
      ["all", card.dataset.outcome].includes(value("by-outcome")) &&
      (error === "all" || (error === "none" ? errors.length === 0 : errors.includes(error))) &&
      (!document.getElementById("by-sign").checked || Number(card.dataset.sign) > 0)
    );
  };
  const choose = () => {
    const group = groups.find((g) => !g.hidden);
    const cards = all(".card", group);
    const key = orders[value("by-order")];
    cards.sort((a, b) => key(b) - key(a));
    cards.forEach((card) => (card.hidden = !wanted(card)));
    cards[0].parentNode.append(...cards);
    const sum = (list) => list.reduce((n, card) => n + Number(card.dataset.count), 0);
    filters.querySelector("output").textContent =
      `${sum(cards.filter((card) => !card.hidden))} of ${sum(cards)} rollouts`;
  };
  filters.addEventListener("change", choose);
  filters.addEventListener("submit", (event) => event.preventDefault());
  const runs = distinct(groups, "run");
  const first = document.querySelector("details.group[open]") || groups[0];
  fill(run, runs, first.dataset.run);
  form.addEventListener("input", pick);
  form.addEventListener("submit", (event) => event.preventDefault());
  const firstSteps = distinct(groups.filter((g) => g.dataset.run === run.value), "step");
  step.max = firstSteps.length - 1;
  step.value = firstSteps.indexOf(first.dataset.step);
  fill(task, [first.dataset.task], first.dataset.task);
  pick();

  // A tooltip near the right or lower edge of the window opens to the other side.
  document.addEventListener("pointerover", (event) => {
    const turn = event.target.closest && event.target.closest(".turn");
    if (!turn) return;
    const box = turn.getBoundingClientRect();
    turn.classList.toggle("above", box.bottom + 220 > window.innerHeight && box.top > 240);
  });
})();
