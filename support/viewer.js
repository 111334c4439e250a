const DECISION = {s: "switch", o: "subgoal", a: "action", ".": "no decision"};
const hiper = data.settings.method === "hiper";
let current = -1, turnNow = 0, shown = [];

const signed = x => x === undefined || x === null ? "–" : (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
const plain = x => x === undefined || x === null ? "–" : (x < 0 ? "−" : "") + Math.abs(x).toFixed(2);
const lines = numbers => numbers.map(n => data.texts[n]).join("\n");
const sum = numbers => numbers.reduce((a, b) => a + b, 0);
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

// The turn after which the planner's value falls most: where an episode was probably lost.
function largestFall(turns) {
  const falls = turns.slice(1).map((t, i) => (turns[i].values || [])[0] - (t.values || [])[0]);
  const size = Math.max(...falls);
  return size > 0 ? {turn: falls.indexOf(size), size} : null;
}
for (const e of data.episodes) {
  e.total = sum(e.turns.map(t => t.reward));
  e.segments = [];
  e.turns.forEach((t, i) => {
    if (t.start || i === 0) e.segments.push({from: i, subgoal: t.subgoal, advantage: t.raw ? t.raw.o : undefined});
    const segment = e.segments[e.segments.length - 1];
    segment.to = i;
    t.segment = e.segments.length - 1;
  });
  const rated = e.segments.filter(s => typeof s.advantage === "number");
  e.worst = rated.length > 1 ? rated.reduce((a, b) => b.advantage < a.advantage ? b : a) : null;
  e.fall = largestFall(e.turns);
  e.errors = e.turns.filter(t => t.error).length;
  e.words = [e.task, ...e.turns.map(t => t.subgoal + "\n" + t.action)].join("\n").toLowerCase();
}
const sizes = data.episodes.flatMap(e => e.turns.flatMap(t => Object.values(t.raw || {}).map(Math.abs))).sort((a, b) => a - b);
const full = sizes.length ? sizes[Math.floor(.97 * (sizes.length - 1))] || 1 : 1;  // |A| of the deepest colour
const hasRaw = sizes.length > 0;

// ---- list ---------------------------------------------------------------------------------------
function options(id, pairs) {
  for (const [value, text] of pairs) el("option", "", text, byId(id)).value = value;
}
const types = [...new Set(data.episodes.map(e => e.type))].sort();
options("result", [["", "Won and lost"], ["won", "Won"], ["lost", "Lost"], ["errors", "With format errors"]]);
options("type", [["", "All task types"], ...types.map(t => ["=" + t, t])]);
options("sort", [["", "As played"], ["low", "Lowest return first"], ["high", "Highest return first"],
  ["turns", "Most turns first"], ["switches", "Most segments first"], ...(hasRaw && hiper ? [["worst", "Lowest subgoal advantage first"]] : [])]);
const KEYS = {low: e => e.total, high: e => -e.total, turns: e => -e.turns.length, switches: e => -e.segments.length,
  worst: e => Math.min(...e.segments.map(s => s.advantage ?? 0))};

function fillList() {
  const [result, type, sort] = ["result", "type", "sort"].map(id => byId(id).value);
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = data.episodes.map((e, n) => n).filter(n => {
    const e = data.episodes[n];
    return (!result || (result === "errors" ? e.errors : (result === "won") === e.success))
      && (!type || "=" + e.type === type) && words.every(word => e.words.includes(word));
  });
  if (sort) shown.sort((a, b) => KEYS[sort](data.episodes[a]) - KEYS[sort](data.episodes[b]) || a - b);
  const won = shown.filter(n => data.episodes[n].success).length;
  byId("count").textContent = `${plural(shown.length, "episode")}, ${won} won`;
  byId("lost").textContent = `${shown.length - won} lost →`;
  byId("lost").hidden = won === shown.length;
  byId("list").replaceChildren(...shown.map(n => {
    const e = data.episodes[n];
    const item = el("button", `item ${e.success ? "won" : "lost"}`);
    el("span", "mark", e.success ? "✓" : "✕", item).title = e.success ? "won" : "lost";
    el("span", "text", e.task, item);
    el("span", "small muted num", `#${n} · return ${plain(e.total)} · ${plural(e.turns.length, "turn")} · `
      + plural(e.segments.length, "segment"), item);
    item.onclick = () => go(n, 0, true);
    if (n === current) item.setAttribute("aria-current", "true");
    return item;
  }));
}

// ---- token colours ------------------------------------------------------------------------------
const TINTS = [...(hasRaw ? [["raw", "advantage"], ["scaled", "advantage, normalised"]] : []),
  ["p", "probability"], ["mask", "decision (mask)"], ["none", "nothing"]];
options("tint", TINTS);
const MASK = {s: "--s3", o: "--s2", a: "--plus"};
const wash = (colour, share) => `color-mix(in srgb, var(${colour}) ${Math.round(100 * share)}%, transparent)`;
function advantage(turn, i, how) {
  const values = turn[how];
  if (!values || turn.trained[i] !== "1") return undefined;
  return values.all !== undefined ? values.all : values[turn.kinds[i]];
}
function paint(span, turn, i) {
  const how = byId("tint").value, kind = turn.kinds[i], trained = turn.trained[i] === "1";
  let colour = "";
  if (how === "raw" || how === "scaled") {
    const a = advantage(turn, i, how), scale = how === "raw" ? full : 2;
    if (typeof a === "number") colour = wash(a < 0 ? "--minus" : "--plus", .05 + .6 * Math.sqrt(Math.min(1, Math.abs(a) / scale)));
  } else if (how === "p") colour = wash("--s0", .7 * (1 - turn.p[i]));
  else if (how === "mask" && MASK[kind]) colour = wash(MASK[kind], .34);
  span.style.background = colour;
  span.className = turn.trained && !trained && how !== "none" && how !== "p" ? "off" : "";
  const a = advantage(turn, i, "raw"), b = advantage(turn, i, "scaled");
  span.title = `${DECISION[kind]} · probability ${turn.p[i].toFixed(3)}`
    + (a === undefined ? turn.trained ? " · not trained" : "" : ` · advantage ${signed(a)}, normalised ${signed(b)}`);
}
function legend() {
  const how = byId("tint").value, key = byId("legend");
  const entries = {
    raw: [[wash("--minus", .66), `advantage ${signed(-full)} or less`], [wash("--plus", .66), `${signed(full)} or more`], ["", "grey: not trained"]],
    scaled: [[wash("--minus", .66), "normalised advantage −2 or less"], [wash("--plus", .66), "+2 or more"], ["", "grey: not trained"]],
    p: [[wash("--s0", .7), "improbable token"], [wash("--s0", .04), "probability 1"]],
    mask: [[wash("--s3", .34), "switch"], [wash("--s2", .34), "subgoal"], [wash("--plus", .34), "action"], ...(hasRaw ? [["", "grey: not trained"]] : [])],
    none: [],
  }[how];
  key.replaceChildren();
  if (entries.length) el("span", "muted", "Tokens", key);
  for (const [colour, text] of entries) {
    const item = el("span", "muted", "", key);
    if (colour) el("i", "", "", item).style.background = colour;
    item.append(text);
  }
}

// ---- one episode --------------------------------------------------------------------------------
function strip(e, parent) {
  const figure = el("figure", "strip", null, parent), n = e.turns.length;
  const W = Math.max(320, Math.min(928, figure.clientWidth || 928)), left = 40, top = 24, rows = [["A", 104], ["V", 84]];
  const hasValues = e.turns.some(t => t.values), step = (W - left) / n, gap = 30;
  const height = top + rows[0][1] + (hasValues ? gap + rows[1][1] : 0) + 20;
  const art = svg("svg", {viewBox: `0 0 ${W} ${height}`, role: "img"}, figure);
  svg("title", {}, art, "Advantages and values of each turn");
  e.segments.forEach((s, k) => {
    const x = left + s.from * step, w = (s.to - s.from + 1) * step;
    svg("rect", {x: x + 1, y: 0, width: w - 2, height: height - 18, rx: 5, style: `fill: color-mix(in srgb, var(--s${k % 5}) 13%, transparent)`}, art);
    svg("text", {x: x + 7, y: 14, style: `fill: var(--s${k % 5}); font-weight: 650`}, art, String(k + 1));
  });
  const main = t => t.raw ? t.raw.all ?? t.raw.a : t.reward;  // without a critic: rewards
  const numbers = e.turns.flatMap(t => [main(t), t.flat, t.raw ? t.raw.o : 0]).filter(x => typeof x === "number");
  const high = Math.max(0, ...numbers), low = Math.min(0, ...numbers), range = high - low || 1;
  const y = a => top + (high - a) / range * rows[0][1];
  const axis = (y0, text) => {
    svg("line", {x1: left, x2: W, y1: y0, y2: y0, stroke: "var(--muted)", "stroke-opacity": .5}, art);
    svg("text", {x: left - 6, y: y0 + 4, "text-anchor": "end"}, art, text);
  };
  axis(y(0), "0");
  for (const edge of [high, low]) if (Math.abs(y(edge) - y(0)) > 14) svg("text", {x: left - 6, y: y(edge) + 4, "text-anchor": "end"}, art, signed(edge));
  const bar = Math.max(2, Math.min(14, step * .3));
  e.turns.forEach((t, i) => {
    const middle = left + (i + .5) * step, two = typeof t.flat === "number";
    const draw = (a, x, style) => typeof a === "number" && svg("rect", {x, width: bar, y: Math.min(y(a), y(0)), height: Math.max(1.2, Math.abs(y(a) - y(0))), rx: 1.5, style}, art);
    draw(main(t), two ? middle - bar - .5 : middle - bar / 2, `fill: var(${main(t) < 0 ? "--minus" : "--plus"})`);
    if (two) draw(t.flat, middle + .5, "fill: none; stroke: var(--flat); stroke-width: 1.2");
    if (t.raw && typeof t.raw.o === "number") {
      const x = middle - bar - 8 > left + i * step ? middle - bar - 7 : left + i * step + 4;
      svg("path", {d: `M${x} ${y(t.raw.o) - 5}l5 5l-5 5l-5 -5z`, style: `fill: var(--card); stroke: var(--s${t.segment % 5}); stroke-width: 1.8`}, art);
    }
  });
  if (hasValues) {
    const y0 = top + rows[0][1] + gap, all = e.turns.flatMap(t => t.values).filter(x => typeof x === "number");
    const vHigh = Math.max(...all), vLow = Math.min(...all), v = a => y0 + (vHigh - a) / (vHigh - vLow || 1) * rows[1][1];
    for (const edge of vHigh > vLow ? [vHigh, vLow] : [vHigh]) svg("text", {x: left - 6, y: v(edge) + 4, "text-anchor": "end"}, art, plain(edge));
    const STYLE = ["stroke: var(--text)", "stroke: var(--accent); stroke-dasharray: 5 3", "stroke: var(--minus); stroke-dasharray: 1.5 3"];
    STYLE.slice(0, e.turns[0].values.length).forEach((style, head) => {
      const points = e.turns.map((t, i) => `${left + (i + .5) * step},${v(t.values[head])}`).join(" ");
      svg("polyline", {points, style: `fill: none; stroke-width: 1.7; stroke-linecap: round; ${style}`}, art);
    });
  }
  const every = Math.ceil(n / Math.floor((W - left) / 26));
  e.turns.forEach((t, i) => {
    if (i % every === 0) svg("text", {x: left + (i + .5) * step, y: height - 3, "text-anchor": "middle"}, art, String(i));
    const hit = svg("rect", {class: "hit", x: left + i * step, y: 0, width: step, height: height - 18}, art);
    svg("title", {}, hit, `turn ${i}: ${t.action}\n` + facts(t).map(([name, x]) => `${name} ${x}`).join("\n"));
    hit.onclick = () => go(current, i, true);
  });
  const key = el("p", "key small muted", null, figure);
  const entry = (style, text) => { const item = el("span", "", "", key); el("i", "", "", item).style.cssText = style; item.append(text); };
  entry("background: linear-gradient(90deg, var(--plus) 50%, var(--minus) 50%)", !hasRaw ? "reward" : hiper ? "A_action (HAE)" : `A (${data.settings.method})`);
  if (e.turns.some(t => typeof t.flat === "number")) entry("border: 1.3px solid var(--flat)", "flat GAE: the same, without boundaries");
  if (hasRaw && hiper) entry("border: 1.6px solid var(--s0); transform: rotate(45deg) scale(.72)", "A_subgoal");
  if (hasValues) {
    entry("background: var(--text); height: 2px; vertical-align: 4px", hiper ? "V_high" : "V");
    if (hiper) entry("border-top: 2px dashed var(--accent); height: 0; vertical-align: 4px; border-radius: 0", "V_low");
    if (hiper) entry("border-top: 2px dotted var(--minus); height: 0; vertical-align: 4px; border-radius: 0", "V_switch");
  }
}
function facts(t) {
  const found = [["reward", plain(t.reward)]], raw = t.raw || {}, values = t.values || [];
  if (t.raw && "all" in raw) found.push(["A", signed(raw.all)]);
  for (const [letter, name] of [["a", "A_action"], ["o", "A_subgoal"], ["s", "A_switch"]]) if (letter in raw) found.push([name, signed(raw[letter])]);
  if (typeof t.flat === "number") found.push(["flat GAE", signed(t.flat)]);
  (hiper ? ["V_high", "V_low", "V_switch"] : ["V"]).forEach((name, i) => { if (i in values) found.push([name, plain(values[i])]); });
  if (typeof t.beta === "number") found.push(["beta", t.beta.toFixed(3)]);
  return found;
}
function showEpisode() {
  const e = data.episodes[current], root = byId("episode");
  root.replaceChildren();
  el("h1", "task text", e.task, root);
  el("p", "muted num", [`#${current}`, e.success ? "won" : e.truncated ? "lost: out of turns" : "lost", e.type, `task ${e.index}`,
    `return ${plain(e.total)}`, ...(e.score !== Number(e.success) ? [`score ${plain(e.score)}`] : []), plural(e.turns.length, "turn"),
    plural(e.segments.length, "segment"), ...(e.errors ? [plural(e.errors, "format error")] : [])].join(" · "), root);
  const pointers = el("p", "pointers", null, root);
  const pointer = (title, name, turn, value) => {
    const button = el("button", "", `${title}: `, pointers);
    el("b", "", name, button);
    button.append(` (turn ${turn}, `);
    el("span", "num " + (value < 0 ? "minus" : "plus"), signed(value), button);
    button.append(")");
    button.onclick = () => go(current, turn, true);
  };
  if (e.worst) pointer("Lowest subgoal advantage", e.worst.subgoal || "(no subgoal)", e.worst.from, e.worst.advantage);
  if (e.fall) pointer(`Largest fall of ${hiper ? "V_high" : "V"}`, e.turns[e.fall.turn].action || "(no action)", e.fall.turn, -e.fall.size);
  strip(e, root);
  el("p", "key small", null, root).id = "legend";
  byId("legend").style.margin = "0 0 .8rem";
  e.segments.forEach((s, k) => {
    const block = el("section", "segment", null, root), header = el("header", "", null, block), name = el("h2", "", null, header);
    block.style.setProperty("--c", `var(--s${k % 5})`);
    el("small", "", String(k + 1), name);
    name.append(s.subgoal || (k || e.segments.length > 1 ? "(no subgoal)" : "one segment"));
    const facts = [`turns ${s.from}–${s.to}`, `reward ${plain(sum(e.turns.slice(s.from, s.to + 1).map(t => t.reward)))}`];
    el("span", "small muted num", facts.join(" · "), header);
    if (typeof s.advantage === "number") el("b", "num " + (s.advantage < 0 ? "minus" : "plus"), `A_subgoal ${signed(s.advantage)}`, header);
    for (let i = s.from; i <= s.to; i++) showTurn(e.turns[i], i, block);
  });
  legend();
}
function showTurn(t, i, parent) {
  const block = el("article", "turn", null, parent), head = el("h3", "num", null, block);
  block.id = `turn-${i}`;
  el("b", "", `Turn ${i}`, head);
  if (data.settings.prompt !== "flat") el("span", "", t.switch ? "SWITCH" : t.start ? "starts a segment" : "KEEP", head);
  if (t.drift && !t.start) el("span", "minus", "writes another subgoal than it carries", head);
  el("p", "text seen", lines(t.observation), block);
  const said = el("p", "text said", null, block);
  t.tokens.forEach((token, k) => {
    const span = el("span", "", data.tokens[token], said);
    if (t.kinds[k] !== (t.kinds[k + 1] || t.kinds[k])) span.style.marginRight = "4px";  // between decisions
    paint(span, t, k);
  });
  if (t.error) el("p", "error", `Format error: ${t.error}`, block);
  const list = el("dl", "num", null, block);
  for (const [name, value] of facts(t)) {
    const pair = el("div", "", null, list);
    el("dt", "", name, pair);
    el("dd", name.startsWith("A") || name === "flat GAE" ? value[0] === "−" ? "minus" : "plus" : "", value, pair);
  }
  const more = el("details", "", null, block);
  el("summary", "", "Prompt", more);
  more.ontoggle = () => { if (more.open && more.children.length === 1) el("p", "text", lines(t.prompt), more); };
}

// ---- moving about -------------------------------------------------------------------------------
function go(episode, turn, push) {
  const changed = episode !== current;
  current = episode;
  turnNow = Math.max(0, Math.min(turn, data.episodes[episode].turns.length - 1));
  document.body.classList.add("one");
  if (changed) { showEpisode(); fillList(); }
  document.querySelectorAll(".turn.here").forEach(node => node.classList.remove("here"));
  const here = byId(`turn-${turnNow}`);
  here.classList.add("here");
  if (turnNow === 0 && changed) { document.querySelector("main").scrollTo(0, 0); scrollTo(0, 0); }
  else here.scrollIntoView({block: turnNow ? "center" : "nearest"});
  const hash = `#episode=${episode}&turn=${turnNow}`;
  if (location.hash !== hash) history[push ? "pushState" : "replaceState"](null, "", hash);
  const item = document.querySelector(".item[aria-current]");
  if (item && changed) item.scrollIntoView({block: "nearest"});
}
function readHash() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const episode = Number.parseInt(wanted.get("episode"), 10), turn = Number.parseInt(wanted.get("turn"), 10) || 0;
  if (episode in data.episodes) go(episode, turn, false);
  else document.body.classList.remove("one");
  return episode in data.episodes;
}
addEventListener("keydown", event => {
  if (event.target.closest("input, select") || event.ctrlKey || event.metaKey || event.altKey || current < 0) return;
  const place = shown.indexOf(current);
  if (event.key === "ArrowDown") go(current, turnNow + 1, false);
  else if (event.key === "ArrowUp") go(current, turnNow - 1, false);
  else if (event.key === "ArrowRight" && place + 1 < shown.length) go(shown[place + 1], 0, false);
  else if (event.key === "ArrowLeft" && place > 0) go(shown[place - 1], 0, false);
  else return;
  event.preventDefault();
});
addEventListener("hashchange", readHash);
addEventListener("popstate", readHash);
for (const id of ["search", "result", "type", "sort"]) byId(id).addEventListener("input", fillList);
byId("tint").onchange = () => {
  document.querySelectorAll(".said").forEach((said, i) => {
    [...said.children].forEach((span, k) => paint(span, data.episodes[current].turns[i], k));
  });
  legend();
};
byId("lost").onclick = () => {
  byId("result").value = "lost";
  fillList();
  go(shown[0], 0, true);
};
byId("back").onclick = () => { document.body.classList.remove("one"); history.pushState(null, "", "#"); };
document.title = data.title;
byId("title").textContent = data.title;
byId("note").textContent = data.note;
fillList();
if (!readHash() && innerWidth > 760 && data.episodes.length) go(0, 0, false);
