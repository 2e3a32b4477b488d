// Shows where the model looked for the word under the pointer or with the keyboard focus.
"use strict";

const { colors, opacity, threshold } = JSON.parse(document.body.dataset.heat); // constants of heat.py
const PIXELS_PER_CELL = 12;

// Pillow's bicubic filter, so that the page shows the same heat as the other pictures.
function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

// For each pixel along an edge of so many cells, the weight of each cell.
function interpolationWeights(numCells) {
  return Array.from({ length: numCells * PIXELS_PER_CELL }, (_, pixel) => {
    const position = (pixel + 0.5) / PIXELS_PER_CELL - 0.5;
    const weights = Array.from({ length: numCells }, (_, cell) => bicubic(position - cell));
    const sum = weights.reduce((a, b) => a + b);
    return weights.map(weight => weight / sum);
  });
}

// The red, green, blue and alpha of an attention value from 0 to 1, as `blend_heat` of heat.py has them.
function heatColor(attention) {
  const heat = Math.min(Math.max((attention - threshold) / (1 - threshold), 0), 1);
  const next = Math.max(1, colors.findIndex(([stop]) => stop >= heat));
  const [[lowStop, low], [highStop, high]] = [colors[next - 1], colors[next]];
  const fraction = (heat - lowStop) / (highStop - lowStop);
  const rgb = low.map((value, channel) => value + (high[channel] - value) * fraction);
  return [...rgb, 255 * opacity * heat * (2 - heat)];
}

// Draws a map of rows x columns bytes; the style sheet stretches the canvas over its part of the image.
function drawHeat(canvas, map, rows, columns) {
  const rowWeights = interpolationWeights(rows), columnWeights = interpolationWeights(columns);
  canvas.width = columnWeights.length;
  canvas.height = rowWeights.length;
  const widened = columnWeights.map(weights => Array.from({ length: rows }, (_, row) =>
    weights.reduce((sum, weight, column) => sum + weight * map[row * columns + column], 0)));
  const context = canvas.getContext("2d"), pixels = context.createImageData(canvas.width, canvas.height);
  for (let y = 0; y < canvas.height; y++) {
    for (let x = 0; x < canvas.width; x++) {
      const value = rowWeights[y].reduce((sum, weight, row) => sum + weight * widened[x][row], 0);
      pixels.data.set(heatColor(value / 255), 4 * (y * canvas.width + x));
    }
  }
  context.putImageData(pixels, 0, 0);
}

function decodeMap(word) {
  return Uint8Array.from(atob(word.dataset.map), character => character.charCodeAt(0));
}

function showWordsOf(figure) {
  const canvas = figure.querySelector("canvas"), description = figure.querySelector(".word");
  let shown = null;
  const update = () => {
    const word = figure.querySelector("button:hover") || figure.querySelector("button:focus");
    if (word === shown) return;
    shown = word;
    canvas.classList.toggle("visible", word !== null);
    description.textContent = word ? word.title : "";
    if (word) drawHeat(canvas, decodeMap(word), +word.dataset.rows, +word.dataset.columns);
  };
  for (const event of ["pointerover", "pointerout", "pointerleave", "focusin"]) figure.addEventListener(event, update);
  figure.addEventListener("focusout", () => setTimeout(update)); // when the focus has arrived at the next word
}

// Tab reaches one word of a caption; the arrow keys, Home and End go to the others.
function enableArrowKeys(caption) {
  caption.addEventListener("keydown", event => {
    const words = [...caption.children], current = words.indexOf(event.target), last = words.length - 1;
    const target = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") event.target.blur();
    if (target === undefined) return;
    event.preventDefault();
    const word = words[Math.min(Math.max(target, 0), last)];
    for (const other of words) other.tabIndex = other === word ? 0 : -1;
    word.focus();
  });
}

// Positions are set here because the content security policy forbids style attributes.
for (const figure of document.querySelectorAll("figure")) {
  const { style, dataset } = figure.querySelector("canvas");
  const [left, top, right, bottom] = dataset.box.split(" ").map(Number);
  Object.assign(style, { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%` });
  for (const word of figure.querySelectorAll("button")) {
    word.style.setProperty("--probability", word.dataset.probability);
  }
  showWordsOf(figure);
  figure.querySelectorAll(".caption").forEach(enableArrowKeys);
}
