/* The overview: what the run is, how good its SAEs are, and how far the scores can be believed. */

const runOf = (data, sae) => data.runs[sae.run];
/** A colour and a dash for each run; where there are many, for each method. */
function styled(runs) {
  const methods = [...new Set(runs.map((run) => run.method))];
  runs.forEach((run, i) => (run.style = (runs.length > 5 ? methods.indexOf(run.method) : i) % 5));
}
const peers = (data, sae) => data.saes.filter((other) => other.name === sae.name);
const FIGURE_TEXT = {
  explained_variance_no_sinks: "Explained variance without sinks", mse_no_sinks: "MSE without sinks, mean over tokens", l0_no_sinks: "L0 without sinks",
  mse: "MSE, all tokens", mse_st: "MSE, special tokens by id", mse_st_template: "MSE, special tokens by template",
  mse_st_no_prefix: "MSE, special tokens beyond the prefix", explained_variance: "Explained variance", l0: "L0, active features per token",
  dead_fraction: "Dead features", dense_10pct: "Features on more than 10 % of tokens", duplicate_fraction: "Duplicate features",
  delta_loss: "Delta Loss, nats per token", kl: "KL divergence, nats per token", top1_agreement: "Same most likely next token",
};
const METHOD_TEXT = { fast: "fast: each dialogue alone, in its chat template", "bt-f": "bt-f: the same dialogues in blocks", "bt-f-isolated": "bt-f-isolated: those blocks, each dialogue seeing itself only", "bt-p": "bt-p: pretraining text in blocks" };
const SHARES = new Set(["dead_fraction", "dense_10pct", "duplicate_fraction", "top1_agreement"]);

function overview(data, sae) {
  const run = runOf(data, sae);
  const parts = [
    ["figures", "Figures", [metricsPanel(data, sae), identityPanel(data, sae)]],
    ["firing", "Errors and firing", [heatPanel(data, sae), scatterPanel(sae), firingPanel(sae)]],
    ["scores", "Scores", judgePanels(data, sae)],
    ["special", "Special tokens", [specialPanel(data, sae)]],
    ["steering", "Steering", [sweepPanel(data, sae)]],
    ["training", "Training", [curvePanel(data, sae)]],
    ["again", "Make it again", [reproducePanel(data, sae)]],
  ];
  return [
    h("div", { class: "title" },
      h("h1", null, sae.name, h("span", { class: `method s${run.style}` }, run.name)),
      h("p", null, `A sparse autoencoder on the residual stream of the model ${run.identity.find(([label]) => label === "Model")?.[1] || "that it names"}. `, sae.features
        ? h("a", { href: link(data, sae) }, `Look at ${plural(sae.features.length, "of its features", "of its features")}`) : "Its features are not in this page."),
      h("nav", { class: "jump", "aria-label": "Parts of the overview" }, parts.map(([id, text]) => h("a", { href: `#overview/${id}` }, text)))),
    ...parts.flatMap(([id, , panels]) => (panels[0].setAttribute("id", `part-${id}`), panels)),
  ];
}

function identityPanel(data, sae) {
  const run = runOf(data, sae), on = run.evaluated;
  const rows = [...sae.identity, ...(sae.store ? [["d_sae", num(sae.store.d_sae)]] : []), ...run.identity];
  if (on) rows.push(["Evaluated on", `${plural(on.n_dialogues, "held-out dialogue")}${on.sources ? ` of ${on.sources}` : ""}`], ["Evaluation tokens", `sha256 ${on.tokens_sha256.slice(0, 12)}…`]);
  if (on?.sinks_pass) rows.push(["SAE in the model", "norm sinks keep the model's own activation"]);
  if (sae.store) rows.push(["Interpreted on", `${plural(sae.store.n_dialogues, "other dialogue")}, ${plural(sae.store.n_tokens, "token")}`], ["Weights", `sha256 ${sae.store.sae_sha256.slice(0, 12)}…`]);
  return panel("Identity", null, h("dl", { class: "facts" }, rows.map(([label, value]) => [h("dt", null, label), h("dd", null, value)])));
}

function figureText(key, figure) {
  if (!figure || figure.value === null) return h("span", { title: figure?.reason || "not measured" }, "–");
  const text = SHARES.has(key) ? percent : num;
  return h("span", null, text(figure.value), figure.interval ? h("small", null, ` [${text(figure.interval[0])}, ${text(figure.interval[1])}]`) : null);
}

