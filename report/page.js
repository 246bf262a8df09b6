"use strict";
// Draws the page from the JSON beside this script. Text reaches the page through text nodes alone.
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

function svg(name, attributes, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function short(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value), odd = size && (size < 1e-3 || size >= 1e6);
  const text = odd ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(4)));
  return text.replace("e+", "e").replaceAll("-", "−");
}

const signed = value => (value > 0 ? "+" : "") + short(value);
const last = list => list[list.length - 1];

// --- the box that follows pointer and focus ------------------------------------------------------

let anchor = null;          // gives the rectangle that the box belongs to, wherever it has been scrolled

// low: on a phone the box lies at the lower or upper end of the screen instead.
function showTip(title, rows, rect, low) {
  tip.replaceChildren(el("div", {class: "title"}, title),
    el("table", {}, ...rows.map(([name, value]) => el("tr", {}, el("th", {}, name), el("td", {}, value)))));
  tip.className = low ? "low" : "";
  anchor = rect;
  placeTip();
}

function placeTip() {
  const rect = anchor();
  tip.hidden = rect.bottom < 0 || rect.top > innerHeight;
  const box = tip.getBoundingClientRect();
  const left = Math.min(rect.left + rect.width / 2 - box.width / 2, innerWidth - box.width - 6);
  const above = rect.top - box.height - 8, below = Math.min(rect.bottom + 8, innerHeight - box.height - 6);
  tip.style.left = Math.max(6, left) + "px";
  tip.style.top = (above > 6 ? above : below) + "px";
  tip.classList.toggle("high", rect.bottom > innerHeight - box.height - 16);
}

const hideTip = () => { tip.hidden = true; };
addEventListener("scroll", () => { if (!tip.hidden) placeTip(); }, {passive: true, capture: true});
addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });

// --- charts --------------------------------------------------------------------------------------

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find(m => m * power >= raw) * power;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

const stroke = series => series.style === "dash" || series.style === "dots"
  || (series.style === "step" && series.colour === "orange") ? "stroke dash" : "stroke";

// Chosen and rejected differ in shape as well as in colour.
const dotAt = (series, x, y, r) => series.colour === "orange"
  ? svg("rect", {x: (x - r).toFixed(1), y: (y - r).toFixed(1), width: 2 * r, height: 2 * r, class: "cloud"})
  : svg("circle", {cx: x.toFixed(1), cy: y.toFixed(1), r, class: "cloud"});

function swatch(series) {
  const sample = svg("svg", {width: 22, height: 10, "aria-hidden": "true", class: series.colour});
  if (series.style === "band") sample.append(svg("rect", {width: 22, height: 10, class: "area"}));
  else if (series.style === "points") sample.append(dotAt(series, 11, 5, 3.5));
  else sample.append(svg("path", {d: "M0 5H22", class: stroke(series)}));
  if (series.style === "dots") sample.append(svg("circle", {cx: 11, cy: 5, r: 3, class: "dot"}));
  return el("span", {}, sample, series.name);
}

function bounds(chart) {
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  const reach = y => { y0 = Math.min(y0, y); y1 = Math.max(y1, y); };
  for (const {style, x, y, lo, hi} of chart.series) {
    const half = style === "step" ? (x[1] - x[0]) / 2 : 0;
    for (const at of x) { x0 = Math.min(x0, at - half); x1 = Math.max(x1, at + half); }
    for (const list of [y, lo || [], hi || []]) list.forEach(reach);
  }
  if (chart.zero) reach(0);
  (chart.range || []).forEach(reach);
  // A mark is drawn where it is near; it never squeezes the curve.
  for (const [value] of chart.marks || []) if (Math.abs(value - y1) < (y1 - y0 || 1)) reach(value);
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  if (y0 === 0 && y1 === 0) y1 = 1;
  if (y0 === y1) { const pad = Math.abs(y0) / 2 || .5; y0 -= pad; y1 += pad; }
  const pad = chart.range ? 0 : (y1 - y0) * .05;
  return [x0, x1, y0 - (chart.zero && y0 === 0 ? 0 : pad), y1 + (chart.zero && y1 === 0 ? 0 : pad)];
}

