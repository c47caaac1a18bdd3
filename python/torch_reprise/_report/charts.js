"use strict";
// The two charts: drawing, the tooltip, the mouse and the keyboard.
(() => {
  const { data, bytes, duration, moment, whole, rowsOf, labelOf, element, swatched } = report;
  const byId = (id) => document.getElementById(id);
  const KINDS = ["forward", "replay", "backward"];
  const RIGHT = 14, TOP = 10, AXIS = 26;
  let LEFT = 172;  // for the names of segments; less on a telephone
  const MANY = 40;  // segments; with more there is no line of text for each

  const tops = [];  // of each layer: the upper edge of its stripe
  data.held.forEach((values, k) => {
    tops.push(k ? values.map((v, i) => v + tops[k - 1][i]) : values);
  });
  const total = tops.length ? tops[tops.length - 1] : data.times.map(() => 0);
  const spansOf = Array.from({ length: data.count }, () => []);
  for (const span of data.spans) spansOf[span[0]].push(span);

  let view = [0, data.length || 1];

  // The point that holds at a time: the last one not after it; -1 before all.
  function pointAt(time) {
    let low = 0, high = data.times.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (data.times[middle] <= time) low = middle + 1; else high = middle;
    }
    return low - 1;
  }

  // Drawing.

  const memory = byId("memory"), timeline = byId("timeline");
  const few = data.count <= MANY;
  const lineHeight = few ? 20 : 400 / data.count;
  const heights = { memory: 330, timeline: TOP + AXIS + Math.max(few ? 60 : 0, data.count * lineHeight) };

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const names = ["paper", "ink", "quiet", "line", ...KINDS];
    return Object.fromEntries(names.map((n) => [n, style.getPropertyValue(`--${n}`).trim()]));
  }
  function begin(canvas) {
    const width = canvas.parentElement.clientWidth, height = heights[canvas.id];
    LEFT = width < 600 ? 92 : 172;
    const scale = window.devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const g = canvas.getContext("2d");
    g.scale(scale, scale);
    g.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const right = width - RIGHT, bottom = height - AXIS;
    canvas.dataset.plot = [LEFT, TOP, right, bottom].join(" ");  // where the axes are
    return { g, right, bottom };
  }
  const xOf = (time, area) => LEFT + (time - view[0]) / (view[1] - view[0]) * (area.right - LEFT);
  function timeOf(x, canvas) {
    const right = canvas.parentElement.clientWidth - RIGHT;
    return view[0] + (x - LEFT) / (right - LEFT) * (view[1] - view[0]);
  }
  function steps(from, to, most) {
    const raw = (to - from) / most || 1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw);
    const found = [];
    for (let k = Math.ceil(from / step); k * step <= to * (1 + 1e-12); k += 1) found.push(k * step);
    return found;
  }
  const shown = (value) => String(Number(value.toPrecision(9)));

  function drawTimes({ g, right, bottom }, theme) {
    const range = view[1] - view[0];
    const [unit, scale] = range >= 1e6 ? ["s", 1e6] : range >= 1e3 ? ["ms", 1e3] : ["\u00b5s", 1];
    const from = (view[0] + data.start) / scale, to = (view[1] + data.start) / scale;
    g.textAlign = "center";
    g.textBaseline = "top";
    for (const tick of steps(from, to, Math.max(3, (right - LEFT) / 110))) {
      const x = Math.round(LEFT + (tick - from) / (to - from) * (right - LEFT)) + 0.5;
      g.strokeStyle = theme.line;
      g.beginPath();
      g.moveTo(x, TOP);
      g.lineTo(x, bottom);
      g.stroke();
      g.fillStyle = theme.quiet;
      g.fillText(`${shown(tick)} ${unit}`, Math.min(x, right - 18), bottom + 7);
    }
  }
  function inside(area, draw) {
    const { g } = area;
    g.save();
    g.beginPath();
    g.rect(LEFT, 0, area.right - LEFT, area.bottom + 1);
    g.clip();
    draw(g);
    g.restore();
  }

  let closer = false;  // is the scale that of what is held, not of what would be held?
  let yOfBytes = () => 0, bytesOfY = () => 0;

  function drawMemory() {
    const theme = colours(), area = begin(memory), { g, right, bottom } = area;
    const top = closer ? data.peak[1] : data.top, head = 1.1 * top || 1;
    yOfBytes = (value) => bottom - value / head * (bottom - TOP);
    bytesOfY = (y) => (bottom - y) / (bottom - TOP) * head;
    drawTimes(area, theme);
    const unit = 1024 ** Math.max(0, Math.min(3, Math.floor(Math.log2(top || 1) / 10)));
    g.textAlign = "right";
    g.textBaseline = "middle";
    for (const tick of steps(0, head / unit, 5)) {
      const y = Math.round(yOfBytes(tick * unit)) + 0.5;
      g.strokeStyle = theme.line;
      g.beginPath();
      g.moveTo(LEFT, y);
      g.lineTo(right, y);
      g.stroke();
      g.fillStyle = theme.quiet;
      g.fillText(`${shown(tick)} ${["B", "KiB", "MiB", "GiB"][Math.round(Math.log2(unit) / 10)]}`, LEFT - 8, y);
    }
    const first = Math.max(0, pointAt(view[0])), last = pointAt(view[1]);
    // The steps of the points from `from` to `to`, forwards or backwards.
    function edge(values, from, to, back) {
      for (let n = from; n <= to; n += 1) {
        const i = back ? from + to - n : n, y = yOfBytes(values ? values[i] : 0);
        const ends = [xOf(data.times[i], area), i < last ? xOf(data.times[i + 1], area) : right];
        if (back) ends.reverse();
        g.lineTo(ends[0], y);
        g.lineTo(ends[1], y);
      }
    }
    inside(area, () => {
      tops.forEach((upper, k) => {
        g.fillStyle = data.layers[k].colour;
        g.strokeStyle = data.layers[k].colour;
        g.lineWidth = 0.5;
        // Only where the layer holds something: the edge of nothing would show.
        for (let from = first; from <= last; from += 1) {
          if (!data.held[k][from]) continue;
          let to = from;
          while (to < last && data.held[k][to + 1]) to += 1;
          g.beginPath();
          edge(upper, from, to, false);
          edge(k ? tops[k - 1] : null, from, to, true);
          g.closePath();
          g.fill();
          g.stroke();
          from = to;
        }
      });
      if (data.without) {
        g.strokeStyle = theme.ink;
        g.lineWidth = 1.5;
        g.setLineDash([6, 4]);
        g.beginPath();
        edge(data.without, first, last, false);
        g.stroke();
        g.setLineDash([]);
      }
      const [time, most] = data.peak, x = xOf(time, area);
      if (most && time >= view[0] && time <= view[1]) {
        const y = yOfBytes(most), text = `peak ${bytes(most)}`;
        g.font = `bold ${g.font}`;
        const room = g.measureText(text).width + 12;
        const left = x + room > right ? x - room : x + 9;
        g.fillStyle = theme.ink;
        g.strokeStyle = theme.paper;
        g.lineWidth = 2;
        g.beginPath();
        g.arc(x, y, 4, 0, 7);
        g.fill();
        g.stroke();
        g.lineWidth = 4;
        g.lineJoin = "round";
        g.textAlign = "left";
        g.textBaseline = "bottom";
        g.strokeText(text, left, y - 3);
        g.fillText(text, left, y - 3);
      }
    });
  }

  function drawTimeline() {
    const theme = colours(), area = begin(timeline), { g, bottom } = area;
    drawTimes(area, theme);
    g.textAlign = "right";
    g.textBaseline = "middle";
    if (few) {
      for (let i = 0; i < data.count; i += 1) {
        const row = rowsOf.get(i), y = TOP + (i + 0.5) * lineHeight;
        const indent = Math.min(row[2], 6) * 10;
        let text = labelOf(i);
        while (g.measureText(text).width > LEFT - 26 - indent && text.length > 4) {
          text = `${text.slice(0, text.length / 2 - 1)}\u2026${text.slice(text.length / 2 + 1)}`;
        }
        g.textAlign = "left";
        g.fillStyle = data.layers[data.layerOf[i]].colour;
        g.fillRect(indent, y - 5, 10, 10);
        g.fillStyle = theme.ink;
        g.fillText(text, indent + 16, y);
      }
    } else {
      g.fillStyle = theme.quiet;
      for (const k of steps(1, data.count, 6)) {
        g.fillText(`#${whole(k)}`, LEFT - 8, TOP + (k - 0.5) * lineHeight);
      }
    }
    const tall = few ? 14 : Math.max(2, lineHeight), least = few ? 1 : 2;
    inside(area, () => {
      for (const kind of ["backward", "forward", "replay"]) {  // a replay lies on top
        g.fillStyle = theme[kind];
        for (const [row, of, from, to] of data.spans) {
          if (of !== kind || to < view[0] || from > view[1]) continue;
          const x = xOf(from, area), y = TOP + (row + 0.5) * lineHeight - tall / 2;
          g.fillRect(x, y, Math.max(least, xOf(to, area) - x), tall);
        }
      }
    });
    g.strokeStyle = theme.line;
    g.strokeRect(LEFT + 0.5, TOP + 0.5, area.right - LEFT - 1, bottom - TOP - 1);
  }

  function draw() {
    if (!data.spans.length && !data.times.length) {
      byId("charts").hidden = true;
      return;
    }
    drawMemory();
    drawTimeline();
    byId("reset").hidden = view[0] === 0 && view[1] === (data.length || 1);
  }

  // The tooltip.

  const tip = byId("tip");
  function showTip(lines, x, y) {
    tip.replaceChildren(...lines);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 16 + box.width > window.innerWidth ? x - 16 - box.width : x + 16;
    const top = y + 16 + box.height > window.innerHeight ? y - 12 - box.height : y + 16;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  }
  function hideAll() {
    tip.hidden = true;
    for (const cursor of document.querySelectorAll(".cursor")) cursor.hidden = true;
  }
  function showCursor(x, width) {
    for (const cursor of document.querySelectorAll(".cursor")) {
      cursor.hidden = false;
      cursor.classList.toggle("range", width !== undefined);
      cursor.style.left = `${x}px`;
      cursor.style.width = `${width ?? 1}px`;
      cursor.style.top = `${TOP}px`;
      cursor.style.bottom = `${AXIS}px`;
    }
  }

  function tellMemory(time, y) {
    const i = pointAt(time), lines = [element("div", `at ${moment(time)}`, "quiet")];
    const held = i < 0 ? 0 : total[i];
    lines.push(element("div", `held ${bytes(held)}`, "title"));
    if (data.without) {
      lines.push(element("div", `${data.withoutLabel} ${bytes(i < 0 ? 0 : data.without[i])}`));
    }
    if (i >= 0) {
      const under = y === undefined ? -1 : tops.findIndex((upper, k) =>
        data.held[k][i] > 0 && bytesOfY(y) <= upper[i] && bytesOfY(y) >= (k ? tops[k - 1][i] : 0));
      const order = data.held.map((_, k) => k).filter((k) => data.held[k][i] > 0);
      order.sort((a, b) => (b === under) - (a === under) || data.held[b][i] - data.held[a][i]);
      for (const k of order.slice(0, 7)) {
        const text = `${data.layers[k].label}: ${bytes(data.held[k][i])}`;
        lines.push(swatched("div", data.layers[k].colour, text, k === under ? "title" : ""));
      }
      if (order.length > 7) lines.push(element("div", `and ${order.length - 7} more`, "quiet"));
    }
    return lines;
  }
  function spanNear(time, y) {
    const slack = 3 * (timeOf(1, timeline) - timeOf(0, timeline));
    const at = (y - TOP) / lineHeight, around = few ? 0 : Math.ceil(3 / lineHeight);
    let best = null, bestScore = Infinity;
    for (let row = Math.floor(at) - around; row <= Math.floor(at) + around; row += 1) {
      for (const span of spansOf[row] || []) {
        const away = Math.max(span[2] - time, time - span[3], 0);
        if (away > slack) continue;
        // The nearest; of those that contain the point the one on top, as it is drawn.
        const score = away / slack + Math.abs(row + 0.5 - at) + (span[1] === "replay" ? 0 : 0.01);
        if (score < bestScore) { best = span; bestScore = score; }
      }
    }
    return best;
  }
  function tellSpan([index, kind, from, to, thread]) {
    const row = rowsOf.get(index);
    const lines = [
      swatched("div", data.layers[data.layerOf[index]].colour, labelOf(index), "title"),
      swatched("div", `var(--${kind})`, `${kind}: ${duration(to - from)}`),
      element("div", `from ${moment(from)} to ${moment(to)}, thread ${thread}`, "quiet"),
    ];
    if (row) {
      if (data.names[row[1]] !== data.short[row[1]]) lines.splice(1, 0, element("div", data.names[row[1]], "quiet"));
      lines.push(element("div", `not saved ${bytes(row[5])}, peak held ${bytes(row[6])}`));
      if (data.generators[row[7]]) lines.push(element("div", `drew from ${data.generators[row[7]]}`));
    }
    return lines;
  }

  // The mouse and the keyboard.

  function place(event, canvas) {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }
  let dragged = null;
  const clamp = (x, canvas) => Math.min(Math.max(x, LEFT), canvas.parentElement.clientWidth - RIGHT);
  for (const canvas of [memory, timeline]) {
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = place(event, canvas), time = timeOf(x, canvas);
      if (dragged !== null) {
        const to = clamp(x, canvas);
        showCursor(Math.min(dragged, to), Math.abs(to - dragged));
        return;
      }
      const outside = x < LEFT || time > view[1] || y < TOP || y > heights[canvas.id] - AXIS;
      if (outside) { hideAll(); return; }
      showCursor(x);
      if (canvas === memory) {
        showTip(tellMemory(time, y), event.clientX, event.clientY);
        return;
      }
      const span = spanNear(time, y);
      if (span) showTip(tellSpan(span), event.clientX, event.clientY); else tip.hidden = true;
    });
    canvas.addEventListener("pointerleave", () => { if (dragged === null) hideAll(); });
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.pointerType === "touch") return;
      dragged = clamp(place(event, canvas)[0], canvas);
      tip.hidden = true;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointerup", (event) => {
      if (dragged === null) return;
      const to = clamp(place(event, canvas)[0], canvas), from = dragged;
      dragged = null;
      hideAll();
      if (Math.abs(to - from) > 4) {
        view = [timeOf(Math.min(from, to), canvas), timeOf(Math.max(from, to), canvas)];
        draw();
      }
    });
    canvas.addEventListener("pointercancel", () => { dragged = null; hideAll(); });
    canvas.addEventListener("dblclick", showEverything);
  }
  function showEverything() {
    view = [0, data.length || 1];
    draw();
  }
  byId("reset").addEventListener("click", showEverything);
  byId("closer").hidden = !(data.without && 2 * data.peak[1] < data.top && data.peak[1]);
  byId("closer").addEventListener("click", () => {
    closer = !closer;
    byId("closer").setAttribute("aria-pressed", String(closer));
    drawMemory();
  });
  let stepped = -1;
  memory.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { hideAll(); showEverything(); return; }
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by || !data.times.length) return;
    event.preventDefault();
    const low = Math.max(0, pointAt(view[0])), high = pointAt(view[1]);
    stepped = Math.min(Math.max(stepped + by, low), high);
    const time = Math.max(data.times[stepped], view[0]), box = memory.getBoundingClientRect();
    const x = xOf(time, { right: box.width - RIGHT });
    showCursor(x);
    showTip(tellMemory(time), box.left + x, box.top + 40);
  });
  memory.addEventListener("blur", hideAll);

  // Legends.

  function legend() {
    const list = byId("layers");
    if (data.without) {
      list.append(element("li", `- - ${data.withoutLabel}`));
    }
    for (const [label, colour] of data.legend) list.append(swatched("li", colour, label));
    for (const kind of KINDS) byId("kinds").append(swatched("li", `var(--${kind})`, kind));
  }

  legend();
  draw();
  window.addEventListener("resize", () => { hideAll(); draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  matchMedia("print").addEventListener("change", draw);
})();
