// Draws the page from the JSON beside this script; charts by uPlot, which stands in front of it. Text reaches the
// page through text nodes alone.
const nothing = {pairs: [], samples: [], growth: []};    // of several runs
const data = {...nothing, ...JSON.parse(document.getElementById("data").textContent)};

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

function short(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value), odd = size && (size < 1e-3 || size >= 1e6);
  const text = odd ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(4)));
  return text.replace("e+", "e").replaceAll("-", "−");
}

const signed = value => (value > 0 ? "+" : "") + short(value);

// Arrow keys, Home and End on a box lead from place at() of `count` to another.
function onArrows(box, count, at, go) {
  const forward = box.dir === "rtl" ? -1 : 1;
  box.addEventListener("keydown", event => {
    const ways = {ArrowLeft: -forward, ArrowRight: forward, ArrowUp: -1, ArrowDown: 1, Home: -count, End: count};
    const by = ways[event.key];
    if (by === undefined) return;
    event.preventDefault();
    go(Math.max(0, Math.min(count - 1, at() + by)));
  });
}

// --- charts --------------------------------------------------------------------------------------

const css = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const pale = (colour, share) => colour + Math.round(255 * share).toString(16);   // of #rrggbb

// What uPlot calls a series: a list of values with its look. Of ours, a band and a smooth line are series of their own,
// without a line in the legend.
function seriesOf(each) {
  const {name: label, y, low, high, smooth, style} = each;
  const colour = css(each.colour), dash = each.dash ? [6, 4] : undefined;
  const drawn = {label, spanGaps: true, points: {show: false}}, silent = {...drawn, class: "silent"};
  const extremes = i => low && low[i] !== null ? ` (${short(low[i])} to ${short(high[i])})` : "";
  const look = {...drawn, colour, dash, stroke: smooth ? pale(colour, .3) : colour, width: style === "bars" ? 1 : 1.5,
    value: (u, value, _, i) => value === null || value === undefined ? "–" : short(value) + extremes(i)};
  const dots = {show: true, size: 6, stroke: colour, fill: colour};
  if (style === "bars") Object.assign(look, {fill: pale(colour, .25), paths: uPlot.paths.bars({size: [1]})});
  if (style === "points") Object.assign(look, {paths: () => null, points: {...dots, width: 0, fill: pale(colour, .5)}});
  if (style === "dots" || y.length === 1) look.points = dots;
  const list = low ? [[high, {...silent, fills: pale(colour, .15)}], [low, silent]] : [];
  list.push([y, look]);
  if (smooth) list.push([smooth, {...silent, stroke: colour, width: 2, dash}]);
  return list;
}

// The place nearest to i where the series has a value; i itself where that is far away.
function nearestValue(u, series, i) {
  const values = u.data[series];
  for (let far = 0; far <= Math.max(4, values.length / 25); far++)
    for (const k of [i - far, i + far]) if (values[k] !== null && values[k] !== undefined) return k;
  return i;
}