const polyline = (xs, ys, X, Y) => xs.map((x, i) => X(x).toFixed(1) + " " + Y(ys[i]).toFixed(1)).join("L");

function drawSeries(series, X, Y, halo) {
  const {x, y, style} = series, group = svg("g", {class: series.colour});
  if (style === "points") {
    group.append(...x.map((at, i) => dotAt(series, X(at), Y(y[i]), 2.3)));
  } else if (style === "band") {
    const back = polyline([...x].reverse(), [...series.lo].reverse(), X, Y);
    group.append(svg("path", {d: "M" + polyline(x, series.hi, X, Y) + "L" + back + "Z", class: "area"}));
  } else if (style === "step") {
    const half = (x[1] - x[0]) / 2, edges = x.flatMap(at => [at - half, at + half]);
    const d = "M" + polyline(edges, y.flatMap(height => [height, height]), X, Y);
    const ground = `L${X(last(edges))} ${Y(0)}L${X(edges[0])} ${Y(0)}Z`;
    group.append(svg("path", {d: d + ground, class: "area"}), svg("path", {d, class: stroke(series)}));
  } else {
    const d = "M" + polyline(x, y, X, Y);
    if (halo) group.append(svg("path", {d, class: "halo"}));
    group.append(svg("path", {d, class: stroke(series)}));
    const r = x.length > 60 ? 1.8 : 3;
    if (style === "dots" || x.length === 1) group.append(...x.map((at, i) =>
      svg("circle", {cx: X(at).toFixed(1), cy: Y(y[i]).toFixed(1), r, class: "dot"})));
  }
  return group;
}

function drawChart(plot, chart) {
  const width = plot.clientWidth, height = chart.wide ? 300 : 210;
  const [x0, x1, y0, y1] = bounds(chart);
  const heights = ticks(y0, y1, 5), labels = heights.map(short);
  const left = 12 + 7 * Math.max(0, ...labels.map(label => label.length)), right = width - 12;
  const top = chart.ylabel ? 22 : 10, floor = height - 36;
  const X = x => left + (x - x0) / (x1 - x0) * (right - left);
  const Y = y => floor - (y - y0) / (y1 - y0) * (floor - top);
  const drawing = svg("svg", {viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "img",
    "aria-label": summary(chart)});
  const line = (kind, x1, x2, y1, y2) => drawing.append(svg("line", {x1, x2, y1, y2, class: kind}));
  const text = (words, x, y, anchor) => drawing.append(svg("text", {x, y, "text-anchor": anchor}, words));
  heights.forEach((tick, i) => {
    line(Math.abs(tick) < 1e-12 ? "axis" : "gridline", left, right, Y(tick), Y(tick));
    text(labels[i], left - 6, Y(tick) + 4, "end");
  });
  line("axis", left, right, floor, floor);
  for (const tick of ticks(x0, x1, Math.max(2, Math.floor(width / 70)))) {
    if (chart.xlabel === "step" && !Number.isInteger(tick)) continue;
    line("axis", X(tick), X(tick), floor, floor + 4);
    text(short(tick), X(tick), floor + 16, "middle");
  }
  text(chart.xlabel, right, height - 4, "end");
  if (chart.ylabel) text(chart.ylabel, 4, 12, "start");
  for (const [value, name] of chart.marks || []) if (value >= y0 && value <= y1) {
    line("mark", left, right, Y(value), Y(value));
    text(name, right, Y(value) - 4, "end");
  }
  const order = ["band", "points", "step", "line", "dash", "dots"];
  for (const series of [...chart.series].sort((a, b) => order.indexOf(a.style) - order.indexOf(b.style)))
    drawing.append(drawSeries(series, X, Y, chart.wide));
  plot.replaceChildren(drawing);
  follow(drawing, chart, X, Y, top, floor);
}

function summary(chart) {
  const ends = chart.series.filter(({style}) => ["line", "dash", "dots"].includes(style))
    .map(({name, y}) => `${name} ends at ${short(last(y))}`);
  return `${chart.title}. ${ends.join(", ")}. Arrow keys read it point by point.`;
}

