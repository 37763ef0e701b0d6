// Draws the page of `ds_fp8 report` from the JSON that stands in it (`ds_fp8/cli/page.py` says what is there).
// Nothing is fetched. What has no numbers is told to be "not measured"; a line of zeros would claim a measurement.
"use strict";

const REPORT = JSON.parse(document.getElementById("data").textContent);
const RUNS = REPORT.runs, ROLES = REPORT.roles;
const WITH_LAYERS = RUNS.filter((run) => run.layers.length);
const COLOURS = ["#3b82d6", "#e07b39", "#3aa76d", "#c94f7c", "#8b6fd6", "#b8962e", "#2aa5b8", "#d65f5f", "#7f8c3a", "#a06b4f"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const MOST_LINES = 60;   // of one chart; more cannot be told apart
const QUANTITIES = {
  amax: { title: "largest absolute value", axis: "amax", log: true },
  scale: { title: "scale", axis: "factor into FP8", log: true },
  underflow: { title: "share flushed to zero", axis: "% of the elements", log: false, percent: true },
};
const WHY_NONE = {
  loss: "the script does not hand its loss to engine.backward, and no other log was given",
  sent: "no FP8 communication was counted: one rank, or a job without msamp, whose communication is DeepSpeed's own",
};
const state = { filter: "", mode: "groups", ranks: "each", smoothing: 0, hidden: new Set() };
const charts = [];

function element(tag, text, parent, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (parent) parent.append(made);
  return made;
}

// --- numbers ---------------------------------------------------------------------------------------------------------

// Exponential mean without the bias of its start; of logarithms where the axis has them.
function smooth(values, log) {
  const weight = state.smoothing;
  if (!weight) return values;
  let mean = 0, share = 0;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * (log ? Math.log(Math.max(value, 1e-300)) : value);
    share = weight * share + (1 - weight);
    return log ? Math.exp(mean / share) : mean / share;
  });
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

// Several [steps, values] as { steps, middle, low, high } over all their steps.
function range(series) {
  const at = new Map();
  for (const [steps, values] of series) {
    steps.forEach((step, index) => at.has(step) ? at.get(step).push(values[index]) : at.set(step, [values[index]]));
  }
  const steps = [...at.keys()].sort((a, b) => a - b), every = steps.map((step) => at.get(step));
  return { steps, middle: every.map(median), low: every.map((v) => Math.min(...v)), high: every.map((v) => Math.max(...v)) };
}

const groupOf = (layer) => layer.replace(/(^|\.)\d+(?=\.|$)/g, "$1*");

function matches(layer) {
  const wanted = state.filter.trim();
  if (!wanted) return true;
  if (!wanted.includes("*")) return layer.includes(wanted);
  const pattern = wanted.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&")).join(".*");
  return new RegExp(`^${pattern}$`).test(layer);
}

// --- lines -----------------------------------------------------------------------------------------------------------

function line(name, steps, values, look, more = {}) {
  const markers = steps.length < 40 ? "lines+markers" : "lines";
  return { type: "scatter", x: steps, y: values, name, mode: markers, marker: { size: 4 }, line: { width: 1.6, ...look }, ...more };
}

// A median with the range around it.
function band(name, series, look, log, scale) {
  const { steps, middle, low, high } = range(series);
  const fit = (values) => smooth(values, log).map((value) => value * scale);
  const edge = { mode: "lines", hoverinfo: "skip", line: { width: 0, color: look.color } };
  return [
    line(name, steps, fit(low), look, edge),
    line(name, steps, fit(high), look, { ...edge, fill: "tonexty", fillcolor: look.color + "2e" }),
    line(name, steps, fit(middle), look),
  ];
}

// Lines of a quantity that each rank has once: the loss, the bytes.
function linesOfRanks(run, index, name, label, look, scale) {
  const ranks = Object.entries(run[name]);
  if (!ranks.length) return [];
  const prefix = `${run.name}${label}`;
  if (state.ranks === "range" && ranks.length > 1) return band(prefix, ranks.map((entry) => entry[1]), look, false, scale);
  return ranks.flatMap(([rank, [steps, values]]) => {
    const title = ranks.length > 1 ? `${prefix}, rank ${rank}` : prefix, scaled = values.map((value) => value * scale);
    const drawn = [line(title, steps, smooth(scaled, false), look)];
    if (state.smoothing) drawn.unshift(line(title, steps, scaled, look, { opacity: 0.25, mode: "lines", hoverinfo: "skip" }));
    return drawn;
  });
}

