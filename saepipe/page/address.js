/* The view stands in the address: #latent-12 or #12, and #search=Dear&sort=d:-1&page=2. */
function addressed() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const named = [...parts.keys()].map((part) => /^(?:latent-)?(\d+)$/.exec(part)).find(Boolean);
  return {
    latent: named ? Number(named[1]) : null,
    search: parts.get("search") ?? "",
    sort: parts.get("sort") ?? "i:1",
    page: Number(parts.get("page") ?? 1),
  };
}

function address({ latent, search, sort, page }) {
  const parts = new URLSearchParams();
  if (search) parts.set("search", search);
  if (sort !== "i:1") parts.set("sort", sort);
  if (page > 1 && latent === undefined) parts.set("page", page);
  return `#${[latent === undefined ? "" : `latent-${latent}`, parts.toString()].filter(Boolean).join("&")}`;
}
