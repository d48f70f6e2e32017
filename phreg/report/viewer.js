"use strict";
/* What the report page does beyond being read: it sorts the table, switches the layer of all images, moves
   the dividers between two models, and shows how similar an image's patches are to the one pointed at.
   All it needs stands in the page's own attributes; nothing is fetched and nothing kept. */

/* Sorts a table by the column whose heading is pressed: up, down, and back to the order it was written in. */
function makeSortable(table) {
  const body = table.tBodies[0];
  const written = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  const turn = { none: "ascending", ascending: "descending", descending: "none" };

  const compare = (column, sign) => (one, other) => {
    const [a, b] = [one.cells[column], other.cells[column]];
    if (column === 0) return sign * a.textContent.localeCompare(b.textContent);
    const [x, y] = [a, b].map((cell) => cell.dataset.value);
    // What does not exist is neither large nor small: it comes last either way.
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return sign * (Number(x) - Number(y));
  };

  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const order = turn[heading.getAttribute("aria-sort")];
      for (const each of headings) each.setAttribute("aria-sort", each === heading ? order : "none");
      const sign = order === "ascending" ? 1 : -1;
      body.append(...(order === "none" ? written : written.toSorted(compare(column, sign))));
    });
  });
}

/* The maps of one image, of all layers and models, one upon the other; two are seen, left and right of a
   divider. The range that moves it lies over them, unseen, so that mouse, finger and keyboard all work. */
class Stack {
  constructor(element) {
    this.element = element;
    this.pictures = [...element.querySelectorAll("img")];
    this.names = [...element.closest("figure").querySelectorAll("[data-side]")];
    this.range = element.querySelector("input");
    this.range?.addEventListener("input", () => this.divide());
  }

  /* A model may lack a layer, as one without registers lacks their attention: the other is shown alone. */
  show(layer, left, right) {
    const shown = this.pictures.filter(
      ({ dataset }) => dataset.layer === layer && [left, right].includes(dataset.model),
    );
    const halved = shown.length === 2;
    for (const picture of this.pictures) {
      picture.hidden = !shown.includes(picture);
      picture.classList.toggle("right", halved && picture.dataset.model === right);
    }
    for (const name of this.names) {
      name.hidden = !shown.some(({ dataset }) => dataset.model === name.dataset.side);
      name.classList.toggle("right", halved && name.dataset.side === right);
    }
    if (!this.range) return;
    this.range.hidden = !halved;
    this.sides = [left, right].map((side) => this.names[Number(side)].textContent);
    this.divide();
  }

  divide() {
    this.element.style.setProperty("--at", `${this.range.value}%`);
    const [left, right] = this.sides;
    this.range.setAttribute("aria-valuetext", `${left} on ${this.range.value} %, ${right} on the rest`);
  }
}

/* One control chooses the layer of all images, and where there are more than two models, which two. */
function switchLayers(stacks) {
  const chosen = (selector, otherwise) => document.querySelector(selector)?.value ?? otherwise;
  const show = () => {
    const layer = chosen("input[name=layer]:checked", "0");
    const [left, right] = [chosen("select[name=left]", "0"), chosen("select[name=right]", "1")];
    for (const stack of stacks) stack.show(layer, left, right);
    for (const text of document.querySelectorAll("[data-layer]:not(img)")) {
      text.hidden = text.dataset.layer !== layer;
    }
  };
  document.querySelector(".controls")?.addEventListener("change", show);
  show();
}

const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer;

/* An image's patches in one model, and the canvas that shows their similarity to one of them. */
class Patches {
  constructor(canvas, palette) {
    const { model, channels, codes, norms, outliers } = canvas.dataset;
    this.canvas = canvas;
    this.palette = palette;
    this.rows = canvas.height;
    this.cols = canvas.width;
    this.model = model;
    this.channels = Number(channels);
    this.codes = new Int8Array(bytes(codes));
    this.norms = norms && new Float32Array(bytes(norms));
    this.outliers = outliers && new Uint8Array(bytes(outliers));
    this.lengths = Float64Array.from({ length: this.rows * this.cols }, (_, patch) =>
      Math.sqrt(this.dot(patch, patch)),
    );
  }

  dot(one, other) {
    let sum = 0;
    for (let channel = 0; channel < this.channels; channel++) {
      sum += this.codes[one * this.channels + channel] * this.codes[other * this.channels + channel];
    }
    return sum;
  }

  /* Cosine of two patches' codes; 0 where one of them is empty. */
  cosine(one, other) {
    return this.dot(one, other) / (this.lengths[one] * this.lengths[other]) || 0;
  }