function lossLines() {
  return RUNS.flatMap((run, index) => linesOfRanks(run, index, "loss", "", { color: COLOURS[index % COLOURS.length] }, 1));
}

function byteUnit() {
  const sizes = RUNS.flatMap((run) => ["sent", "deepspeed"].flatMap((name) => Object.values(run[name]).flatMap((s) => s[1])));
  const largest = sizes.reduce((a, b) => Math.max(a, b), 0);
  return [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]].find((unit) => largest >= unit[1]) || ["B", 1];
}

function byteLines() {
  const factor = 1 / byteUnit()[1];
  return RUNS.flatMap((run, index) => {
    const color = COLOURS[index % COLOURS.length];
    return [
      ...linesOfRanks(run, index, "sent", ": sent", { color }, factor),
      ...linesOfRanks(run, index, "deepspeed", ": DeepSpeed alone", { color, dash: "dot" }, factor),
    ];
  });
}

// The names that get a colour: groups, or layers, in the order of the first run that has them.
function shownNames() {
  const names = new Set();
  for (const run of RUNS) for (const layer of run.layers) if (matches(layer)) names.add(state.mode === "groups" ? groupOf(layer) : layer);
  return [...names];
}

function operandLines(role, quantity, names) {
  const { log, percent } = QUANTITIES[quantity], factor = percent ? 100 : 1, lines = [];
  WITH_LAYERS.forEach((run) => {
    const found = new Map();
    for (const [ofRole, ofQuantity, layer, rank, steps, values] of run.lines) {
      if (ofRole !== role || ofQuantity !== quantity || !matches(run.layers[layer])) continue;
      const name = state.mode === "groups" ? groupOf(run.layers[layer]) : run.layers[layer];
      if (!names.has(name) || state.hidden.has(name)) continue;
      if (!found.has(name)) found.set(name, []);
      found.get(name).push([rank, steps, values]);
    }
    for (const [name, series] of found) {
      const look = { color: names.get(name), dash: DASHES[WITH_LAYERS.indexOf(run) % DASHES.length] };
      const title = WITH_LAYERS.length > 1 ? `${run.name}: ${name}` : name;
      if (state.mode === "groups" || state.ranks === "range") {
        lines.push(...band(title, series.map(([, steps, values]) => [steps, values]), look, log, factor));
      } else {
        for (const [rank, steps, values] of series) {
          const ofRank = run.ranks.length > 1 ? `${title}, rank ${rank}` : title;
          lines.push(line(ofRank, steps, smooth(values, log).map((value) => value * factor), look));
        }
      }
    }
    lines.push(...alarmMarks(run, role, quantity, names, factor));
  });
  return lines;
}

// A cross where an alarm was raised, at the value of its layer; on the lower edge where there is none (inf, NaN).
function alarmMarks(run, role, quantity, names, factor) {
  const x = [], y = [], text = [];
  for (const group of run.alarms) for (const row of group.rows) {
    const name = state.mode === "groups" ? groupOf(row.fqn) : row.fqn;
    if (row.role !== role || !matches(row.fqn) || !names.has(name) || state.hidden.has(name)) continue;
    const own = run.lines.find((l) => l[0] === role && l[1] === quantity && run.layers[l[2]] === row.fqn && row.ranks.includes(l[3]));
    for (const step of row.steps) {
      let index = own ? own[4].findIndex((at) => at >= step) : -1;
      x.push(step);
      y.push(index < 0 ? null : own[5][index] * factor);
      text.push(`${group.kind}: ${row.fqn} ${row.role}`);
    }
  }
  if (!x.length) return [];
  const look = { symbol: "x", size: 9, color: css("--bad") };
  return [{ type: "scatter", x, y, text, name: "alarm", mode: "markers", marker: look, hovertemplate: "step %{x}<br>%{text}<extra></extra>", isAlarm: true }];
}

