const PER_PAGE = 24;
const list = document.getElementById("latents");
const search = document.getElementById("search");
const sort = document.getElementById("sort");
const count = document.getElementById("count");
const deep = document.getElementById("deep");
const pageNumber = document.getElementById("page");
let index = { i: [] };
let order = []; // places of all latents in the index, sorted
let found = []; // those of them that the search finds
let texts = null; // of all contexts, once they are loaded
let page = 0;

function arrange() {
  const [key, direction] = sort.value.split(":");
  const column = key === "l" ? ranks(index.l) : index[key];
  order = index.i.map((_, place) => place);
  order.sort((a, b) => direction * (column[a] - column[b]) || a - b);
  filter();
}

function ranks(labels) {
  const collator = new Intl.Collator("en", { numeric: true });
  const sorted = labels.map((_, place) => place).sort((a, b) => collator.compare(labels[a], labels[b]));
  const rank = [];
  sorted.forEach((place, at) => {
    rank[place] = at && labels[place] === labels[sorted[at - 1]] ? rank[sorted[at - 1]] : at;
  });
  return rank;
}

function filter() {
  const wanted = search.value.toLowerCase();
  const named = /^#?\d+$/.test(wanted.trim()) ? Number(wanted.trim().replace("#", "")) : null;
  const fits = (place) =>
    index.i[place] === named || index.words[place].includes(wanted) || (texts !== null && texts[place].includes(wanted));
  found = wanted ? order.filter(fits) : order;
  const all = counted(index.i.length, "latent");
  count.textContent = wanted ? `${found.length.toLocaleString("en")} of ${all}` : all;
  show(0);
  if (found.length) return;
  const dead = named !== null && named < index.d_sae && !index.places.has(named);
  const said = dead ? missing(named) : index.i.length ? "No latent matches." : "No latent fired on these tokens.";
  list.replaceChildren(element("p", "empty", said));
}

function missing(i) {
  return `Latent ${i} is not here: it did not fire on these tokens, or the page shows only some of the latents.`;
}

function pages() {
  return Math.max(1, Math.ceil(found.length / PER_PAGE));
}

function show(number) {
  page = Math.min(Math.max(number, 0), pages() - 1);
  hush();
  list.replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((place) => card(index, place)));
  pageNumber.value = page + 1;
  pageNumber.max = pages();
  document.getElementById("pages").textContent = `of ${pages().toLocaleString("en")}`;
  document.getElementById("before").disabled = page === 0;
  document.getElementById("after").disabled = page === pages() - 1;
}

function turn(by) {
  const before = page;
  show(page + by);
  if (page !== before) list.scrollIntoView();
}

function focusOn(card) {
  hush();
  card?.focus({ preventScroll: true });
  card?.scrollIntoView({ block: "start" });
}

function current() {
  return document.activeElement?.closest("article");
}

function step(by) {
  const cards = [...list.querySelectorAll("article")];
  const at = cards.indexOf(current());
  const next = at < 0 ? 0 : at + by;
  if (next >= 0 && next < cards.length) return focusOn(cards[next]);
  const before = page;
  show(page + by);
  if (page !== before) focusOn(by > 0 ? list.firstElementChild : list.lastElementChild);
}

function jump() {
  const named = /^#latent-(\d+)$/.exec(location.hash);
  if (!named) return;
  const place = index.places.get(Number(named[1]));
  if (place === undefined) {
    list.replaceChildren(element("p", "empty", missing(Number(named[1]))));
    return;
  }
  if (!found.includes(place)) {
    search.value = "";
    filter();
  }
  show(Math.floor(found.indexOf(place) / PER_PAGE));
  focusOn(document.getElementById(`latent-${named[1]}`));
}

async function searchAll() {
  deep.disabled = true;
  try {
    texts = await allTexts(index, (share) => (deep.textContent = `Reading contexts: ${Math.round(100 * share)} %`));
    deep.textContent = "All contexts are searched";
    filter();
  } catch {
    deep.disabled = false;
    deep.textContent = "Not all contexts can be read: reload the page";
  }
}

const KEYS = {
  "/": () => search.focus(),
  j: () => step(1),
  k: () => step(-1),
  n: () => turn(1),
  p: () => turn(-1),
  c: () => {
    const tab = current()?.querySelector('[aria-selected="true"]');
    (tab?.nextElementSibling ?? tab?.parentElement.firstElementChild)?.click();
  },
  ArrowRight: () => current() && point(current(), 1),
  ArrowLeft: () => current() && point(current(), -1),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    hush();
    if (event.target === search) {
      search.value = "";
      filter();
      search.blur();
    }
  }
  if (event.target.matches("input, select") || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});
document.getElementById("tools").addEventListener("submit", (event) => event.preventDefault());
document.getElementById("before").addEventListener("click", () => turn(-1));
document.getElementById("after").addEventListener("click", () => turn(1));
pageNumber.addEventListener("change", () => show(Math.floor(Number(pageNumber.value) || 1) - 1));
search.addEventListener("input", filter);
sort.addEventListener("change", arrange);
deep.addEventListener("click", searchAll);
list.addEventListener("pointerover", (event) => {
  const target = event.target.closest("[data-told]");
  if (target) tell(target);
  else hush();
});
list.addEventListener("pointerleave", hush);
window.addEventListener("scroll", () => (bubble.hidden = true), { passive: true });
window.addEventListener("hashchange", jump);

async function open() {
  index = await unpack(document.getElementById("data").textContent);
  index.places = new Map(index.i.map((i, place) => [i, place]));
  index.words = index.l.map((label, place) => `${label}\n${index.w[place]}`.toLowerCase());
  for (const key of ["e", "n"]) {
    if (index[key].every((value) => value === null)) sort.querySelector(`[value^="${key}:"]`).remove();
  }
  arrange();
  jump();
  document.body.dataset.ready = "yes";
}

open().catch((error) => {
  list.replaceChildren(element("p", "empty", `This browser cannot show the latents (${error}); any browser from 2023 on can.`));
});
