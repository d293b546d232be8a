// Curves: the readout under the pointer, and the check box of each method.

{
  const charts = data.charts;
  const plots = all("svg.plot");
  const heads = all(".readout .at");
  const lastTexts = all(".readout").map((table) => all("td", table).map((td) => td.textContent));

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
}