function nearest(list, x) {
  let best = 0;
  list.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(list[best] - x)) best = i; });
  return best;
}

// Pointer: the nearest point of a cloud, else all curves at the nearest x. Arrow keys: from x to x.
function follow(drawing, chart, X, Y, top, floor) {
  const clouds = chart.series.filter(series => series.style === "points");
  const curves = chart.series.filter(series => series.style !== "points");
  const read = curves.length ? curves : clouds;
  const stops = [...new Set(read.flatMap(series => series.x))].sort((a, b) => a - b);
  const cross = svg("line", {y1: top, y2: floor, class: "cross", visibility: "hidden"});
  drawing.append(cross);
  let at = -1;

  const spot = (x, top, bottom) => () => {          // a rectangle of the drawing, in the window
    const box = drawing.getBoundingClientRect();
    return {left: box.left + x, width: 0, top: box.top + top, bottom: box.top + bottom};
  };

  function readAt(x) {
    const gap = stops.length > 1 ? (last(stops) - stops[0]) / 40 : 1, rows = [];
    for (const {name, x: xs, y, lo, hi} of read) {
      const i = nearest(xs, x);
      const value = lo ? `${short(lo[i])} to ${short(hi[i])}` : short(y[i]);
      if (Math.abs(xs[i] - x) <= gap) rows.push([name, value]);
    }
    cross.setAttribute("x1", X(x));
    cross.setAttribute("x2", X(x));
    cross.setAttribute("visibility", "visible");
    showTip(`${chart.xlabel} ${short(x)}`, rows, spot(X(x), 8, floor));
  }

  function readPoint(series, i) {
    const x = series.x[i], y = series.y[i];
    cross.setAttribute("visibility", "hidden");
    showTip(quoted(series.labels[i]), [["", series.name], [chart.xlabel, short(x)], [chart.ylabel, short(y)]],
      spot(X(x), Y(y), Y(y)));
  }

  drawing.addEventListener("pointermove", event => {
    const box = drawing.getBoundingClientRect();
    const px = event.clientX - box.left, py = event.clientY - box.top;
    let best = null, reach = 18 ** 2;
    for (const series of clouds) series.x.forEach((x, i) => {
      const far = (X(x) - px) ** 2 + (Y(series.y[i]) - py) ** 2;
      if (far < reach) { reach = far; best = [series, i]; }
    });
    if (best) readPoint(...best);
    else if (curves.length) readAt(stops[at = nearest(stops.map(X), px)]);
  });
  const leave = () => { cross.setAttribute("visibility", "hidden"); hideTip(); };
  drawing.addEventListener("pointerleave", leave);
  drawing.addEventListener("blur", leave);
  drawing.addEventListener("keydown", event => {
    const to = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: stops.length - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    at = Math.max(0, Math.min(stops.length - 1, to));
    readAt(stops[at]);
  });
}

function chartFigure(chart) {
  const plot = el("div", {class: "plot"});
  let width = 0;
  new ResizeObserver(() => {
    if (plot.clientWidth !== width) { width = plot.clientWidth; drawChart(plot, chart); }
  }).observe(plot);
  return el("figure", chart.wide ? {class: "wide"} : {}, el("figcaption", {}, chart.title),
    el("div", {class: "legend"}, ...chart.series.map(swatch)), plot);
}

const charts = list => el("div", {class: "grid"}, ...list.map(chartFigure));

// --- tables --------------------------------------------------------------------------------------

function tableBox(title, columns, rows, kind) {
  const head = el("thead", {}, el("tr", {}, ...columns.map(name => el("th", {scope: "col"}, name))));
  const cell = (text, i) => i ? el("td", {}, text) : el("th", {scope: "row"}, text);
  const body = el("tbody", {}, ...rows.map(row => el("tr", {}, ...row.map(cell))));
  return el("div", {class: "box " + (kind || ""), tabindex: 0, role: "region", "aria-label": title},
    el("table", {}, columns.some(name => name) ? head : null, body));
}

const tileGrid = tiles => el("dl", {class: "tiles"}, ...tiles.map(([label, value, note]) =>
  el("div", {class: "card"}, el("dt", {}, label),
    el("dd", {}, el("div", {class: "value"}, value), el("div", {class: "note"}, note)))));

