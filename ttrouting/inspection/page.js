// The sections of the page: loads, tokens, text, tables, curves. What it draws with is in maps.js.
"use strict";

// --- load ------------------------------------------------------------------------------------------

const largest = (...arrays) => arrays.reduce((m, a) => a.reduce((n, x) => Math.max(n, Math.abs(x)), m), 0);
const minus = (after, before) => after.map((x, i) => x - before[i]);
const names = adapted ? ["base", "adapted", "adapted − base"] : ["base"];

const loads = names.map((title) => new HeatMap({
  title, rows: L, columns: E, cell: [Math.max(2, 300 / E), Math.max(6, Math.min(16, 480 / L))], stretch: true,
  rowName: (l) => short(facts.layers[l]), columnName: String, pick: (l) => chooseLayer(l),
  words: `Load of ${E} experts in ${L} layers, ${title}`,
  describe(l, e) {
    const lines = [`${facts.layers[l]}, expert ${e}`];
    for (const trace of traces) {
      const weight = trace.meanWeight(l, e), share = percent(trace.load[l * E + e], 1);
      lines.push(`${trace.name}: ${share} of tokens${weight === null ? "" : `, mean weight ${weight.toFixed(3)}`}`);
    }
    return lines.join("\n");
  },
}));
loads.forEach((map) => { map.row = make("div", "row"); map.field.append(map.row); });
byId("loads").append(...loads.map((map) => map.element));

function paintLoads() {
  const most = largest(...traces.map((trace) => trace.load));
  traces.forEach((trace, i) => loads[i].paint(trace.load, most, tones.amount, percent, 0));
  if (adapted) {
    const shift = minus(adapted.load, base.load);
    loads[2].paint(shift, largest(shift), tones.shift, percent, -1);
  }
}

// --- one layer, token by token -----------------------------------------------------------------------

const listed = (experts) => experts.map(([e, w]) => (w === null ? `${e}` : `${e} ${w.toFixed(3)}`)).join("   ") || "none";
const visible = (token) => token.replace(/\n/g, "↵").replace(/\t/g, "⇥");
const mean = (values, t) => { let sum = 0; for (let l = 0; l < L; l++) sum += values[t * L + l]; return sum / L; };

function aboutToken(t) {
  const lines = [`“${visible(facts.tokens[t])}”, token ${t}${t < facts.prompt_tokens ? "" : ", written"}`];
  for (const trace of traces) {
    const entropy = trace.entropy ? `, entropy ${mean(trace.entropy, t).toFixed(2)}` : "";
    lines.push(`${trace.name}, all layers: k ${mean(trace.count, t).toFixed(2)}${entropy}`);
  }
  if (adapted) lines.push(`experts differ in ${Math.round(changed[t] * L)} of ${L} layers`);
  lines.push(`${facts.layers[state.layer]}:`);
  for (const trace of traces) {
    const entropy = trace.entropy ? `  (entropy ${trace.entropy[t * L + state.layer].toFixed(2)})` : "";
    lines.push(`${trace.name}: ${listed(trace.experts(t, state.layer))}${entropy}`);
  }
  return lines.join("\n");
}

const width = Math.max(3, Math.min(14, Math.floor((byId("tokens").clientWidth - 40) / T)));
const strips = names.map((title) => new HeatMap({
  title: `${title}: ${base.weights ? "weight" : "choice"} of each expert (down) for each token (across)`,
  rows: E, columns: T, cell: [width, Math.max(3, Math.min(12, 320 / E))],
  rowName: String, columnName: String, words: `Weights of ${E} experts for ${T} tokens in one layer, ${title}`,
  pick: (_, t) => { spans[t].scrollIntoView({ block: "nearest" }); },
  describe(e, t) {
    chooseToken(t);
    const weights = traces.map((trace) => {
      const found = trace.experts(t, state.layer).find(([other]) => other === e);
      return `${trace.name} ${found ? (found[1] === null ? "chosen" : found[1].toFixed(3)) : "–"}`;
    });
    return `expert ${e}: ${weights.join(", ")}\n${aboutToken(t)}`;
  },
}));
byId("tokens").append(...strips.map((map) => map.element));
const lines = strips.map((map) => {
  if (facts.prompt_tokens < T) {
    const end = make("div", "line");
    end.style.left = `${(100 * facts.prompt_tokens) / T}%`;
    map.field.append(end);
  }
  const line = make("div", "line now");
  line.hidden = true;
  map.field.append(line);
  return line;
});

