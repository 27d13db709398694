const SVG = "http://www.w3.org/2000/svg";
const VIEWS = { top: "Top", bands: "By strength", random: "Random" };
const CONTEXTS_ARE =
  "A context is cut to the tokens around its strongest one, so it may begin inside a word. The model reads documents joined, " +
  "with a special token such as <|bos|> or <|eos|> where one begins or ends; these are shown, but no activation on them counts.";
const FIGURES = {
  density: "Share of the tokens on which it is active",
  "max activation": "Its strongest activation",
  typical: "Mean activation where it is active, the unit of steer.strength",
  "logit effect": "How far it raises the logit of the token that it raises most, at its maximum",
  "nearest cosine": "Largest cosine of its decoder row with that of another live latent",
};
const bubble = document.getElementById("bubble");

function histogram(latent, maximum) {
  const drawing = document.createElementNS(SVG, "svg");
  const tallest = Math.max(...latent.h, 1);
  drawing.setAttribute("class", "histogram");
  drawing.setAttribute("viewBox", `0 0 ${latent.h.length} 44`);
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", `Histogram of activations from 0 to ${number(maximum)}`);
  latent.h.forEach((tokens, bin) => {
    if (!tokens) return;
    const height = Math.max(1, (43 * tokens) / tallest);
    const bar = document.createElementNS(SVG, "rect");
    const shape = { x: bin + 0.06, y: 44 - height, width: 0.88, height };
    for (const [key, value] of Object.entries(shape)) bar.setAttribute(key, value);
    bar.dataset.told = `${counted(tokens, "token")} from ${number(bin * latent.w)} to ${number((bin + 1) * latent.w)}`;
    drawing.append(bar);
  });
  return drawing;
}

/* A context is texts, each active one followed by its activation in thousandths of the latent's maximum. */
function context(parts, maximum) {
  const peak = Math.max(...parts.filter((part) => typeof part === "number"));
  const text = element("bdi");
  text.dir = "auto";
  let marked = false;
  parts.forEach((part, at) => {
    const strength = parts[at + 1];
    if (typeof part === "number") return;
    if (typeof strength !== "number") return text.append(...isolated(part));
    const mark = element("mark", strength === peak && !marked ? "peak" : "", ...isolated(part === "" ? "∅" : part));
    marked ||= strength === peak;
    mark.style.setProperty("--v", strength / 1000);
    mark.dataset.told = `${number((strength * maximum) / 1000)}, ${Math.round(strength / 10)} % of the maximum`;
    text.append(mark);
  });
  return element("li", "", element("span", "value", number((peak * maximum) / 1000)), text);
}

function contexts(latent, view, maximum) {
  const list = (found) => element("ol", "", ...found.map((parts) => context(parts, maximum)));
  if (view === "top") return [list(latent.t)];
  if (view === "random") {
    return [element("p", "about", "Drawn at random from all contexts in which it fires"), list(latent.r)];
  }
  return latent.b.flatMap(([low, ...found], at) => {
    const high = at ? latent.b[at - 1][0] : maximum;
    const said = `From ${number(low)} to ${number(high)}${found.length ? "" : ": no context is strongest there"}`;
    return [element("p", "about", said), list(found)];
  });
}

/* Three ways to choose contexts, as tabs: one stop of the tab key, and arrows between them. */
function tabs(latent, maximum, name) {
  const panel = element("div", "contexts");
  const bar = element("div", "tabs");
  bar.setAttribute("role", "tablist");
  bar.setAttribute("aria-label", `Contexts of latent ${name}`);
  panel.id = `contexts-${name}`;
  panel.setAttribute("role", "tabpanel");
  const buttons = Object.entries(VIEWS).map(([view, title]) => {
    const tab = button(title, () => choose(view));
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    tab.dataset.view = view;
    tab.title = CONTEXTS_ARE;
    return tab;
  });
  function choose(view) {
    for (const tab of buttons) {
      tab.setAttribute("aria-selected", tab.dataset.view === view);
      tab.tabIndex = tab.dataset.view === view ? 0 : -1;
    }
    panel.replaceChildren(...contexts(latent, view, maximum));
    hush();
  }
  bar.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const at = buttons.indexOf(event.target);
    const next = buttons[(at + by + buttons.length) % buttons.length];
    next.focus();
    next.click();
    event.preventDefault();
    event.stopPropagation();
  });
  bar.append(...buttons);
  choose("top");
  return [bar, panel];
}

