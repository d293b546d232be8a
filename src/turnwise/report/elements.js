// What all parts of the script share: the data, and elements that are made of text alone.
// Whatever a stranger wrote comes in as a string and goes out as a text node or an attribute that cannot run.

const all = (selector, from) => [...(from || document).querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const text = (place) => (place === undefined ? "" : data.texts[place]);
document.documentElement.classList.add("js");

const make = (tag, properties, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "weight") element.style.setProperty("--w", value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
};

const number = (value) =>
  value === null || value === undefined ? "–" : value.toFixed(2).replace("-0.00", "0.00").replace("-", "−");

const signed = (value) => {
  const plain = number(value);
  return value > 0 && plain !== "0.00" ? `+${plain}` : plain;
};

const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

// The class and weight by which an advantage is coloured; the root lets small ones be seen beside large ones.
const kind = (value) => (value === undefined || Math.abs(value) < 0.005 ? "none" : value > 0 ? "pos" : "neg");
const weight = (value) => Math.sqrt(Math.min(1, Math.abs(value || 0) / data.scale)).toFixed(2);
const shaded = (classes, value) => ({ class: `${classes} ${kind(value)}`, weight: weight(value) });

const MARKS = {
  right: "✓ right",
  wrong: "✗ wrong",
  failed: "✗ failed",
  "no answer": "✗ no answer",
  "not checked": "not checked",
};
const OF_ENVIRONMENTS = { right: "✓ solved", wrong: "✗ not solved" };
const mark = (rollout) => {
  const outcome = text(rollout.outcome);
  const kinds = { right: "right", "not checked": "" };
  const said = (data.groups[rollout.group].golds ? null : OF_ENVIRONMENTS[outcome]) || MARKS[outcome];
  return make("b", { class: outcome in kinds ? kinds[outcome] : "wrong" }, said);
};
const verdict = (rollout) => (rollout.said === undefined ? text(rollout.end) : `“${text(rollout.said)}”`);
const runOf = (rollout) => data.runs[data.groups[rollout.group].run];