function paintStrips() {
  const dense = traces.map((trace) => trace.dense(state.layer)), most = largest(...dense);
  const number = (x) => x.toFixed(2);
  dense.forEach((values, i) => strips[i].paint(values, most, tones.amount, number, 0));
  if (adapted) {
    const shift = minus(dense[1], dense[0]);
    strips[2].paint(shift, largest(shift), tones.shift, number, -1);
  }
}

// --- text ------------------------------------------------------------------------------------------

const text = byId("text");
const spans = facts.tokens.map((token, t) => {
  const span = make("span", t < facts.prompt_tokens ? "" : "written", token.replace(/\n/g, "↵\n") || "∅");
  span.dataset.token = t;
  return span;
});
text.append(...spans);
text.addEventListener("pointermove", (event) => {
  const t = event.target.dataset.token;
  if (t === undefined) { hush(); return; }
  chooseToken(Number(t));
  say(event, aboutToken(Number(t)));
});
text.addEventListener("pointerleave", hush);

const modes = [
  adapted && ["changed", "layers whose experts changed"],
  ["k", "experts that ran (k)"],
  base.entropy && ["entropy", "entropy of the routers"],
  ["top", "top expert of the layer"],
].filter(Boolean);
byId("mode").append(...modes.map(([value, label]) => new Option(label, value)));
byId("which").hidden = !adapted;

function paintText() {
  const mode = byId("mode").value, trace = adapted && byId("trace").value === "adapted" ? adapted : base;
  const key = byId("text-legend");
  byId("which").hidden = !adapted || mode === "changed";
  key.replaceChildren();
  let colour;
  if (mode === "top") {
    const top = (t) => trace.experts(t, state.layer)[0]?.[0];
    colour = (t) => (top(t) === undefined ? null : tones.kind(top(t)));
    key.append("colours repeat; the number is in the tip");
  } else {
    const means = (one) => facts.tokens.map((_, t) => mean(mode === "k" ? one.count : one.entropy, t));
    const values = mode === "changed" ? changed : means(trace);
    // base and adapted share a scale
    let low = mode === "changed" ? 0 : Infinity, high = 0;
    for (const all of mode === "changed" ? [changed] : traces.map(means))
      for (const x of all) [low, high] = [Math.min(low, x), Math.max(high, x)];
    const even = (x) => tones.amount(x * x);
    colour = (t) => (high > low ? even((values[t] - low) / (high - low)) : null);
    const number = (x) => (mode === "changed" ? percent(x) : x.toFixed(2));
    key.append(high > low ? legend(number(low), number(high), even, 0) : `${number(high)} everywhere`);
  }
  spans.forEach((span, t) => {
    const found = colour(t);
    span.style.background = found ? css(found) : "";
    span.style.color = found ? inkOn(found) : "";
  });
}

// --- choices ---------------------------------------------------------------------------------------

byId("layer").append(...facts.layers.map((name, l) => new Option(name, l)));
byId("layer").addEventListener("change", (event) => chooseLayer(Number(event.target.value)));
byId("mode").addEventListener("change", paintText);
byId("trace").addEventListener("change", paintText);

function chooseLayer(layer) {
  state.layer = layer;
  byId("layer").value = layer;
  for (const map of loads) {
    map.row.style.top = `${(100 * layer) / L}%`;
    map.row.style.height = `${100 / L}%`;
  }
  paintStrips();
  if (byId("mode").value === "top") paintText();
}

function chooseToken(t) {
  if (state.token !== null) spans[state.token].classList.remove("here");
  state.token = t;
  spans[t].classList.add("here");
  for (const line of lines) {
    line.hidden = false;
    line.style.left = `${(100 * (t + 0.5)) / T}%`;
  }
}

// --- tables and curves -------------------------------------------------------------------------------

