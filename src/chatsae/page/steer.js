/* Steering: the sweep of alpha beside its controls, and answers side by side. */

const ARM_TEXT = { feature: "this feature", random: "a random direction", other: "another feature" };
const armText = (arm) => ARM_TEXT[arm] || human(arm);
const END_TEXT = { stop: "", length: " · cut at the limit" };
const endText = (reason) => (reason ? (END_TEXT[reason] ?? ` · ${human(reason)}`) : "");
const HOLDS = { key: "holds", label: "Answers that hold", unit: "share of questions" };
const MEASURE_TEXT = {
  kl_first: "KL at the first token", kl_mean: "KL, mean of the answer", log_perplexity: "Log perplexity under the unsteered model", log_perplexity_ratio: "Log perplexity above the unsteered answer's",
  distinct_1: "Distinct tokens", distinct_2: "Distinct pairs of tokens", repetition: "Repetition", length: "Length", stopped: "Ended by itself", changed: "Differs from the unsteered answer",
  reread_mean: "Feature re-read in the answer, mean", reread_max: "Feature re-read, largest", reread_share: "Feature re-read, share of tokens", other_reread_mean: "Other feature re-read, mean",
};
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/[^.!?]$/, "$&.");
const squareRoot = (v) => Math.sign(v) * Math.sqrt(Math.abs(v)); // alpha may be negative
const MAIN = ["log_perplexity_ratio", "kl_mean", "reread_mean"];

function sweepView(data, sae, sweep) {
  const alphas = sweep.strengths.map((one) => one[1]), known = Object.entries(sweep.measures).map(([key, [label, unit]]) => ({ key, label, unit }));
  const window_ = sweep.windows.feature, open = window_ && window_.open, q = sweep.quality;
  const series = (key) => sweep.arms.map((arm, style) => {
    const kept = (sweep.curves[arm]?.[key] || []).map((v, i) => v && [alphas[i], ...v]).filter(Boolean);
    return { name: armText(arm), style, points: kept.map(([a, v]) => [a, v]), spread: kept.filter((v) => v.length > 2).map(([a, , low, high]) => [a, low, high]) };
  });
  const figure = ({ key, label: what, unit }) => {
    const label = MEASURE_TEXT[key] || what;
    const own = series(key);
    if (!own.some((line) => line.points.length)) return null;
    const words = `${label} against alpha: ${own.map((line) => `${line.name} ${line.points.map(([a, v]) => `${num(v)} at ${num(a)}`).join(", ")}`).join("; ")}`;
    return h("figure", null, h("figcaption", { title: what }, label), lines(own, { xLabel: "alpha, by square root", yLabel: unit || label, words, grows: squareRoot, xTicks: alphas, ys: key === "holds" ? [0, 1] : null, span: open ? [window_.from, window_.to] : null, spanText: open ? `the window: alpha ${num(window_.from)} to ${num(window_.to)}` : null }));
  };
  const first = [HOLDS, ...known.filter((m) => MAIN.includes(m.key))], rest = known.filter((m) => !MAIN.includes(m.key));
  const edge = (value, edges) => h("span", null, num(value), edges ? h("small", null, ` [${num(edges[0])}, ${num(edges[1])}]`) : null);
  const rows = sweep.arms.map((arm, style) => {
    const own = sweep.windows[arm], minus = sweep.windows_against?.[arm];
    return [h("span", null, h("span", { class: `method s${style}` }, armText(arm))), own ? edge(own.from, own.from_interval) : "–", own ? edge(own.to, own.to_interval) : "–", own && own.open ? `${num(own.rel_from)} to ${num(own.rel_to)}` : "none", minus ? differenceText(minus, num) : ""];
  });
  const auto = sweep.auto.alpha === null ? `none (${sweep.auto.reason})` : `${num(sweep.auto.alpha)}, after ${plural(sweep.auto.forwards, "forward")} (KL ${num(sweep.auto.kl)}, bound ${num(sweep.auto.bound)})`;
  return [
    h("p", null, open ? h("b", null, `Window: alpha ${num(window_.from)} to ${num(window_.to)} (${num(window_.rel_from)} to ${num(window_.rel_to)} times the layer's median norm). `) : h("b", null, "No window: no alpha changes answers and keeps their quality. "), `Shaded in the figures. Automatic alpha: ${auto}.`),
    h("p", { class: "note" }, sentence(q.words), ` ${plural(sweep.questions.length, "question")}, greedy, up to ${sweep.max_new_tokens} tokens; whiskers are 95 % intervals over questions.`),
    legend(series("holds")), h("div", { class: "multiples" }, first.map(figure)),
    h("details", null, h("summary", null, "Other measures"), h("div", { class: "multiples" }, rest.map(figure))),
    table(["", "acts from alpha", "holds up to alpha", "window / norm", "feature’s upper end minus this"], rows, { class: "figures" }), gradesView(sweep, alphas), answersView(sweep),
  ];
}

function gradesView(sweep, alphas) {
  const found = sweep.grades;
  if (!found) return null;
  const series = sweep.arms.map((arm, style) => ({ name: armText(arm), style, points: (found.curves[arm]?.harmonic_mean || []).map((v, i) => v && [alphas[i], v[0]]).filter(Boolean) }));
  const lost = Object.entries(found.missing).map(([why, n]) => ` Missing: ${n} × ${why}.`).join("");
  return h("figure", null, h("figcaption", null, `Grades by ${found.judge}: concept, instruction and fluency of 0 to 2, harmonic mean`), h("p", { class: "note" }, `Concept: ${found.concept}.${lost}`), lines(series, { xLabel: "alpha, by square root", yLabel: "harmonic mean", grows: squareRoot, xTicks: alphas, ys: [0, 2], words: `Harmonic mean of grades against alpha` }));
}

