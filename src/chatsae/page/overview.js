/* The overview: what the run is, how good its SAEs are, and how far the scores can be believed. */

const runOf = (data, sae) => data.runs[sae.run];
const peers = (data, sae) => data.saes.filter((other) => other.name === sae.name);
const FIGURE_TEXT = {
  mse: "MSE, all tokens", mse_st: "MSE, special tokens by id", mse_st_template: "MSE, special tokens by template",
  mse_st_no_prefix: "MSE, special tokens beyond the prefix", explained_variance: "Explained variance", l0: "L0, active features per token",
  dead_fraction: "Dead features", dense_10pct: "Features on more than 10 % of tokens", duplicate_fraction: "Duplicate features",
  delta_loss: "Delta Loss, nats per token", kl: "KL divergence, nats per token", top1_agreement: "Same most likely next token",
};
const SHARES = new Set(["dead_fraction", "dense_10pct", "duplicate_fraction", "top1_agreement"]);

function overview(data, sae) {
  const run = runOf(data, sae);
  return [
    h("div", { class: "title" },
      h("h1", null, sae.name, h("span", { class: `method s${sae.run}` }, run.name)),
      h("p", null, `A sparse autoencoder on ${run.identity.find(([label]) => label === "Model")?.[1] || "a model"}. `, sae.features
        ? h("a", { href: link(data, sae) }, `Look at ${plural(sae.features.length, "of its features", "of its features")}`) : "Its features are not in this page.")),
    metricsPanel(data, sae), identityPanel(data, sae), heatPanel(data, sae), scatterPanel(sae), firingPanel(data, sae), densityPanel(sae),
    ...judgePanels(data, sae), curvePanel(data, sae), reproducePanel(data, sae),
  ];
}

function identityPanel(data, sae) {
  const run = runOf(data, sae), on = run.evaluated;
  const rows = [...sae.identity, ...(sae.store ? [["d_sae", num(sae.store.d_sae)]] : []), ...run.identity];
  if (on) rows.push(["Evaluated on", `${plural(on.n_dialogues, "held-out dialogue")}${on.sources ? ` of ${on.sources}` : ""}`], ["Evaluation tokens", `sha256 ${on.tokens_sha256.slice(0, 12)}…`]);
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
    const marks = all.length > 1 && values.length ? intervals(all.map((one) => ({ name: runOf(data, one).name, style: one.run, value: one.figures[key]?.value ?? null, interval: one.figures[key]?.interval }))) : null;
    return [h("span", { title: what }, FIGURE_TEXT[key] || human(key), best ? h("small", { title: best === "min" ? "smaller is better" : "larger is better" }, best === "min" ? " ↓" : " ↑") : null), ...cells, ...(all.length > 1 ? [marks] : [])];
  });
  const head = ["", ...all.map((one) => h("span", { class: `method s${one.run}` }, runOf(data, one).name)), ...(all.length > 1 ? ["with intervals"] : [])];
  const on = run.evaluated, alike = new Set(all.map((one) => runOf(data, one).evaluated.tokens_sha256)).size === 1;
  const note = `${plural(on.n_dialogues, "held-out dialogue")}, each fed whole; in brackets 95 % intervals. ` +
    (all.length > 1 ? (alike ? "All on the same dialogues; bold is the best value, whether or not the intervals overlap. More active features leave less error, so read errors beside L0." : "The runs were evaluated on different dialogues: the figures cannot be compared.") : "");
  const table_ = table(head, rows, { class: "metrics" });
  const result = panel("Held-out dialogues", note, table_);
  result.classList.add("wide");
  return result;
}

const LACKS_SAMPLE = "Norms and errors of single tokens have not been measured.";

