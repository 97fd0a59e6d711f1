/* Scores of features: their distribution in every run, what separates the runs, and how far a judge can be believed. */

const between = (text, edges) => (edges ? h("small", null, ` [${text(edges[0])}, ${text(edges[1])}]`) : null);
const shareText = (one) => (one && one.share !== null ? h("span", null, percent(one.share), between(percent, one.interval)) : "–");
const meanText = (mean, edges) => (mean === null || mean === undefined ? "–" : h("span", null, num(mean), between(num, edges)));
const signed = (value, text) => (value === null ? "–" : value > 0 ? "+" : value < 0 ? "−" : "") + text(Math.abs(value));
const hundredth = (value) => (value === null ? "–" : value.toFixed(2));
const points = (share) => (100 * share).toFixed(Math.abs(share) < 0.0995 ? 1 : 0);

/** A difference with its interval; bold where the interval lies on one side of zero. */
function differenceText(one, text) {
  if (!one) return "–";
  const edges = one.interval, clear = edges && edges[0] * edges[1] > 0;
  return h("span", { class: clear ? "best" : null, title: one.p_value === undefined || one.p_value === null ? null : `p = ${num(one.p_value)}` },
    signed(one.difference, text), edges ? h("small", null, ` [${signed(edges[0], text)}, ${signed(edges[1], text)}]`) : null);
}

const judgeName = (one) => `${one.judge} judge, ${one.n_contexts} contexts`;

function judgePanels(data, sae) {
  if (!sae.judges.length) return [wideAs(panel("Scores of features", null, missing("No judge has scored the features of this SAE.", sae.features ? `chatsae judge ${runOf(data, sae).path}` : sae.how)), "full")];
  return [scoresPanel(data, sae), ...pairPanel(data, sae), ...sae.judges.map((one) => wideAs(trustPanel(sae, one), sae.judges.length > 1 ? "half" : "full"))];
}

/** The scores of a judge in every run as steps: of the comparison, where seeds are one method, or of each run. */
function distributions(data, sae, found) {
  const compared = (data.comparison || []).find((one) => one.sae === sae.name && judgeName(one) === judgeName(found));
  const line = (name, style, summary, steps, band) => ({ name, style, summary, band, points: [[0.5, 0], ...steps, [5.5, 1]] });
  if (compared) return compared.methods.map((m) => line(m.label, data.runs.find((run) => m.runs.includes(run.path))?.style ?? 4, m, m.cdf.score.map((v, i) => [v, m.cdf.share[i]]), m.cdf_band));
  return peers(data, sae).flatMap((one) => one.judges.filter((j) => judgeName(j) === judgeName(found)).map(({ summary: j }) => {
    let sum = 0;
    const steps = Object.entries(j.counts).map(([score, n]) => [Number(score), (sum += n) / Math.max(1, j.n)]);
    return line(runOf(data, one).name, runOf(data, one).style, j, steps, j.n ? Math.sqrt(Math.log(2 / 0.05) / (2 * j.n)) : 0); // Dvoretzky, Kiefer, Wolfowitz
  }));
}

function scoresPanel(data, sae) {
  const rows = [], all = sae.judges.map((found) => ({ found, series: distributions(data, sae, found) }));
  const figures = all.map(({ found, series }) => {
    for (const { name, style, summary: j } of series) {
      const lost = Object.values(j.without_score).reduce((a, b) => a + b, 0), why = Object.entries(j.without_score).map(([reason, n]) => `${n} × ${reason}`).join("; ");
      rows.push([h("span", null, h("span", { class: `method s${style}` }, name), ` ${found.judge}, ${found.n_contexts}`), shareText(j.high), meanText(j.mean, j.mean_interval), ...Object.values(j.counts).map(num), h("span", { title: why || null }, num(lost))]);
    }
    const words = `Cumulative distribution of scores, ${judgeName(found)}: ${series.map((l) => `${l.name}: ${percent(l.summary.high.share)} score 4 or 5`).join("; ")}`;
    return h("figure", null, h("figcaption", null, judgeName(found)), lines(series, { xLabel: "score", yLabel: "share of features up to it", steps: true, xs: [0.5, 5.5], ys: [0, 1], xTicks: [1, 2, 3, 4, 5], words }));
  });
  const note = "The paper's rubric for a feature's strongest contexts: 5 is one clear pattern without exception, 1 is none. A curve that stays low has many features with high scores; its band holds the whole curve with 95 %. In brackets 95 % intervals.";
  return wideAs(panel("Scores of features", note, legend(all[0].series), h("div", { class: "flow" }, figures,
    table(["judge and contexts", "scores 4 and 5", "mean score", "1", "2", "3", "4", "5", "no score"], rows, { class: "figures" }))), "full");
}