function table(heads, rows) {
  const found = make("table"), head = make("tr");
  head.append(...heads.map((name, i) => make("th", i ? "" : "left", name)));
  const top = make("thead"), body = make("tbody");
  top.append(head);
  body.append(...rows);
  found.append(top, body);
  return found;
}

function row(cells) {
  const found = make("tr");
  found.append(...cells.map((cell, i) => {
    const box = make("td", i ? "" : "left");
    box.append(...[cell].flat());
    return box;
  }));
  return found;
}

const pair = ([before, after]) => {
  const [a, b] = [before, after].map((x) => x.toFixed(2));
  return a === b ? a : `${a} → ${b}`;
};
const experts = (found, kind, sign) =>
  make("span", kind, found.slice(0, 3).map(([e, share]) => `${e} ${sign}${percent(share)}`).join(", "));

if (facts.changes.length) {
  byId("changes").hidden = false;
  const heads = ["layer", "tokens changed", "gained a token", "lost a token", "k", "entropy", "gained most", "lost most"];
  byId("changes").querySelector(".wide").append(table(heads, facts.changes.map((c) => row([
    c.name, percent(c.changed), c.gained.toFixed(2), c.lost.toFixed(2), pair(c.k), c.entropy ? pair(c.entropy) : "",
    experts(c.experts_gained, "gained", "+"), experts(c.experts_lost, "lost", "−"),
  ]))));
}

function draw({ name, losses, outcome }) {
  const known = losses.filter((x) => x !== null), [low, high] = [Math.min(...known), Math.max(...known)];
  const x = (i) => 44 + (266 * i) / Math.max(1, losses.length - 1);
  const y = (v) => 14 + 116 * (high > low ? (high - v) / (high - low) : 0.5);
  const points = losses.map((v, i) => [i, v]).filter(([, v]) => v !== null);
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
  const add = (tag, attributes, words, inside = svg) => {
    const found = document.createElementNS(space, tag);
    for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
    if (words) found.textContent = words;
    inside.append(found);
    return found;
  };
  svg.setAttribute("viewBox", "0 0 320 156");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Loss of ${name}: ${known.map((v) => v.toFixed(3)).join(", ")}`);
  add("text", { x: 38, y: y(high) + 3, "text-anchor": "end" }, high.toFixed(3));
  if (high > low) add("text", { x: 38, y: y(low) + 3, "text-anchor": "end" }, low.toFixed(3));
  add("text", { x: x(0), y: 150, "text-anchor": "middle" }, "0");
  add("text", { x: x(losses.length - 1), y: 150, "text-anchor": "end" }, `step ${losses.length - 1}`);
  add("path", { d: points.map(([i, v], n) => `${n ? "L" : "M"}${x(i)} ${y(v)}`).join("") });
  for (const [i, v] of points) add("title", {}, `step ${i}: ${v.toFixed(4)}`, add("circle", { cx: x(i), cy: y(v), r: 3 }));
  const box = make("div", "curve");
  box.append(make("h3", "", name), svg, make("p", "faint", outcome));
  return box;
}

if (facts.curves.length) {
  byId("curves").hidden = false;
  byId("curves").querySelector(".maps").append(...facts.curves.map(draw));
}

if (facts.next_tokens.length) {
  byId("next").hidden = false;
  const bar = (share) => {
    const found = make("span", "bar");
    found.style.width = `${(8 * share).toFixed(3)}rem`;
    return [found, percent(share, 1)];
  };
  const rows = facts.next_tokens.map(({ text: token, before, after }) => {
    const found = row([`“${visible(token)}”`, bar(before), ...(after === null ? [] : [bar(after)])]);
    found.children[2]?.classList.add("adapted");
    return found;
  });
  byId("next").querySelector(".wide").append(table(["token", ...traces.map((trace) => trace.name)], rows));
}

// --- begin -----------------------------------------------------------------------------------------

byId("summary").textContent = facts.summary;
function paint() {
  readTones();
  paintLoads();
  paintText();
  chooseLayer(state.layer);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
paint();
document.body.dataset.milliseconds = Math.round(performance.now() - begun);
