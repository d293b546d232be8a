// Which rollouts are in view: filters, order, pages, and the one that is open. Rows exist for the page in view alone.

const browser = byId("browser");
if (browser) {
  const PAGE = 40;
  const rollouts = data.rollouts;
  const names = ["run", "step", "outcome", "error", "sign", "order", "text"];
  const fields = Object.fromEntries(names.map((name) => [name, byId(`by-${name}`)]));
  const list = byId("rows");
  const credits = rollouts.map(({ turns }) => (turns || []).map((turn) => turn.advantage).filter((a) => a !== undefined));
  const most = (values, pick) => (values.length ? pick(...values) : 0);
  const stepOf = (i) => data.groups[rollouts[i].group].step;
  const orders = {
    credit: (i) => most(credits[i].map(Math.abs), Math.max),
    up: (i) => most(credits[i], Math.max),
    down: (i) => -most(credits[i], Math.min),
    high: (i) => rollouts[i].return || 0,
    low: (i) => -(rollouts[i].return || 0),
    step: (i) => -stepOf(i),
  };
  const steps = [...new Set(data.groups.map((group) => group.step))].sort((a, b) => a - b);
  const searched = rollouts.map(({ group, said }) =>
    `${text(data.groups[group].question)}\n${text(said)}`.toLowerCase()
  );
  let found = [];
  let page = 0;
  let grouped = false;
  let groups = [];
  let group = null;

  const fill = (select, options) =>
    select.replaceChildren(...options.map(([value, said]) => make("option", { value }, said)));
  const methods = [...new Set(data.runs.map((run) => run.method))];
  fill(fields.run, [
    ["", "all"],
    ...(methods.length > 1 ? methods.map((method) => [`m${method}`, text(method)]) : []),
    ...data.runs.map((run, i) => [`r${i}`, `${text(run.title)} · ${text(run.name)}`]),
  ]);
  const errors = [...new Set(rollouts.flatMap((rollout) => rollout.errors || []))];
  const outcomes = data.outcomes.filter((name) => rollouts.some((rollout) => text(rollout.outcome) === name));
  fill(fields.outcome, [["", "any"], ...outcomes.map((name) => [name, name])]);
  fill(fields.error, [["", "any"], ["none", "none"], ...errors.map((place) => [`e${place}`, text(place)])]);
  fields.step.max = steps.length;

  const wanted = () => {
    const run = fields.run.value;
    const only = Number(fields.step.value) ? steps[Number(fields.step.value) - 1] : null;
    const outcome = fields.outcome.value;
    const error = fields.error.value;
    const sign = fields.sign.value;
    const said = fields.text.value.trim().toLowerCase();
    return (rollout, i) => {
      const own = data.groups[rollout.group];
      const failed = rollout.errors || [];
      return (
        (!run || run === `r${own.run}` || run === `m${data.runs[own.run].method}`) &&
        (only === null || own.step === only) &&
        (!outcome || text(rollout.outcome) === outcome) &&
        (!error || (error === "none" ? !failed.length : failed.some((place) => error === `e${place}`))) &&
        (!sign || (rollout.flips && rollout.flips[sign])) &&
        (!said || searched[i].includes(said))
      );
    };
  };

  // One row; its rollout opens below it.
  const row = (i) => {
    const rollout = rollouts[i];
    const chip = ({ advantage }) => make("span", shaded("chip", advantage), signed(advantage));
    const chips = (rollout.turns || []).map(chip);
    return make("li", {}, make("button", { type: "button", class: "row", "aria-expanded": "false", "data-rollout": i },
      make("span", { class: "place" }, `step ${stepOf(i)} · ${text(runOf(rollout).title)}`),
      make("span", { class: "question" }, text(data.groups[rollout.group].question)),
      make("span", { class: "ended" }, verdict(rollout), " ", mark(rollout)),
      make("span", { class: "chips" }, ...chips)));
  };
  const close = () => {
    const open = list.querySelector('[aria-expanded="true"]');
    if (!open) return null;
    open.setAttribute("aria-expanded", "false");
    open.nextSibling.remove();
    return open;
  };
  const open = (head) => {
    if (close() === head) return;
    const i = Number(head.dataset.rollout);
    head.setAttribute("aria-expanded", "true");
    const g = rollouts[i].group;
    const others = data.groups[g].rollouts[1] - data.groups[g].rollouts[0];
    head.parentNode.append(rolloutView(i, [
      button(`Its group (${others})`, () => showGroup(g, i)),
      button("Close", () => close().focus()),
    ]));
  };

  const showPage = () => {
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.max(0, Math.min(last, page));
    const shown = found.slice(page * PAGE, (page + 1) * PAGE);
    list.replaceChildren(...shown.map(row));
    const from = page * PAGE;
    const now = `${from + 1} to ${from + shown.length} of ${found.length.toLocaleString("en")}`;
    byId("page-now").textContent = shown.length ? now : "";
    byId("page-back").disabled = page === 0;
    byId("page-on").disabled = page === last;
    all(".pager", byId("list"))[0].hidden = last === 0;
  };

  const view = (side) => {
    grouped = side;
    byId("as-list").setAttribute("aria-pressed", String(!side));
    byId("as-group").setAttribute("aria-pressed", String(side));
    byId("list").hidden = side;
    byId("group").hidden = !side;
    if (!side) byId("group").replaceChildren();
  };
  const showGroup = (g, focused) => {
    view(true);
    group = g;
    const at = groups.indexOf(g);
    const where = at < 0 ? "outside the filters" : `group ${at + 1} of ${groups.length}`;
    const step = (by) => {
      showGroup(groups[(Math.max(at, 0) + by + groups.length) % groups.length]);
      all(".pager button", byId("group"))[by < 0 ? 0 : 1].focus();
    };
    const leave = () => {
      view(false);
      const back = list.querySelector('[aria-expanded="true"]') || list.querySelector(".row") || byId("as-list");
      back.focus();
    };
    const focus = groupView(byId("group"), g, where, step, leave);
    if (focused !== undefined) focus(focused);
  };
  // The group that was in view last, or the first one of the filters.
  const showGroups = () => {
    view(true);
    if (groups.length) showGroup(groups.includes(group) ? group : groups[0]);
    else byId("group").replaceChildren(make("p", { class: "hint" }, "No group has such a rollout."));
  };

  const choose = () => {
    const key = orders[fields.order.value];
    const test = wanted();
    found = [...rollouts.keys()].filter((i) => test(rollouts[i], i));
    const keys = new Map(found.map((i) => [i, key(i)]));
    found.sort((a, b) => keys.get(b) - keys.get(a) || a - b);
    groups = [...new Set(found.map((i) => rollouts[i].group))];
    const now = Number(fields.step.value);
    byId("step-now").textContent = now ? String(steps[now - 1]) : "all";
    fields.step.setAttribute("aria-valuetext", now ? `step ${steps[now - 1]}` : "all steps");
    const of = `${found.length.toLocaleString("en")} of ${count(rollouts.length, "rollout")}`;
    byId("found").textContent = `${of}, in ${count(groups.length, "group")}`;
    page = 0;
    showPage();
    if (grouped) showGroups();
  };

  const turnTo = (by) => {
    page += by;
    showPage();
    const first = list.querySelector(".row");
    if (first) first.focus();
  };
  byId("page-back").addEventListener("click", () => turnTo(-1));
  byId("page-on").addEventListener("click", () => turnTo(1));
  byId("as-list").addEventListener("click", () => view(false));
  byId("as-group").addEventListener("click", showGroups);
  byId("filters").addEventListener("input", choose);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("click", (event) => {
    const head = event.target.closest(".row");
    if (head) open(head);
  });
  list.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      const was = close();
      if (was) was.focus();
      return;
    }
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!by || !event.target.classList.contains("row")) return;
    event.preventDefault();
    const heads = all(".row", list);
    const to = heads[heads.indexOf(event.target) + by];
    if (to) to.focus();
  });

  const key = (share) => make("span", shaded("key", share * data.scale), signed(share * data.scale));
  const keys = { class: "keys", role: "img", "aria-label": "colour scale of the advantage" };
  byId("scale").append(
    make("span", {}, "less likely"),
    make("span", keys, ...[-1, -0.5, 0, 0.5, 1].map(key)),
    make("span", {}, "more likely"),
    make("span", { class: "key env" }, "grey: from tools, never trained on")
  );
  browser.hidden = false;
  choose();
}
