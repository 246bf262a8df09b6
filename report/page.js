// Draws the page from the JSON beside this script; charts by uPlot, which stands in front of it. Text reaches the
// page through text nodes alone.
const data = JSON.parse(document.getElementById("data").textContent);

// A function among the attributes listens to the event of its name; children that are null are left out.
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    typeof value === "function" ? node.addEventListener(key, value) : node.setAttribute(key, value);
  node.append(...children.filter(child => child !== null));
  return node;
}

function short(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value), odd = size && (size < 1e-3 || size >= 1e6);
  const text = odd ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(4)));
  return text.replace("e+", "e").replaceAll("-", "−");
}

const signed = value => (value > 0 ? "+" : "") + short(value);
const note = text => el("p", {class: "note"}, text);
const card = (...children) => el("div", {class: "card"}, ...children);
const fold = (open, title, ...children) =>
  el("details", {class: "card", ...(open ? {open: ""} : {})}, el("summary", {}, title), ...children);

// Arrow keys, Home and End on a box lead from place at() of `count` to another.
function onArrows(box, count, at, go) {
  box.addEventListener("keydown", event => {
    const on = getComputedStyle(box).direction === "rtl" ? -1 : 1;
    const by = {ArrowLeft: -on, ArrowRight: on, ArrowUp: -1, ArrowDown: 1, Home: -count, End: count}[event.key];
    if (!by) return;
    event.preventDefault();
    go(Math.max(0, Math.min(count - 1, at() + by)));
  });
}

// A list whose items are one tab stop: arrow keys and clicks walk it, enter(i) shows where they are.
function rove(box, items, at, enter) {
  items.forEach((item, i) => {
    item.tabIndex = i === at ? 0 : -1;
    item.addEventListener("click", () => item.focus({preventScroll: true}));
    item.addEventListener("focus", () => {
      [items[at].tabIndex, item.tabIndex] = [-1, 0];
      enter(at = i);
    });
  });
  onArrows(box, items.length, () => at, to => items[to].focus());
}

// --- charts --------------------------------------------------------------------------------------
const css = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const pale = (colour, share) => colour + Math.round(255 * share).toString(16);   // of #rrggbb

// What uPlot calls series, [values, look] each. A band, and the raw curve behind a smooth one, are not in the legend.
function seriesOf({name: label, y, low, high, smooth, style, colour: named, dash}) {
  const colour = css(named), dots = {show: true, size: 6, stroke: colour, fill: colour};
  const silent = {label, spanGaps: true, points: {show: false}, class: "silent"};
  const value = (u, _, i, at) => short(y[at]) + (low && low[at] ? ` (${short(low[at])} to ${short(high[at])})` : "");
  const look = {...silent, class: null, value, stroke: colour, width: smooth ? 2 : 1.5, dash: dash && [6, 4]};
  if (style === "bars") Object.assign(look, {fill: pale(colour, .25), width: 1, paths: uPlot.paths.bars({size: [1]})});
  if (style === "points") Object.assign(look, {paths: () => null, points: {...dots, width: 0, fill: pale(colour, .5)}});
  if (style === "dots" || y.length === 1) look.points = dots;
  return [...(low ? [[high, {...silent, band: pale(colour, .15)}], [low, silent]] : []),
    ...(smooth ? [[y, {...silent, stroke: pale(colour, .3), width: 1.5}]] : []), [smooth || y, look]];
}

