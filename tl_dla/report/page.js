// What the reader chooses (a row, prompt, position, candidate or token), and all that follows it:
// the figures, their marks, the panel, the table of rows and the address.
const $ = name => document.getElementById(name);
const state = {row: null, prompt: null, position: null, candidate: null, token: null};
const sorting = {by: null, down: true};
const preference = matchMedia("(prefers-color-scheme: dark)");
const pause = () => new Promise(done => setTimeout(done));
let figures = {}, asked = null, byLabel = new Map(), headAt = new Map(), drawn = {};

function make(tag, properties = {}, ...inside) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside.filter(one => one !== null));
  return element;
}
const number = x => Number.isFinite(x) ? ((x < 0 ? "−" : "+") + Math.abs(x).toFixed(Math.abs(x) >= 10 ? 2 : 3)) : "–";
const percent = x => (100 * x).toFixed(1).replace("-", "−") + "%";
const tokensOf = prompt => (asked.tokens ?? {})[prompt];  // none where a cache came without them
const marksOf = figure => figure.layout.meta?.marks ?? {};
const quoted = text => "“" + text.replaceAll("\n", "↵") + "”";
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;

// ---- what is chosen ----------------------------------------------------------------------------

// The held places that the choice leaves; evidence is of the first of them.
function places() {
  const all = asked.places.map((_, s) => s).filter(s =>
    (state.prompt === null || asked.places[s][0] === state.prompt) &&
    (state.position === null || asked.places[s][1] === state.position));
  return all.length ? all : asked.places.map((_, s) => s);
}
const place = () => places()[0];
const overall = () => state.prompt === null && state.position === null;
const columns = () => state.candidate !== null ? [state.candidate] : asked.candidates.map((_, c) => c).slice(0, 4);
const valueOf = (r, c) => overall() ? asked.mean[c][r] : mean(places().map(s => asked.values[s][c][r]));
const logitOf = c => mean(places().map(s => asked.logit[s][c]));
function placed(s) {
  const [prompt, position] = asked.places[s], tokens = tokensOf(prompt);
  return (asked.n_prompts > 1 ? `prompt ${prompt}, ` : "") + `position ${position}` + (tokens ? ` ${quoted(tokens[position])}` : "");
}
function moved(s, head) {
  const by = columns().map(c => asked.moved[s][c][head]);
  return by.length === 1 ? by[0] : by[0].map((_, i) => mean(by.map(one => one[i])));
}

function choose(change, keep) {
  Object.assign(state, change);
  if (!asked.places.some(([p, q]) => (state.prompt === null || p === state.prompt) && (state.position === null || q === state.position)))
    state.position = null;
  if (!keep) {
    const words = new URLSearchParams();
    for (const [name, value] of Object.entries(state)) if (value !== null) words.set(name, value);
    try { history.replaceState(null, "", "#" + words); } catch { /* a frame without an address */ }
  }
  follow();
}
function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  if (location.hash && ![...words.keys()].some(name => name in state)) return;  // a heading's
  const whole = name => /^\d+$/.test(words.get(name) ?? "") ? Number(words.get(name)) : null;
  const found = {row: words.get("row"), prompt: whole("prompt"), position: whole("position"), candidate: whole("candidate"), token: whole("token")};
  if (!byLabel.has(found.row)) found.row = null;
  if (!asked.places.some(([p]) => p === found.prompt)) found.prompt = null;
  if (!(found.candidate < asked.candidates.length)) found.candidate = null;
  choose(found, true);
}
function follow() {
  for (const [name, select] of Object.entries(selects)) select.value = state[name] ?? "";
  fillPanel(); fillRows(); markTokens(); showCards();
  redraw(preference.matches);
}

// ---- selectors ---------------------------------------------------------------------------------

