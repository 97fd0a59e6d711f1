/* What is shown: the address decides, keys and fields change the address or the list. */

const wide = () => matchMedia("(min-width: 900px)").matches;

async function main() {
  const data = await unpack($("data").textContent);
  styled(data.runs);
  const view = { sae: 0, search: "", role: "", score: "", density: "", token: "", sort: "score", up: false, open: null, shown: [], cursor: -1, page: "overview" };
  view.sae = Math.max(0, data.saes.findIndex((one) => one.features));
  $("sae").append(...data.saes.map((one, i) => h("option", { value: i }, `${runOf(data, one).name} · ${one.name}${one.features ? "" : " (no features)"}`)));
  $("pick").hidden = data.saes.length < 2;
  const options = (id, rows) => $(id).append(...rows.map(([value, text]) => h("option", { value }, text)));
  options("by-role", [["", "any role"], ...ROLE_TEXT.map((text, i) => [i, `prefers ${text}`])]);
  options("by-score", SCORES);
  options("by-density", DENSITIES);
  const tokens = [...new Set(data.saes.flatMap(specialTexts))];
  options("by-token", [["", "any token"], ...tokens.map((text) => [text, `fires on ${tokenText(text)}`])]);
  $("by-token").hidden = !tokens.length;
  const sae = () => data.saes[view.sae];

  function drawOverview() {
    document.title = `${sae().name} · chatsae report`;
    if ($("overview").dataset.sae === String(view.sae)) return; // as it was left
    $("overview").replaceChildren(...overview(data, sae()));
    $("overview").dataset.sae = view.sae;
  }

  function drawList() {
    const one = sae();
    view.shown = one.features ? selected(one, view) : [];
    $("list-head").replaceChildren(listHead(view, (column) => {
      view.up = view.sort === column.key ? !view.up : Boolean(column.up);
      view.sort = column.key;
      drawList();
    }));
    $("list").replaceChildren(...view.shown.map((f) => listRow(data, one, f)));
    $("count").textContent = one.features ? `${view.shown.length.toLocaleString("en-US")} of ${plural(one.features.length, "feature")}: ${num(one.drawn)} drawn${one.features.length > one.drawn ? `, ${num(one.features.length - one.drawn)} named by tables` : ""}; ${num(one.store.n_live)} of ${num(one.store.d_sae)} are live` : "";
    view.cursor = view.shown.findIndex((f) => f.i === view.open);
    markRows();
  }

  function markRows() {
    [...$("list").children].forEach((row, i) => {
      row.classList.toggle("open", view.shown[i].i === view.open);
      row.classList.toggle("cursor", i === view.cursor);
      if (i === view.cursor) row.scrollIntoView({ block: "nearest" });
    });
  }

  function drawFeature() {
    const one = sae(), f = one.byIndex && one.byIndex.get(view.open);
    document.body.classList.toggle("reading", view.open !== null || !one.features);
    $("explorer").classList.toggle("empty", !one.features);
    if (!one.features) $("feature").replaceChildren(missing(`The features of ${one.name} (${runOf(data, one).name}) are not in this page.`, one.how));
    else if (view.open === null) $("feature").replaceChildren(h("p", { class: "hint" }, "Choose a feature of the list: j and k move, Enter opens, / searches."));
    else if (!f) $("feature").replaceChildren(missing(`Feature ${view.open} has no contexts in this page.`, `chatsae features ${runOf(data, one).path} --sae ${one.name} --only ${view.open}`));
    else $("feature").replaceChildren(...featureView(data, one, f, (step) => move(step, true)));
    $("feature").scrollTop = 0;
    if (f) document.title = `Feature ${f.i} · ${one.name}`;
  }

  function move(step, open) {
    if (!view.shown.length) return;
    view.cursor = Math.min(view.shown.length - 1, Math.max(0, view.cursor + step));
    markRows();
    if (open) location.hash = link(data, sae(), view.shown[view.cursor].i);
  }

  /** The SAE and feature of an address: NAME, NAME/FEATURE, RUN/NAME or RUN/NAME/FEATURE. */
  function address() {
    let text = location.hash.slice(1);
    try {
      text = decodeURI(text);
    } catch {
      // not an address that this page makes: taken as it is
    }
    const found = text.match(/^(.*?)(?:\/(\d+))?$/s);
    const named = (name) => data.saes.findIndex((one) => one.name === name || `${runOf(data, one).name}/${one.name}` === name);
    return { text, number: named(found[1]), feature: found[2] === undefined ? null : Number(found[2]) };
  }

  function route() {
    const { text, number, feature } = address();
    if (number >= 0) {
      [view.page, view.sae] = ["features", number];
      view.open = feature;
    } else if (text === "features") [view.page, view.open] = ["features", null];
    else view.page = "overview";
    draw();
    const part = number < 0 && text.match(/^overview\/(\w+)$/);
    if (part) $(`part-${part[1]}`)?.scrollIntoView();
  }

  function draw() {
    const features = view.page === "features";
    $("overview").hidden = features;
    $("explorer").hidden = !features;
    $("sae").value = view.sae;
    $("tab-features").href = link(data, sae());
    for (const name of ["overview", "features"]) $(`tab-${name}`).toggleAttribute("aria-current", name === view.page);
    document.body.classList.toggle("reading", features && view.open !== null);
    enrich(data, sae());
    if (!features) return drawOverview();
    document.title = `Features · ${sae().name}`;
    drawList();
    if (view.open === null && wide() && view.shown.length) {
      view.open = view.shown[0].i; // beside the list there is room for one
      view.cursor = 0;
      drawFeature();
      markRows();
    } else drawFeature();
    if (!wide()) scrollTo(0, 0);
  }

  for (const [id, key, event] of [["search", "search", "input"], ["by-role", "role", "change"], ["by-score", "score", "change"], ["by-density", "density", "change"], ["by-token", "token", "change"]]) {
    $(id).addEventListener(event, () => {
      view[key] = $(id).value;
      drawList();
    });
  }
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("sae").addEventListener("change", () => {
    view.sae = Number($("sae").value);
    view.open = null;
    const next = view.page === "features" ? link(data, sae()) : "#overview";
    if (location.hash === next) draw();
    else location.hash = next;
  });
  keys({ view, move, open: () => view.shown[view.cursor] && (location.hash = link(data, sae(), view.shown[view.cursor].i)), list: () => (location.hash = link(data, sae())) });
  theme();
  addEventListener("hashchange", route);
  route();
  $("loading").remove();
  document.documentElement.dataset.ready = "yes";
}

