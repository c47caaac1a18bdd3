"use strict";
// The table of the segments, sorted by the column whose heading is clicked.
(() => {
  const { data, bytes, whole, element, swatch } = report;
  const more = document.getElementById("more");

  const COLUMNS = [
    // title, value to sort by, text, is it words?
    ["#", (row) => row[0], (row) => whole(row[0] + 1)],
    ["segment", (row) => data.names[row[1]], (row) => data.names[row[1]], true],
    ["depth", (row) => row[2]],
    ["form", (row) => row[3], (row) => (row[3] ? "reentrant" : "hooks"), true],
    ["slots", (row) => row[4], (row) => whole(row[4])],
    ["not saved", (row) => row[5], (row) => bytes(row[5])],
    ["peak held", (row) => row[6], (row) => bytes(row[6])],
    ["drew from", (row) => data.generators[row[7]], (row) => data.generators[row[7]] || "-", true],
    ["forward ms", (row) => row[8], (row) => row[8].toFixed(3)],
    ["replay ms", (row) => row[9], (row) => row[9].toFixed(3)],
    ["replays", (row) => row[10]],
  ];
  const AT_FIRST = 200;
  let sorted = { column: 0, down: false }, all = false;
  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);

  function fillTable() {
    const { column, down } = sorted, value = COLUMNS[column][1];
    document.querySelectorAll("th").forEach((th, i) => {
      if (i === column) th.setAttribute("aria-sort", down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
    const rows = [...data.table].sort((a, b) =>
      (down ? -1 : 1) * compare(value(a), value(b)) || a[0] - b[0]);
    const body = document.querySelector("tbody"), visible = all ? rows : rows.slice(0, AT_FIRST);
    body.replaceChildren(...visible.map((row) => {
      const line = element("tr");
      for (const [title, plain, text, words] of COLUMNS) {
        const cell = element("td", undefined, words ? "words" : "");
        if (title === "segment") {
          cell.classList.add("name");
          cell.append(swatch(data.layers[data.layerOf[row[0]]].colour));
        }
        cell.append(String((text || plain)(row)));
        line.append(cell);
      }
      return line;
    }));
    more.hidden = visible.length === rows.length;
    more.textContent = `Show all ${whole(rows.length)}`;
  }
  function makeTable() {
    const head = element("tr");
    COLUMNS.forEach(([title, , , words], column) => {
      const th = element("th", undefined, words ? "words" : ""), button = element("button", title);
      th.scope = "col";
      button.type = "button";
      button.addEventListener("click", () => {
        // Numbers: the largest first, for that is what one looks for.
        const down = sorted.column === column ? !sorted.down : !words && column > 0;
        sorted = { column, down };
        fillTable();
      });
      th.append(button);
      head.append(th);
    });
    document.querySelector("thead").append(head);
    more.addEventListener("click", () => { all = true; fillTable(); });
    document.getElementById("rows").hidden = !data.count;
    fillTable();
  }

  makeTable();
})();