const selects = {};
function addSelects() {
  const prompts = [...new Set(asked.places.map(([p]) => p))].sort((a, b) => a - b);
  const positions = [...new Set(asked.places.map(([, q]) => q))].sort((a, b) => a - b);
  const several = prompts.some(p => asked.places.filter(([own]) => own === p).length > 1);
  const add = (name, all, names) => {
    const select = make("select", {onchange: () => choose({[name]: select.value === "" ? null : Number(select.value)})});
    select.append(make("option", {value: "", textContent: all}), ...names.map(([value, text]) => make("option", {value, textContent: text})));
    $("ask").append(make("label", {}, name + " ", select));
    selects[name] = select;
  };
  const words = p => `${p}` + (asked.tokens ? ` ${asked.tokens[p].join("").replaceAll("\n", "↵").slice(-40)}` : "");
  if (asked.n_prompts > 1) add("prompt", "all (mean)", prompts.map(p => [p, words(p)]));
  if (several) add("position", "all", positions.map(q => [q, `${q}`]));
  if (asked.candidates.length > 1) add("candidate", "all", asked.candidates.map((name, c) => [c, quoted(name)]));
  const held = prompts.length < asked.n_prompts ? `The page holds ${prompts.length} of ${asked.n_prompts} prompts to choose.` : "";
  if (held) $("ask").append(make("span", {className: "soft", textContent: held}));
  $("ask").hidden = !$("ask").children.length;
}

// ---- figures -----------------------------------------------------------------------------------