// --- charts ----------------------------------------------------------------------------------------------------------

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Powers of ten that a chart spans: few of them are labelled at 1, 2 and 5.
function decades(lines) {
  const values = lines.flatMap((line) => line.y).filter((value) => value > 0);
  return values.length ? Math.log10(values.reduce((a, b) => Math.max(a, b)) / values.reduce((a, b) => Math.min(a, b))) : 0;
}

function layout(axis, log, lines) {
  const line = css("--line"), lost = lines.filter((l) => l.isAlarm).flatMap((l) => l.x.filter((_, i) => l.y[i] === null));
  const common = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true, tickfont: { size: 11 } };
  return {
    autosize: true, showlegend: false, hovermode: "closest", dragmode: "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--text"), size: 11 },
    margin: { l: 52, r: 10, t: 8, b: 38 },
    xaxis: { ...common, title: { text: "optimizer step", standoff: 6 }, nticks: 7 },
    yaxis: { ...common, title: { text: axis, standoff: 6 }, type: log ? "log" : "linear", exponentformat: "power", nticks: 7, ...(log ? { dtick: decades(lines) > 3 ? 1 : "D2" } : { rangemode: axis.startsWith("%") ? "tozero" : "normal" }) },
    shapes: [...new Set(lost)].map((x) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: css("--bad"), width: 1, dash: "dot" } })),
  };
}

function card(parent, title, unit, axis, log, read, reason) {
  const box = element("div", null, parent, { class: "card" });
  const head = element("h3", title + " ", box);
  if (unit) element("small", unit, head);
  const none = element("p", `not measured: ${reason}`, box, { class: "none", hidden: "" });
  const chart = element("div", null, box, { class: "chart", role: "img", "aria-label": `${title}, ${axis} over optimizer steps` });
  charts.push({ chart, none, axis, log, read });
}

function draw() {
  for (const { chart, none, axis, log, read } of charts) {
    const lines = read().map((one) => ({ ...one }));
    const measured = lines.some((one) => one.isAlarm || one.y.length);
    none.hidden = measured;
    chart.hidden = !measured;
    if (measured) Plotly.react(chart, lines, layout(axis, log, lines), { responsive: true, displayModeBar: false });
  }
}

function chip(parent, name, colour, tag, attributes = {}) {
  const made = element(tag, null, parent, { class: "chip", ...attributes });
  element("i", null, made, { style: `color: ${colour}` });
  element("span", name, made);
  return made;
}

function redraw() {
  colours = nameColours();
  legend();
  draw();
}

let colours = new Map();

function nameColours() {
  return new Map(shownNames().slice(0, MOST_LINES).map((name, index) => [name, COLOURS[index % COLOURS.length]]));
}

function legend() {
  const box = document.getElementById("legend"), names = shownNames();
  box.replaceChildren();
  for (const [name, colour] of colours) {
    const made = chip(box, name, colour, "button", { type: "button", title: "hide or show" });
    made.classList.toggle("off", state.hidden.has(name));
    made.onclick = () => { state.hidden.has(name) ? state.hidden.delete(name) : state.hidden.add(name); redraw(); };
  }
  const layers = new Set(RUNS.flatMap((run) => run.layers)), kept = [...layers].filter(matches).length;
  const more = names.length > MOST_LINES ? `; drawn are the first ${MOST_LINES} of ${names.length} lines, filter to see others` : "";
  const dashes = WITH_LAYERS.length > 1 ? `; ${WITH_LAYERS.map((run, i) => `${run.name} ${["solid", "dashed", "dotted", "dash-dotted"][i % 4]}`).join(", ")}` : "";
  const what = state.mode === "groups" ? "A line is the median of a group, its band the least to the largest; a cross is an alarm" : "A cross is an alarm";
  document.getElementById("shown").textContent = layers.size ? `${kept} of ${layers.size} layers${more}. ${what}${dashes}.` : "";
}

// --- the page --------------------------------------------------------------------------------------------------------

