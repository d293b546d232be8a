// Siblings side by side: a row for each rollout of a group, a column for each turn.

const groupTable = (g) => {
  const group = data.groups[g];
  const places = [...Array(group.rollouts[1] - group.rollouts[0]).keys()].map((n) => group.rollouts[0] + n);
  const width = Math.max(...places.map((i) => (data.rollouts[i].turns || []).length));
  const columns = [...Array(width).keys()];
  const cell = (i, k) => {
    const turn = (data.rollouts[i].turns || [])[k];
    if (!turn) return make("td", { class: "nothing" });
    const gist = text(turn.gist);
    const label = `rollout ${i - group.rollouts[0] + 1}, turn ${k + 1}: advantage ${signed(turn.advantage)}, ${gist}`;
    const named = { type: "button", tabindex: -1, "data-rollout": i, "data-turn": k, "aria-label": label };
    const said = [make("b", {}, signed(turn.advantage)), make("span", {}, gist)];
    return make("td", {}, make("button", { ...shaded("cell", turn.advantage), ...named }, ...said));
  };
  const rows = places.map((i) => {
    const rollout = data.rollouts[i];
    return make("tr", {}, make("th", { scope: "row" }, make("i", {}, String(i - group.rollouts[0] + 1)), mark(rollout)),
      ...columns.map((k) => cell(i, k)), make("td", { class: "sum" }, number(rollout.return)));
  });
  const titles = ["rollout", ...columns.map((k) => `turn ${k + 1}`), "return"];
  const head = make("tr", {}, ...titles.map((title) => make("th", { scope: "col" }, title)));
  const named = { class: "siblings", role: "grid", "aria-label": "siblings by turn" };
  return make("table", named, make("thead", {}, head), make("tbody", {}, ...rows));
};

const tally = (g) => {
  const group = data.groups[g];
  const own = data.rollouts.slice(...group.rollouts);
  const mean = own.reduce((sum, rollout) => sum + (rollout.return || 0), 0) / own.length;
  const found = data.outcomes.map((name) => [name, own.filter((rollout) => text(rollout.outcome) === name).length]);
  const said = found.filter(([, n]) => n).map(([name, n]) => `${n} ${name}`);
  return `${count(own.length, "rollout")}: ${said.join(", ")}. Mean return ${number(mean)}.`;
};

// Fills `box` with a group and a place for an opened rollout; `step` goes to other groups, `leave` back to the list.
const groupView = (box, g, where, step, leave) => {
  const group = data.groups[g];
  const opened = make("div", { class: "opened" });
  const golds = (group.golds || []).map(text);
  const accepted = golds.length ? `Accepted: ${golds.join(", ")}. ` : "";
  const table = groupTable(g);
  const cells = all("button", table);
  let from = cells[0];
  const reach = (cell) => {
    cells.forEach((other) => (other.tabIndex = other === cell ? 0 : -1));
    from = cell;
  };
  if (from) reach(from);
  const close = () => {
    opened.replaceChildren();
    if (from) from.focus();
  };
  const open = (cell) => {
    reach(cell);
    opened.replaceChildren(rolloutView(Number(cell.dataset.rollout), [button("Close", close)]));
    all(".turn", opened)[Number(cell.dataset.turn)].focus();
  };
  const beside = (cell, down, right) => {
    const row = cell.closest("tr");
    const rows = [...row.parentNode.children];
    const at = rows.indexOf(row);
    const k = Number(cell.dataset.turn);
    if (right) return all("button", row)[k + right];
    for (let to = at + down; rows[to]; to += down) if (all("button", rows[to])[k]) return all("button", rows[to])[k];
    return null;
  };
  table.addEventListener("click", (event) => {
    const cell = event.target.closest("button");
    if (cell) open(cell);
  });
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("button");
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!cell || !move) return;
    event.preventDefault();
    const to = beside(cell, ...move);
    if (!to) return;
    reach(to);
    to.focus();
  });
  box.onkeydown = (event) => {
    if (event.key !== "Escape") return;
    if (opened.firstChild) close();
    else leave();
  };
  const run = data.runs[group.run];
  box.replaceChildren(
    make(
      "div",
      { class: "pager" },
      button("Previous group", () => step(-1)),
      make("span", {}, where),
      button("Next group", () => step(1)),
      button("Back to the list", leave)
    ),
    make("h3", {}, text(group.question)),
    make("p", { class: "golds" }, accepted, `${text(run.title)}, step ${group.step}. ${tally(g)}`),
    make("div", { class: "scroll" }, table),
    make("p", { class: "hint" }, "Arrow keys move, Enter opens a rollout, Escape closes it and then the group."),
    opened
  );
  // Moves to the first turn of a rollout.
  return (i) => {
    const cell = cells.find((own) => Number(own.dataset.rollout) === i);
    if (!cell) return;
    reach(cell);
    cell.focus();
  };
};
