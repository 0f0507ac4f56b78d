// What the page draws with: traces, colours, tips, heat-maps. T tokens, L layers, E experts, K columns of experts a token.
"use strict";
const begun = performance.now();
const facts = JSON.parse(document.getElementById("facts").textContent);
const T = facts.tokens.length, L = facts.layers.length, E = facts.num_experts;
const byId = (id) => document.getElementById(id);
const percent = (x, digits = 0) => `${(100 * x).toFixed(digits)} %`;
const short = (name) => (name.match(/\d+/g) || [name]).at(-1);
const state = { layer: facts.changes.length ? facts.changes[0].index : L >> 1, token: null };

// --- data ----------------------------------------------------------------------------------------

function decode(text, Kind) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Kind(bytes.buffer);
}

class Trace {
  constructor(name, { ids, weights, entropy, k }) {
    this.name = name;
    this.K = k; // columns
    this.ids = decode(ids, Int16Array); // [T, L, K]
    this.weights = weights && decode(weights, Float32Array); // [T, L, K]
    this.entropy = entropy && decode(entropy, Float32Array); // [T, L]
    this.load = new Float32Array(L * E);
    this.total = new Float32Array(L * E); // sums of weights
    this.count = new Uint16Array(T * L); // experts that ran
    for (let t = 0, i = 0; t < T; t++)
      for (let l = 0; l < L; l++)
        for (let k = 0; k < this.K; k++, i++) {
          const e = this.ids[i];
          if (e < 0) continue;
          this.load[l * E + e] += 1 / T;
          this.total[l * E + e] += this.weights ? this.weights[i] : 0;
          this.count[t * L + l]++;
        }
  }
  // the experts of a token in a layer, heaviest first: [[expert, weight or null], ...]
  experts(t, l) {
    const found = [];
    for (let i = (t * L + l) * this.K, end = i + this.K; i < end; i++)
      if (this.ids[i] >= 0) found.push([this.ids[i], this.weights && this.weights[i]]);
    return found.sort((a, b) => b[1] - a[1]);
  }
  // [E, T] of one layer; 1 stands for a weight that is not known
  dense(l) {
    const found = new Float32Array(E * T);
    for (let t = 0; t < T; t++)
      for (let i = (t * L + l) * this.K, end = i + this.K; i < end; i++)
        if (this.ids[i] >= 0) found[this.ids[i] * T + t] = this.weights ? this.weights[i] : 1;
    return found;
  }
  meanWeight(l, e) {
    const share = this.load[l * E + e];
    return this.weights && share ? this.total[l * E + e] / (share * T) : null;
  }
}

const base = new Trace("base", facts.base);
const adapted = facts.adapted && new Trace("adapted", facts.adapted);
const traces = adapted ? [base, adapted] : [base];
const changed = new Float32Array(T); // share of layers whose set of experts differs
if (adapted)
  for (let t = 0; t < T; t++)
    for (let l = 0; l < L; l++) {
      const set = (trace) => trace.experts(t, l).map(([e]) => e).sort((a, b) => a - b).join();
      if (set(base) !== set(adapted)) changed[t] += 1 / L;
    }

// --- colours: the style sheet's, mixed ---------------------------------------------------------------

let tones;
function readTones() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => {
    const hex = style.getPropertyValue(`--${name}`).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  };
  const [ground, more, less] = ["ground", "v1", "v2"].map(colour);
  const mix = (to, x) => ground.map((g, i) => Math.round(g + (to[i] - g) * x));
  tones = {
    // the root lets small values be seen; x is in 0..1, of a difference in -1..1
    amount: (x) => mix(more, Math.sqrt(Math.min(1, Math.max(0, x)))),
    shift: (x) => mix(x < 0 ? less : more, Math.sqrt(Math.min(1, Math.abs(x)))),
    kind: (e) => mix(colour(`v${1 + (e % 6)}`), 0.35 + 0.18 * (Math.floor(e / 6) % 4)),
  };
}
const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#1b1f24" : "#ffffff");

