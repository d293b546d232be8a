// One rollout: each turn's text shaded token by token, its numbers, and why.

const facts = (rows) =>
  make("dl", { class: "facts" }, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));

const pairs = (head, found) => (found || []).map(([name, value]) => [`${head}${text(name)}`, number(value)]);

// Accepted answers in what a tool said are underlined, as whole words.
const underlined = (said, golds) => {
  const names = golds.filter((name) => name.trim().length > 1).sort((a, b) => b.length - a.length);
  if (!names.length) return [said];
  const words = names.map((name) => name.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")).join("|");
  const parts = said.split(new RegExp(`(?<![\\p{L}\\p{N}_])(${words})(?![\\p{L}\\p{N}_])`, "iu"));
  return parts.map((part, i) => (i % 2 ? make("u", {}, part) : part));
};

const tokenText = (turn, k) => {
  const said = text(turn.text);
  const known = turn.cuts !== undefined;
  const lengths = known ? data.cuts[turn.cuts] : [said.length];
  const own = (turn.by_token || {}).advantages;
  const values = (turn.by_token || {}).values;
  const credit = (i) => (own && known ? own[i] : turn.advantage);
  let end = 0;
  const spans = lengths.map((length, i) => {
    end += length;
    const piece = length ? said.slice(end - length, end) : "▪";
    return make("span", shaded(length ? "token" : "token bare", credit(i)), piece);
  });
  const named = { class: "said", tabindex: known ? 0 : null, role: "group", "aria-label": `text of turn ${k + 1}` };
  const pre = make("pre", named, ...spans);
  if (end < said.length || !said) pre.append(said ? said.slice(end) : "(nothing)");
  if (!known) {
    const note = "Shaded as a whole: the run holds no tokenizer that cuts this text.";
    return [pre, make("p", { class: "reading" }, note)];
  }

  const rest = `${count(lengths.length, "token")}; point at one, or focus the text and use left and right.`;
  const reading = make("output", { class: "reading" }, rest);
  let at = -1;
  const go = (i) => {
    if (spans[at]) spans[at].classList.remove("at");
    at = i;
    if (!spans[at]) return (reading.textContent = rest);
    spans[at].classList.add("at");
    const name = lengths[at] ? `“${spans[at].textContent}”` : "that adds no text";
    const value = values ? `; value ${number(values[at])}` : "";
    reading.textContent = `Token ${at + 1} of ${lengths.length}, ${name}: advantage ${signed(credit(at))}${value}`;
  };
  pre.addEventListener("pointerover", (event) => go(spans.indexOf(event.target)));
  pre.addEventListener("pointerleave", () => go(-1));
  pre.addEventListener("blur", () => go(-1));
  pre.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go(Math.max(0, Math.min(spans.length - 1, to)));
  });
  return [pre, reading];
};

const turnView = (rollout, k, golds) => {
  const turn = rollout.turns[k];
  const last = k === rollout.turns.length - 1;
  const flips = rollout.flips || {};
  const dealt = runOf(rollout).placebo;
  const opposed = [
    (flips.outcome || []).includes(k) ? "The outcome points the other way." : "",
    (flips.own || []).includes(k) ? `${dealt ? "The reward dealt to it" : "Its own reward"} points the other way.` : "",
  ].filter(Boolean);
  const rows = [
    ...pairs(dealt ? "dealt: " : "reward: ", turn.paid),
    ...(last ? pairs("outcome: ", rollout.paid) : []),
    ["return from here on", number(turn.return)],
    ...pairs("baseline: ", turn.bases),
    ...(turn.value === undefined ? [] : [["critic’s value before", number(turn.value)]]),
    ["advantage", turn.advantage === undefined ? "none" : signed(turn.advantage)],
    ["in the loss", turn.masked ? "no (masked out)" : "yes"],
    ["tokens sampled", turn.tokens.toLocaleString("en")],
    ...(turn.results || []).map((result) => ["tool", result.error === undefined ? "ran" : text(result.error)]),
  ];
  const notes = [`turn ${k + 1}`, ...(turn.masked ? ["not in the loss"] : []), ...(last ? [text(rollout.end)] : [])];
  const credit = signed(turn.advantage);
  const label = `turn ${k + 1}, advantage ${credit}`;
  const badge = make("strong", shaded("adv", turn.advantage), credit);
  const why = make("p", { class: "why" }, text(turn.why), ...opposed.map((said) => make("b", { class: "against" }, said)));
  return make(
    "section",
    { ...shaded(`turn${turn.masked ? " masked" : ""}`, turn.advantage), tabindex: -1, "aria-label": label },
    make("div", { class: "head" }, make("span", {}, notes.join(" · ")), badge),
    make("div", { class: "columns" }, make("div", {}, ...tokenText(turn, k), why), facts(rows)),
    ...(turn.results || []).map((result) =>
      make("div", { class: "env" }, result.error === undefined ? null : make("b", {}, text(result.error), " "),
        make("pre", {}, ...underlined(text(result.text), golds)))
    )
  );
};

// The whole rollout; `actions` are buttons for its head.
const rolloutView = (i, actions) => {
  const rollout = data.rollouts[i];
  const group = data.groups[rollout.group];
  const golds = (group.golds || []).map(text);
  const turns = rollout.turns || [];
  const sums = turns.map((turn, k) => [k, (turn.paid || []).reduce((sum, [, value]) => sum + value, 0), turn.paid]);
  const outcome = (rollout.paid || []).reduce((sum, [, value]) => sum + value, 0);
  const paid = sums.filter(([, , own]) => own).map(([k, sum]) => `turn ${k + 1} ${number(sum)}`);
  const parts = [...paid, `outcome ${number(outcome)}`];
  const more = [
    ...(golds.length ? [` Accepted: ${golds.join(", ")}`] : []),
    ...(group.kind === undefined ? [] : [` (${text(group.kind)})`]),
  ];
  return make(
    "article",
    { class: "rollout", "aria-label": `rollout: ${verdict(rollout)}` },
    make("header", {}, make("em", {}, verdict(rollout)), mark(rollout), make("span", { class: "actions" }, ...actions)),
    make("p", { class: "asked" }, text(group.question), ...more.map((said) => make("span", {}, said))),
    ...turns.map((_, k) => turnView(rollout, k, golds)),
    rollout.failed === undefined ? null : make("p", { class: "failed" }, text(rollout.failed)),
    make("footer", {}, `Return ${number(rollout.return)}: ${parts.join(" + ")}`)
  );
};

const button = (said, act, properties) => {
  const element = make("button", { type: "button", ...properties }, said);
  element.addEventListener("click", act);
  return element;
};
