"use strict";
// Shared by the scripts of the page: the data (see _page.py) and how to write it. Times are
// microseconds since the first event. Everything that comes from a program is written as text, never
// as markup.
const report = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // Words.

  function bytes(count) {
    const units = ["B", "KiB", "MiB", "GiB"];
    let unit = 0;
    while (count >= 1024 && unit < 3) { count /= 1024; unit += 1; }
    return `${unit ? count.toFixed(1) : count} ${units[unit]}`;
  }
  function duration(us) {
    if (us >= 1e6) return `${(us / 1e6).toFixed(3)} s`;
    if (us >= 1e3) return `${(us / 1e3).toFixed(3)} ms`;
    return `${us.toFixed(1)} \u00b5s`;
  }
  const moment = (us) => duration(us + data.start);
  const whole = (n) => n.toLocaleString("en-US");

  const rowsOf = new Map(data.table.map((row) => [row[0], row]));
  const labelOf = (index) => {
    const row = rowsOf.get(index);
    return `#${whole(index + 1)}${row ? ` ${data.short[row[1]]}` : ""}`;
  };

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }
  function swatch(colour) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    made.setAttribute("class", "swatch");
    made.setAttribute("width", 11);
    made.setAttribute("height", 11);
    made.setAttribute("aria-hidden", "true");
    const box = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    box.setAttribute("width", 11);
    box.setAttribute("height", 11);
    box.setAttribute("rx", 2);
    box.style.fill = colour;
    made.append(box);
    return made;
  }
  function swatched(tag, colour, text, className = "") {
    const made = element(tag, undefined, className);
    made.append(swatch(colour), text);
    return made;
  }

  return { data, bytes, duration, moment, whole, rowsOf, labelOf, element, swatch, swatched };
})();
