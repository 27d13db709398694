"use strict";
const list = document.getElementById("latents");
const search = document.getElementById("search");
const sort = document.getElementById("sort");
const count = document.getElementById("count");
let cards = [];

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function number(value) {
  if (value === 0) return "0";
  if (value >= 1e6 || value < 0.001) return value.toExponential(1);
  return value >= 1000 ? String(Math.round(value)) : value.toPrecision(3);
}

function percent(density) {
  return number(100 * density) + " %";
}

function histogram(latent) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  const tallest = Math.max(...latent.h, 1);
  drawing.setAttribute("class", "histogram");
  drawing.setAttribute("viewBox", `0 0 ${latent.h.length} 44`);
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", `Histogram of activations from 0 to ${number(latent.m)}`);
  latent.h.forEach((tokens, bin) => {
    if (!tokens) return;
    const height = Math.max(1, (43 * tokens) / tallest);
    const bar = document.createElementNS(space, "rect");
    const shape = { x: bin + 0.06, y: 44 - height, width: 0.88, height };
    for (const [key, value] of Object.entries(shape)) bar.setAttribute(key, value);
    const told = document.createElementNS(space, "title");
    told.textContent = `${tokens} tokens from ${number(bin * latent.w)} to ${number((bin + 1) * latent.w)}`;
    bar.append(told);
    drawing.append(bar);
  });
  return drawing;
}

/* An excerpt is texts, each active one followed by its activation in thousandths of the latent's maximum. */
function excerpt(parts, maximum) {
  const peak = Math.max(...parts.filter((part) => typeof part === "number"));
  const text = element("bdi");
  text.dir = "auto";
  let marked = false;
  parts.forEach((part, at) => {
    const strength = parts[at + 1];
    if (typeof part === "number") return;
    if (typeof strength !== "number") return text.append(part);
    const mark = element("mark", strength === peak && !marked ? "peak" : "", part);
    marked ||= strength === peak;
    mark.style.setProperty("--v", strength / 1000);
    mark.title = number((strength * maximum) / 1000);
    text.append(mark);
  });
  return element("li", "", element("span", "value", number((peak * maximum) / 1000)), text);
}

function card(latent) {
  const link = element("a", "", `#${latent.i}`);
  link.href = `#latent-${latent.i}`;
  link.tabIndex = -1;
  const figures = element("p", "figures",
    "density ", element("b", "", percent(latent.d)), element("br"),
    "max activation ", element("b", "", number(latent.m)));
  const scale = element("div", "scale", element("span", "", "0"), element("span", "", number(latent.h.length * latent.w)));
  const side = element("div", "", element("h2", "", link), figures, histogram(latent), scale);
  const made = element("article", "", side, element("ol", "", ...latent.x.map((parts) => excerpt(parts, latent.m))));
  made.id = `latent-${latent.i}`;
  made.tabIndex = 0;
  made.setAttribute("aria-label", `Latent ${latent.i}`);
  const words = latent.x.map((parts) => parts.filter((part) => typeof part === "string").join("")).join("\n");
  return { latent, made, words: words.toLowerCase() };
}

function arrange() {
  const [key, direction] = sort.value.split(":");
  cards.sort((a, b) => direction * (a.latent[key] - b.latent[key]) || a.latent.i - b.latent.i);
  list.replaceChildren(...cards.map((item) => item.made));
  filter();
}

function filter() {
  const wanted = search.value.toLowerCase();
  const index = wanted.trim().replace(/^#/, "");
  let shown = 0;
  for (const item of cards) {
    item.made.hidden = !(item.words.includes(wanted) || String(item.latent.i) === index);
    shown += !item.made.hidden;
  }
  const all = `${cards.length} latent${cards.length === 1 ? "" : "s"}`;
  count.textContent = shown === cards.length ? all : `${shown} of ${all}`;
  list.querySelector(".empty")?.remove();
  if (!shown) list.append(element("p", "empty", cards.length ? "No latent matches." : "No latent fired on these tokens."));
}

function step(by) {
  const visible = cards.filter((item) => !item.made.hidden).map((item) => item.made);
  const at = visible.indexOf(document.activeElement?.closest("article"));
  const next = visible[at < 0 ? 0 : Math.min(Math.max(at + by, 0), visible.length - 1)];
  next?.focus({ preventScroll: true });
  next?.scrollIntoView({ block: "start" });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && event.target === search) {
    search.value = "";
    filter();
    search.blur();
  }
  if (event.target.matches("input, select")) return;
  if (event.key === "/") {
    event.preventDefault();
    search.focus();
  } else if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
});
document.getElementById("tools").addEventListener("submit", (event) => event.preventDefault());
search.addEventListener("input", filter);
sort.addEventListener("change", arrange);

async function open() {
  const packed = atob(document.getElementById("data").textContent);
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  cards = (await new Response(unpacked).json()).map(card);
  arrange();
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

open().catch((error) => {
  list.replaceChildren(element("p", "empty", `This browser cannot show the latents (${error}); any browser from 2023 on can.`));
});