function drawChart(plot, chart) {
  const lists = chart.series.map(seriesOf).flat(), flat = lists.map(([, look]) => look);
  const bands = flat.flatMap(({fills}, i) => fills ? [{series: [i + 1, i + 2], fill: fills}] : []);
  const axis = {stroke: css("muted"), font: "11.5px system-ui, sans-serif", grid: {stroke: css("grid"), width: 1},
    ticks: {stroke: css("edge"), width: 1, size: 4}};
  const whole = ["step", "tokens"].includes(chart.xlabel), words = (u, ticks) =>
    ticks.map(tick => whole && tick % 1 ? "" : short(tick));
  const half = chart.series[0].style === "bars" ? (chart.x[1] - chart.x[0]) / 2 : 0;
  const end = {pad: .05, soft: 0, mode: chart.zero ? 1 : 0}, height = {min: end, max: end};   // mode 1: with 0
  const rest = u => {                     // without a pointer, the legend of a curve tells where it ends
    if (chart.xlabel === "step") u.setLegend({idxs: u.data.map((_, i) => nearestValue(u, i, chart.x.length - 1))});
  };
  const u = new uPlot({
    width: plot.clientWidth, height: chart.small ? 150 : 230, bands,
    series: [{label: chart.xlabel, value: (u, x) => short(x)}, ...flat],
    axes: [{...axis, values: words, size: 30, space: 60},
      {...axis, size: 56, space: 32, values: (u, ticks) => ticks.map(short)}],
    scales: {x: {time: false, range: (u, low, high) => low === high ? [low - 1, high + 1] : [low - half, high + half]},
      y: {range: chart.range ? () => uPlot.rangeNum(...chart.range, height) : height}},
    cursor: {dataIdx: nearestValue, sync: {key: chart.xlabel, scales: ["x", null]}, y: false, points: {size: 6}},
    legend: {markers: {width: 2, stroke: (u, i) => u.series[i].colour, fill: (u, i) => u.series[i].fill || "transparent",
      dash: (u, i) => u.series[i].dash ? "dashed" : "solid"}},
    hooks: {setCursor: [u => { if (u.cursor.idx === null) rest(u); }],
      setSeries: [(u, i, {show}) => u.series.forEach((each, k) => {        // with what has no line of its own
        if (each.label === u.series[i].label && each.show !== show) u.setSeries(k, {show});
      })]},
  }, [chart.x, ...lists.map(([values]) => values)], plot);
  rest(u);
  u.root.tabIndex = 0;
  u.root.setAttribute("role", "group");
  u.root.setAttribute("aria-label", `${chart.title}. Arrow keys read it point by point.`);
  let at = -1;
  onArrows(u.root, chart.x.length, () => at, to => u.setCursor({left: u.valToPos(chart.x[at = to], "x"), top: 10}));
  u.root.addEventListener("blur", () => u.setCursor({left: -10, top: -10}));
  return u;
}

function chartFigure(chart) {
  const plot = el("div", {class: "plot"});
  let drawn = null;
  const draw = () => {
    if (drawn) drawn.destroy();
    drawn = drawChart(plot, chart);
  };
  const fit = () => { if (!drawn || plot.clientWidth !== drawn.width) draw(); };
  new ResizeObserver(() => requestAnimationFrame(fit)).observe(plot);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  return el("figure", {}, el("figcaption", {}, chart.title), plot, el("div", {class: "note"}, chart.note || ""));
}

const charts = (list, kind = "grid") => el("div", {class: kind}, ...list.map(chartFigure));

// --- tables --------------------------------------------------------------------------------------

function tableBox(title, columns, rows, kind = "") {
  const line = (cells, scope) => el("tr", {}, ...cells.map((text, i) =>
    i && scope === "row" ? el("td", {"data-column": columns[i]}, text) : el("th", {scope}, text)));
  const wide = columns.length > 2 ? " wide" : "";    // a phone sets each row's cells below each other
  return el("div", {class: "box " + kind + wide, tabindex: 0, role: "region", "aria-label": title}, el("table", {},
    columns.some(name => name) ? el("thead", {}, line(columns, "col")) : null,
    el("tbody", {}, ...rows.map(row => line(row, "row")))));
}

const fold = (open, kind, title, ...children) =>
  el("details", {class: "card " + kind, ...(open ? {open: ""} : {})}, el("summary", {}, title), ...children);

// --- tokens --------------------------------------------------------------------------------------

// Arrow keys walk a list, which is one tab stop for all its items.
function rove(box, items, at, enter) {
  let current = at;
  items.forEach((item, i) => { item.tabIndex = i === at ? 0 : -1; });
  onArrows(box, items.length, () => current, to => items[to].focus());
  box.addEventListener("focusin", event => {
    items[current].tabIndex = -1;
    current = items.indexOf(event.target.closest("[role=option]"));
    items[current].tabIndex = 0;
    enter(current);
  });
  box.addEventListener("click", event => {
    const item = event.target.closest("[role=option]");
    if (item) item.focus({preventScroll: true});
  });
}