function drawChart(plot, chart) {
  const lists = chart.series.flatMap(seriesOf), steps = chart.xlabel === "step";
  const axis = {stroke: css("muted"), font: "11.5px system-ui, sans-serif", grid: {stroke: css("grid"), width: 1},
    ticks: {stroke: css("edge"), width: 1, size: 4}};
  const tick = value => (steps || chart.xlabel === "tokens") && value % 1 ? "" : short(value);
  const half = chart.series[0].style === "bars" ? (chart.x[1] - chart.x[0]) / 2 : 0;
  const end = {pad: .05, soft: 0, mode: chart.zero ? 1 : 0}, height = {min: end, max: end};   // mode 1: with 0
  const rest = u => {                     // without a pointer, the legend of a curve tells where it ends
    if (steps && u.cursor.idx == null) u.setLegend({idxs: u.data.map(values => values.findLastIndex(Number.isFinite))});
  };
  const u = new uPlot({
    width: plot.clientWidth, height: chart.small ? 150 : 230,
    bands: lists.flatMap(([, {band}], i) => band ? [{series: [i + 1, i + 2], fill: band}] : []),
    series: [{label: chart.xlabel, value: (u, x) => short(x)}, ...lists.map(([, look]) => look)],
    axes: [{...axis, size: 30, space: 60, values: (u, at) => at.map(tick)},
      {...axis, size: 56, space: 32, values: (u, at) => at.map(short)}],
    scales: {x: {time: false, range: (u, low, high) => low === high ? [low - 1, high + 1] : [low - half, high + half]},
      y: {range: chart.range ? () => uPlot.rangeNum(...chart.range, height) : height}},
    cursor: {hover: {skip: [null], prox: 30}, sync: {key: chart.xlabel, scales: ["x", null]}, y: false,
      points: {size: 6}},
    legend: {markers: {dash: (u, i) => u.series[i].dash ? "dashed" : "solid"}},
    hooks: {ready: [rest], setCursor: [rest], setSeries: [(u, i, {show}) => u.series.forEach((each, k) => {
      if (each.label === u.series[i].label && each.show !== show) u.setSeries(k, {show});      // with the silent ones
    })]},
  }, [chart.x, ...lists.map(([values]) => values)], plot);
  Object.assign(u.root, {tabIndex: 0, role: "group", ariaLabel: `${chart.title}. Arrow keys read it point by point.`});
  const read = at => u.setCursor({left: u.valToPos(chart.x[at], "x"), top: 10});
  onArrows(u.root, chart.x.length, () => u.cursor.idx ?? -1, read);
  u.root.addEventListener("blur", () => u.setCursor({left: -10, top: -10}));
  return u;
}

function chartFigure(chart) {
  const plot = el("div", {class: "plot"});
  let drawn = null;
  const draw = () => { drawn?.destroy(); drawn = drawChart(plot, chart); };
  const fit = () => { if (drawn?.width !== plot.clientWidth) draw(); };
  new ResizeObserver(() => requestAnimationFrame(fit)).observe(plot);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  return el("figure", {}, el("figcaption", {}, chart.title), plot, chart.note ? note(chart.note) : null);
}

const charts = (list, kind = "") => el("div", {class: "grid " + kind}, ...list.map(chartFigure));

// --- tables --------------------------------------------------------------------------------------
function tableBox({title, columns, rows}, kind = "") {
  const line = (cells, scope) => el("tr", {}, ...cells.map((text, i) =>
    i && scope === "row" ? el("td", {"data-column": columns[i]}, text) : el("th", {scope}, text)));
  const wide = columns.length > 2 ? " wide" : "";    // a phone sets each row's cells below each other
  return el("div", {class: "box " + kind + wide, tabindex: 0, role: "region", "aria-label": title}, el("table", {},
    columns.some(name => name) ? el("thead", {}, line(columns, "col")) : null,
    el("tbody", {}, ...rows.map(row => line(row, "row")))));
}

// --- tokens --------------------------------------------------------------------------------------
const SIDES = ["chosen", "rejected"];
const FACTS = [["reward", data.symbol, signed], ["f", "weight f", f => short(f) + (f <= 0 ? " (sign flips)" : "")],
  ["share", "share of Σ|f|", share => (100 * share).toFixed(2) + "%"], ["ref", "log π_ref", short],
  ["guide", "log π_guide", short], ["policy", "log π (policy)", short], ["moved", "log π/π_ref", signed]];
const sum = list => list.reduce((a, b) => a + b, 0);

// What the run recorded of each response, unpacked, and each token's share of its weights.
for (const record of data.pairs) for (const side of SIDES) {
  const m = record[side];
  for (const key in m) m[key] = new Float32Array(Uint8Array.from(atob(m[key]), c => c.charCodeAt(0)).buffer);
  m.tokens = Array.from(m.tokens, place => data.pieces[place]);
  const whole = m.f && sum(m.f.map(Math.abs));
  if (m.f) m.share = m.f.map(f => Math.abs(f) / whole);
}

// White space is marked by the style sheet, so that copied text is the text itself.
const MARKS = {" ": "space", "\n": "line", "\t": "tab"};
const pieceNodes = text => text === "" ? [el("span", {class: "part"})] : text.split(/([ \n\t])/).map(part =>
  MARKS[part] ? el("span", {class: MARKS[part]}, part) : part);
const quoted = text => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "(part of a character)";

// The end of a prompt without its template's marks: what tells one pair from another in a list.
const gist = prompt => prompt.replace(/<\|[^|]*\|>|\[\/?INST\]|<\/?s>/g, " ").replace(/\s+/g, " ").trim().slice(-110);