function variantOf(name) {
  const word = x => x === null ? "" : `${x}`, {prompt, position, candidate} = state;
  for (const [p, q, c] of [[prompt, position, candidate], [prompt, position, null], [prompt, null, candidate], [prompt, null, null], [null, null, candidate], [null, null, null]]) {
    const key = [p, q, c].map(word).join("|");
    if (key in figures[name]) return key;
  }
  return Object.keys(figures[name])[0];
}
// What stands for a row where it has no place of its own: the row that holds it, or the reading of
// the stream right after it was written; and which row a reading follows.
function standsFor(label) {
  const [, kind, layer] = asked.rows[byLabel.get(label)] ?? [];
  if (layer === null || layer === undefined) return [];
  const attention = ["head", "attn", "source"].includes(kind);
  return attention ? [`${layer}_attn_out`, `${layer}_mid`] : [`${layer}_mlp_out`, `${layer + 1}_pre`, "final_post"];
}
function writerOf(label) {
  const [, layer, name] = /^(\d+)_(mid|pre)$/.exec(label) ?? [];
  if (name === "mid") return `${layer}_attn_out`;
  return name === "pre" ? `${layer - 1}_mlp_out` : null;
}
function rectangles(figure, dark) {
  const marks = marksOf(figure), style = {line: {color: themes[dark ? "dark" : "light"].edge, width: 2}, fillcolor: "rgba(0,0,0,0)", layer: "above"};
  const rows = state.row === null ? [] : state.row in marks ? [state.row] : standsFor(state.row).filter(one => one in marks).slice(0, 1);
  const column = [state.token, state.position].filter(one => one !== null).map(one => `@${one}`);
  return [...rows, ...column].filter(one => one in marks).map(one => {
    const [xref, yref, x0, x1, y0, y1] = marks[one];
    return {type: "rect", xref, yref, x0, x1, y0, y1, ...style};
  });
}
// A figure in the colours of the page: its own, or the dark ones in their place.
function drawOne(name, dark, width) {
  const key = variantOf(name), figure = figures[name][key], theme = themes[dark ? "dark" : "light"];
  const shapes = rectangles(figure, dark), wanted = `${key} ${dark} ${width ?? ""}`;
  if (drawn[name] === wanted) { Plotly.relayout(name, {shapes}); return; }
  drawn[name] = wanted;
  const layout = structuredClone(figure.layout), data = structuredClone(figure.data);
  Object.assign(layout, {template: theme.template, paper_bgcolor: "rgba(0,0,0,0)", shapes});
  if (layout.coloraxis) layout.coloraxis.colorscale = theme.scales[layout.meta.scale];
  for (const trace of data)
    if (trace.type === "heatmap" && trace.textfont && trace.textfont.color) trace.textfont.color = theme.ink;
  const least = width ? 0 : layout.meta?.least ?? 330;
  if (width) {
    if (layout.height > 820) {  // what a page holds
      for (const trace of data) if (trace.textfont) trace.textfont.size = 8;
      Object.assign(layout.yaxis, {tickfont: {size: 8}});
    }
    Object.assign(layout, {width, height: Math.min(layout.height, 820)});
    const n = data[0].type === "heatmap" && data[0].x ? data[0].x.length : 0;
    if (n > 14) layout.xaxis.range = [n - 14.5, n - 0.5];  // on paper, the columns that can be read
  }
  Object.assign($(name).style, {height: layout.height + "px", minWidth: least + "px"});
  if ($(name + "-note")) $(name + "-note").textContent = figure.note.join("\n");
  $(name).parentElement.setAttribute("aria-label", figure.label);
  const room = width ?? Math.max($(name).parentElement.clientWidth, least);
  if (layout.meta?.worded > room) delete data[0].texttemplate;  // on a phone
  const words = width ? null : data[0].texttemplate;  // in cells: as long a task as all the rest
  if (words) data[0].texttemplate = "";
  Plotly.react(name, data, layout, {responsive: true, displaylogo: false, showSendToCloud: false, showLink: false});
  if (words) setTimeout(() => { if (drawn[name] === wanted) Plotly.restyle(name, {texttemplate: words}, [0]); });
}
function fit(name) {  // the panel may have taken room since the figure was drawn
  if ($(name)._fullLayout && Math.abs($(name)._fullLayout.width - $(name).clientWidth) > 1) Plotly.Plots.resize(name);
}
let latest = 0;
async function redraw(dark) {
  const own = ++latest;
  for (const name of Object.keys(figures)) {
    await pause();  // so that no task is long
    if (own !== latest) return;
    drawOne(name, dark);
    fit(name);
    reveal(name);
  }
  await pause();
}
// A wide figure shows its chosen column, or its last ones.
function reveal(name) {
  const box = $(name).parentElement, axis = $(name)._fullLayout.xaxis;
  if (axis.type !== "category" || box.scrollWidth <= box.clientWidth) return;
  const marks = marksOf(figures[name][variantOf(name)]), column = marks[`@${state.token ?? state.position}`];
  box.scrollLeft = column ? axis._offset + axis.c2p((column[2] + column[3]) / 2) - box.clientWidth / 2 : box.scrollWidth;
}
function drawAll(dark, width) {  // at once: a print does not wait
  latest++;
  for (const name of Object.keys(figures)) drawOne(name, dark, width);
}
// A press on a figure chooses the row, and the column, that stand there.
function listen(name) {
  const box = $(name);
  let start = null;
  box.addEventListener("pointerdown", event => { start = event.target.closest(".modebar") ? null : [event.clientX, event.clientY]; }, true);
  addEventListener("pointerup", event => {
    if (start && Math.hypot(event.clientX - start[0], event.clientY - start[1]) < 5) press(name, event);
    start = null;
  }, true);
}
function press(name, event) {
  const marks = marksOf(figures[name][variantOf(name)]), full = $(name)._fullLayout, box = $(name).getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top, change = {};
  const within = (ref, at, from, to, side) => {
    if (ref === "paper") return true;
    const axis = full[ref.split(" ")[0].replace(/^([xy])/, "$1axis")], place = at - axis._offset;
    if (ref.endsWith("domain")) return place >= 0 && place <= axis._length;
    const [a, b] = [axis.c2p(from), axis.c2p(to)];
    return place >= Math.min(a, b) && place <= Math.max(a, b) && (side || (place >= 0 && place <= axis._length));
  };
  for (const [label, [xref, yref, x0, x1, y0, y1]] of Object.entries(marks)) {
    if (!within(xref, x, x0, x1) || !within(yref, y, y0, y1)) continue;
    if (label[0] === "@") change.token = Number(label.slice(1));
    else if (byLabel.has(label)) change.row = label;
    else if (byLabel.has(writerOf(label))) change.row = writerOf(label);
  }
  if (Object.keys(change).length) choose(change);
}

// ---- the panel ---------------------------------------------------------------------------------

