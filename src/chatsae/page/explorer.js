/* The feature list and the view of one feature. */

const link = (data, sae, index) => {
  const alone = peers(data, sae).length === 1 || peers(data, sae)[0] === sae;
  const name = alone ? sae.name : `${runOf(data, sae).name}/${sae.name}`;
  return `#${encodeURI(name)}${index === undefined ? "" : `/${index}`}`;
};

/** How much a feature prefers some tokens: its mean on them over that plus its mean on all others; one half is not at all. */
function affinity(mean, all, n, total) {
  const rest = total > n ? Math.max(0, (all * total - mean * n) / (total - n)) : 0;
  return mean + rest > 0 ? mean / (mean + rest) : 0;
}

/** What the list shows and sorts by, once for every feature. */
function enrich(data, sae) {
  if (!sae.features || sae.byIndex) return;
  const total = sae.store.n_tokens, counts = sae.part_tokens, special = specialOf(sae);
  for (const f of sae.features) {
    const roles = f.role.map((mean, r) => (counts.role[r] ? affinity(mean, f.mean, counts.role[r], total) : 0));
    f.roleBest = roles.indexOf(Math.max(...roles));
    f.roleAffinity = roles[f.roleBest];
    f.first = affinity(f.position[0], f.mean, counts.position[0], total);
    const verdict = f.verdicts.find((v) => v);
    f.score = verdict ? verdict[0] : null;
    f.deviating = verdict && verdict[0] !== null ? verdict[2] : [];
    const peaks = f.top.map((c) => data.texts[tokensOf(data, c).t[c[3]]]);
    f.peak = mode(peaks);
    f.label = verdict && verdict[0] !== null && verdict[0] >= 1.5 ? verdict[1] : `often ${peaks.length ? `“${tokenText(f.peak)}”` : "nothing"}`;
    f.special = special.get(f.i) || [];
    const often = peaks.filter((text) => text === f.peak).length * 2 >= peaks.length;
    f.tokens = new Set([...f.special.map((one) => one.token), ...(often ? [f.peak] : [])]);
    f.haystack = [f.i, f.label, verdict ? verdict[1] : "", ...peaks, ...f.up.map(([t]) => data.texts[t])].join("\n").toLowerCase();
  }
  sae.byIndex = new Map(sae.features.map((f) => [f.i, f]));
}