const fold = (open, kind, title, ...children) =>
  el("details", {class: "card " + kind, ...(open ? {open: ""} : {})}, el("summary", {}, title), ...children);

// --- moving about in a list by arrow keys: one tab stop for all its items ------------------------

function rove(box, items, at, enter) {
  let current = at;
  items.forEach((item, i) => { item.tabIndex = i === at ? 0 : -1; });

  function line(direction) {            // the nearest item of the line above or below
    const from = items[current].getBoundingClientRect(), middle = from.left + from.width / 2;
    let best = current, score = Infinity, edge = null;
    for (let i = current + direction; i >= 0 && i < items.length; i += direction) {
      const to = items[i].getBoundingClientRect();
      if (Math.abs(to.top - from.top) < 4) continue;
      if (edge === null) edge = to.top;
      if (Math.abs(to.top - edge) > 4) break;
      const far = Math.abs(to.left + to.width / 2 - middle);
      if (far < score) { score = far; best = i; }
    }
    return best;
  }

  const forward = box.dir === "rtl" ? -1 : 1;
  const moves = {ArrowLeft: () => current - forward, ArrowRight: () => current + forward,
    ArrowUp: () => line(-1), ArrowDown: () => line(1), Home: () => 0, End: () => items.length - 1};
  box.addEventListener("keydown", event => {
    if (!moves[event.key]) return;
    event.preventDefault();
    items[Math.max(0, Math.min(items.length - 1, moves[event.key]()))].focus();
  });
  box.addEventListener("focusin", event => {
    const i = items.indexOf(event.target);
    if (i < 0) return;
    items[current].tabIndex = -1;
    items[current = i].tabIndex = 0;
    enter(i);
  });
}

// --- token heat maps -----------------------------------------------------------------------------

const SIDES = ["chosen", "rejected"];
const {loss, alpha, beta, guide_beta: guideBeta} = data.settings;

function unpack(text, type) {
  const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
  return new type(bytes.buffer);
}

const tokensOf = (record, side) => Array.from(unpack(record[side].ids, Uint32Array), id => data.pieces[id]);

// The same arithmetic as report.py's `score`.
function measure(record, side) {
  const tokens = tokensOf(record, side), [ref, guide, policy] = ["ref", "guide", "policy"].map(
    name => record[side][name] ? unpack(record[side][name], Float32Array) : null);
  const each = formula => tokens.map((_, t) => formula(t));
  const moved = policy && ref ? each(t => policy[t] - ref[t]) : null;
  let reward = null, weight = null;
  if (loss === "tgdpo" && guide && ref) {
    reward = each(t => guideBeta * (guide[t] - ref[t]));
    weight = reward.map(r => 1 + (side === "chosen" ? alpha : -alpha) * r);
  } else if (loss === "dpo" && moved) reward = moved.map(m => beta * m);
  else if (loss === "simpo" && policy) reward = each(t => beta / tokens.length * policy[t]);
  const total = weight ? weight.reduce((sum, f) => sum + Math.abs(f), 0) : tokens.length;
  const share = each(t => (weight ? Math.abs(weight[t]) : 1) / total);
  return {tokens, ref, guide, policy, moved, reward, weight, share};
}

// White space is marked by the style sheet, so that copied text is the text itself.
const MARKS = {" ": "space", "\n": "line", "\t": "tab"};
function pieceNodes(text) {
  if (text === "") return [el("span", {class: "part"})];
  const parts = text.split(/([ \n\t])/).filter(part => part);
  return parts.map(part => MARKS[part] ? el("span", {class: MARKS[part]}, part) : part);
}
const quoted = text =>
  text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "(part of a character)";

// The end of a prompt without its template's marks: what tells one pair from another in a list.
const gist = prompt =>
  prompt.replace(/<\|[^|]*\|>|\[\/?INST\]|<\/?s>/g, " ").replace(/\s+/g, " ").trim().slice(-110);

