// A cursor in each chart, moved by pointer or keyboard, whose values are shown below it and read aloud; a copy button.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const text = (value, digits = 5) => (typeof value === "string" ? value : value.toLocaleString("en-US", {
  maximumSignificantDigits: digits,
}));

// The last index whose x is not above `place`, or -1.
function before(xs, place) {
  let low = -1, high = xs.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (xs[middle] <= place) low = middle; else high = middle - 1;
  }
  return low;
}

function followCursor(figure) {
  const values = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot"), readout = figure.querySelector(".readout");
  const [low, high] = values.ends;
  const places = [...new Set(values.series.flatMap((one) => one.x))].sort((a, b) => a - b);
  if (!places.length) return;
  const cursor = document.createElementNS(SVG, "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y2", "100%");
  plot.querySelector("svg").append(cursor);
  let current = places.length - 1;

  function show(index) {
    current = Math.max(0, Math.min(places.length - 1, index));
    const place = places[current];
    const share = `${(100 * (place - low)) / (high - low)}%`;
    cursor.setAttribute("x1", share);
    cursor.setAttribute("x2", share);
    cursor.classList.add("on");
    const epoch = values.perEpoch ? ` (epoch ${(place / values.perEpoch).toFixed(2)})` : "";
    const parts = [[`${values.x} ${text(place, 15)}${epoch}`, "", ""]];
    for (const one of values.series) {
      const at = before(one.x, place);
      // A value from before the cursor is shown with its own place.
      const from = at >= 0 && one.x[at] !== place ? ` (at ${text(one.x[at], 15)})` : "";
      if (at >= 0) parts.push([`${one.label} `, `${text(one.y[at])}`, from, one.colour]);
    }
    readout.replaceChildren(...parts.map(([name, value, from, colour], k) => {
      const part = document.createElement("span"), number = document.createElement("b");
      number.textContent = value;
      if (colour) number.className = colour;
      part.append(name, number, from + (k < parts.length - 1 ? "; " : ""));
      return part;
    }));
    plot.setAttribute("aria-valuenow", String(current));
    plot.setAttribute("aria-valuetext", readout.textContent);
  }

  const attributes = {
    role: "slider", tabindex: "0", "aria-orientation": "horizontal", "aria-label": plot.dataset.label,
    "aria-valuemin": "0", "aria-valuemax": String(places.length - 1), "aria-valuenow": String(current),
  };
  for (const [name, value] of Object.entries(attributes)) plot.setAttribute(name, value);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const place = low + ((event.clientX - box.left) / box.width) * (high - low);
    const at = Math.max(0, before(places, place));
    show(at + 1 < places.length && places[at + 1] - place < place - places[at] ? at + 1 : at);
  });
  plot.addEventListener("focus", () => show(current));
  const hide = () => {
    cursor.classList.remove("on");
    readout.replaceChildren();
  };
  plot.addEventListener("pointerleave", () => document.activeElement === plot || hide());
  plot.addEventListener("blur", hide);
  const page = Math.max(1, Math.round(places.length / 10));
  const moves = {
    ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -page, PageUp: page,
    Home: -places.length, End: places.length,
  };
  plot.addEventListener("keydown", (event) => {
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(current + moves[event.key]);
  });
}

function addCopyButton(box) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(box.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(box);
      button.textContent = "Selected: copy it by Ctrl-C";
    }
  });
  box.after(button);
}

document.querySelectorAll(".chart").forEach(followCursor);
document.querySelectorAll(".copy").forEach(addCopyButton);
