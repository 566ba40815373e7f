"use strict";

// ---- The table: a click on a heading sorts, another one reverses.

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");

      const keyOf = (row) => row.cells[column].dataset.sort;
      const compare = (a, b) => {
        const [x, y] = [keyOf(a), keyOf(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what is missing comes last
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return ascending ? order : -order;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    });
  });
}

// ---- The masks: the patch under the pointer, and what has reached it after some layers.

const dataElement = document.getElementById("mask-data");
if (dataElement) showMasks(JSON.parse(dataElement.textContent));

async function showMasks({ height, width, matrices, layers: matrixOf }) {
  const numPatches = height * width;
  const decoded = await Promise.all(matrices.map((bits) => decode(bits, numPatches)));
  // For each figure and each of its layers, the neighbors of every patch.
  const neighbors = matrixOf.map((numbers) => numbers.map((number) => decoded[number]));
  const figures = [...document.querySelectorAll("figure.mask")];
  const slider = document.getElementById("layers");
  const globalToken = document.getElementById("global-token");
  let patch = Math.floor(height / 2) * width + Math.floor(width / 2);

  function draw() {
    const layers = Number(slider.value);
    document.getElementById("layers-shown").textContent = layers;
    figures.forEach((figure, index) => {
      const passed = neighbors[index].slice(0, layers);
      const direct = passed[passed.length - 1][patch];
      const reached = reach(passed, patch, globalToken.checked);
      figure.querySelector(".neighbors").setAttribute("d", outline(direct));
      figure.querySelector(".reached").setAttribute("d", outline(reached));
      figure.querySelector(".query").setAttribute("d", outline([patch]));

      const share = Math.round((100 * reached.length) / numPatches);
      const after = layers > 1 ? `; after ${layers} layers ${reached.length} (${share} %)` : "";
      figure.querySelector(".count").textContent = count(direct.length) + after;
    });
  }

  // What the patch can know of: the layers are walked from the last one back to the first.
  function reach(passed, start, withGlobalToken) {
    if (withGlobalToken && passed.length > 1) return [...Array(numPatches).keys()];
    const seen = new Set([start]);
    for (const neighborsOf of [...passed].reverse()) {
      if (seen.size === numPatches) break;
      for (const i of [...seen]) neighborsOf[i].forEach((j) => seen.add(j));
    }
    return [...seen].sort((a, b) => a - b);
  }

  const count = (number) => `${number} neighbor${number === 1 ? "" : "s"}`;
  const outline = (patches) =>
    patches.map((i) => `M${i % width} ${Math.floor(i / width)}h1v1h-1z`).join("");

  function select(row, column) {
    const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
    patch = clamp(row, height) * width + clamp(column, width);
    draw();
  }

  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  for (const svg of figures.map((figure) => figure.querySelector("svg"))) {
    const point = (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(
        svg.getScreenCTM().inverse());
      select(Math.floor(at.y), Math.floor(at.x));
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      const [down, right] = steps[event.key];
      select(Math.floor(patch / width) + down, (patch % width) + right);
    });
  }
  slider.addEventListener("input", draw);
  globalToken.addEventListener("change", draw);
  document.getElementById("controls").hidden = false;
  draw();
}

// A mask as a list of neighbors of each patch, from the bits of its matrix: zlib, then base64.
async function decode(text, numPatches) {
  const all = [...Array(numPatches).keys()];
  if (text === null) return all.map(() => all); // full attention
  const compressed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const isSet = (bit) => bytes[bit >> 3] & (128 >> (bit & 7));
  return all.map((i) => all.filter((j) => isSet(i * numPatches + j)));
}
