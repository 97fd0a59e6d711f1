"use strict";
/* Small parts that all of the page uses. Text of data sets only ever goes through textContent. */

const $ = (id) => document.getElementById(id);

/** An element with attributes (on*: listeners) and children; strings become text. */
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  return fill(element, attributes, children);
}

/** The same of SVG. */
function s(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

/** A number as people read it. */
function num(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en-US");
  if (size >= 1e5 || size < 1e-3) {
    const [mantissa, power] = value.toExponential(Math.max(0, digits - 1)).split("e");
    return `${Number(mantissa)}·10${superscript(Number(power))}`;
  }
  return Number(value.toPrecision(digits)).toLocaleString("en-US", { maximumSignificantDigits: digits });
}

const superscript = (n) => String(n).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
const power = (n) => (n === 0 ? "1" : n === 1 ? "10" : `10${superscript(n)}`);

function percent(share, digits = 2) {
  if (share === null || share === undefined) return "–";
  const value = 100 * share;
  if (value === 0 || value === 100) return `${value} %`;
  if (value < 0.01) return "< 0.01 %";
  return `${Number(value.toPrecision(value >= 99 ? 3 : digits))} %`;
}

const plural = (n, one, many) => `${n.toLocaleString("en-US")} ${n === 1 ? one : many || one + "s"}`;
const human = (name) => String(name).replaceAll("_", " ");

const BIDI = /[\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ufeff]/g;
const CONTROL = /[\u0000-\u0008\u000b-\u001f]/g;

/** Characters that would not be seen, or would turn the text around them, as signs. */
function visible(text) {
  return text
    .replace(CONTROL, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\u007f/g, "␡")
    .replace(BIDI, (c) => `‹U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}›`);
}

/** A token by itself: white space is seen. */
function tokenText(text) {
  return visible(text).replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
}

/** Expand [value, how often, ...]. */
function runs(list) {
  const found = [];
  for (let i = 0; i < list.length; i += 2) for (let n = 0; n < list[i + 1]; n++) found.push(list[i]);
  return found;
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const ROLES = ["none", "system", "default_system", "user", "assistant", "tool"];
const KINDS = ["content", "first", "control", "role_name", "template_text", "end_of_turn"];
const ROLE_TEXT = ["no role", "system", "default system", "user", "assistant", "tool"];
const KIND_TEXT = ["content", "first token", "control token", "role name", "template text", "end of turn"];
const POSITIONS = ["0", "1–7", "8–63", "64–511", "512+"];

/** A command that can be selected and copied. */
function command(text) {
  const button = h("button", { type: "button", class: "copy", title: "Copy", "aria-label": `Copy: ${text}` }, "copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(button.previousElementSibling);
      button.textContent = "selected";
    }
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
  return h("p", { class: "command" }, h("code", null, text), button);
}

/** What stands where data are missing: why, and the command that makes them. */
function missing(text, how) {
  return h("div", { class: "missing" }, h("p", null, text), how ? command(how) : null);
}

function panel(title, note, ...children) {
  return h("section", { class: "panel" }, h("h2", null, title), note ? h("p", { class: "note" }, note) : null, children);
}

const wideAs = (element, ...classes) => (element.classList.add(...classes), element);

/** Text of a judge: what stands in backticks as code. */
const explained = (text) => String(text).split("`").map((part, i, all) => (i % 2 && i < all.length - 1 ? h("code", null, tokenText(part)) : visible(i % 2 ? `\`${part}` : part)));

/** A table from a head and rows of cells; cells are strings or nodes, numbers are set to the right. */
function table(head, rows, attributes) {
  const cell = (tag, value, i) => h(tag, { class: i && !(value instanceof Node) ? "n" : null, scope: tag === "th" ? "col" : null }, value);
  return h("div", { class: "scroll" }, h("table", attributes,
    h("thead", null, h("tr", null, head.map((value, i) => cell("th", value, i)))),
    h("tbody", null, rows.map((row) => h("tr", null, row.map((value, i) => cell("td", value, i)))))));
}