function metricsPanel(data, sae) {
  const all = peers(data, sae).filter((one) => one.figures), run = runOf(data, sae);
  if (!sae.figures) return panel("Held-out dialogues", null, missing("The run has not been evaluated.", `chatsae eval ${run.path}`));
  const rows = data.headline.map(({ key, best, what }) => {
    const values = all.map((one) => one.figures[key]?.value).filter((v) => v !== null && v !== undefined);
    const winner = best && values.length > 1 ? Math[best](...values) : null;
    const cells = all.map((one) => h("span", { class: winner !== null && one.figures[key]?.value === winner ? "best" : null }, figureText(key, one.figures[key])));
    const marks = all.length > 1 && values.length ? intervals(all.map((one) => ({ name: runOf(data, one).name, style: runOf(data, one).style, value: one.figures[key]?.value ?? null, interval: one.figures[key]?.interval }))) : null;
    return [h("span", { title: what }, FIGURE_TEXT[key] || human(key), best ? h("small", { title: best === "min" ? "smaller is better" : "larger is better" }, best === "min" ? " ↓" : " ↑") : null), ...cells, ...(all.length > 1 ? [marks] : [])];
  });
  const head = ["", ...all.map((one) => h("span", { class: `method s${runOf(data, one).style}` }, runOf(data, one).name)), ...(all.length > 1 ? ["with intervals"] : [])];
  const on = run.evaluated, alike = new Set(all.map((one) => runOf(data, one).evaluated.tokens_sha256)).size === 1;
  const methods = [...new Set(all.map((one) => METHOD_TEXT[runOf(data, one).method]).filter(Boolean))];
  const note = `${methods.length > 1 ? `Trained on: ${methods.join("; ")}. Measured on: ` : ""}${plural(on.n_dialogues, "held-out dialogue")}, each fed whole; in brackets 95 % intervals. ` +
    (all.length > 1 ? (alike ? "All on the same dialogues; bold is the best value, whether or not the intervals overlap. More active features leave less error, so read errors beside L0." : "The runs were evaluated on different dialogues: the figures cannot be compared.") : "");
  const sinks = data.headline.some(({ key }) => key === "mse_no_sinks") ? " Norm sinks are tokens longer than ten times the median; they can hold nearly all of the squared norm, so the figures without them come first." : "";
  return wideAs(panel("Held-out dialogues", note + sinks, table(head, rows, { class: "metrics" }), partsTable(data, all)), "wide");
}

const PART_TEXT = { position_0: "position 0", constant_prefix: "constant prefix", template: "template beyond it", content: "content" };

function partsTable(data, all) {
  const known = all.filter((one) => one.mse_by_part), parts = Object.keys(PART_TEXT);
  if (!known.length) return null;
  const least = (part) => Math.min(...known.map((one) => one.mse_by_part[part]).filter((v) => v !== null));
  const cell = (one, part) => {
    const value = one.mse_by_part[part];
    return h("span", { class: known.length > 1 && value === least(part) ? "best" : null }, value === null ? "–" : num(value));
  };
  const rows = known.map((one) => [h("span", { class: `method s${runOf(data, one).style}` }, runOf(data, one).name), ...parts.map((part) => cell(one, part))]);
  return [
    h("h3", { title: "Eq. 7 of the paper: mean over the tokens of a dialogue that are in the part, then over dialogues" }, "MSE by part, eq. 7"),
    table(["", ...parts.map((part) => PART_TEXT[part])], rows, { class: "figures" }),
  ];
}

const LACKS_SAMPLE = "Norms and errors of single tokens have not been measured.";