  /* Draws a pixel a patch; the style sheet enlarges them. */
  draw(chosen) {
    const image = new ImageData(this.cols, this.rows);
    for (let patch = 0; patch < this.lengths.length; patch++) {
      const shade = Math.round(255 * Math.min(1, Math.max(0, this.cosine(chosen, patch))));
      image.data.set(this.palette.subarray(3 * shade, 3 * shade + 3), 4 * patch);
      image.data[4 * patch + 3] = 255;
    }
    this.canvas.getContext("2d").putImageData(image, 0, 0);
  }

  describe(patch) {
    const facts = [];
    if (this.norms) facts.push(`norm ${Number(this.norms[patch].toPrecision(3))}`);
    if (this.outliers) facts.push(this.outliers[patch] ? "an outlier" : "no outlier");
    return facts.length && this.model ? `${this.model}: ${facts.join(", ")}` : facts.join(", ");
  }
}

/* An image with the maps beside it. A place in it is a pair of shares of its width and height, since models
   may cut the same image into grids of different sizes. */
class Card {
  constructor(article, palette) {
    this.models = [...article.querySelectorAll("canvas")].map((canvas) => new Patches(canvas, palette));
    if (!this.models.length) return;
    this.surfaces = [...article.querySelectorAll(".surface")];
    this.told = article.querySelector("[role=status]");
    for (const surface of this.surfaces) {
      for (const kind of ["pointermove", "pointerdown"]) {
        surface.addEventListener(kind, (event) => this.follow(surface, event));
      }
    }
    this.surfaces[0].addEventListener("keydown", (event) => this.step(event));
    this.choose(...this.telling());
  }

  /* Where to begin: at an outlier, since that tells most, or in the middle. */
  telling() {
    const [{ outliers, rows, cols }] = this.models;
    const first = outliers ? outliers.indexOf(1) : -1;
    return first < 0 ? [rows >> 1, cols >> 1] : [Math.floor(first / cols), first % cols];
  }

  /* Chooses a patch by its row and column in the first model's grid. */
  choose(row, col) {
    const [{ rows, cols }] = this.models;
    this.point((col + 0.5) / cols, (row + 0.5) / rows);
  }

  follow(surface, event) {
    const { left, top, width, height } = surface.getBoundingClientRect();
    this.point((event.clientX - left) / width, (event.clientY - top) / height);
  }

  step(event) {
    const [{ rows, cols }] = this.models;
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault(); // or the page would scroll
    const within = (place, count) => Math.min(count - 1, Math.max(0, place));
    this.choose(within(this.row + move[0], rows), within(this.col + move[1], cols));
  }

  point(x, y) {
    const cell = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    const places = this.models.map(({ rows, cols }) => [cell(y, rows), cell(x, cols)]);
    const key = places.join();
    if (key === this.key) return;
    this.key = key;
    [this.row, this.col] = places[0];
    const facts = this.models.map((model, index) => {
      const patch = places[index][0] * model.cols + places[index][1];
      model.draw(patch);
      return model.describe(patch);
    });
    const place = `Patch in row ${this.row + 1}, column ${this.col + 1}`;
    this.told.textContent = [place, ...facts.filter(Boolean)].join("; ");
    for (const surface of this.surfaces) this.mark(surface, places);
  }

  /* Frames the chosen patch: on a similarity map by its own model's grid, elsewhere by the first's. */
  mark(surface, places) {
    const canvas = surface.querySelector("canvas");
    const index = canvas ? this.models.findIndex((model) => model.canvas === canvas) : 0;
    const [row, col] = places[index];
    const { rows, cols } = this.models[index];
    const { style } = surface.querySelector(".mark");
    style.left = `${(100 * col) / cols}%`;
    style.top = `${(100 * row) / rows}%`;
    style.width = `${100 / cols}%`;
    style.height = `${100 / rows}%`;
  }
}

/* What scrolls sideways must be reachable by keyboard; what does not must not stop the Tab key. */
function reachable() {
  for (const box of document.querySelectorAll(".scroll")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

document.documentElement.classList.add("js");
document.querySelectorAll("table").forEach(makeSortable);
switchLayers([...document.querySelectorAll(".stack")].map((element) => new Stack(element)));
const palette = new Uint8Array(bytes(document.body.dataset.palette));
document.querySelectorAll(".image").forEach((article) => new Card(article, palette));
reachable();
window.addEventListener("resize", reachable);
