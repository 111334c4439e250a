// Colours that people with any kind of colour vision tell apart, and dashes from the sixth group on.
const COLOURS = ["--plus", "--minus", "--s1", "--s3", "--s2"];
const colour = group => `var(${COLOURS[group % COLOURS.length]})`;
const dash = group => ["none", "7 4", "2 4"][Math.floor(group / COLOURS.length) % 3];

const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
const isNumber = x => typeof x === "number";
function show(value, unit) {
  if (!isNumber(value)) return "–";
  if (unit === "%") return (100 * value).toFixed(1) + " %";
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.095 || size === 0 ? 2 : 4).replace("-", "−");
}

// A line as the group's curve is drawn.
function drawKey(group, parent) {
  const key = svg("svg", {class: "line"}, parent);
  svg("line", {x2: 22, y1: 2, y2: 2, style: `stroke: ${colour(group)}; stroke-width: 3; stroke-dasharray: ${dash(group)}`}, key);
}

// ---- tables -------------------------------------------------------------------------------------
function table(parent, head, rows) {
  const top = el("tr", "", null, el("thead", "", null, parent)), body = el("tbody", "", null, parent);
  for (const text of head) el("th", "", text, top);
  for (const row of rows) {
    const line = el("tr", "", null, body);
    for (const cell of row) {
      const td = el("td", "num", null, line);
      if (cell && cell.group !== undefined) drawKey(cell.group, td);
      td.append(cell && cell.text !== undefined ? cell.text : String(cell ?? "–"));
    }
  }
}
const evaluation = e => e ? `${show(e.success, "%")}  [${(100 * e.low).toFixed(1)}, ${(100 * e.high).toFixed(1)}]` : "–";
table(byId("runs"), ["Run", "Method", "Seed", "Iterations", "Before", "After, with 95 % interval", "Evaluated on", "Minutes of the iterations"],
  data.runs.map(run => {
    const first = run.evals[0], last = run.evals[run.evals.length - 1];
    const after = last && last.iteration > 0 ? last : null;
    return [{text: run.name, group: run.group}, run.method, run.seed, run.iterations, first && first.iteration === 0 ? show(first.success, "%") : "–",
      after ? `${evaluation(after)} after ${after.iteration}` : "–", (last || {}).about, run.minutes.toFixed(1)];
  }));
if (data.differ.length) {
  el("h2", "", "Settings that differ", byId("differ"));
  const box = el("div", "scroll", null, byId("differ"));
  table(el("table", "", null, box), ["Setting", ...data.runs.map(run => run.name)],
    data.differ.map(([name, values]) => [name, ...values.map(value => typeof value === "string" ? value || "(empty)" : JSON.stringify(value))]));
}