function heatPanel(data, sae) {
  const note = "Mean squared error by role and kind of token, colour by logarithm; below, the number of tokens.";
  if (!sae.sample) return panel("Error by role and kind", null, missing(LACKS_SAMPLE, sae.how));
  const cells = sae.sample.cells, roles = ROLES.map((_, i) => i).filter((r) => cells.some((c) => c.role === r));
  const kinds = KINDS.map((_, i) => i).filter((k) => cells.some((c) => c.kind === k));
  const left = 88, top = 4, wide = 61, high = Math.round(Math.min(76, Math.max(42, 290 / roles.length))), width = left + wide * kinds.length + 4, height = top + high * roles.length + 46;
  const logs = cells.filter((c) => c.mse > 0).map((c) => Math.log10(c.mse)), low = Math.min(...logs), span = Math.max(...logs) - low || 1;
  const svg = frame(`Mean squared error by role and kind: ${cells.map((c) => `${ROLE_TEXT[c.role]} ${KIND_TEXT[c.kind]} ${num(c.mse)} (${c.n} tokens)`).join("; ")}`, width, height);
  roles.forEach((r, i) => svg.append(s("text", { x: left - 7, y: top + high * i + high / 2 + 4, class: "tick end" }, ROLE_TEXT[r])));
  kinds.forEach((k, i) => {
    const words = KIND_TEXT[k].split(" ");
    words.forEach((word, line) => svg.append(s("text", { x: left + wide * (i + 0.5), y: height - 32 + 13 * line, class: "tick mid" }, word)));
  });
  roles.forEach((r, i) => kinds.forEach((k, j) => {
    const cell = cells.find((c) => c.role === r && c.kind === k), x = left + wide * j + 1, y = top + high * i + 1;
    if (!cell) return svg.append(s("rect", { x, y, width: wide - 2, height: high - 2, class: "void" }));
    const share = cell.mse > 0 ? (Math.log10(cell.mse) - low) / span : 0;
    svg.append(s("g", { class: share > 0.55 ? "heat strong" : "heat" },
      s("rect", { x, y, width: wide - 2, height: high - 2, "fill-opacity": (0.05 + 0.9 * share).toFixed(3) }, tip(`${ROLE_TEXT[r]}, ${KIND_TEXT[k]}: MSE ${num(cell.mse)}, L0 ${num(cell.l0)}, ${plural(cell.n, "token")}`)),
      s("text", { x: x + wide / 2 - 1, y: y + high / 2 - 2, class: "mid value" }, num(cell.mse, 2)),
      s("text", { x: x + wide / 2 - 1, y: y + high / 2 + 13, class: "mid small" }, `n ${cell.n.toLocaleString("en-US")}`)));
  }));
  return panel("Error by role and kind", note, h("div", { class: "scroll" }, svg));
}

