const PER_PAGE = 24;
const list = document.getElementById("latents");
const search = document.getElementById("search");
const sort = document.getElementById("sort");
const count = document.getElementById("count");
const deep = document.getElementById("deep");
const pageNumber = document.getElementById("page");
let index = { i: [] };
let order = []; // places of all latents in the index, sorted
let found = []; // those of them that the search finds, the best matches first
let numbers = []; // of latents that the search names
let texts = null; // of all contexts, once they are loaded
let page = 0;

function arrange() {
  const [key, direction] = sort.value.split(":");
  const column = key === "l" ? ranks(index.l) : index[key];
  order = index.i.map((_, place) => place);
  order.sort((a, b) => direction * (column[a] - column[b]) || a - b);
  filter();
}

/* Labels that begin with a letter or a digit come first; signs and what stands for blanks behind them. */
function ranks(labels) {
  const collator = new Intl.Collator("en", { numeric: true });
  const sign = labels.map((label) => Number(!/^[\p{L}\p{N}]/u.test(label)));
  const sorted = labels.map((_, place) => place);
  sorted.sort((a, b) => sign[a] - sign[b] || collator.compare(labels[a], labels[b]));
  const rank = [];
  sorted.forEach((place, at) => {
    rank[place] = at && labels[place] === labels[sorted[at - 1]] ? rank[sorted[at - 1]] : at;
  });
  return rank;
}

function typed() {
  return search.value.toLowerCase();
}

function filter() {
  const wanted = typed();
  numbers = numbersIn(wanted);
  const rankOf = index.i.map((_, place) => rank(place, wanted, numbers));
  found = wanted ? order.filter((place) => rankOf[place] < Infinity).sort((a, b) => rankOf[a] - rankOf[b]) : order;
  const all = counted(index.i.length, "latent");
  count.textContent = wanted ? `${found.length.toLocaleString("en")} of ${all}` : all;
}

/* What stands above the cards, or in their place. */
function remarks() {
  const missed = numbers.filter((i) => i < index.d_sae && !index.places.has(i)).map(missing);
  if (!found.length && !missed.length) missed.push(index.i.length ? "No latent matches." : "No latent fired on these tokens.");
  return missed.map((said) => element("p", found.length ? "about" : "empty", said));
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
  const cards = found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((place) => {
    const made = card(index, place, reason(place, typed(), numbers));
    made.querySelector("h2 a").href = address({ ...view(), latent: index.i[place] });
    return made;
  });
  list.replaceChildren(...remarks(), ...cards);
  pageNumber.value = page + 1;
  pageNumber.max = pages();
  document.getElementById("pages").textContent = `of ${pages().toLocaleString("en")}`;
  document.getElementById("before").disabled = page === 0;
  document.getElementById("after").disabled = page === pages() - 1;
}

function turn(by) {
  const before = page;
  show(page + by);
  if (page === before) return;
  record();
  list.scrollIntoView();
}

function view() {
  return { search: search.value, sort: sort.value, page: page + 1 };
}

function record(entry = "pushState") {
  history[entry](null, "", address(view()));
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
  if (page === before) return;
  record("replaceState");
  focusOn(by > 0 ? list.querySelector("article") : list.lastElementChild);
}

/* Show what the address says. */
function follow() {
  const asked = addressed();
  search.value = asked.search;
  sort.value = asked.sort;
  if (!sort.value) sort.selectedIndex = 0;
  arrange();
  if (asked.latent === null) return show((Math.floor(asked.page) || 1) - 1);
  const place = index.places.get(asked.latent);
  if (place === undefined) return list.replaceChildren(element("p", "empty", missing(asked.latent)));
  if (!found.includes(place)) {
    search.value = "";
    filter();
  }
  show(Math.floor(found.indexOf(place) / PER_PAGE));
  focusOn(document.getElementById(`latent-${asked.latent}`));
}

/* Go where a link inside the page leads; the way back ends at the latent that was left. */
function go(event) {
  const link = event.target.closest('a[href^="#"]');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const left = Number(link.closest("article").id.replace("latent-", ""));
  history.replaceState(null, "", address({ ...view(), latent: left }));
  if (link.hash !== location.hash) history.pushState(null, "", link.hash);
  follow();
}

function searchAnew() {
  const goesOn = search.value && addressed().search;
  filter();
  show(0);
  record(goesOn ? "replaceState" : "pushState");
}

async function searchAll() {
  deep.disabled = true;
  try {
    texts = await allTexts(index, (share) => (deep.textContent = `Reading contexts: ${Math.round(100 * share)} %`));
    deep.textContent = "All contexts are searched";
    filter();
    show(page);
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
      searchAnew();
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
pageNumber.addEventListener("change", () => {
  show(Math.floor(Number(pageNumber.value) || 1) - 1);
  record();
});
search.addEventListener("input", searchAnew);
sort.addEventListener("change", () => {
  arrange();
  show(0);
  record();
});
list.addEventListener("click", go);
deep.addEventListener("click", searchAll);
list.addEventListener("pointerover", (event) => {
  const target = event.target.closest("[data-told]");
  if (target) tell(target);
  else hush();
});
list.addEventListener("pointerleave", hush);
window.addEventListener("scroll", () => (bubble.hidden = true), { passive: true });
window.addEventListener("hashchange", follow);

async function open() {
  index = await unpack(document.getElementById("data").textContent);
  index.places = new Map(index.i.map((i, place) => [i, place]));
  index.words = Object.fromEntries(["l", "w", "r"].map((key) => [key, index[key].map((text) => text.toLowerCase())]));
  for (const key of ["e", "n"]) {
    if (index[key].every((value) => value === null)) sort.querySelector(`[value^="${key}:"]`).remove();
  }
  follow();
  document.body.dataset.ready = "yes";
}

open().catch((error) => {
  list.replaceChildren(element("p", "empty", `This browser cannot show the latents (${error}); any browser from 2023 on can.`));
});