function keys({ view, move, open, list }) {
  const search = $("search"), help = $("help");
  $("help-open").addEventListener("click", () => help.showModal());
  $("help-close").addEventListener("click", () => help.close());
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const typing = event.target.matches("input, select, textarea");
    if (typing) {
      if (event.key === "Escape") event.target.blur();
      else if (event.key === "Enter" && event.target === search) {
        view.cursor = Math.max(0, view.cursor);
        open();
        search.blur();
      }
      return;
    }
    const acts = {
      "/": () => {
        if (view.page !== "features") list();
        setTimeout(() => search.focus());
      },
      j: () => view.page === "features" && move(1),
      k: () => view.page === "features" && move(-1),
      t: () => $("theme").click(),
      "?": () => help.showModal(),
      Enter: () => view.page === "features" && !event.target.closest("a, button") && open(),
      Escape: () => (document.body.classList.contains("reading") && !wide() ? list() : (location.hash = "#overview")),
    };
    if (!acts[event.key]) return;
    if (event.key !== "Enter" || !event.target.closest("a, button")) event.preventDefault();
    acts[event.key]();
  });
}

/** Light or dark: as the system has it, until the button is pressed. */
function theme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const apply = () => {
    const dark = chosen ? chosen === "dark" : system.matches;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    $("theme").textContent = dark ? "Light" : "Dark";
  };
  $("theme").addEventListener("click", () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    apply();
  });
  system.addEventListener("change", apply);
  apply();
}

main().catch((error) => {
  $("loading")?.replaceChildren(`The page cannot be shown: ${error.message}`);
  throw error;
});