const textBox = (text, kind = "") => el("div", {class: "text " + kind, tabindex: 0}, text);
const valueList = rows => rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)));

let by;    // one of data.colours, or undefined where the run recorded nothing to colour by

// The response as coloured tokens, {node, recolour}; above it what is known of one token, else of the whole.
function heatMap(m, side) {
  const known = FACTS.filter(([key]) => m[key]), summed = known.filter(([key]) => ["reward", "moved"].includes(key));
  const facts = t => [["token", `${t + 1} of ${m.tokens.length}`],
    ...known.map(([key, name, form]) => [name, form(m[key][t])])];
  const totals = [["tokens", m.tokens.length], ...summed.map(([key, name]) => ["Σ " + name, signed(sum(m[key]))]),
    ...(m.f ? [["f ≤ 0", m.f.filter(f => f <= 0).length]] : [])];
  const read = el("dl", {class: "sums read"}), rest = () => read.replaceChildren(...valueList(totals));
  const show = t => read.replaceChildren(el("b", {}, quoted(m.tokens[t])), ...valueList(facts(t)));
  const label = t => [quoted(m.tokens[t]), ...facts(t).slice(1, 3).map(row => row.join(" "))].join(", ");
  const spans = m.tokens.map((token, t) =>
    el("span", {role: "option", "aria-label": label(t), pointerenter: () => show(t)}, ...pieceNodes(token)));
  const box = el("div", {class: "tokens", role: "listbox", dir: "auto", pointerleave: rest, focusout: rest,
    "aria-label": `${side} response, token by token`},
    // a line breaks before a token that begins with a space, never behind the space
    ...spans.flatMap((span, t) => m.tokens[t].startsWith(" ") ? [el("wbr"), span] : [span]));
  const recolour = () => spans.forEach((span, t) => {
    const value = by && m[by.key] ? m[by.key][t] - by.middle : 0;
    span.style.setProperty("--m", (value && 60 * Math.min(1, Math.abs(value) / by.scale)).toFixed(0) + "%");
    const names = {more: value > 0, less: value < 0, long: m.tokens[t].length > 24, flip: m.f && m.f[t] <= 0};
    span.className = ["tok", ...Object.keys(names).filter(name => names[name])].join(" ");
  });
  rove(box, spans, 0, show);
  rest();
  recolour();
  return {node: card(el("h4", {class: side}, `The ${side} response`), read, box), recolour};
}

// A row of buttons, one of them pressed, each for one of `all` and named text(it).
function choices(all, label, text, pick, first = 0) {
  const buttons = all.map((each, i) =>
    el("button", {type: "button", "data-key": each.key || each.name, click: () => press(i)}, text(each)));
  const press = at => {
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === at));
    pick(all[at]);
  };
  if (buttons.length) press(first);
  return el("div", {class: "group", role: "group", "aria-label": label}, ...buttons);
}