function row(title, chips) {
  return element("p", "effects", element("span", "name", title), element("span", "chips", ...chips));
}

function effects(title, tokens) {
  const chips = tokens.map(([text, effect]) => {
    const chip = element("span", "chip", quoted(text));
    chip.dataset.told = `${effect > 0 ? "+" : "−"}${number(Math.abs(effect))}`;
    return chip;
  });
  return row(title, chips);
}

function neighbours(latent, index) {
  const near = latent.n.map(([i, cosine]) => {
    const place = index.places.get(i);
    const tail = element("span", "cosine", cosine.toFixed(2));
    if (place === undefined) return element("span", "chip absent", `#${i} `, tail);
    const link = element("a", "chip", `#${i} `, quoted(index.l[place]), " ", tail);
    link.href = address({ sort: sort.value, latent: i });
    return link;
  });
  const absent = near.filter((chip) => chip.tagName === "SPAN").length;
  if (absent) near.push(element("span", "cosine", `${absent < near.length ? "dashed: " : ""}not on this page`));
  return row("similar", near);
}

function fill(card, latent, index, place) {
  const maximum = index.m[place];
  const scale = element("div", "scale", element("span", "", "0"), element("span", "", `last bar ends at ${number(latent.h.length * latent.w)}`));
  card.querySelector(".side").append(histogram(latent, maximum), scale);
  const about = element("div", "about-it");
  if (latent.p.length) about.append(effects("raises", latent.p), effects("lowers", latent.s));
  if (latent.n.length) about.append(neighbours(latent, index));
  card.querySelector(".body").replaceChildren(...tabs(latent, maximum, index.i[place]), about);
}

function failed(card) {
  const again = button("Reload", () => location.reload());
  const said = "What it says of this latent cannot be read: the page was written anew after it was opened, or its folder moved. ";
  card.querySelector(".body").replaceChildren(element("p", "about", said, again));
}

/* What the index knows is there at once, the rest when its block is. */
function card(index, place, reasons) {
  const i = index.i[place];
  const link = element("a", "", `#${i}`);
  link.tabIndex = -1;
  const figures = [["density", `${number(100 * index.d[place])} %`], ["max activation", number(index.m[place])], ["typical", number(index.t[place])]];
  if (index.e[place] !== null) figures.push(["logit effect", number(index.e[place])]);
  if (index.n[place] !== null) figures.push(["nearest cosine", index.n[place].toFixed(2)]);
  const table = element("dl", "figures");
  for (const [name, value] of figures) {
    const shown = element("div", "", element("dt", "", name), element("dd", "", value));
    shown.title = FIGURES[name];
    table.append(shown);
  }
  const side = element("div", "side", element("h2", "", link), element("p", "label", quoted(index.l[place])), ...reasons, table);
  if (index.address) {
    const away = element("a", "away", "Neuronpedia");
    away.href = index.address + i;
    away.target = "_blank";
    away.rel = "noreferrer";
    side.append(away);
  }
  const made = element("article", "", side, element("div", "body", element("p", "about", "…")));
  made.id = `latent-${i}`;
  made.tabIndex = 0;
  made.setAttribute("aria-label", `Latent ${i}, ${index.l[place]}`);
  details(index, place).then((latent) => fill(made, latent, index, place)).catch(() => failed(made));
  return made;
}

/* A bubble that tells the activation of the token, or the size of the bar, that is pointed at. */
function tell(target) {
  bubble.replaceChildren(...(target.tagName === "rect" ? [] : [quoted(target.textContent), " "]), target.dataset.told);
  bubble.hidden = false;
  const box = target.getClientRects()[0];
  const left = Math.min(box.left, document.documentElement.clientWidth - bubble.offsetWidth - 8);
  const above = box.top - bubble.offsetHeight - 6;
  bubble.style.left = `${Math.max(8, left)}px`;
  bubble.style.top = `${above > 0 ? above : box.bottom + 6}px`;
}

function hush() {
  bubble.hidden = true;
  document.querySelector(".pointed")?.classList.remove("pointed");
}

/* Arrow keys go from one active token of a card to the next. */
function point(card, by) {
  const marks = [...card.querySelectorAll("mark")];
  const at = marks.findIndex((mark) => mark.classList.contains("pointed"));
  const next = marks[at < 0 ? (by > 0 ? 0 : marks.length - 1) : at + by];
  hush();
  if (!next) return;
  next.classList.add("pointed");
  next.scrollIntoView({ block: "nearest" });
  tell(next);
}
