/* The features of the chat template's tokens. */

const PLACE_TEXT = { id: "anywhere", template: "written by the template" };
const placeText = (place) => PLACE_TEXT[place] || `${human(place)} turns`;

/** Rows of a token that say the same, as one row with all their places. */
function merged(rows) {
  const found = [];
  for (const row of rows) {
    const like = found.find((one) => one.id === row.id && one.n === row.n && String(one.features) === String(row.features));
    if (like) like.places.push(row.place);
    else found.push({ ...row, places: [row.place] });
  }
  return found;
}

function specialPanel(data, sae) {
  const path = runOf(data, sae).path;
  if (!sae.special) return wideAs(panel("Features of the template's tokens", null, missing("Which features fire on the tokens that the chat template writes has not been measured.", `chatsae tokens ${path}`)), "full");
  const { n_dialogues, n_tokens } = sae.special, rows = sae.special.rows.filter((row) => row.features.length), most = Math.max(...rows.map((row) => row.features.length));
  const cell = ([i, mean, , share, only]) => h("span", { class: "top", title: `${sae.byIndex?.get(i)?.label || ""} — active on ${percent(share)} of these tokens` },
    h("a", { href: link(data, sae, i) }, i), h("small", null, ` ${num(mean)} · ${only === null ? "–" : only.toFixed(2)}`));
  const fires = new Set(rows.map((row) => row.token)), silent = specialTexts(sae).filter((text) => !fires.has(text));
  let last = null;
  const body = merged(rows).map((row) => {
    const first = row.id !== last;
    last = row.id;
    return [h("span", null, first ? h("span", { class: "chip" }, tokenText(row.token)) : null), h("span", null, row.places.map(placeText).join(", ")), num(row.n), ...Array.from({ length: most }, (_, k) => (row.features[k] ? cell(row.features[k]) : ""))];
  });
  return wideAs(panel("Features of the template's tokens", `The features of largest mean activation on each token, over ${plural(n_dialogues, "dialogue")} held out for steering (${plural(n_tokens, "token")}): number, mean there, and how exclusive it is (the mean there over that plus the mean on all other tokens: 1 only there, 0.5 no preference).`,
    silent.length ? h("p", { class: "note" }, "No feature fires on ", silent.map((text) => [h("span", { class: "chip" }, tokenText(text)), " "])) : null,
    table(["token", "where", "times", ...Array.from({ length: most }, (_, k) => `${k + 1}.`)], body, { class: "special" })), "full");
}

/** For each feature the tokens it is among the first of: [token, place, rank, mean, exclusiveness]. */
function specialOf(sae) {
  const found = new Map();
  for (const row of sae.special ? merged(sae.special.rows) : []) {
    row.features.forEach(([i, mean, , , only], k) => (found.get(i) || found.set(i, []).get(i)).push({ token: row.token, places: row.places, rank: k + 1, mean, only }));
  }
  return found;
}

const specialTexts = (sae) => [...new Set((sae.special ? sae.special.rows : []).map((row) => row.token))];

function specialNote(f) {
  if (!f.special.length) return null;
  const best = new Map();
  for (const one of f.special) if (!best.has(one.token) || one.rank < best.get(one.token).rank) best.set(one.token, one);
  return h("p", { class: "note" }, "Among the strongest on the template's ", [...best.values()].map((one, i) => [i ? ", " : "", h("span", { class: "chip" }, tokenText(one.token)), ` (${placeText(one.places[0])}: no. ${one.rank}, mean ${num(one.mean)}, exclusiveness ${one.only === null ? "–" : one.only.toFixed(2)})`]), ".");
}