function explorer() {
  const records = new Map(data.pairs.map(record => [record.number, record])), view = el("div"), about = note("");
  const all = {name: "all", mark: "", note: "", pairs: [...records.keys()]}, kinds = [...data.classes, all];
  const count = el("span", {class: "muted", role: "status"}), scale = el("span", {class: "scale"});
  const listBox = el("div", {class: "card list"}), search = el("input", {type: "search", id: "find",
    placeholder: "pair number or text", "aria-label": "Filter pairs by number or text", input: () => list()});
  let shown = null, views = [], among = all;

  function list() {
    const wanted = search.value.trim().toLowerCase(), pool = among.pairs.map(number => records.get(number));
    const exact = pool.filter(record => record && [`${record.number}`, `#${record.number}`].includes(wanted));
    const text = ({source, prompt, chosen, rejected}) =>
      [source, "\n", prompt, "\n", ...chosen.tokens, "\n", ...rejected.tokens].join("").toLowerCase();
    const found = exact.length ? exact : pool.filter(record => record && text(record).includes(wanted));
    const told = (name, value) => value === null ? "" : ` ${name} ${signed(value)} `;
    const options = found.map(({number, margin, dpo_margin: plain, prompt}) =>
      el("div", {role: "option", "data-pair": number}, el("b", {}, `#${number} `), 
        kinds.find(({pairs}) => pairs.includes(number)).mark,
        told("Σ " + data.symbol, margin), told("margin", plain), el("span", {class: "snippet"}, gist(prompt))));
    const box = el("div", {role: "listbox", "aria-label": "Pairs"}, ...options);
    count.textContent = `${found.length} of ${data.pairs.length} pairs`;
    listBox.replaceChildren(found.length ? box : note("No pair matches."));
    const at = Math.max(0, found.indexOf(shown)), open = i => {
      options.forEach((each, k) => each.setAttribute("aria-selected", i === k));
      if (shown !== found[i]) show(shown = found[i]);
    };
    rove(box, options, at, open);
    if (found.length) open(at);
  }

  function show(record) {
    views = SIDES.map(side => heatMap(record[side], side));
    const sums = [[`Σ ${data.symbol}, chosen less rejected`, record.margin], ["the policy's plain DPO margin",
      record.dpo_margin], ["its optimised margin φ", record.chosen.f ? record.phi : null]];
    const prompt = [`Pair ${record.number}: the prompt`, textBox(record.prompt), note(record.source)];
    view.replaceChildren(fold(record.prompt.length < 600, ...prompt),
      el("dl", {class: "sums"}, ...valueList(sums.filter(row => row[1] !== null).map(([k, v]) => [k, signed(v)]))),
      el("div", {class: "grid sides"}, ...views.map(each => each.node)));
  }

  const colours = choices(data.colours, "Colour by", each => each.name, each => {
    by = each;
    views.forEach(each => each.recolour());
    scale.replaceChildren(short(by.middle - by.scale), el("span", {class: "bar"}), short(by.middle + by.scale),
      by.key === "f" ? "wavy underline: f ≤ 0" : "");
  });
  const classes = choices(kinds, "Which pairs", ({name, mark, pairs}) => `${mark} ${name} (${pairs.length})`, each => {
    among = each;
    about.textContent = among.note;
    if (among !== all) shown = null;         // open the class's first pair
    list();
  }, kinds.findIndex(({pairs}) => pairs.some(number => records.has(number))));
  return el("div", {}, el("div", {class: "controls"}, classes, search, count), about,
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

document.getElementById("top").append(el("h1", {}, data.name), el("p", {class: "muted"}, data.about),
  ...data.notes.map(text => el("p", {class: "warning"}, text)));

const {title, words, picture, charts: first} = data.answer, isFinal = each => each.id === "evaluation";
const final = data.tables.filter(isFinal), facts = data.tables.filter(each => !isFinal(each));
if (words.length || first.length || final.length) section("answer", title,
  ...words.map(([lead, text]) => el("p", {}, el("b", {}, lead + " "), text)),
  first.length ? card(el("h3", {}, picture), charts(first)) : null, ...final.map(each => card(tableBox(each))));

if (data.pairs.length) section("tokens", "Tokens", el("p", {class: "muted"}, data.meaning,
  " A token's share of Σ|f| over its response is its weight's share of the gradient: f multiplies the token's ∇ log π, "
  + "whose length a run does not record. Hover, tap, or walk with the arrow keys to read a token."), explorer());

if (data.curves.length) section("curves", "All curves", charts(data.curves, "wall"), note("Pale: every step; strong: "
  + "smoothed. Drag over steps to enlarge them, double-click to go back; a click on a name hides its curve."));

if (data.moved) section("moved", "What moved", charts(data.moved.charts), el("h3", {}, "What carries the reward"),
  card(tableBox({title: "What carries the reward", columns: data.moved.columns, rows: data.moved.table}, "figures"),
    note(`The end token is ${quoted(data.moved.end)} where it ends a response; punctuation is a token of punctuation `
      + "and symbols alone. Shares are of all tokens of the side.")));

if (data.samples.length) section("samples", "Samples", ...data.samples.map(({prompt = "", ...answers}, i) =>
  fold(i < 3, `${i + 1}: ${gist(prompt)}`, textBox(prompt, "muted"), el("div", {class: "grid answers"},
    ...Object.entries(answers).map(([name, text]) => el("div", {}, el("h4", {}, name), textBox(text)))))));

if (data.growth.length) section("growth", "Samples while it trained", ...data.growth.map(({prompt, answers: rows}, i) =>
  fold(i < 3, `${i + 1}: ${gist(prompt)}`, tableBox({title: "Answers by step", columns: ["step", "answer"], rows}))));

if (facts.length || data.command) section("run", "The run",
  data.command ? card(el("div", {class: "muted"}, "Made by"), el("pre", {}, el("code", {}, data.command))) : "",
  el("div", {class: "grid halves"}, ...facts.map(each => fold(each.open, each.title, tableBox(each)))));

if (!links.children.length) main.append(el("p", {}, "The run has not written anything yet."));
main.append(el("footer", {}, "Made by report/report.py from the run's directory. It needs no network."));
