/* What is said of each latent is in blocks beside the page. They are scripts, since a page from disk may load no others. */
const folder = document.getElementById("data").dataset.folder;
const awaited = new Map();
const blocks = new Map();

window.saepipeBlock = (number, packed) => awaited.get(number)?.(packed);

function block(number) {
  if (blocks.has(number)) return blocks.get(number);
  const loading = new Promise((resolve, reject) => {
    awaited.set(number, resolve);
    const script = element("script");
    script.src = `${folder}/${number}.js`;
    script.onerror = () => {
      blocks.delete(number);
      reject(new Error(`${script.src} cannot be read`));
    };
    script.onload = () => script.remove();
    document.head.append(script);
  }).then(unpack);
  blocks.set(number, loading);
  return loading;
}

async function details(index, place) {
  return (await block(Math.floor(place / index.per_block)))[place % index.per_block];
}

/* The texts of all contexts of each latent, for the search; tells how far it is. */
async function allTexts(index, progress) {
  const texts = [];
  const last = Math.ceil(index.i.length / index.per_block);
  for (let first = 0; first < last; first += 8) {
    const some = Array.from({ length: Math.min(8, last - first) }, (_, at) => block(first + at));
    for (const latents of await Promise.all(some)) {
      for (const latent of latents) texts.push(contextsOf(latent).map(plain).join("\n").toLowerCase());
    }
    progress(Math.min(first + 8, last) / last);
  }
  return texts;
}

function contextsOf(latent) {
  return [...latent.t, ...latent.b.flatMap(([, ...found]) => found), ...latent.r];
}

function plain(parts) {
  return parts.filter((part) => typeof part === "string").join("");
}