const unpack = (text, type) => new type(Uint8Array.from(atob(text), character => character.charCodeAt(0)).buffer);
const SIDES = ["chosen", "rejected"];
const FACTS = [["reward", data.symbol, signed], ["f", "weight f", f => short(f) + (f <= 0 ? " (sign flips)" : "")],
  ["share", "share of Σ|f|", share => (100 * share).toFixed(2) + "%"], ["ref", "log π_ref", short],
  ["guide", "log π_guide", short], ["policy", "log π (policy)", short], ["moved", "log π/π_ref", signed]];
const tokensOf = (record, side) => Array.from(unpack(record[side].ids, Uint32Array), id => data.pieces[id]);
const sum = list => list.reduce((a, b) => a + b, 0);

// What the run recorded of a response, unpacked, and each token's share of its weights.
function recorded(record, side) {
  const found = {tokens: tokensOf(record, side)};
  for (const [key] of FACTS) if (record[side][key]) found[key] = unpack(record[side][key], Float32Array);
  if (found.f) found.share = found.f.map(f => Math.abs(f) / sum(found.f.map(Math.abs)));
  return found;
}

// White space is marked by the style sheet, so that copied text is the text itself.
const MARKS = {" ": "space", "\n": "line", "\t": "tab"};
const pieceNodes = text => text === "" ? [el("span", {class: "part"})]
  : text.split(/([ \n\t])/).filter(part => part).map(part => MARKS[part] ? el("span", {class: MARKS[part]}, part) : part);
const quoted = text =>
  text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "(part of a character)";

// The end of a prompt without its template's marks: what tells one pair from another in a list.
const gist = prompt =>
  prompt.replace(/<\|[^|]*\|>|\[\/?INST\]|<\/?s>/g, " ").replace(/\s+/g, " ").trim().slice(-110);

const valueList = rows => rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)));

// by: one of data.colours, or undefined where the run recorded nothing to colour by.
function paint(span, m, t, by) {
  const value = by && m[by.key] ? m[by.key][t] - by.middle : 0;
  span.style.setProperty("--m", (by ? 60 * Math.min(1, Math.abs(value) / by.scale) : 0).toFixed(0) + "%");
  const names = {more: value > 0, less: value < 0, long: m.tokens[t].length > 24, flip: m.f && m.f[t] <= 0};
  span.className = ["tok", ...Object.keys(names).filter(name => names[name])].join(" ");
}

function heatMap(record, side, by) {
  const m = recorded(record, side), known = FACTS.filter(([key]) => m[key]);
  const facts = t => [["token", `${t + 1} of ${m.tokens.length}`],
    ...known.map(([key, name, form]) => [name, form(m[key][t])])];
  const summed = known.filter(([key]) => key === "reward" || key === "moved");
  const totals = [["tokens", m.tokens.length], ...summed.map(([key, name]) => ["Σ " + name, signed(sum(m[key]))]),
    ...(m.f ? [["f ≤ 0", m.f.filter(f => f <= 0).length]] : [])];
  const spans = m.tokens.map((token, t) => {
    const label = [quoted(token), ...facts(t).slice(1, 3).map(row => row.join(" "))].join(", ");
    const span = el("span", {role: "option", "aria-label": label}, ...pieceNodes(token));
    paint(span, m, t, by);
    return span;
  });
  // A line breaks before a token that begins with a space, never behind the space.
  const box = el("div", {class: "tokens", role: "listbox", "aria-label": `${side} response, token by token`,
    dir: record[side].rtl ? "rtl" : "ltr"},
    ...spans.flatMap((span, t) => m.tokens[t].startsWith(" ") ? [el("wbr"), span] : [span]));
  const read = el("dl", {class: "sums read"});
  const rest = () => read.replaceChildren(...valueList(totals));
  const show = t => read.replaceChildren(el("b", {}, quoted(m.tokens[t])), ...valueList(facts(t)));
  rest();
  rove(box, spans, 0, show);
  spans.forEach((span, t) => span.addEventListener("pointerenter", () => show(t)));
  for (const end of ["pointerleave", "focusout"]) box.addEventListener(end, rest);
  const colour = side === "chosen" ? "blue" : "orange";
  return {node: el("div", {class: "card"}, el("h4", {class: colour}, `The ${side} response`), read, box),
    recolour: to => spans.forEach((span, t) => paint(span, m, t, to))};
}