/** What separates the runs: differences of shares and means, of the same SAE with the same judge. */
function pairPanel(data, sae) {
  const own = (data.comparison || []).filter((one) => one.sae === sae.name && one.pairs.length);
  if (!own.length) return [];
  const rows = own.flatMap((one) => one.pairs.map((pair) => {
    const near = pair.by_density, seeds = pair.by_seed;
    const seed = seeds && seeds.high ? differenceText({ difference: seeds.high.mean, interval: seeds.high.interval }, points) : "–";
    return [h("span", null, h("b", null, `${pair.first} − ${pair.second}`), ` ${one.judge}, ${one.n_contexts}`), differenceText(pair.high, points), differenceText(pair.mean, hundredth), differenceText(near && near.high, points), differenceText(near && near.mean, hundredth), seed];
  }));
  const lost = own.flatMap((one) => Object.entries(one.left_out || {})).map(([why, n]) => ` Left out: ${n} × ${why}.`).join("");
  const note = `Differences of the share of scores 4 and 5, in points of a hundred, and of the mean score, with 95 % intervals; bold where zero lies outside. Features have no counterpart in another SAE: “paired” sets those of equal rank of density side by side; “seeds” takes each pair of runs of one seed as one value.${lost}`;
  return [wideAs(panel("Between the runs", note, table(["", "scores 4 and 5", "mean score", "4 and 5, paired", "mean, paired", "4 and 5, seeds"], rows, { class: "figures" })), "full")];
}

const NULL_TEXT = { random: "random tokens", shuffled: "shuffled contexts", random_directions: "random directions", random_weights: "random weights" };
const NULL_WHAT = "Random tokens: windows around them, as if of one feature. Shuffled contexts: those of the SAE's features, dealt out anew.";

/** The SAE beside what cannot have a meaning. */
function nullTable(sae, found) {
  const c = found.calibration, above = found.summary.above || {}, controls = c.controls || {};
  const row = (kind) => {
    const control = controls[kind], minus = above[kind];
    if (!control && c.null_mean[kind] === undefined) return null;
    return [h("span", { title: control ? control.what : null }, NULL_TEXT[kind] || human(kind)), control ? meanText(control.summary.mean, control.summary.mean_interval) : num(c.null_mean[kind]),
      shareText(control ? control.false_positives : c.false_positives[kind]), minus ? differenceText(minus.mean, hundredth) : kind === "random" ? num(found.summary.above_null) : "–", minus ? differenceText(minus.high, points) : "–"];
  };
  const rows = Object.keys(NULL_TEXT).map(row).filter(Boolean), all = Object.values(found.summary.counts), above2 = all[2] + all[3] + all[4];
  const own = [h("b", null, "this SAE"), meanText(found.summary.mean, found.summary.mean_interval), percent(above2 / Math.max(1, found.summary.n)), "", ""];
  const what = Object.values(controls).map((control) => control.what.replace(/[^.!?]$/, "$&.")).join(" ");
  return [table(["", "mean score", "above 2", "SAE minus it: mean", "SAE minus it: 4 and 5"], [own, ...rows], { class: "figures" }), h("p", { class: "note" }, NULL_WHAT, what ? ` ${visible(what)}` : null)];
}

function trustPanel(sae, found) {
  const c = found.calibration, by = new Map();
  for (const p of c.planted) (by.get(p.deviating) || by.set(p.deviating, []).get(p.deviating)).push(p);
  const planted = [...by].map(([deviating, list]) => {
    const scores = list.map((p) => p.score).filter((v) => v !== null);
    return [`${deviating} of ${c.n_contexts} deviate`, num(list[0].expected), scores.length ? num(scores.reduce((a, b) => a + b, 0) / scores.length) : "–", `${scores.filter((v) => Math.round(v) === list[0].expected).length} of ${list.length}`];
  });
  const facts = [
    ["Right on planted features", shareText(c.accuracy)], ["Agreement with the known scores, κ", meanText(c.planted_kappa, c.planted_kappa_interval)],
    ["Agreement with itself, κ", meanText(c.retest_kappa, c.retest_kappa_interval)],
    ...(found.agreement || []).map((one, i) => [`Features scored again (${i + 2}. time), κ`, meanText(one.kappa, one.kappa_interval)]), ["Calibration features without a score", num(c.without_score)],
  ];
  return panel(`How far to believe the ${judgeName(found)}`, "Judged beside the SAE's features: features whose score is known (patterns of these dialogues with a known number of contexts that deviate), and features that cannot have a meaning. A judge worth its name gives the first their score, the second 1, and the SAE clearly more than those. Differences of shares in points of a hundred; κ weighs large disagreements more, 1 is none.",
    h("div", { class: "beside" }, h("dl", { class: "facts" }, facts.map(([label, value]) => [h("dt", null, label), h("dd", null, value)])), table(["planted", "known", "mean", "right"], planted, { class: "figures" })), h("h3", null, "Beside features without a meaning"), nullTable(sae, found));
}
