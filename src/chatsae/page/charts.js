/* Charts as inline SVG. Each has a title, axes with units, tooltips, and its content as words for those who do not see it. */

const W = 460, H = 230, PAD = { left: 56, right: 14, top: 12, bottom: 42 };

function frame(words, width = W, height = H) {
  return s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words, class: "chart" });
}

const tip = (text) => s("title", null, text);

/** Ticks at 1, 2 or 5 times a power of ten. */
function ticks(low, high, n = 5) {
  if (!(high > low)) return [low];
  const raw = (high - low) / n, base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [1, 2, 5, 10].find((k) => k * base >= raw * 0.8);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** A scale from data to pixels: linear, or by a function that grows. */
function scale(low, high, from, to, log, grows) {
  const f = grows || (log ? Math.log10 : (v) => v);
  const a = f(low), b = f(high) === f(low) ? f(low) + 1 : f(high);
  const map = (v) => from + ((f(v) - a) / (b - a)) * (to - from);
  map.ticks = log ? logTicks(low, high) : ticks(low, b === f(high) ? high : low + 1);
  map.log = log;
  return map;
}

function logTicks(low, high) {
  if (high / low < 10) return ticks(low, high, 4).filter((v) => v >= low);
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    for (const k of Math.log10(high / low) < 2.2 ? [1, 2, 5] : [1]) {
      const v = k * 10 ** e;
      if (v >= low * 0.999 && v <= high * 1.001) found.push(v);
    }
  }
  if (found.length > 8) return found.filter((_, i) => i % 2 === 0);
  return found.length ? found : [low, high];
}

const tickText = (v, log) => (log && Number.isInteger(Math.log10(v)) && (v >= 1e4 || v <= 1e-3) ? power(Math.log10(v)) : num(v));

function axes(svg, x, y, xLabel, yLabel, width = W, height = H, pad = PAD) {
  const bottom = height - pad.bottom;
  for (const v of y ? y.ticks : []) {
    svg.append(s("line", { x1: pad.left, x2: width - pad.right, y1: y(v), y2: y(v), class: "grid" }));
    svg.append(s("text", { x: pad.left - 6, y: y(v) + 4, class: "tick end" }, tickText(v, y.log)));
  }
  svg.append(s("line", { x1: pad.left, x2: width - pad.right, y1: bottom, y2: bottom, class: "axis" }));
  for (const v of x ? x.ticks : []) {
    svg.append(s("line", { x1: x(v), x2: x(v), y1: bottom, y2: bottom + 4, class: "axis" }));
    svg.append(s("text", { x: x(v), y: bottom + 16, class: "tick mid" }, tickText(v, x.log)));
  }
  svg.append(s("text", { x: (pad.left + width - pad.right) / 2, y: height - 6, class: "label mid" }, xLabel));
  svg.append(s("text", { transform: `translate(13 ${(pad.top + bottom) / 2}) rotate(-90)`, class: "label mid" }, yLabel));
}

/** What stands in place of a chart without a single value. */
const nothing = () => h("p", { class: "note" }, "No values.");

/** Bars over bins [{low, high, n, text}]; the x axis may be logarithmic. */
function histogram(bins, { xLabel, yLabel, words, log, marks = [], width = W, height = H }) {
  if (!bins.length) return nothing();
  const svg = frame(words, width, height), low = bins[0].low, high = bins[bins.length - 1].high;
  const x = scale(low, high, PAD.left, width - PAD.right, log), bottom = height - PAD.bottom;
  const y = scale(0, Math.max(...bins.map((b) => b.n)) * 1.05 || 1, bottom, PAD.top);
  axes(svg, x, y, xLabel, yLabel, width, height);
  for (const bin of bins) {
    const left = x(bin.low), wide = Math.max(0.6, x(bin.high) - left - 1);
    svg.append(s("rect", { x: left + 0.5, width: wide, y: y(bin.n), height: Math.max(0, bottom - y(bin.n)), class: bin.class || "bar" }, tip(bin.text)));
  }
  marks.filter((m) => m.at >= low && m.at <= high).forEach((mark, i) => {
    svg.append(s("line", { x1: x(mark.at), x2: x(mark.at), y1: PAD.top, y2: bottom, class: "mark" }));
    const right = x(mark.at) > width - 120;
    svg.append(s("text", { x: x(mark.at) + (right ? -5 : 5), y: PAD.top + 10 + 14 * i, class: right ? "tick end" : "tick" }, mark.text));
  });
  return svg;
}