// A row of buttons, one of them pressed. names: [key, text] each.
function choices(names, label, pick, first = 0) {
  const buttons = names.map(([key, text]) => el("button", {type: "button", "data-key": key}, text));
  const press = at => {
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === at)));
    pick(names[at][0]);
  };
  buttons.forEach((button, i) => button.addEventListener("click", () => press(i)));
  if (buttons.length) press(first);
  return el("div", {class: "group", role: "group", "aria-label": label}, ...buttons);
}

function explorer() {
  const all = {name: "all", mark: "", note: "", pairs: data.pairs.map(({number}) => number)};
  const kinds = [...data.classes, all], records = new Map(data.pairs.map(record => [record.number, record]));
  const marks = new Map(data.classes.flatMap(({mark, pairs}) => pairs.map(number => [number, mark])));
  let shown = null, views = [], among = all, by;
  const listBox = el("div", {class: "card list"}), view = el("div"), note = el("p", {class: "note"});
  const count = el("span", {class: "muted", role: "status"}), scale = el("span", {class: "scale"});
  const search = el("input", {type: "search", id: "find", placeholder: "pair number or text",
    "aria-label": "Filter pairs by number or text"});

  function matching() {
    const wanted = search.value.trim().toLowerCase();
    const pool = among.pairs.map(number => records.get(number)).filter(found => found);
    const exact = pool.filter(({number}) => [String(number), `#${number}`].includes(wanted));
    const text = record => [record.source, record.prompt, ...SIDES.map(side => tokensOf(record, side).join(""))];
    return exact.length || !wanted ? (wanted ? exact : pool)
      : pool.filter(record => text(record).join("\n").toLowerCase().includes(wanted));
  }

  function option({number, margin, dpo_margin: plain, prompt}) {
    const sums = [["Σ " + data.symbol, margin], ["margin", plain]].filter(([, sum]) => sum !== null);
    return el("div", {role: "option", "data-pair": number}, el("b", {}, `#${number} `), marks.get(number) || "",
      ...sums.map(([name, sum]) => ` ${name} ${signed(sum)} `), el("span", {class: "snippet"}, gist(prompt)));
  }

  function list() {
    const found = matching(), options = found.map(option);
    count.textContent = `${found.length} of ${data.pairs.length} pairs`;
    const box = el("div", {role: "listbox", "aria-label": "Pairs"}, ...options);
    listBox.replaceChildren(found.length ? box : el("p", {class: "note"}, "No pair matches."));
    if (!found.length) return;
    const at = Math.max(0, found.indexOf(shown)), open = i => {
      options.forEach((each, k) => each.setAttribute("aria-selected", String(k === i)));
      if (shown !== found[i]) show(shown = found[i]);
    };
    rove(box, options, at, open);
    open(at);
  }

  function show(record) {
    views = SIDES.map(side => heatMap(record, side, by));
    const {margin, dpo_margin: plain, phi, chosen} = record, sums = [[`Σ ${data.symbol}, chosen less rejected`, margin],
      ["the policy's plain DPO margin", plain], ["its optimised margin φ", chosen.f ? phi : null]];
    view.replaceChildren(
      fold(record.prompt.length < 600, "", `Pair ${record.number}: the prompt`,
        el("div", {class: "text", tabindex: 0}, record.prompt), el("div", {class: "note"}, record.source)),
      el("dl", {class: "sums"}, ...valueList(sums.filter(row => row[1] !== null).map(([k, v]) => [k, signed(v)]))),
      el("div", {class: "sides"}, ...views.map(each => each.node)));
  }

  const colours = choices(data.colours.map(each => [each.key, each.name]), "Colour by", key => {
    by = data.colours.find(each => each.key === key);
    views.forEach(each => each.recolour(by));
    scale.replaceChildren(short(by.middle - by.scale), el("span", {class: "bar"}), short(by.middle + by.scale),
      key === "f" ? "wavy underline: f ≤ 0" : "");
  });
  const names = kinds.map(({name, mark, pairs}) => [name, `${mark} ${name} (${pairs.length})`]);
  const classes = choices(names, "Which pairs", name => {
    among = kinds.find(each => each.name === name);
    note.textContent = among.note;
    if (among !== all) shown = null;         // open the class's first pair
    list();
  }, kinds.findIndex(({pairs}) => pairs.some(number => records.has(number))));
  search.addEventListener("input", list);
  return el("div", {}, el("div", {class: "controls"}, classes, search, count), note,
    by ? el("div", {class: "controls"}, el("span", {class: "muted"}, "Colour by"), colours, scale) : null,
    el("div", {class: "explorer"}, listBox, view));
}