function alarms() {
  const section = document.getElementById("alarms"), several = RUNS.length > 1;
  for (const run of RUNS) {
    const prefix = several ? `${run.name}: ` : "";
    if (!run.banner) { element("p", `${prefix}not measured: a run without telemetry`, section, { class: "note" }); continue; }
    if (!run.alarms.length) element("p", `${prefix}No alarms.`, section);
    for (const group of run.alarms) {
      const box = element("details", null, section, { class: "alarm" }), head = element("summary", null, box);
      element("b", `${prefix}${group.kind}`, head);
      const operands = group.rows.length === 1 ? `${group.rows[0].fqn}, ${group.rows[0].role}` : `${group.rows.length} operands`;
      head.append(` ${operands}. Cure: ${group.cure}.`);
      if (group.rows.length <= 3) box.open = true;
      const table = element("table", null, element("div", null, box, { class: "scroll" }));
      const top = element("tr", null, table);
      for (const name of ["layer", "operand", "steps", ...(run.ranks.length > 1 ? ["ranks"] : []), "finding"]) element("th", name, top);
      for (const row of group.rows) {
        const cells = element("tr", null, table);
        element("td", row.fqn, cells);
        element("td", row.role, cells);
        element("td", row.steps.length > 6 ? `${row.steps[0]} to ${row.steps.at(-1)}, ${row.steps.length} times` : row.steps.join(", "), cells);
        if (run.ranks.length > 1) element("td", row.ranks.join(", "), cells);
        element("td", row.finding, cells);
      }
    }
  }
}

function runs() {
  const thinned = RUNS.filter((run) => run.every > 1).map((run) => `${run.name}: a point stands for ${run.every} looked-at steps (their largest amax and underflow, smallest scale, mean loss and bytes)`);
  document.getElementById("runs-line").textContent = [RUNS.map((run) => run.source).join("; "), ...thinned].join(". ");
  const table = document.getElementById("facts"), head = element("tr", null, table);
  element("th", "", head);
  for (const run of RUNS) element("th", run.name, head);
  RUNS[0].facts.forEach(([name], index) => {
    const row = element("tr", null, table);
    element("td", name, row);
    for (const run of RUNS) element("td", run.facts[index][1] ?? "not measured", row);
  });
  const banners = document.getElementById("banners");
  for (const run of RUNS) {
    if (!run.banner) continue;
    const box = element("div", null, banners);
    if (RUNS.length > 1) element("h3", run.name, box);
    element("pre", run.banner, box);
  }
}

function controls() {
  const on = (id, event, change) => document.getElementById(id).addEventListener(event, (e) => { change(e.target); redraw(); });
  const ranks = document.getElementById("ranks"), most = Math.max(...RUNS.map((run) => run.ranks.length));
  for (const [value, text] of [["each", "each"], ["range", "median and range"]]) element("option", text, ranks, { value });
  ranks.disabled = most < 2;
  state.ranks = ranks.value = most > 8 ? "range" : "each";
  on("filter", "input", (input) => { state.filter = input.value; });
  on("mode", "change", (input) => { state.mode = input.value; state.hidden.clear(); });
  on("ranks", "change", (input) => { state.ranks = input.value; });
  on("smoothing", "input", (input) => {
    state.smoothing = Number(input.value);
    document.getElementById("smoothing-value").textContent = state.smoothing ? `over about ${Math.round(1 / (1 - state.smoothing))} points` : "off";
  });
  if (new Set(RUNS.flatMap((run) => run.layers)).size <= 8) state.mode = document.getElementById("mode").value = "layers";
}

alarms();
runs();
const [progress, operands] = ["progress", "operands"].map((id) => document.querySelector(`#${id} .cards`));
RUNS.forEach((run, index) => chip(document.getElementById("run-legend"), run.name, COLOURS[index % COLOURS.length], "span"));
card(progress, "Loss", RUNS.length > 1 ? "all runs" : "", "loss", false, lossLines, WHY_NONE.loss);
card(progress, "Sent by a rank for each step", "dotted: DeepSpeed alone", byteUnit()[0], false, byteLines, WHY_NONE.sent);
for (const [quantity, { title, axis, log }] of Object.entries(QUANTITIES)) {
  for (const role of ROLES) {
    card(operands, `${role}: ${title}`, "", axis, log, () => operandLines(role, quantity, colours), "the log has no reading of it");
  }
}
controls();
redraw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
