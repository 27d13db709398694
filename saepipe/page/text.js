"use strict";

const ESCAPES = /((?:\\x[0-9a-f]{2}|\\u\{[0-9a-f]+\}|<\|\w+\|>)+)/;

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function button(text, action) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

/* Text from the data, cut off from its surroundings: a right-to-left token must not turn what stands beside it. */
function quoted(text) {
  return element("bdi", "token", ...(text.trim() ? isolated(text) : [text === "" ? "∅" : "␣".repeat(text.length)]));
}

/* A text whose bytes, names of characters and special tokens, such as \xd7 and <|eos|>, are cut off from letters beside
   them, which may turn them. */
function isolated(text) {
  return text.split(ESCAPES).map((part, at) => {
    if (at % 2 === 0) return part;
    const escapes = element("bdi", "", part);
    escapes.dir = "ltr";
    return escapes;
  });
}

function number(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 0.001) return value.toExponential(1);
  return size >= 1000 ? String(Math.round(value)) : value.toPrecision(3);
}

function counted(n, noun) {
  return `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
}

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}