// --- the page ------------------------------------------------------------------------------------

const main = document.querySelector("main"), links = el("div");
document.querySelector("nav").append(links);

function section(id, title, ...children) {
  main.append(el("section", {id}, el("h2", {}, title), ...children));
  links.append(el("a", {href: "#" + id}, id === "answer" ? "Answer" : title));
}

document.getElementById("top").append(el("h1", {}, data.name), el("p", {class: "about"}, data.about),
  ...data.notes.map(note => el("p", {class: "warning"}, note)));

const evaluation = data.tables.find(each => each.id === "evaluation"), {title, words, picture} = data.answer;
if (words.length || data.answer.charts.length || evaluation) section("answer", title,
  ...words.map(([lead, text]) => el("p", {}, el("b", {}, lead + " "), text)),
  data.answer.charts.length ? el("div", {class: "card"}, el("h3", {}, picture), charts(data.answer.charts)) : null,
  evaluation ? el("div", {class: "card"}, tableBox(evaluation.title, evaluation.columns, evaluation.rows)) : null);

if (data.pairs.length) section("tokens", "Tokens", el("p", {class: "muted"}, data.meaning,
  " A token's share of Σ|f| over its response is its weight's share of the gradient: f multiplies the token's ∇ log π, "
  + "whose length a run does not record. Hover, tap, or walk with the arrow keys to read a token."), explorer());

if (data.curves.length) section("curves", "All curves", charts(data.curves, "grid wall"), el("p", {class: "note"},
  "Pale: every step; strong: smoothed. Drag over steps to enlarge them, double-click to go back; "
  + "a click on a name hides its curve."));

if (data.moved) section("moved", "What moved", charts(data.moved.charts),
  el("h3", {}, "What carries the reward"), el("div", {class: "card"},
    tableBox("What carries the reward", data.moved.columns, data.moved.table, "figures"),
    el("p", {class: "note"}, `The end token is ${quoted(data.moved.end)} where it ends a response; `
      + "punctuation is a token of punctuation and symbols alone. Shares are of all tokens of the side.")));

if (data.samples.length) section("samples", "Samples", ...data.samples.map(({prompt = "", ...answers}, i) =>
  fold(i < 3, "sample", `${i + 1}: ${gist(prompt)}`, el("div", {class: "text muted", tabindex: 0}, prompt),
    el("div", {class: "sides answers"}, ...Object.entries(answers).map(([name, text]) =>
      el("div", {}, el("h4", {}, name), el("div", {class: "text", tabindex: 0}, text)))))));

if (data.growth.length) section("growth", "Samples while it trained", ...data.growth.map(({prompt, answers}, i) =>
  fold(i < 3, "sample", `${i + 1}: ${gist(prompt)}`, tableBox("Answers by step", ["step", "answer"], answers))));

const facts = data.tables.filter(each => each.id !== "evaluation");
if (facts.length || data.command) section("run", "The run",
  data.command ? el("div", {class: "card"}, el("div", {class: "muted"}, "Made by"),
    el("pre", {}, el("code", {}, data.command))) : "",
  el("div", {class: "halves"}, ...facts.map(each => fold(each.open, "", each.title,
    tableBox(each.title, each.columns, each.rows)))));

if (!links.children.length) main.append(el("p", {}, "The run has not written anything yet."));
main.append(el("footer", {}, "Made by report/report.py from the run's directory. It needs no network."));