function heatPanel(data, sae) {
  const note = "Mean squared error by role and kind of token, colour by logarithm; below, the number of tokens.";
  if (!sae.sample) return panel("Error by role and kind", null, missing(LACKS_SAMPLE, sae.how));
  const cells = sae.sample.cells, roles = ROLES.map((_, i) => i).filter((r) => cells.some((c) => c.role === r));
  const kinds = KINDS.map((_, i) => i).filter((k) => cells.some((c) => c.kind === k));
  const left = 88, top = 4, wide = 61, high = 38, width = left + wide * kinds.length + 4, height = top + high * roles.length + 46;
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
      s("text", { x: x + wide / 2 - 1, y: y + 17, class: "mid value" }, num(cell.mse, 2)),
      s("text", { x: x + wide / 2 - 1, y: y + 31, class: "mid small" }, `n ${cell.n.toLocaleString("en-US")}`)));
  }));
  return panel("Error by role and kind", note, h("div", { class: "scroll" }, svg));
}

function scatterPanel(sae) {
  const sample = sae.sample;
  if (!sample) return panel("Norm and error", null, missing(LACKS_SAMPLE, sae.how));
  const points = sample.points.filter((p) => p[0] > 0 && p[1] > 0), norms = points.map((p) => p[0]), errors = points.map((p) => p[1]);
  const low = Math.min(...norms) / 1.1, high = Math.max(...norms, sample.n_sinks ? sample.sink_norm : 0) * 1.1;
  const sinks = sample.n_sinks ? plural(sample.n_sinks, "norm sink") : "no norm sink";
  const svg = frame(`Squared error against norm of ${points.length} tokens; ${sinks}`);
  const x = scale(low, high, PAD.left, W - PAD.right, true);
  const y = scale(Math.min(...errors) / 1.2, Math.max(...errors) * 1.2, H - PAD.bottom, PAD.top, true);
  axes(svg, x, y, "norm of the residual stream", "MSE");
  const group = (p) => (p[4] ? "sink" : p[3] === 0 ? "content" : "template");
  for (const p of [...points].sort((a, b) => a[4] - b[4])) {
    const where = `${ROLE_TEXT[p[2]]}, ${KIND_TEXT[p[3]]}: norm ${num(p[0])}, MSE ${num(p[1])}`;
    svg.append(group(p) === "content" ? s("circle", { cx: x(p[0]), cy: y(p[1]), r: 2.4, class: "point content" }, tip(where))
      : s("path", { d: p[4] ? `M${x(p[0])} ${y(p[1]) - 6}l5.2 9h-10.4z` : `M${x(p[0]) - 2.5} ${y(p[1]) - 2.5}h5v5h-5z`, class: `point ${group(p)}` }, tip(p[4] ? `sink · ${where}` : where)));
  }
  if (x(sample.sink_norm) < W - PAD.right) svg.append(s("line", { x1: x(sample.sink_norm), x2: x(sample.sink_norm), y1: PAD.top, y2: H - PAD.bottom, class: "mark" }, tip("10 times the median norm")));
  const key = h("p", { class: "legend" }, [["content", "content"], ["template", "written by the template"], ["sink", "norm sink"]].map(([name, text]) => h("span", null,
    s("svg", { viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true" }, name === "content" ? s("circle", { cx: 6, cy: 6, r: 3, class: "point content" })
      : s("path", { d: name === "sink" ? "M6 1l5 9h-10z" : "M3 3h6v6h-6z", class: `point ${name}` })), " ", text)));
  return panel("Norm and error", `A sample of ${plural(sample.n_tokens, "token")} of ${plural(sample.n_dialogues, "dialogue")}. A norm sink is longer than 10 times the median (${num(sample.median_norm)}): ${sinks} here.`, key, svg);
}

const LACKS_FEATURES = "The features of this SAE have not been looked at.";

function firingPanel(data, sae) {
  if (!sae.firing) return panel("Active features per token", null, missing(LACKS_FEATURES, sae.how));
  const counts = sae.firing.l0, low = counts[0][0], high = counts[counts.length - 1][0] + 1, step = Math.max(1, Math.ceil((high - low) / 48));
  const bins = [];
  for (let from = low; from < high; from += step) {
    const n = counts.filter(([v]) => v >= from && v < from + step).reduce((sum, [, c]) => sum + c, 0);
    bins.push({ low: from, high: from + step, n, text: `${step === 1 ? from : `${from} to ${from + step - 1}`} active features: ${plural(n, "token")}` });
  }
  const total = counts.reduce((sum, [, c]) => sum + c, 0), mean = counts.reduce((sum, [v, c]) => sum + v * c, 0) / total;
  let seen = 0;
  const median = counts.find(([, c]) => (seen += c) >= total / 2)[0];
  return panel("Active features per token", `L0 of ${plural(total, "token")} drawn from the interpretation split: mean ${num(mean)}, median ${median}.`,
    histogram(bins, { xLabel: "active features (L0)", yLabel: "tokens", words: `Histogram of L0 from ${low} to ${high - 1}, mean ${num(mean)}, median ${median}`, marks: [{ at: mean, text: `mean ${num(mean)}` }] }));
}

function densityPanel(sae) {
  if (!sae.firing) return panel("Density of features", null, missing(LACKS_FEATURES, sae.how));
  const { density, dead, d_sae } = sae.firing, known = new Map(density), bins = [];
  for (let b = density[0][0]; b <= Math.min(-1, density[density.length - 1][0]); b++) {
    const n = (known.get(b) || 0) + (b === -1 ? known.get(0) || 0 : 0), low = 10 ** (b / 4), high = 10 ** ((b + 1) / 4);
    bins.push({ low, high, n, text: `${percent(low)} to ${percent(high)} of tokens: ${plural(n, "feature")}`, class: high > 0.1001 ? "bar dense" : "bar" });
  }
  const dense = bins.filter((b) => b.class === "bar dense").reduce((sum, b) => sum + b.n, 0);
  return panel("Density of features", `Share of ${plural(sae.store.n_tokens, "token")} on which each of ${plural(d_sae, "feature")} is active: ${num(dead)} never, ${num(dense)} on more than 10 %.`,
    histogram(bins, { xLabel: "share of tokens, by logarithm", yLabel: "features", log: true, words: `Histogram of density; ${dead} features never fire, ${dense} on more than 10 % of tokens` }));
}

const CURVE_TEXT = { mse: "MSE", l0: "L0, active features per token", sparsity: "Sparsity loss", loss: "Loss", dead_fraction: "Share of dead features", gsnr: "Gradient signal to noise" };

function curvePanel(data, sae) {
  const all = peers(data, sae), names = [...new Set(all.flatMap((one) => Object.keys(runOf(data, one).curves[sae.name] || {})))];
  if (!names.length) return panel("Training", null, missing("The run has logged no training metrics."));
  const key = all.map((one) => ({ name: runOf(data, one).name, style: one.run }));
  const result = panel("Training", "What each step logged of its batch, over the tokens trained on.", legend(key), h("div", { class: "multiples" }, names.map((name) => {
    const series = all.map((one) => ({ name: runOf(data, one).name, style: one.run, points: (runOf(data, one).curves[sae.name]?.[name] || []).map(([t, v]) => [t / 1e6, v]) })).filter((line) => line.points.length);
    const log = name !== "dead_fraction";
    return h("figure", null, h("figcaption", null, CURVE_TEXT[name] || human(name)), lines(series, { xLabel: "training tokens, millions", yLabel: `${human(name)}${log ? ", by logarithm" : ""}`, log, words: `${human(name)} while training: ${series.map((l) => `${l.name} ends at ${num(l.points[l.points.length - 1][1])}`).join(", ")}` }));
  })));
  result.classList.add("wide", sae.judges.length ? "wide" : "full");
  return result;
}

const interval = (share) => (share.interval ? `${percent(share.share)} [${percent(share.interval[0])}, ${percent(share.interval[1])}]` : "–");

function judgePanels(data, sae) {
  const how = `chatsae judge ${runOf(data, sae).path}`;
  if (!sae.judges.length) {
    const lacking = panel("Scores of features", null, missing("No judge has scored the features of this SAE.", sae.features ? how : sae.how));
    lacking.classList.add("wide");
    return [lacking];
  }
  return sae.judges.flatMap((found) => [cdfPanel(data, sae, found), calibrationPanel(data, found)]);
}

function cdfPanel(data, sae, found) {
  const series = peers(data, sae).flatMap((one) => one.judges.filter((j) => j.judge === found.judge && j.n_contexts === found.n_contexts).map((j) => {
    let sum = 0;
    const points = [[0.5, 0], ...Object.entries(j.summary.counts).map(([score, n]) => [Number(score), (sum += n) / Math.max(1, j.summary.n)]), [5.5, 1]];
    return { name: runOf(data, one).name, style: one.run, points, summary: j.summary };
  }));
  const lost = (j) => Object.values(j.without_score).reduce((a, b) => a + b, 0);
  const rows = series.map(({ name, summary: j }) => [name, interval(j.high), num(j.mean), num(j.above_null), ...Object.values(j.counts).map(num), num(lost(j))]);
  const result = panel(`Scores of features: ${found.judge} judge, ${found.n_contexts} contexts`, "1 no pattern … 5 a clear one without exceptions (the paper's rubric). The curve that stays lower has more features with high scores.",
    legend(series), h("div", { class: "beside" }, lines(series, { xLabel: "score", yLabel: "share of features up to it", steps: true, xs: [0.5, 5.5], ys: [0, 1], xTicks: [1, 2, 3, 4, 5], words: `Cumulative distribution of scores: ${series.map((l) => `${l.name}: ${interval(l.summary.high)} score 4 or 5`).join("; ")}` }),
    table(["", "scores 4 and 5 [95 %]", "mean", "above nulls", "1", "2", "3", "4", "5", "none"], rows)));
  result.classList.add("wide2");
  return result;
}

function calibrationPanel(data, found) {
  const c = found.calibration, by = new Map();
  for (const p of c.planted) (by.get(p.deviating) || by.set(p.deviating, []).get(p.deviating)).push(p);
  const planted = [...by].map(([deviating, list]) => {
    const scores = list.map((p) => p.score).filter((v) => v !== null);
    return [`${deviating} of ${c.n_contexts} deviate`, num(list[0].expected), scores.length ? num(scores.reduce((a, b) => a + b, 0) / scores.length) : "–", `${scores.filter((v) => Math.round(v) === list[0].expected).length} of ${list.length}`];
  });
  const facts = [
    ["Right on planted features", interval(c.accuracy)], ["Random tokens scored above 2", interval(c.false_positives.random)],
    ["Shuffled contexts scored above 2", interval(c.false_positives.shuffled)], ["Agreement with itself, κ", num(c.retest_kappa)],
    ["Agreement with the known scores, κ", num(c.planted_kappa)], ["Mean score of random tokens", num(c.null_mean.random)], ["Without a score", num(c.without_score)],
  ];
  return panel(`How far to believe the ${found.judge} judge`, "Features whose score is known were judged beside those of the SAE: patterns of the run's own dialogues with a known number of deviating contexts, and contexts without any pattern.",
    h("dl", { class: "facts" }, facts.map(([label, value]) => [h("dt", null, label), h("dd", null, value)])),
    table(["planted", "known score", "mean score", "right"], planted));
}

function reproducePanel(data, sae) {
  const run = runOf(data, sae), result = panel("How to make this again", `With chatsae ${data.chatsae}, and the recipe of the run below.`,
    run.commands.map(([what, line]) => [h("h3", null, what), command(line)]), h("h3", null, "Write this page"), command(data.command),
    h("details", null, h("summary", null, "The whole recipe (config.yaml)"), h("pre", null, run.recipe)));
  result.classList.add("wide", "full");
  return result;
}