function details(m, t) {
  const rows = [["token", `${t + 1} of ${m.tokens.length}`]];
  if (m.reward) rows.push([data.symbol, signed(m.reward[t])]);
  if (m.weight) rows.push(["weight f", short(m.weight[t]) + (m.weight[t] <= 0 ? " (sign flips)" : "")]);
  rows.push(["share of Σ|f|", (100 * m.share[t]).toFixed(2) + "%"]);
  if (m.ref) rows.push(["log π_ref", short(m.ref[t])]);
  if (m.guide) rows.push(["log π_guide", short(m.guide[t])]);
  if (m.policy) rows.push(["log π (policy)", short(m.policy[t])]);
  if (m.moved) rows.push(["log π/π_ref", signed(m.moved[t])]);
  return rows;
}

const COLOURS = {
  reward: {name: data.symbol, of: (m, t) => m.reward && m.reward[t], scale: data.reward_scale, middle: 0},
  weight: {name: "weight f; wavy underline: f ≤ 0", of: (m, t) => m.weight && m.weight[t] - 1,
    scale: alpha * data.reward_scale || 1, middle: 1},
  moved: {name: "log π/π_ref of the policy", of: (m, t) => m.moved && m.moved[t],
    scale: data.moved_scale, middle: 0},
};

function paint(span, m, t, by) {
  const value = COLOURS[by].of(m, t) || 0;
  span.style.setProperty("--m", (60 * Math.min(1, Math.abs(value) / COLOURS[by].scale)).toFixed(0) + "%");
  const names = {more: value > 0, less: value < 0, long: m.tokens[t].length > 24,
    flip: m.weight && m.weight[t] <= 0};
  span.className = ["tok", ...Object.keys(names).filter(name => names[name])].join(" ");
}

function heatMap(record, side, by) {
  const m = measure(record, side), sum = list => list.reduce((a, b) => a + b, 0);
  const spans = m.tokens.map((token, t) => {
    const words = details(m, t).slice(1, 3).map(row => row.join(" ")).join(", ");
    const label = `${quoted(token)}: ${words}`;
    const span = el("span", {role: "option", "aria-label": label}, ...pieceNodes(token));
    paint(span, m, t, by);
    return span;
  });
  // A line breaks before a token that begins with a space, never behind the space.
  const box = el("div", {class: "tokens", role: "listbox", "aria-label": `${side} response, token by token`,
    dir: record[side].rtl ? "rtl" : "ltr"},
    ...spans.flatMap((span, t) => m.tokens[t].startsWith(" ") ? [el("wbr"), span] : [span]));
  const show = t => showTip(quoted(m.tokens[t]), details(m, t), () => spans[t].getBoundingClientRect(), true);
  rove(box, spans, 0, show);
  box.addEventListener("pointerover", event => {
    const t = spans.indexOf(event.target.closest(".tok"));
    if (t >= 0) show(t);
  });
  box.addEventListener("click", event => {
    const t = spans.indexOf(event.target.closest(".tok"));
    if (t >= 0) spans[t].focus({preventScroll: true});
  });
  box.addEventListener("pointerleave", hideTip);
  box.addEventListener("focusout", hideTip);
  const facts = [`${spans.length} tokens`];
  if (m.reward) facts.push(`Σ ${data.symbol} ${signed(sum(m.reward))}`);
  if (m.moved) facts.push(`Σ log π/π_ref ${signed(sum(m.moved))}`);
  if (m.weight) facts.push(`f ≤ 0: ${m.weight.filter(f => f <= 0).length}`);
  const [name, colour] = side === "chosen" ? ["Chosen", "blue"] : ["Rejected", "orange"];
  const title = el("h4", {class: colour}, name);
  return {node: el("div", {class: "card"}, title, el("div", {class: "note"}, facts.join(" · ")), box),
    recolour: to => spans.forEach((span, t) => paint(span, m, t, to))};
}

// A row of buttons of which one is pressed. names: [key, text] each.
function choices(names, label, pressed, pick) {
  const buttons = names.map(([key, text]) => el("button", {type: "button", "data-key": key}, text));
  const press = key => buttons.forEach(
    button => button.setAttribute("aria-pressed", String(button.dataset.key === key)));
  buttons.forEach((button, i) => button.addEventListener("click", () => {
    press(names[i][0]);
    pick(names[i][0]);
  }));
  press(pressed);
  return el("div", {class: "group", role: "group", "aria-label": label}, ...buttons);
}