function legend(low, high, tone, from) {
  const box = make("span", "legend"), bar = make("i");
  const stops = Array.from({ length: 13 }, (_, i) => css(tone(from + ((1 - from) * i) / 12)));
  bar.style.background = `linear-gradient(90deg, ${stops.join(",")})`;
  box.append(low, bar, high);
  return box;
}

// --- elements --------------------------------------------------------------------------------------

function make(tag, kind = "", text = null) {
  const found = document.createElement(tag);
  if (kind) found.className = kind;
  if (text !== null) found.textContent = text;
  return found;
}

const tip = byId("tip");
function say(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const { innerWidth: width, innerHeight: height } = window, box = tip.getBoundingClientRect();
  const x = event.clientX + 14, y = event.clientY + 14;
  tip.style.left = `${Math.max(4, Math.min(x, width - box.width - 4))}px`;
  tip.style.top = `${y + box.height > height ? Math.max(4, event.clientY - box.height - 10) : y}px`;
}
const hush = () => { tip.hidden = true; };

function ticks(kind, count, size, name) {
  const box = make("div", kind), step = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 250, 500, 1000, 2000, 5000];
  const room = kind === "rows" ? 12 : 30;
  const every = step.find((s) => s * size >= room) || step.at(-1);
  for (let i = 0; i < count; i += every) {
    const mark = make("span", "", name(i));
    mark.style[kind === "rows" ? "top" : "left"] = `${(100 * (i + 0.5)) / count}%`;
    box.append(mark);
  }
  return box;
}

// A grid of cells, one pixel each, stretched by the style sheet. `value(row, column)` is painted by `tone`.
class HeatMap {
  constructor({ title, rows, columns, cell, rowName, columnName, describe, pick, words, stretch = false }) {
    Object.assign(this, { rows, columns });
    this.canvas = make("canvas");
    this.canvas.width = columns;
    this.canvas.height = rows;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", words);
    this.mark = make("div", "cell");
    this.mark.hidden = true;
    this.field = make("div", "field");
    this.field.append(this.canvas, this.mark);
    this.canvas.style.height = `${rows * cell[1]}px`;
    if (!stretch) this.canvas.style.width = `${columns * cell[0]}px`;
    const plot = make("div", "plot");
    plot.append(ticks("rows", rows, cell[1], rowName), this.field, ticks("columns", columns, cell[0], columnName));
    this.element = make("div", "map");
    this.head = make("h3", "", title);
    this.element.append(this.head, plot);
    this.canvas.addEventListener("pointermove", (event) => {
      const [row, column] = this.at(event);
      this.place(this.mark, row, column);
      this.mark.hidden = false;
      say(event, describe(row, column));
    });
    this.canvas.addEventListener("pointerleave", () => { this.mark.hidden = true; hush(); });
    if (pick) this.canvas.addEventListener("click", (event) => pick(...this.at(event)));
  }
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const inside = (x, size, count) => Math.max(0, Math.min(count - 1, Math.floor((x / size) * count)));
    const row = inside(event.clientY - box.top, box.height, this.rows);
    return [row, inside(event.clientX - box.left, box.width, this.columns)];
  }
  place(element, row, column) {
    element.style.left = `${(100 * column) / this.columns}%`;
    element.style.top = `${(100 * row) / this.rows}%`;
    element.style.width = `${100 / this.columns}%`;
    element.style.height = `${100 / this.rows}%`;
  }
  paint(values, most, tone, low, from) {
    const pixels = new ImageData(this.columns, this.rows), data = pixels.data;
    const scale = most || 1, shades = Array.from({ length: 511 }, (_, i) => tone((i - 255) / 255));
    for (let i = 0; i < values.length; i++) {
      const [r, g, b] = shades[255 + Math.round(Math.max(-1, Math.min(1, values[i] / scale)) * 255)];
      data.set([r, g, b, 255], 4 * i);
    }
    this.canvas.getContext("2d").putImageData(pixels, 0, 0);
    this.head.querySelector(".legend")?.remove();
    const limits = from < 0 ? [`−${low(scale)}`, `+${low(scale)}`] : ["0", low(scale)];
    this.head.append(" ", legend(...limits, tone, from));
  }
}