/** Lines [{name, points: [[x, y]], style}], with `spread` [[x, low, high]] where there are intervals; steps for distributions; `span` is marked on x. */
function lines(series, { xLabel, yLabel, words, log, xs, ys, steps, xTicks, grows, span, spanText }) {
  const shown = series.map((line) => ({ ...line, points: log ? line.points.filter((p) => p[1] > 0) : line.points })).filter((line) => line.points.length);
  if (!shown.length) return nothing();
  const all = shown.flatMap((line) => [...line.points, ...(log ? [] : (line.spread || []).flatMap(([a, b, c]) => [[a, b], [a, c]]))]);
  const [x0, x1] = xs || [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
  let [y0, y1] = ys || [Math.min(...all.map((p) => p[1])), Math.max(...all.map((p) => p[1]))];
  if (!ys && !log) y0 = Math.min(0, y0);
  const svg = frame(words), x = scale(x0, x1, PAD.left, W - PAD.right, false, grows), y = scale(y0, y1, H - PAD.bottom, PAD.top, log);
  if (xTicks) x.ticks = xTicks.filter((v, i) => i === 0 || v === x1 || (x1 !== v && x(x1) - x(v) > 26)).reduce((kept, v) => (kept.length && x(v) - x(kept[kept.length - 1]) < 26 ? kept : [...kept, v]), []);
  if (span) svg.append(s("rect", { x: Math.min(x(span[0]), x(span[1]) - 3), width: Math.max(3, x(span[1]) - x(span[0])), y: PAD.top, height: H - PAD.bottom - PAD.top, class: "span" }, tip(spanText)));
  axes(svg, x, y, xLabel, yLabel);
  for (const line of shown) {
    for (const [a, low, high] of line.spread || []) {
      if (!log || low > 0) svg.append(s("path", { d: `M${x(a).toFixed(1)} ${y(low).toFixed(1)}V${y(high).toFixed(1)}`, class: `whisker s${line.style}` }));
    }
    const drawn = (points) => points.map(([a, b], i) => {
      const at = `${x(a).toFixed(1)} ${y(b).toFixed(1)}`;
      return i === 0 ? `M${at}` : steps ? `H${x(a).toFixed(1)}V${y(b).toFixed(1)}` : `L${at}`;
    }).join("");
    if (line.band) {
      const edge = (by) => line.points.map(([a, b]) => [a, Math.min(y1, Math.max(y0, b + by))]);
      const low = edge(-line.band).flatMap(([a, b], i, all) => (i ? [[a, all[i - 1][1]], [a, b]] : [[a, b]])).reverse();
      svg.append(s("path", { d: `${drawn(edge(line.band))}L${low.map(([a, b]) => `${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("L")}Z`, class: `belt s${line.style}` }));
    }
    svg.append(s("path", { d: drawn(line.points), class: `line s${line.style}` }, tip(line.name)));
    const every = Math.ceil(line.points.length / 40);
    line.points.forEach(([a, b], i) => {
      if (i % every === 0 || i === line.points.length - 1) svg.append(s("circle", { cx: x(a), cy: y(b), r: 4, class: "touch" }, tip(`${line.name}: ${num(b)} at ${num(a)}`)));
    });
  }
  return svg;
}

/** Names of lines with a piece of each. */
function legend(series) {
  return h("p", { class: "legend" }, series.map((line) => h("span", null,
    s("svg", { viewBox: "0 0 24 8", width: 24, height: 8, "aria-hidden": "true" }, s("path", { d: "M0 4H24", class: `line s${line.style}` })), " ", line.name)));
}

/** Horizontal bars [{name, value, text, class}] in room for a column. */
function bars(rows, { words, unit }) {
  const width = 300, row = 20, left = 96, top = 2, height = rows.length * row + top + 18;
  const svg = frame(words, width, height), most = Math.max(...rows.map((r) => r.value)) || 1;
  rows.forEach((bar, i) => {
    const y = top + i * row, long = (bar.value / most) * (width - left - 62);
    svg.append(s("text", { x: left - 6, y: y + 14, class: "tick end" }, bar.name));
    svg.append(s("rect", { x: left, y: y + 3, width: Math.max(bar.value > 0 ? 1 : 0, long), height: row - 6, class: bar.class || "bar" }, tip(bar.text)));
    svg.append(s("text", { x: left + long + 5, y: y + 14, class: "tick" }, bar.label));
  });
  svg.append(s("line", { x1: left, x2: left, y1: top, y2: height - 18, class: "axis" }));
  svg.append(s("text", { x: left, y: height - 3, class: "label" }, unit));
  return svg;
}

/** Values with intervals on one common axis, as marks in a table. */
function intervals(rows) {
  const edges = rows.flatMap((r) => (r.interval || [r.value, r.value]).concat(r.value)).filter((v) => v !== null);
  const low = Math.min(...edges), high = Math.max(...edges), width = 120, height = 9 * rows.length + 5;
  const x = scale(low, high === low ? low + 1 : high, 5, width - 5);
  const svg = frame(rows.map((r) => `${r.name} ${num(r.value)}`).join(", "), width, height);
  rows.forEach((r, i) => {
    const y = 7 + 9 * i;
    if (r.value === null) return;
    if (r.interval) svg.append(s("line", { x1: x(r.interval[0]), x2: x(r.interval[1]), y1: y, y2: y, class: `line s${r.style}` }));
    svg.append(s("circle", { cx: x(r.value), cy: y, r: 3.4, class: `dot s${r.style}` }, tip(`${r.name}: ${num(r.value)}`)));
  });
  return svg;
}