const rowButton = label => make("button", {className: "link", textContent: label, onclick: () => choose({row: label})});
function tableOf(heads, lines) {
  const body = lines.map(line => make("tr", {}, ...line.map(cell => make("td", typeof cell === "string" ? {className: /^[+−–\d]/.test(cell) ? "n" : "", textContent: cell} : {}, ...(typeof cell === "string" ? [] : [cell])))));
  return make("table", {className: "plain"}, make("thead", {}, make("tr", {}, ...heads.map(textContent => make("th", {scope: "col", textContent})))), make("tbody", {}, ...body));
}
function fillPanel() {
  const box = $("panel"), open = state.row !== null || state.token !== null;
  box.hidden = !open;
  document.body.classList.toggle("asked", open);
  if (!open) return;
  const parts = [make("button", {className: "close", textContent: "×", ariaLabel: "close", onclick: () => choose({row: null, token: null})})];
  if (state.row !== null) parts.push(...aboutRow(byLabel.get(state.row)));
  if (state.token !== null) parts.push(...aboutToken(state.token));
  box.replaceChildren(...parts);
}
function aboutRow(r) {
  const [label, kind] = asked.rows[r], s = place(), parts = [make("h2", {textContent: label}, " ", make("span", {className: "soft", textContent: kind}))];
  const of = overall() && asked.n_prompts > 1 ? "mean over all prompts" : places().length > 1 ? `mean over ${places().length} positions` : placed(s);
  parts.push(make("p", {className: "soft", textContent: of}));
  for (const c of columns()) {
    const value = valueOf(r, c), share = kind === "residual" || overall() && asked.n_prompts > 1 ? "" : ` · ${percent(value / logitOf(c))} of the logit`;
    parts.push(make("p", {}, asked.candidates[c] ? quoted(asked.candidates[c]) + " " : "", make("b", {className: "value", textContent: number(value)}), share));
  }
  parts.push(...aboutEffects(label), ...aboutSources(label, s), make("div", {id: "panel-attention"}), ...aboutTokens(label, s), ...aboutHeads(r));
  return parts;
}
function aboutEffects(label) {
  const audit = asked.audit[label];
  if (!audit) return [];
  const at = name => overall() ? audit.mean[name === "direct" ? 0 : 1] : mean(places().map(s => audit[name][s]));
  const [direct, total] = [at("direct"), at("total")];
  return [make("h3", {textContent: "Direct and total effect"}),
    tableOf(["direct", "total", "indirect"], [[number(direct), number(total), number(total - direct)]]),
    ...audit.flags.map(textContent => make("p", {className: "soft", textContent}))];
}
function aboutSources(label, s) {
  const head = headAt.get(label), [prompt] = asked.places[s], tokens = tokensOf(prompt);
  if (head === undefined) return asked.refused.heads && label.includes("H") ? [make("p", {className: "soft", textContent: asked.refused.heads})] : [];
  const attention = asked.attention[s][head], move = moved(s, head), most = Math.max(...move.map(Math.abs), 1e-12);
  const order = move.map((_, i) => i).sort((a, b) => Math.abs(move[b]) - Math.abs(move[a]));
  const read = attention.map((_, i) => i).sort((a, b) => attention[b] - attention[a]);
  const shown = [...new Set([...read.slice(0, 5), ...order.slice(0, 5)])].sort((a, b) => (attention[b] ?? 0) - (attention[a] ?? 0));
  const near = new Set(tokens.length <= 120 ? tokens.keys() : shown.flatMap(i => [i - 2, i - 1, i, i + 1, i + 2]));
  const strip = make("p", {className: "prompt strip"});
  let gap = false;
  tokens.forEach((text, i) => {
    if (!near.has(i)) { if (!gap) strip.append(" … "); gap = true; return; }
    gap = false;
    strip.append(tokenOf(text, prompt, i, move[i] ?? 0, most, attention[i] ?? 0));
  });
  return [make("h3", {textContent: `Attention from ${placed(s)}, and what it moved`}), strip,
    ...aboutWhy(label, s, read),
    tableOf(["token", "position", "attention", "moved"], shown.map(i => [quoted(tokens[i]), `${i}`, percent(attention[i] ?? 0), number(move[i] ?? 0)])),
    make("p", {className: "soft", textContent: `All ${move.length} tokens add up to ${number(move.reduce((a, b) => a + b, 0))} logits.`})];
}
// Who wrote its query and its key: of the largest heads in a sentence, of others the call that says it.
function aboutWhy(label, s, read) {
  if (!Object.values(asked.why).some(one => Object.keys(one).length)) return [];  // the model's scores are not read
  const [prompt, position] = asked.places[s], tokens = asked.tokens[prompt], attention = asked.attention[s][headAt.get(label)];
  const first = asked.places.findIndex(([own]) => own === prompt);  // its last attributed position
  const why = s === first ? (asked.why[prompt] ?? {})[label] : undefined;
  if (why) return [make("p", {textContent: `${label} ${why}.`})];
  const versus = read.find(i => tokens[i] !== tokens[read[0]] && attention[i] > 0);
  if (versus === undefined) return [make("p", {className: "soft", textContent: `${label} sees one sort of token only.`})];
  const given = asked.n_prompts > 1 ? `prompts[${prompt}]` : "prompt";
  return [make("p", {className: "soft", textContent: "Who wrote its query and key: "}, make("code", {textContent:
    `attribute_attention(model, ${given}, "${label}", query=${position}, key=${read[0]}, versus=${versus})`}))];
}
function tint(value, most) {
  return `color-mix(in srgb, ${value >= 0 ? themes.positive : themes.negative} ${Math.round(80 * Math.abs(value) / most)}%, transparent)`;
}
function tokenOf(text, prompt, i, value, most, attention) {
  const span = make("span", {className: "token", textContent: text, title: `position ${i}: attention ${percent(attention)}, moved ${number(value)}`});
  Object.assign(span.dataset, {prompt, position: i});
  span.style.background = tint(value, most);
  return span;
}
function aboutTokens(label, s) {
  const promoted = asked.promoted ?? [], sides = promoted[s]?.[label];
  if (promoted.length && !promoted[s]) return [make("p", {className: "soft", textContent: `Tokens that it raises and lowers: the page holds them for ${promoted.filter(one => one).length} of its ${promoted.length} places.`})];
  if (!sides) return [];
  const lines = sides.map(side => side.map(([token, value]) => `${quoted(asked.vocabulary[token])} ${number(value)}`));
  return [make("h3", {textContent: "Tokens it raises and lowers most"}),
    tableOf(["raises", "lowers"], lines[0].map((one, i) => [one, lines[1][i] ?? ""]))];
}
function aboutHeads(r) {
  const [, kind, layer] = asked.rows[r], c = columns()[0];
  if (kind !== "attn") return [];
  const heads = asked.rows.map((row, i) => [row, i]).filter(([row]) => row[1] === "head" && row[2] === layer).map(([row, i]) => [row[0], valueOf(i, c)]);
  heads.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  return heads.length ? [make("h3", {textContent: "Its heads"}), tableOf(["head", "logits"], heads.slice(0, 12).map(([name, value]) => [rowButton(name), number(value)]))] : [];
}
function aboutToken(i) {
  const s = place(), [prompt] = asked.places[s], text = (tokensOf(prompt) ?? [])[i];
  if (text === undefined) return [];
  const parts = [make("h2", {textContent: quoted(text)}, " ", make("span", {className: "soft", textContent: `token ${i}` + (asked.n_prompts > 1 ? ` of prompt ${prompt}` : "")}))];
  if (!asked.heads.length) return parts;
  const heads = asked.heads.map((name, h) => [name, asked.attention[s][h][i] ?? 0, moved(s, h)[i] ?? 0]);
  heads.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
  parts.push(make("h3", {textContent: `Heads that moved most from it, to ${placed(s)}`}),
    tableOf(["head", "attention", "moved"], heads.slice(0, 10).map(([name, attention, value]) => [rowButton(name), percent(attention), number(value)])),
    make("p", {className: "soft", textContent: `All heads moved ${number(heads.reduce((a, b) => a + b[2], 0))} logits from it.`}));
  return parts;
}