function scatterPanel(sae) {
  const sample = sae.sample;
  if (!sample) return panel("Norm and error", null, missing(LACKS_SAMPLE, sae.how));
  const points = sample.points.filter((p) => p[0] > 0 && p[1] > 0), norms = points.map((p) => p[0]), errors = points.map((p) => p[1]);
  if (!points.length) return panel("Norm and error", null, nothing());
  const low = Math.min(...norms) / 1.1, high = Math.max(...norms, sample.n_sinks ? sample.sink_norm : 0) * 1.1;
  const sinks = sample.n_sinks ? plural(sample.n_sinks, "norm sink") : "no norm sink";
  const tall = 320, svg = frame(`Squared error against norm of ${points.length} tokens; ${sinks}`, W, tall);
  const x = scale(low, high, PAD.left, W - PAD.right, true);
  const y = scale(Math.min(...errors) / 1.2, Math.max(...errors) * 1.2, tall - PAD.bottom, PAD.top, true);
  axes(svg, x, y, "norm of the residual stream", "MSE", W, tall);
  const group = (p) => (p[4] ? "sink" : p[3] === 0 ? "content" : "template");
  for (const p of [...points].sort((a, b) => a[4] - b[4])) {
    const where = `${ROLE_TEXT[p[2]]}, ${KIND_TEXT[p[3]]}: norm ${num(p[0])}, MSE ${num(p[1])}`;
    svg.append(group(p) === "content" ? s("circle", { cx: x(p[0]), cy: y(p[1]), r: 2.4, class: "point content" }, tip(where))
      : s("path", { d: p[4] ? `M${x(p[0])} ${y(p[1]) - 6}l5.2 9h-10.4z` : `M${x(p[0]) - 2.5} ${y(p[1]) - 2.5}h5v5h-5z`, class: `point ${group(p)}` }, tip(p[4] ? `sink · ${where}` : where)));
  }
  if (x(sample.sink_norm) < W - PAD.right) svg.append(s("line", { x1: x(sample.sink_norm), x2: x(sample.sink_norm), y1: PAD.top, y2: tall - PAD.bottom, class: "mark" }, tip("10 times the median norm")));
  const key = h("p", { class: "legend" }, [["content", "content"], ["template", "written by the template"], ["sink", "norm sink"]].map(([name, text]) => h("span", null,
    s("svg", { viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true" }, name === "content" ? s("circle", { cx: 6, cy: 6, r: 3, class: "point content" })
      : s("path", { d: name === "sink" ? "M6 1l5 9h-10z" : "M3 3h6v6h-6z", class: `point ${name}` })), " ", text)));
  return panel("Norm and error", `A sample of ${plural(sample.n_tokens, "token")} of ${plural(sample.n_dialogues, "dialogue")}. A norm sink is longer than 10 times the median (${num(sample.median_norm)}): ${sinks} here.`, key, svg);
}

const LACKS_FEATURES = "The features of this SAE have not been looked at.";

const LOW = { width: W, height: 172 };

function firingPanel(sae) {
  if (!sae.firing) return panel("What fires", null, missing(LACKS_FEATURES, sae.how));
  return panel("What fires", null, l0Figure(sae), densityFigure(sae));
}

function l0Figure(sae) {
  const counts = sae.firing.l0;
  if (!counts.length) return h("figure", null, h("figcaption", null, "Active features per token"), nothing());
  const low = counts[0][0], high = counts[counts.length - 1][0] + 1, step = Math.max(1, Math.ceil((high - low) / 48));
  const bins = [];
  for (let from = low; from < high; from += step) {
    const n = counts.filter(([v]) => v >= from && v < from + step).reduce((sum, [, c]) => sum + c, 0);
    bins.push({ low: from, high: from + step, n, text: `${step === 1 ? from : `${from} to ${from + step - 1}`} active features: ${plural(n, "token")}` });
  }
  const total = counts.reduce((sum, [, c]) => sum + c, 0), mean = counts.reduce((sum, [v, c]) => sum + v * c, 0) / total;
  let seen = 0;
  const median = counts.find(([, c]) => (seen += c) >= total / 2)[0];
  return h("figure", null, h("figcaption", null, "Active features per token"), h("p", { class: "note" }, `${plural(total, "token")} of the interpretation split: mean ${num(mean)}, median ${median}.`),
    histogram(bins, { ...LOW, xLabel: "active features (L0)", yLabel: "tokens", words: `Histogram of L0 from ${low} to ${high - 1}, mean ${num(mean)}, median ${median}`, marks: [{ at: mean, text: `mean ${num(mean)}` }] }));
}

function densityFigure(sae) {
  const { density, dead, d_sae } = sae.firing, known = new Map(density), bins = [];
  if (!density.length) return h("p", { class: "note" }, `None of ${plural(d_sae, "feature")} is ever active.`);
  for (let b = Math.min(-1, density[0][0]); b <= Math.min(-1, density[density.length - 1][0]); b++) {
    const n = (known.get(b) || 0) + (b === -1 ? known.get(0) || 0 : 0), low = 10 ** (b / 4), high = 10 ** ((b + 1) / 4);
    bins.push({ low, high, n, text: `${percent(low)} to ${percent(high)} of tokens: ${plural(n, "feature")}`, class: high > 0.1001 ? "bar dense" : "bar" });
  }
  const dense = bins.filter((b) => b.class === "bar dense").reduce((sum, b) => sum + b.n, 0);
  return h("figure", null, h("figcaption", null, "Density of features"), h("p", { class: "note" }, `Share of ${plural(sae.store.n_tokens, "token")} on which each is active: of ${plural(d_sae, "feature")} ${num(dead)} never, ${num(dense)} on more than 10 %.`),
    histogram(bins, { ...LOW, xLabel: "share of tokens, by logarithm", yLabel: "features", log: true, words: `Histogram of density; ${dead} features never fire, ${dense} on more than 10 % of tokens` }));
}

const CURVE_TEXT = { mse: "MSE", l0: "L0, active features per token", sparsity: "Sparsity loss", loss: "Loss", dead_fraction: "Share of dead features", gsnr: "Gradient signal to noise" };

function curvePanel(data, sae) {
  const all = peers(data, sae), names = [...new Set(all.flatMap((one) => Object.keys(runOf(data, one).curves[sae.name] || {})))];
  if (!names.length) return panel("Training", null, missing("The run has logged no training metrics."));
  const key = all.map((one) => ({ name: runOf(data, one).name, style: runOf(data, one).style }));
  const result = panel("Training", "What each step logged of its batch, over the tokens trained on.", legend(key), h("div", { class: "multiples" }, names.map((name) => {
    const series = all.map((one) => ({ name: runOf(data, one).name, style: runOf(data, one).style, points: (runOf(data, one).curves[sae.name]?.[name] || []).map(([t, v]) => [t / 1e6, v]) })).filter((line) => line.points.length);
    const log = name !== "dead_fraction" && series.some((line) => line.points.some((p) => p[1] > 0)); // a line of zeros has no logarithm
    return h("figure", null, h("figcaption", null, CURVE_TEXT[name] || human(name)), lines(series, { xLabel: "training tokens, millions", yLabel: `${human(name)}${log ? ", by logarithm" : ""}`, log, words: `${human(name)} while training: ${series.map((l) => `${l.name} ends at ${num(l.points[l.points.length - 1][1])}`).join(", ")}` }));
  })));
  return wideAs(result, "full");
}

function reproducePanel(data, sae) {
  const run = runOf(data, sae), result = panel("How to make this again", `With chatsae ${data.chatsae}, and the recipe of the run below.`,
    run.commands.map(([what, line]) => [h("h3", null, what), command(line)]), h("h3", null, "Write this page"), command(data.command),
    h("details", null, h("summary", null, "The whole recipe (config.yaml)"), h("pre", null, run.recipe)));
  return wideAs(result, "full");
}