function mode(list) {
  const counts = new Map();
  for (const value of list) counts.set(value, (counts.get(value) || 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? "";
}

/** The tokens of a context: text numbers, roles, kinds, turns. */
function tokensOf(data, context) {
  const [number, start, length] = context, dialogue = data.dialogues[number];
  dialogue.codes ||= runs(dialogue.c);
  dialogue.turns ||= runs(dialogue.u);
  const cut = (list) => list.slice(start - dialogue.start, start - dialogue.start + length);
  return { t: cut(dialogue.t), codes: cut(dialogue.codes), turns: cut(dialogue.turns), name: dialogue.name };
}

const COLUMNS = [
  { key: "i", text: "#", what: "number of the feature", up: true }, { key: "score", text: "score", what: "1 to 5, from its strongest contexts" },
  { key: "density", text: "density", what: "share of tokens on which it is active" }, { key: "roleAffinity", text: "role", what: "the role it prefers most, and how much: 0.5 is not at all, 1 is only there" },
  { key: "first", text: "pos. 0", what: "how much it prefers the first token of a dialogue: 0.5 is not at all, 1 is only there" },
];
const SCORES = [["", "any score"], ["4", "score 4 and 5"], ["3", "score 3"], ["1", "score 1 and 2"], ["none", "no score"]];
const DENSITIES = [["", "any density"], ["0,0.001", "below 0.1 %"], ["0.001,0.01", "0.1 % to 1 %"], ["0.01,0.1", "1 % to 10 %"], ["0.1,2", "above 10 %"]];

function selected(sae, view) {
  const words = view.search.toLowerCase().split(/\s+/).filter(Boolean);
  const [low, high] = view.density ? view.density.split(",").map(Number) : [0, 2];
  const scored = { "": () => true, 4: (v) => v !== null && v >= 3.5, 3: (v) => v !== null && v >= 2.5 && v < 3.5, 1: (v) => v !== null && v < 2.5, none: (v) => v === null }[view.score];
  const found = sae.features.filter((f) => words.every((w) => f.haystack.includes(w)) && (view.role === "" || f.roleBest === Number(view.role)) && (view.token === "" || f.tokens.has(view.token)) && scored(f.score) && f.density >= low && f.density < high);
  const sign = view.up ? 1 : -1, value = (f) => f[view.sort] ?? -Infinity;
  return found.sort((a, b) => sign * (value(a) - value(b)) || a.i - b.i);
}

const scoreBadge = (score) => h("span", { class: `score k${score === null ? 0 : Math.round(score)}`, title: score === null ? "no score" : `score ${num(score)} of 5` }, score === null ? "–" : num(score, 2));

function listHead(view, resort) {
  return h("div", { class: "head cells" }, COLUMNS.map((c) => h("button", { type: "button", title: `Sort by ${c.what}`, "data-sort": c.key, "aria-pressed": String(view.sort === c.key), onclick: () => resort(c) },
    c.text, view.sort === c.key ? (view.up ? " ▲" : " ▼") : "")));
}

function listRow(data, sae, f) {
  return h("li", { "data-i": f.i }, h("a", { href: link(data, sae, f.i) }, h("span", { class: "cells" }, h("b", null, f.i), scoreBadge(f.score), h("span", null, percent(f.density)),
    h("span", { class: `role r${f.roleBest}` }, `${ROLE_TEXT[f.roleBest].replace("default ", "def. ")} ${f.roleAffinity.toFixed(2)}`), h("span", null, f.first.toFixed(2))), h("span", { class: "what" }, explained(f.label))));
}

function featureView(data, sae, f, move) {
  const run = runOf(data, sae), verdicts = f.verdicts.map((v, i) => v && { v, judge: sae.judges[i] }).filter(Boolean);
  const facts = [["active on", percent(f.density)], ["largest", num(f.max)], ["mean, all tokens", num(f.mean)], ["prefers", `${ROLE_TEXT[f.roleBest]} ${f.roleAffinity.toFixed(2)}`], ["position 0", f.first.toFixed(2)]];
  return [
    h("header", null,
      h("div", { class: "line" }, h("a", { class: "back", href: link(data, sae) }, "← list"), h("h1", null, `Feature ${f.i}`), scoreBadge(f.score),
        h("span", { class: "grow" }), isSteered(sae, f) && h("button", { type: "button", class: "to", onclick: () => $("steering").scrollIntoView() }, "Steering ↓"), h("button", { type: "button", onclick: () => move(-1), title: "previous of the list" }, "↑"), h("button", { type: "button", onclick: () => move(1), title: "next of the list" }, "↓")),
      h("p", { class: "sub" }, h("span", { class: `method s${run.style}` }, run.name), " ", sae.name),
      verdictLines(verdicts),
      verdicts.length ? null : missing("No judge has scored this feature.", `chatsae judge ${run.path}`),
      specialNote(f),
      h("dl", { class: "stats" }, facts.map(([label, value]) => h("div", null, h("dt", null, label), h("dd", null, value))))),
    h("div", { class: "columns" },
      h("div", { class: "contexts" },
        h("h2", null, "Strongest contexts"), h("p", { class: "note" }, "Shade: activation, up to the feature's largest. Underlined: the largest of the context. Boxed: written by the chat template. The bar names the role."),
        f.top.length ? f.top.map((c, rank) => contextView(data, f, c, rank, f.deviating.includes(rank))) : f.density > 0 ? missing("Its contexts are not in this page.", `chatsae features ${run.path} --sae ${sae.name} --only ${f.i}`) : h("p", null, "It is active nowhere in these dialogues."),
        f.sampled.length ? [h("h2", null, "Over all its activations"), h("p", { class: "note" }, "Contexts at quantiles of its activations: what it means where it is weak."), f.sampled.map((c) => contextView(data, f, c, null, false))] : null),
      h("aside", null, valuesPanel(data, f), partPanel("Mean activation by role", ROLE_TEXT, f.role, f.role_n, sae.part_tokens.role, "r"),
        partPanel("By kind of token", KIND_TEXT, f.kind, f.kind_n, sae.part_tokens.kind), partPanel("By position", POSITIONS, f.position, f.position_n, sae.part_tokens.position),
        lensPanel(data, f), nearPanel(data, sae, f))),
    h("section", { id: "steering" }, steerSection(data, sae, f)),
  ];
}

/** What judges say, those that say the same in one line. */
function verdictLines(verdicts) {
  const by = new Map();
  for (const { v, judge } of verdicts) {
    const said = v[1] || "no explanation", facts = `${judge.judge} judge, ${judge.n_contexts} contexts${v[0] === null ? ", no score" : `: ${num(v[0])} of 5, ${v[2].length} deviating`}`;
    (by.get(said) || by.set(said, []).get(said)).push(facts);
  }
  return [...by].map(([said, facts]) => h("p", { class: "verdict" }, explained(said), h("small", null, ` — ${facts.join("; ")}`)));
}

function contextView(data, f, context, rank, deviates) {
  const [, start, length, peak, value, quantile, acts] = context, tokens = tokensOf(data, context), level = new Map();
  let at = -1;
  for (let i = 0; i < acts.length; i += 2) level.set((at += acts[i]), acts[i + 1]);
  const head = h("header", null, h("b", null, rank === null ? `${percent(quantile)} of its activations are smaller` : `#${rank + 1}`), h("span", null, `activation ${num(value)}`), deviates ? h("span", { class: "deviates" }, "deviates from the explanation") : null,
    h("span", { class: "from", title: tokens.name }, `${tokens.name} · token ${start + peak}`));
  const body = h("div", { class: "dialogue" });
  let segment = null, role = null, turn = null, plain = null;
  for (let i = 0; i < length; i++) {
    const code = tokens.codes[i] >> 1, r = Math.floor(code / 6), kind = code % 6, text = data.texts[tokens.t[i]] ?? "";
    if (segment === null || (r !== 0 && (r !== role || tokens.turns[i] !== turn))) {
      segment = h("div", { class: `turn r${r}`, dir: "auto" });
      body.append(h("div", { class: `band r${r}` }, ROLE_TEXT[r]), segment);
      [role, turn, plain] = [r, tokens.turns[i], null];
    }
    if (level.has(i) || kind !== 0) {
      segment.append(tokenSpan(text, kind, level.get(i), i === peak, f.max));
      plain = null;
    } else if (plain) plain.append(visible(text));
    else segment.append((plain = h("span", null, visible(text))));
  }
  if (start > 0) body.firstChild.classList.add("cut");
  return h("section", { class: `context${deviates ? " deviating" : ""}` }, head, body);
}

function tokenSpan(text, kind, level, peak, max) {
  const chip = kind !== 0 && kind !== 4, shown = chip ? tokenText(text) : visible(text);
  const classes = [chip ? "chip" : kind === 4 ? "written" : "", level ? "act" : "", level > 140 ? "hot" : "", peak ? "peak" : ""].filter(Boolean).join(" ");
  const span = h("span", { class: classes || null, title: level ? `${KIND_TEXT[kind]}: ${num((level / 255) * max)}` : chip ? KIND_TEXT[kind] : null }, shown);
  if (level) span.style.setProperty("--a", (0.12 + 0.88 * (level / 255)).toFixed(3));
  return span;
}

function valuesPanel(data, f) {
  const [first, counts] = f.values, edges = data.value_edges;
  if (!counts.length) return null;
  const bins = counts.map((n, i) => ({ low: edges[first + i], high: edges[first + i + 1], n, text: `${num(edges[first + i])} to ${num(edges[first + i + 1])}: ${plural(n, "token")}` }));
  return panel("Activations", null, histogram(bins, { xLabel: "activation, by logarithm", yLabel: "tokens", log: true, width: 300, height: 170, words: `Histogram of activations up to ${num(f.max)}` }));
}

function partPanel(title, names, means, counts, totals, tint) {
  const rows = names.map((name, i) => ({ name, value: means[i], label: num(means[i], 2), class: tint ? `bar ${tint}${i}` : "bar", text: `${name}: mean ${num(means[i])}; active on ${num(counts[i])} of ${plural(totals[i], "token")}`, total: totals[i] })).filter((row) => row.total > 0);
  return panel(title, null, bars(rows, { unit: "mean activation", words: `${title}: ${rows.map((r) => `${r.name} ${r.label}`).join(", ")}` }));
}

function lensPanel(data, f) {
  if (!f.up.length) return null;
  const list = (tokens) => h("ol", { class: "tokens" }, tokens.slice(0, 10).map(([t, value]) => h("li", null, h("code", null, tokenText(data.texts[t])), h("span", null, num(value, 2)))));
  return panel("Tokens it promotes and suppresses", "Logit lens of the decoder direction.", h("div", { class: "two" }, h("div", null, h("h3", null, "promotes"), list(f.up)), h("div", null, h("h3", null, "suppresses"), list(f.down))));
}

function nearPanel(data, sae, f) {
  const name = (i) => (sae.byIndex.has(i) ? h("a", { href: link(data, sae, i), title: sae.byIndex.get(i).label }, i) : h("span", { title: "without contexts in this page" }, i));
  const list = (rows, format) => (rows.length ? h("ol", { class: "tokens" }, rows.slice(0, 8).map((row) => h("li", null, name(row[0]), format(row)))) : h("p", { class: "note" }, "none"));
  return panel("Neighbours", null, h("div", { class: "two" },
    h("div", null, h("h3", { title: "cosine of decoder directions" }, "decoder, cosine"), list(f.near, (r) => h("span", null, hundredth(r[1])))),
    h("div", null, h("h3", { title: "correlation of firing; and the share of this feature's tokens on which the other fires" }, "fires with, φ"), list(f.with, (r) => h("span", { title: `on ${percent(r[2])} of its tokens` }, hundredth(r[1]))))));
}