// ---- rows, tokens and cards --------------------------------------------------------------------

const MOST_LISTED = 200;
function fillRows() {
  const wanted = $("find").value.trim().toLowerCase(), shown = columns();
  let rows = asked.rows.map((row, i) => i).filter(i => asked.rows[i][0].toLowerCase().includes(wanted) || asked.rows[i][1] === wanted);
  const key = {row: i => i, kind: i => asked.rows[i][1], size: i => Math.abs(valueOf(i, shown[0]))};
  shown.forEach(c => { key[`c${c}`] = i => valueOf(i, c); });
  const of = key[sorting.by ?? "row"] ?? key.row, sign = sorting.by !== null && sorting.down ? -1 : 1;
  rows.sort((a, b) => { const [x, y] = [of(a), of(b)]; return sign * (x < y ? -1 : x > y ? 1 : 0) || a - b; });
  const heading = (name, text) => make("th", {scope: "col", ariaSort: sorting.by === name ? (sorting.down ? "descending" : "ascending") : "none"},
    make("button", {className: "link", textContent: text, onclick: () => { sorting.down = sorting.by === name ? !sorting.down : true; sorting.by = name; fillRows(); }}));
  const heads = [heading("row", "row"), heading("kind", "kind"), ...shown.map(c => heading(`c${c}`, asked.candidates[c] ? quoted(asked.candidates[c]) : "logits")), heading("size", "size")];
  const lines = rows.slice(0, MOST_LISTED).map(i => {
    const [label, kind] = asked.rows[i];
    return make("tr", {className: label === state.row ? "chosen" : ""}, make("th", {scope: "row"}, rowButton(label)), make("td", {textContent: kind}),
      ...shown.map(c => make("td", {className: "n", textContent: number(valueOf(i, c))})), make("td", {className: "n", textContent: Math.abs(valueOf(i, shown[0])).toFixed(3)}));
  });
  $("listed").replaceChildren(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...lines));
  $("found").textContent = `${Math.min(rows.length, MOST_LISTED)} of ${asked.rows.length} rows`;
}
function markTokens() {
  const s = place(), [prompt] = asked.places[s], head = headAt.get(state.row);
  const move = head === undefined ? null : moved(s, head), most = move ? Math.max(...move.map(Math.abs), 1e-12) : 1;
  for (const token of document.querySelectorAll("header .token")) {
    const own = Number(token.dataset.prompt) === prompt, at = Number(token.dataset.position);
    token.classList.toggle("chosen", own && at === state.token);
    token.style.background = own && move && move[at] ? tint(move[at], most) : "";
  }
}
function showCards() {
  const groups = [...document.querySelectorAll("[data-cards]")], wanted = groups.find(one => Number(one.dataset.cards) === state.prompt);
  for (const group of groups) group.hidden = group !== (wanted ?? groups[0]);
}

