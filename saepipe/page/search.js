/* What the search finds, the best first; `index.words` are the same texts as in the index, in small letters. */
const SEVERAL = /^[\s,]*#?\d+(?:[\s,]+#?\d+)*[\s,]*$/;

function numbersIn(typed) {
  return SEVERAL.test(typed) ? typed.match(/\d+/g).map(Number) : [];
}

/* A label holds its tokens without the spaces around them. */
function inLabel(typed) {
  return typed.trim() || typed;
}

function tokensWith(column, place, wanted) {
  if (!index.words[column][place].includes(wanted)) return [];
  const tokens = index[column][place].split("\n").map((text, at) => ({ text, at }));
  return tokens.filter(({ text }) => text.toLowerCase().includes(wanted));
}

/* Rank of a latent among those found: below 0 if named by its number, then label, the tokens on which it is strongest in
   a context, the stronger the earlier, those it raises, and texts; Infinity: not found. */
function rank(place, wanted, numbers) {
  const at = numbers.indexOf(index.i[place]);
  if (at >= 0) return at - numbers.length;
  const label = index.words.l[place];
  if (label === inLabel(wanted)) return 0;
  if (label.includes(inLabel(wanted))) return 1;
  const [firing] = tokensWith("w", place, wanted);
  if (firing) return 3 - index.s[place][firing.at] / 100;
  const [raised] = tokensWith("r", place, wanted);
  if (raised) return 4 + raised.at / 100;
  return texts !== null && texts[place].includes(wanted) ? 5 : Infinity;
}

/* Why a latent is found, where neither its number nor its label says so. */
function reason(place, wanted, numbers) {
  const found = rank(place, wanted, numbers);
  if (!wanted || found < 2) return [];
  if (found < 4) {
    const tokens = tokensWith("w", place, wanted).slice(0, 3);
    const said = tokens.flatMap(({ text, at }) => [quoted(text), ` at ${index.s[place][at]} % of its maximum `]);
    return [element("p", "hit", "fires on ", ...said)];
  }
  if (found < 5) return [element("p", "hit", "raises ", ...tokensWith("r", place, wanted).flatMap(({ text }) => [quoted(text), " "]))];
  const line = texts[place].split("\n").find((one) => one.includes(wanted));
  const at = line.indexOf(wanted);
  return [element("p", "hit", "in a context ", quoted(line.slice(Math.max(0, at - 12), at + wanted.length + 12)))];
}