/** The answers to one question: a row for each alpha, a column for each arm. */
function answersView(sweep) {
  const body = h("div", null), pick = h("select", { "aria-label": "Question" }, sweep.questions.map((text, i) => h("option", { value: i }, `${i + 1}. ${visible(text)}`)));
  const text = (cell, base) => (cell && base && cell[0] === base[0] ? h("div", { class: "answer lost" }, "unchanged") : cell ? h("div", { class: `answer${cell[2] ? "" : " lost"}` }, visible(cell[0]) || "∅", h("small", null, `${cell[2] ? "" : " ✕ does not hold"}${endText(cell[1])}`)) : h("span", null, "–"));
  const draw = () => {
    const q = Number(pick.value), base = sweep.answers.unsteered?.[0]?.[q];
    const rows = sweep.strengths.slice(1).map(([label, alpha, norm, max, kl], i) => [h("b", { title: label }, label.includes("auto") ? `auto: ${num(alpha)}` : num(alpha)), ...[norm, max, kl].map((value) => h("small", null, num(value, 2))), ...sweep.arms.map((arm) => text(sweep.answers[arm]?.[i + 1]?.[q], base))]);
    body.replaceChildren(h("p", { class: "unsteered" }, h("small", null, "Without steering "), text(base)), table(["alpha", "/ norm", "/ max", "KL", ...sweep.arms.map(armText)], rows, { class: "answers" }));
  };
  pick.addEventListener("change", draw);
  draw();
  return h("details", { open: true }, h("summary", null, "Answers side by side"), h("p", { class: "row" }, pick), body);
}

const strengthHead = ([label, alpha, norm, max, kl]) => h("span", { class: "strength" }, h("b", null, label.includes("auto") ? `auto: ${num(alpha)}` : num(alpha)), [[norm, "× norm"], [max, "× max"], [kl, "KL"]].map(([value, unit]) => value !== null && h("small", null, unit === "KL" ? ` KL ${num(value, 2)}` : ` ${num(value, 2)} ${unit}`)));

function sweepPanel(data, sae) {
  const sweeps = sae.steering ? sae.steering.sweeps : [], body = h("div", null);
  const first = sae.special?.rows[0]?.features[0]?.[0] ?? sae.features?.[0]?.i ?? 0;
  if (!sweeps.length) return wideAs(panel("Steering", null, missing("Which strength of steering changes answers and keeps their quality has not been measured for any feature of this SAE.", `chatsae steer ${runOf(data, sae).path} --sae ${sae.name} --feature ${first} --sweep`), steeredList(data, sae)), "full");
  const pick = h("select", { "aria-label": "Feature" }, sweeps.map((one, i) => h("option", { value: i }, `feature ${one.feature}${sae.byIndex?.get(one.feature) ? `: ${visible(sae.byIndex.get(one.feature).label)}` : ""}`)));
  const draw = () => body.replaceChildren(...sweepView(data, sae, sweeps[Number(pick.value)]).filter(Boolean));
  pick.addEventListener("change", draw);
  draw();
  return wideAs(panel("Steering: alpha against quality", "Answers to the same questions with alpha times a direction added to the residual stream: the feature's own, a random one, and that of another live feature.", sweeps.length > 1 ? h("p", null, pick) : h("p", null, h("a", { href: link(data, sae, sweeps[0].feature) }, `Feature ${sweeps[0].feature}`)), body, steeredList(data, sae)), "full");
}

function steeredList(data, sae) {
  const there = Object.keys(sae.steering?.examples || {});
  return there.length ? h("p", { class: "note" }, "Steering examples of features ", there.map((i, k) => [k ? ", " : "", h("a", { href: link(data, sae, i) }, i)])) : null;
}

const isSteered = (sae, f) => sae.steering && (sae.steering.examples[f.i] || sae.steering.sweeps.some((one) => one.feature === f.i));

/** Of one feature: its examples and its sweep. */
function steerSection(data, sae, f) {
  const found = sae.steering, lost = Object.entries(found?.left_out || {}).map(([why, n]) => `Left out: ${n} × ${why}.`).join(" ");
  const examples = found?.examples[f.i] || [], sweeps = (found?.sweeps || []).filter((one) => one.feature === f.i), how = `chatsae steer ${runOf(data, sae).path} --sae ${sae.name} --feature ${f.i}`;
  const head = h("h2", null, "Steering");
  if (!examples.length && !sweeps.length) return [head, missing(`What answers become when this feature is added to the residual stream has not been tried. ${lost}`, how)];
  return [head, lost ? h("p", { class: "note" }, lost) : null, examples.map(exampleView), sweeps.map((one) => h("section", { class: "panel" }, h("h2", null, "Alpha against quality"), sweepView(data, sae, one)))];
}

function exampleView(one) {
  return one.prompts.map(([prompt, base, answers]) => {
    const known = one.strengths.length === answers.length, cell = (text, end, lowered) => h("div", { class: "answer" }, visible(text) || "∅", h("small", null, `${endText(end)}${lowered ? ` · guard lowered it ${lowered} times` : ""}`));
    return h("section", { class: "panel steer" }, h("p", null, h("small", null, "Question "), visible(prompt)), h("div", { class: "scroll", tabindex: 0 }, h("div", { class: "columns-of" },
      h("div", null, h("h3", null, "without steering"), cell(base)), answers.map(([label, text, end, lowered], k) => known && one.strengths[k][1] === 0 && text === base ? null : h("div", null, h("h3", null, known ? ["alpha ", strengthHead(one.strengths[k])] : visible(label)), cell(text, end, lowered))))));
  });
}