// ---- start -------------------------------------------------------------------------------------

async function start() {
  asked = JSON.parse(await unpacked("evidence"));
  byLabel = new Map(asked.rows.map(([label], i) => [label, i]));
  headAt = new Map(asked.heads.map((label, i) => [label, i]));
  addSelects();
  $("find").addEventListener("input", fillRows);
  document.addEventListener("click", event => {
    const token = event.target.closest(".token[data-position]");
    if (!token) return;
    const prompt = Number(token.dataset.prompt), position = Number(token.dataset.position);
    const known = asked.places.some(([p]) => p === prompt), attributed = asked.places.some(([p, q]) => p === prompt && q === position);
    if (known) choose({token: position, ...(asked.n_prompts > 1 ? {prompt} : {}), ...(attributed && "position" in selects ? {position} : {})});
  });
  document.addEventListener("keydown", event => {
    if (event.key === "Escape") choose({row: null, token: null});
    if (event.key === "Enter" && event.target.matches(".token")) event.target.click();
  });
  await pause();
  figures = JSON.parse(await unpacked("figures"));
  await unpack("plotly");
  readAddress();
  if (!Object.values(state).some(one => one !== null)) follow();
  await redraw(preference.matches);
  for (const name of Object.keys(figures)) listen(name);
  addEventListener("hashchange", readAddress);
  preference.addEventListener("change", event => redraw(event.matches));
  addEventListener("beforeprint", () => drawAll(false, 680));
  addEventListener("afterprint", () => redraw(preference.matches));
  if ($("circuitsvis")) {
    await pause();
    await unpack("circuitsvis");
    await pause();
    drawAttention();
  }
  document.documentElement.dataset.drawn = "";
}
start();