function explorer() {
  const marks = ["▲", "▼", "✗"], members = data.classes.map(each => new Set(each.pairs)), texts = new Map();
  let shown = null, views = [], among = "all", by = "reward";
  const listBox = el("div", {class: "card list"}), view = el("div"), note = el("p", {class: "note"});
  const count = el("span", {class: "muted", role: "status"});
  const search = el("input", {type: "search", id: "find", placeholder: "pair number or text",
    "aria-label": "Filter pairs by number or text"});

  function textOf(record) {
    if (!texts.has(record.n)) {
      const words = SIDES.map(side => tokensOf(record, side).join(""));
      texts.set(record.n, [record.source, record.prompt, ...words].join("\n").toLowerCase());
    }
    return texts.get(record.n);
  }

  function matching() {
    const wanted = search.value.trim().toLowerCase();
    const records = new Map(data.pairs.map(record => [record.n, record]));
    const pool = among === "all" ? data.pairs
      : data.classes.find(each => each.name === among).pairs.map(n => records.get(n)).filter(found => found);
    if (!wanted) return pool;
    const exact = pool.filter(record => [String(record.n), `#${record.n}`].includes(wanted));
    return exact.length ? exact : pool.filter(record => textOf(record).includes(wanted));
  }

  function option(record) {
    const signs = marks.filter((_, i) => members[i] && members[i].has(record.n)).join("");
    const margin = record.margins[0] === null ? "" : ` margin ${signed(record.margins[0])}`;
    return el("div", {role: "option", "data-pair": record.n}, el("b", {}, `#${record.n} `), signs + margin,
      el("span", {class: "snippet"}, gist(record.prompt)));
  }

  function list() {
    const found = matching(), options = found.map(option);
    count.textContent = `${found.length} of ${data.pairs.length} pairs`;
    const box = el("div", {role: "listbox", "aria-label": "Pairs"}, ...options);
    listBox.replaceChildren(found.length ? box : el("p", {class: "note"}, "No pair matches."));
    if (!found.length) return;
    const open = i => {
      options.forEach((each, k) => each.setAttribute("aria-selected", String(k === i)));
      show(found[i]);
    };
    const at = Math.max(0, found.indexOf(shown));
    rove(box, options, at, open);
    options.forEach(each => each.addEventListener("click", () => each.focus()));
    open(at);
  }

  function show(record) {
    if (shown === record) return;
    shown = record;
    views = SIDES.map(side => heatMap(record, side, by));
    const [margin, plain, phi] = record.margins;
    const sums = [[`Σ ${data.symbol}, chosen less rejected`, margin], ["plain DPO margin", plain]];
    if (data.guided && margin !== null && phi !== null)
      sums.push(["optimised margin φ", phi], ["added by the guidance", phi - plain]);
    view.replaceChildren(
      fold(record.prompt.length < 600, "", `Pair ${record.n}: the prompt`,
        el("div", {class: "text", tabindex: 0}, record.prompt), el("div", {class: "note"}, record.source)),
      el("dl", {class: "sums"}, ...sums.filter(([, value]) => value !== null).map(([name, value]) =>
        el("div", {}, el("dt", {}, name), el("dd", {}, signed(value))))),
      el("div", {class: "sides"}, ...views.map(each => each.node)));
  }

  const low = el("span"), high = el("span"), name = el("span");
  function recolour(to) {
    by = to;
    views.forEach(each => each.recolour(by));
    const colour = COLOURS[by];
    low.textContent = short(colour.middle - colour.scale);
    high.textContent = short(colour.middle + colour.scale);
    name.textContent = colour.name;
  }

  function choose(to) {
    among = to;
    note.textContent = to === "all" ? "" : data.classes.find(each => each.name === to).note;
    if (to !== "all") shown = null;         // open the class's first pair
    list();
  }

  const classes = [["all", `all ${data.pairs.length}`],
    ...data.classes.map((each, i) => [each.name, `${marks[i]} ${each.name} (${each.pairs.length})`])];
  const colours = [["reward", data.symbol], ...(data.guided ? [["weight", "weight f"]] : []),
    ...(data.pairs.some(({chosen}) => chosen.policy && chosen.ref) ? [["moved", "log π/π_ref"]] : [])];
  search.addEventListener("input", list);
  recolour(by);
  list();
  return el("div", {},
    el("div", {class: "controls"}, choices(classes, "Which pairs", among, choose), search, count), note,
    el("div", {class: "controls"}, el("span", {class: "muted"}, "Colour by"),
      choices(colours, "Colour by", by, recolour),
      el("span", {class: "scale"}, low, el("span", {class: "bar"}), high, name)),
    el("div", {class: "explorer"}, listBox, view));
}