// ---- charts -------------------------------------------------------------------------------------
// One curve per group: the mean of its runs, over the iterations that all of them reached.
function groupCurves(chart) {
  return data.groups.map((_, k) => {
    const runs = chart.lines.filter((_, n) => data.runs[n].group === k);
    const at = new Map();
    for (const run of runs) for (const [x, y] of run) if (isNumber(y)) at.set(x, [...(at.get(x) || []), y]);
    const points = [...at].filter(([, ys]) => ys.length === runs.length).sort((a, b) => a[0] - b[0]);
    return points.map(([x, ys]) => ({x, mean: mean(ys), low: Math.min(...ys), high: Math.max(...ys), many: ys.length > 1}));
  });
}
function ticks(low, high) {
  const raw = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= raw);
  const found = [];
  for (let y = Math.ceil(low / step - 1e-9) * step; y <= high + step * 1e-6; y += step) found.push(Math.abs(y) < step * 1e-6 ? 0 : y);
  return found;
}
function draw(chart, parent, wide) {
  const figure = el("figure", "", null, parent), caption = el("figcaption", "num", null, figure);
  el("b", "", chart.title.replaceAll("_", "_\u200b"), caption);  // where a long name may break
  const read = el("span", "muted", "", caption);
  const W = Math.max(280, (figure.clientWidth || 360) - 30), H = wide ? 300 : 170, left = 42, right = 8, top = 12, bottom = 22;
  const art = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": chart.title}, figure);
  const curves = groupCurves(chart), points = chart.points.flat();
  const xs = [...curves.flat().map(p => p.x), ...points.map(p => p[0])];
  const ys = [...curves.flat().flatMap(p => [p.low, p.high]), ...points.flatMap(p => [p[2], p[3]])];
  if (!xs.length) { svg("text", {x: left, y: H / 2}, art, "no data"); return; }
  let low = Math.min(0, ...ys), high = Math.max(...ys);
  if (chart.title.includes("V_")) high = Math.max(high, 1), low = Math.max(low, -1);
  if (chart.unit === "%" && high > .5) high = 1;
  if (high === low) high = low + 1;
  const xHigh = Math.max(1, ...xs);
  const inset = 12, X = x => left + inset + x / xHigh * (W - left - right - 2 * inset), Y = y => H - bottom - (Math.max(low, Math.min(high, y)) - low) / (high - low) * (H - top - bottom);
  const warmup = Math.max(...data.runs.map(run => run.warmup || 0));
  if (warmup > 0) {
    const from = Math.max(left, X(-.5)), to = Math.min(W - right, X(warmup - .5));
    const band = svg("rect", {x: from, width: to - from, y: top, height: H - top - bottom, fill: "var(--muted)", "fill-opacity": .14}, art);
    svg("title", {}, band, "the critic only is trained");
  }
  for (const y of ticks(low, high)) {
    svg("line", {x1: left, x2: W - right, y1: Y(y), y2: Y(y), stroke: "var(--line)"}, art);
    svg("text", {x: left - 7, y: Y(y) + 4, "text-anchor": "end"}, art, chart.unit === "%" ? String(Math.round(1000 * y) / 10) : String(Number(y.toPrecision(3))).replace("-", "−"));
  }
  for (const x of ticks(0, xHigh).filter(Number.isInteger)) svg("text", {x: X(x), y: H - 5, "text-anchor": "middle"}, art, String(x));
  curves.forEach((curve, k) => {
    if (!curve.length) return;
    if (curve[0].many) {
      const outline = [...curve.map(p => `${X(p.x)},${Y(p.high)}`), ...curve.slice().reverse().map(p => `${X(p.x)},${Y(p.low)}`)].join(" ");
      svg("polygon", {points: outline, style: `fill: ${colour(k)}; fill-opacity: .16`}, art);
    }
    if (curve.length === 1) svg("circle", {cx: X(curve[0].x), cy: Y(curve[0].mean), r: 2.5, style: `fill: ${colour(k)}`}, art);
    svg("polyline", {points: curve.map(p => `${X(p.x)},${Y(p.mean)}`).join(" "), style: `fill: none; stroke: ${colour(k)}; stroke-width: 2; stroke-linejoin: round; stroke-dasharray: ${dash(k)}`}, art);
  });
  chart.points.forEach((list, n) => list.forEach(([x, y, from, to]) => {
    const style = `stroke: ${colour(data.runs[n].group)}; stroke-width: 1.6; fill: var(--card)`;
    const members = data.runs.filter(run => run.group === data.runs[n].group), shift = (members.indexOf(data.runs[n]) - (members.length - 1) / 2) * 7;
    svg("line", {x1: X(x) + shift, x2: X(x) + shift, y1: Y(from), y2: Y(to), style}, art);
    const dot = svg("circle", {cx: X(x) + shift, cy: Y(y), r: 4, style}, art);
    svg("title", {}, dot, `${data.runs[n].name}: evaluation after ${x} iterations: ${show(y, "%")}, 95 % interval ${show(from, "%")} to ${show(to, "%")}`);
  }));
  const last = Math.max(0, ...curves.flat().map(p => p.x)), cursor = svg("line", {y1: top, y2: H - bottom, stroke: "var(--muted)", visibility: "hidden"}, art);
  const tell = x => {
    const values = curves.map(curve => { const p = curve.find(p => p.x === x); return p ? show(p.mean, chart.unit) : "–"; });
    read.textContent = `${x}: ${values.join(" / ")}`;
  };
  art.onpointermove = event => {
    const box = art.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * W;
    const x = Math.max(0, Math.min(last, Math.round((at - left - inset) / (W - left - right - 2 * inset) * xHigh)));
    cursor.setAttribute("x1", X(x)); cursor.setAttribute("x2", X(x)); cursor.setAttribute("visibility", "visible");
    tell(x);
  };
  art.onpointerleave = () => { cursor.setAttribute("visibility", "hidden"); tell(last); };
  tell(last);
}
function drawAll() {
  byId("sections").replaceChildren();
  for (const section of data.sections) {
    if (!section.charts.length) continue;
    el("h2", "", section.title, byId("sections"));
    const wide = section.charts.length === 1, grid = el("div", wide ? "charts wide" : "charts", null, byId("sections"));
    for (const chart of section.charts) draw(chart, grid, wide);
  }
}
document.title = data.title;
byId("title").textContent = data.title;
data.groups.forEach((name, k) => {
  const item = el("span", "", "", byId("key"));
  drawKey(k, item);
  item.append(name);
});
const many = data.groups.length < data.runs.length;
el("span", "muted", `x: iteration. Lines: training episodes${many ? ", mean and range of the runs" : ""}. Circles: evaluations with 95 % intervals.`
  + (data.runs.some(run => run.warmup) ? " Shaded: only the critic is trained." : ""), byId("key"));
drawAll();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