// --- the page ------------------------------------------------------------------------------------

const main = document.querySelector("main"), links = el("div");
document.querySelector("nav").append(links);

function section(id, title, ...children) {
  main.append(el("section", {id}, el("h2", {}, title), ...children));
  links.append(el("a", {href: "#" + id}, title));
}

document.getElementById("top").append(el("h1", {}, data.name), el("p", {class: "about"}, data.about),
  ...data.notes.map(note => el("p", {class: "warning"}, note)), tileGrid(data.tiles));

const evaluation = data.tables.find(each => each.id === "evaluation");
if (evaluation) section("evaluation", "Final evaluation",
  el("div", {class: "card"}, tableBox("Final evaluation", evaluation.columns, evaluation.rows)));

if (data.stages.length) section("curves", "Curves",
  ...data.stages.flatMap(stage => [el("h3", {}, stage.title), charts(stage.charts)]));

const FORMULAS = {
  tgdpo: `r̂ = ${short(guideBeta)} · log π_guide/π_ref; f = 1 + ${short(alpha)} r̂ in the chosen response `
    + `and 1 − ${short(alpha)} r̂ in the rejected one.`,
  dpo: "Without a guide every weight is 1; shown is the policy's implicit reward, "
    + `${short(beta)} · log π/π_ref.`,
  simpo: `Shown is each token's part of SimPO's reward, ${short(beta)}/|y| · log π; SimPO has no reference `
    + "and no weights.",
};
if (data.pairs.length) section("tokens", "Tokens", el("p", {class: "muted"}, FORMULAS[loss],
  " A token's share of the gradient is given as its weight's share, |f| / Σ|f| over its response: β f "
  + "multiplies the token's ∇ log π in the gradient of the loss, and how long that vector is, a run does not "
  + "record. Hover, tap, or walk with the arrow keys to read a token."), explorer());

if (data.moved) section("moved", "What moved", tileGrid(data.moved.figures),
  el("h3", {}, "What carries the reward"), el("div", {class: "card"},
    tableBox("What carries the reward", data.moved.columns, data.moved.table, "figures"),
    el("p", {class: "note"}, `The end token is ${quoted(data.moved.end)} where it ends a response; `
      + "punctuation is a token of punctuation and symbols alone. Shares are of all tokens of the side.")),
  el("h3", {}, "Distributions"), charts(data.moved.charts));

if (data.samples.length) section("samples", "Samples", ...data.samples.map(({prompt = "", ...answers}, i) =>
  fold(i < 3, "sample", `${i + 1}: ${gist(prompt)}`, el("div", {class: "text muted", tabindex: 0}, prompt),
    el("div", {class: "sides answers"}, ...Object.entries(answers).map(([name, text]) =>
      el("div", {}, el("h4", {}, name), el("div", {class: "text", tabindex: 0}, text)))))));

const facts = data.tables.filter(each => each.id !== "evaluation");
if (facts.length || data.command) section("run", "The run",
  data.command ? el("div", {class: "card"}, el("div", {class: "muted"}, "Made by"),
    el("pre", {}, el("code", {}, data.command))) : "",
  el("div", {class: "halves"}, ...facts.map(each => fold(each.open, "", each.title,
    tableBox(each.title, each.columns, each.rows), each.note ? el("p", {class: "note"}, each.note) : null))));

if (!links.children.length) main.append(el("p", {}, "The run has not written anything yet."));
main.append(el("footer", {}, "Made by report/report.py from the run's directory. It needs no network."));
